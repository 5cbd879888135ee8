"""Convert a Hugging Face checkpoint: one pass over the data, in memory for one fused group at a time."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import ops
from ..errors import CheckpointError
from ..formats import MXFP8, NVFP4, Format
from ..tensor import QuantizedTensor
from .calibrated import Calibrated
from .config import Group, Quantization, hf_quant_config, quantization_config
from .exclusion import target_list
from .manifest import write_manifest
from .options import Options
from .plan import Plan, Planned, make_plan
from .schema import Entry, kv_scale_entries, weight_entries, weight_tensors
from .shards import (
    INDEX,
    SINGLE,
    Checkpoint,
    ShardWriter,
    TensorInfo,
    copy_companions,
    whole_or_nothing,
    write_json,
)
from .weights import CONSTANT_INPUT_SCALE, WeightGroup, quantize_groups

DEFAULT_SHARD_BYTES = 5_000_000_000
Progress = Callable[[int], None]  # called with the bytes of the source just finished


@dataclass(frozen=True)
class WeightReport:
    """How one weight fared; `bytes` counts its elements and scales, `format` and `tensor_scale` are those written."""

    name: str
    format: Format
    tensor_scale: float | None
    kind: str
    leaf: str
    elements: int
    bytes: int
    squared_error: float
    squared_norm: float

    @property
    def relative_error(self) -> float:
        """‖decoded − original‖ / ‖original‖; 0 for an all-zero weight."""
        return _ratio(self.squared_error, self.squared_norm)


@dataclass(frozen=True)
class Report:
    """What a conversion did; `impl` is the implementation that quantized: "cpu", "triton" or "reference"."""

    output: Path
    options: Options
    impl: str
    weights: tuple[WeightReport, ...]
    source_bytes: int
    output_bytes: int
    fused_groups: int
    unequal_fused_scales: int
    to_search: int
    kept: int
    shards: int
    seconds: float

    @property
    def bits_per_weight(self) -> float:
        """Bits per quantized weight, scales included."""
        return 8 * sum(w.bytes for w in self.weights) / sum(w.elements for w in self.weights)

    @property
    def searched(self) -> int:
        """Weights whose scales the search chose; `to_search` were planned."""
        return sum(_is_search(weight.format) for weight in self.weights)

    def relative_error(self, weights: Iterable[WeightReport] | None = None) -> float:
        """Of several weights taken as one long vector; of all by default."""
        chosen = self.weights if weights is None else tuple(weights)
        return _ratio(sum(w.squared_error for w in chosen), sum(w.squared_norm for w in chosen))

    def by_kind(self) -> dict[str, list[WeightReport]]:
        """Weights by kind and leaf, such as "experts down_proj"."""
        found: defaultdict[str, list[WeightReport]] = defaultdict(list)
        for weight in self.weights:
            found[f"{weight.kind} {weight.leaf}"].append(weight)
        return dict(found)


def convert(
    source: Path,
    output: Path,
    options: Options,
    *,
    calibrated: Calibrated | None = None,
    device: torch.device | str = "cpu",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress = lambda done: None,
) -> Report:
    """Convert a model directory into a new one, which appears whole or not at all.

    The bytes of the output depend on the weights and the options alone, not on how the source is sharded; and on what
    `calibrated` gives, which is written as it is.

    Raises:
        CheckpointError: anything wrong with the source, the options for it, or the output place; nothing is left
            behind then.
    """
    start = time.monotonic()
    checkpoint = Checkpoint(source)
    plan = make_plan(checkpoint, options)
    if calibrated is None and (reason := options.needs_data):
        raise CheckpointError(f"{reason} needs calibration data: use `halfbyte calibrate`")
    with whole_or_nothing(output) as target:
        shards = shard(output_entries(plan, options), max_shard_bytes)
        digests: dict[str, str] = {}
        weights: list[WeightReport] = []
        unequal = 0
        with ExitStack() as stack:
            writers: dict[str, ShardWriter] = {}
            for file, entries in shards.items():
                writers |= dict.fromkeys(entries, stack.enter_context(ShardWriter(target / file, entries)))
            for group in plan.groups:
                scales = set()
                for item, tensors, report in convert_group(checkpoint, group, options, device, calibrated):
                    for name, tensor in tensors.items():
                        digests[name] = writers[name].write(name, tensor)
                    if report:
                        weights.append(report)
                        scales.add(report.tensor_scale)
                    progress(item.nbytes)
                unequal += len(scales) > 1
            for name, tensor in kv_scales(plan, options, calibrated).items():
                digests[name] = writers[name].write(name, tensor)
        sizes = {name: TensorInfo("", *entry).nbytes for entries in shards.values() for name, entry in entries.items()}
        if len(shards) > 1:
            weight_map = {name: file for file, entries in shards.items() for name in entries}
            write_index(target, weight_map, sum(sizes.values()))
        copy_companions(source, target)
        write_configs(target, checkpoint, plan, options)
        write_manifest(target, options, digests, None if calibrated is None else calibrated.to_json())
    return Report(
        output=output,
        options=options,
        impl=ops.pick("auto", torch.device(device)),
        weights=tuple(weights),
        source_bytes=checkpoint.nbytes,
        output_bytes=sum(sizes.values()),
        fused_groups=sum(len(group) > 1 for group in plan.groups),
        unequal_fused_scales=unequal,
        to_search=sum(_is_search(item.format) for item in plan),
        kept=sum(item.format is None for item in plan),
        shards=len(shards),
        seconds=time.monotonic() - start,
    )


def output_entries(plan: Plan, options: Options) -> list[dict[str, Entry]]:
    """Name → (dtype, shape) of all that will be written, one dict per group: a group never straddles shards."""
    groups: list[dict[str, Entry]] = []
    for group in plan.groups:
        entries: dict[str, Entry] = {}
        for item in group:
            if item.format is not None:
                activations = options.activations != "none"
                entries |= weight_entries(options.layout, item.format, item.name.module, item.shape, activations)
            else:
                entries[item.name.full] = (item.dtype, item.shape)
        groups.append(entries)
    groups.append(_kv_entries(plan, options))
    return [entries for entries in groups if entries]


def shard(groups: Iterable[Mapping[str, Entry]], max_bytes: int) -> dict[str, dict[str, Entry]]:
    """Fill files in order, each up to max_bytes unless a single group is larger."""
    shards: list[dict[str, Entry]] = [{}]
    filled = 0
    for entries in groups:
        size = sum(TensorInfo("", *entry).nbytes for entry in entries.values())
        if shards[-1] and filled + size > max_bytes:
            shards.append({})
            filled = 0
        shards[-1] |= entries
        filled += size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": entries for i, entries in enumerate(shards, 1)}


def convert_group(
    checkpoint: Checkpoint,
    group: tuple[Planned, ...],
    options: Options,
    device: torch.device | str,
    calibrated: Calibrated | None = None,
) -> Iterator[tuple[Planned, dict[str, Tensor], WeightReport | None]]:
    """The output tensors of each member of a group, quantized under one tensor scale."""
    fmt = group[0].format
    if fmt is None:
        (item,) = group
        yield item, {item.name.full: checkpoint.read(item.source, item.index)}, None
        return
    weights = [checkpoint.read(item.source, item.index).to(device) for item in group]
    given = [calibrated.weight(item.name.full) if calibrated else None for item in group]
    quantized = given
    if any(q is None for q in given):
        (rounded,) = quantize_groups([weight_group(checkpoint, group, weights, fmt)])
        quantized = [r if q is None else q for q, r in zip(given, rounded, strict=True)]
    for item, weight, q in zip(group, weights, quantized, strict=True):
        assert q is not None
        if tuple(q.shape) != item.shape:
            raise CheckpointError(
                f"{item.name.full}: calibrated as {list(q.shape)}, but its shape is {list(item.shape)}"
            )
        tensors = weight_tensors(options.layout, item.name.module, q, _input_scale(item, options, calibrated))
        yield item, tensors, _report(item, weight, q)


def weight_group(checkpoint: Checkpoint, group: tuple[Planned, ...], weights: list[Tensor], fmt: Format) -> WeightGroup:
    """A planned group with its weights, for `quantize_groups`."""
    where = [f"{checkpoint.directory / checkpoint.tensors[item.source].file}: " for item in group]
    return WeightGroup(fmt, weights, [item.name.full for item in group], where)


def _input_scale(item: Planned, options: Options, calibrated: Calibrated | None) -> float | None:
    if options.activations != "calibrated" or not isinstance(item.format, NVFP4):
        return CONSTANT_INPUT_SCALE if options.activations == "constant" else None
    scale = calibrated.input_scale(item.name.module) if calibrated else None
    if scale is None:
        raise CheckpointError(
            f"{item.name.module}: its input was not calibrated, since it is not in a decoder layer; leave it in high "
            "precision: drop it from policy.include"
        )
    return float(scale)


def kv_scales(plan: Plan, options: Options, calibrated: Calibrated | None = None) -> dict[str, Tensor]:
    """All ones, a plain cast of the KV cache to FP8, but for what was calibrated."""
    scales = {name: torch.ones(shape) for name, (_, shape) in _kv_entries(plan, options).items()}
    if calibrated is None or options.kv_cache != "fp8_calibrated":
        return scales
    for name in scales:
        attention = name.rpartition(".")[0].removesuffix(".k_proj").removesuffix(".v_proj")
        found = calibrated.kv_scales(attention)
        if found is None:
            raise CheckpointError(f"{attention}: its keys and values were not calibrated; use kv_cache=fp8")
        scales[name] = found["kv".index(name.rpartition(".")[2][0])].reshape(scales[name].shape)
    return scales


def _kv_entries(plan: Plan, options: Options) -> dict[str, Entry]:
    if options.kv_cache == "none":
        return {}
    attentions: defaultdict[str, set[str]] = defaultdict(set)
    for item in plan:
        if item.linear and item.name.kind == "attention" and item.name.tower != "other":
            attentions[item.name.parent].add(item.name.leaf)
    keys = {"k_proj", "kv_b_proj", "qkv_proj"}  # what makes an attention that fills a KV cache
    entries: dict[str, Entry] = {}
    for attention, leaves in attentions.items():
        if keys & leaves:
            entries |= kv_scale_entries(options.layout, attention, frozenset(leaves))
    return entries


def write_index(target: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    """Write model.safetensors.index.json."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(target / INDEX, index)


def write_configs(target: Path, checkpoint: Checkpoint, plan: Plan, options: Options) -> None:
    """Write config.json with its quantization_config and, for the layout that has one, hf_quant_config.json."""
    quantization = Quantization(
        layout=options.layout,
        groups=_config_groups(plan, options),
        activations=options.activations != "none",
        kv_cache=options.kv_cache != "none",
        ignore=plan.ignore,
    )
    config = {**checkpoint.config, "quantization_config": quantization_config(quantization)}
    write_json(target / "config.json", config)
    beside = hf_quant_config(quantization)
    if beside is not None:
        write_json(target / "hf_quant_config.json", beside)


def _config_groups(plan: Plan, options: Options) -> tuple[Group, ...]:
    """One group for all Linears, or where precision is mixed one for each format."""
    formats: tuple[Format, ...] = (MXFP8(), NVFP4())
    modules = [(fmt, [i.name for i in plan.quantized if type(i.format) is type(fmt)]) for fmt in formats]
    used = [(fmt, names) for fmt, names in modules if names]
    if len(used) == 1:
        return (Group(used[0][0]),)
    return tuple(Group(fmt, target_list(options.layout, names)) for fmt, names in used)


def _is_search(fmt: Format | None) -> bool:
    return isinstance(fmt, NVFP4) and fmt.scale_rule == "search"


def _report(item: Planned, weight: Tensor, q: QuantizedTensor) -> WeightReport:
    original = weight.float()
    difference = q.dequantize(torch.float32).sub_(original)
    return WeightReport(
        name=item.name.full,
        format=q.format,
        tensor_scale=None if q.tensor_scale is None else float(q.tensor_scale),
        kind=item.name.kind,
        leaf=item.name.leaf,
        elements=weight.numel(),
        bytes=q.nbytes,
        squared_error=_squared_norm(difference),
        squared_norm=_squared_norm(original),
    )


def _squared_norm(matrix: Tensor) -> float:
    """Sum of squares, of float32 values from the least to the largest."""
    norms = torch.linalg.vector_norm(matrix, dim=-1).double()
    if not 1e-12 < float(norms.amax()) < 1e18:  # the squares may have left float32's range
        norms = torch.linalg.vector_norm(matrix, dim=-1, dtype=torch.float64)
    return float(norms.square().sum())


def _ratio(squared_error: float, squared_norm: float) -> float:
    return float((squared_error / squared_norm) ** 0.5) if squared_norm else 0.0
