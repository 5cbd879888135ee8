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
from ..formats import NVFP4, Format
from ..functional import quantize
from ..tensor import QuantizedTensor
from .config import Quantization, hf_quant_config, quantization_config
from .manifest import write_manifest
from .plan import Options, Plan, Planned, make_plan
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

CONSTANT_INPUT_SCALE = 1.0  # amax 2688 = 6 · 448
DEFAULT_SHARD_BYTES = 5_000_000_000
Progress = Callable[[int], None]  # called with the bytes of the source just finished


@dataclass(frozen=True)
class WeightReport:
    """How one weight fared; `bytes` counts its elements and scales."""

    name: str
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
    kept: int
    shards: int
    seconds: float

    @property
    def bits_per_weight(self) -> float:
        """Bits per quantized weight, scales included."""
        return 8 * sum(w.bytes for w in self.weights) / sum(w.elements for w in self.weights)

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
    device: torch.device | str = "cpu",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress = lambda done: None,
) -> Report:
    """Convert a model directory into a new one, which appears whole or not at all.

    The bytes of the output depend on the weights and the options alone, not on how the source is sharded.

    Raises:
        CheckpointError: anything wrong with the source, the options for it, or the output place; nothing is left
            behind then.
    """
    start = time.monotonic()
    checkpoint = Checkpoint(source)
    plan = make_plan(checkpoint, options)
    with whole_or_nothing(output) as target:
        shards = shard(output_entries(plan, options), max_shard_bytes)
        digests: dict[str, str] = {}
        weights: list[WeightReport] = []
        with ExitStack() as stack:
            writers: dict[str, ShardWriter] = {}
            for file, entries in shards.items():
                writers |= dict.fromkeys(entries, stack.enter_context(ShardWriter(target / file, entries)))
            for group in plan.groups:
                for item, tensors, report in convert_group(checkpoint, group, options, device):
                    for name, tensor in tensors.items():
                        digests[name] = writers[name].write(name, tensor)
                    weights += [report] if report else []
                    progress(item.nbytes)
            for name, tensor in kv_scales(plan, options).items():
                digests[name] = writers[name].write(name, tensor)
        sizes = {name: TensorInfo("", *entry).nbytes for entries in shards.values() for name, entry in entries.items()}
        if len(shards) > 1:
            weight_map = {name: file for file, entries in shards.items() for name in entries}
            write_index(target, weight_map, sum(sizes.values()))
        copy_companions(source, target)
        write_configs(target, checkpoint, plan, options)
        write_manifest(target, options, digests)
    return Report(
        output=output,
        options=options,
        impl=ops.pick("auto", torch.device(device)),
        weights=tuple(weights),
        source_bytes=checkpoint.nbytes,
        output_bytes=sum(sizes.values()),
        fused_groups=sum(len(group) > 1 for group in plan.groups),
        kept=sum(not item.decision.quantize for item in plan),
        shards=len(shards),
        seconds=time.monotonic() - start,
    )


def output_entries(plan: Plan, options: Options) -> list[dict[str, Entry]]:
    """Name → (dtype, shape) of all that will be written, one dict per group: a group never straddles shards."""
    groups: list[dict[str, Entry]] = []
    for group in plan.groups:
        entries: dict[str, Entry] = {}
        for item in group:
            if item.decision.quantize:
                activations = options.activations != "none"
                entries |= weight_entries(options.layout, options.format, item.name.module, item.shape, activations)
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
    checkpoint: Checkpoint, group: tuple[Planned, ...], options: Options, device: torch.device | str
) -> Iterator[tuple[Planned, dict[str, Tensor], WeightReport | None]]:
    """The output tensors of each member of a group, quantized under one tensor scale."""
    if not group[0].decision.quantize:
        (item,) = group
        yield item, {item.name.full: checkpoint.read(item.source, item.index)}, None
        return
    weights = [checkpoint.read(item.source, item.index).to(device) for item in group]
    amax = group_amax(checkpoint, group, weights)
    input_scale = CONSTANT_INPUT_SCALE if options.activations == "constant" else None
    for item, weight in zip(group, weights, strict=True):
        q = quantize_weight(weight, options.format, amax)
        tensors = weight_tensors(options.layout, item.name.module, q, input_scale)
        yield item, tensors, _report(item, weight, q)


def group_amax(checkpoint: Checkpoint, group: tuple[Planned, ...], weights: list[Tensor]) -> Tensor:
    """max |w| over all members; refuses NaN and inf."""
    amaxes = [weight.abs().amax().float() for weight in weights]
    for item, amax in zip(group, amaxes, strict=True):
        if not bool(amax.isfinite()):
            path = checkpoint.directory / checkpoint.tensors[item.source].file
            raise CheckpointError(
                f"{path}: tensor {item.name.full}: contains NaN or inf; repair the model, or exclude it with "
                f"--ignore {item.name.module}"
            )
    return torch.stack(amaxes).amax()


def quantize_weight(weight: Tensor, fmt: Format, amax: Tensor) -> QuantizedTensor:
    """Quantize one weight under its group's amax (which MXFP8 has no use for)."""
    return quantize(weight, fmt, amax=amax) if isinstance(fmt, NVFP4) else quantize(weight, fmt)


def kv_scales(plan: Plan, options: Options) -> dict[str, Tensor]:
    """All ones: a plain cast of the KV cache to FP8."""
    return {name: torch.ones(shape) for name, (_, shape) in _kv_entries(plan, options).items()}


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
        format=options.format,
        activations=options.activations != "none",
        kv_cache=options.kv_cache != "none",
        ignore=plan.ignore,
    )
    config = {**checkpoint.config, "quantization_config": quantization_config(quantization)}
    write_json(target / "config.json", config)
    beside = hf_quant_config(quantization)
    if beside is not None:
        write_json(target / "hf_quant_config.json", beside)


def _report(item: Planned, weight: Tensor, q: QuantizedTensor) -> WeightReport:
    original = weight.float()
    difference = q.dequantize(torch.float32).sub_(original)
    return WeightReport(
        name=item.name.full,
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
