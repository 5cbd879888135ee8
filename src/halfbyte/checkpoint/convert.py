"""Convert a Hugging Face checkpoint: one pass over the data, in memory for one fused group at a time."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from .. import ops
from ..errors import CheckpointError
from ..formats import MXFP8, NVFP4, Format
from ..tensor import QuantizedTensor
from .calibrated import Calibrated
from .config import Group, Quantization, hf_quant_config, quantization_config
from .exclusion import linear_targets, target_list
from .files import TEMPORARY
from .journal import MODEL, Journal, differences, said, working_directory
from .manifest import choices, write_manifest
from .options import Options
from .plan import Plan, Planned, make_plan, text_config
from .ranks import Ranks
from .recorded import finished_shards, source_files
from .result import Encoded, is_search, report_weight
from .result import Report as Report
from .result import WeightReport as WeightReport
from .schema import Entry, kv_scale_entries, weight_entries, weight_tensors
from .shards import (
    DTYPES,
    INDEX,
    SINGLE,
    Checkpoint,
    Fetched,
    TensorInfo,
    copy_companions,
    publish,
    write_json,
)
from .sources import DecodedCheckpoint, open_source
from .stages import Converted, Record, Stages, Unit
from .stages import Progress as Progress
from .staging import Staging
from .weights import CONSTANT_INPUT_SCALE, WeightGroup, quantize_groups

DEFAULT_SHARD_BYTES = 5_000_000_000
MEMORY = 1_000_000_000
"""Bytes of the source that are held at once, unless a single group is larger."""


def convert(
    source: Path,
    output: Path,
    options: Options,
    *,
    calibrated: Calibrated | None = None,
    device: torch.device | str = "cpu",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    resume: bool = False,
    requantize: bool = False,
    work: Path | None = None,
    ranks: Ranks | None = None,
    progress: Progress = lambda done: None,
) -> Report:
    """Convert a model directory into a new one, which appears whole or not at all.

    The bytes of the output depend on the weights and the options alone, not on how the source is sharded nor on how
    many ranks convert; and on what `calibrated` gives, which is written as it is.

    Until it is whole, the output is in `work` (OUTPUT.partial by default). What is finished stays there when a
    conversion is interrupted; with resume=True the next one goes on from there, and ends with the same bytes.

    A source that is quantized already, to FP8, MXFP8 or MXFP4, is taken as what it decodes to (docs/sources.md); with
    requantize=True also one that is NVFP4.

    ranks: `Ranks.current()` where several processes of torch.distributed convert together; then all of them call this
    with the same arguments, but for `device` and `progress`, and share a file system. Each returns the report.

    Raises:
        CheckpointError: anything wrong with the source, the options for it, or the output place; nothing is left
            behind then. Or the disk failed, which says where to go on from; or there is something else to resume. Or
            another rank failed: then it is that rank's error.
    """
    start = time.monotonic()
    ranks = ranks or Ranks()
    work = work or working_directory(output)
    with ranks.leaving(), ranks.telling():
        checkpoint = open_source(source, requantize=requantize)
        plan = make_plan(checkpoint, options)
        if calibrated is None and (reason := options.needs_data):
            raise CheckpointError(f"{reason} needs calibration data: use `halfbyte calibrate`")
        calibration = None if calibrated is None else calibrated.to_json()
        shards = shard(output_entries(plan, options), max_shard_bytes)
        unchanged = source_files(checkpoint)
        settings = {**choices(options, calibration), "max_shard_bytes": max_shard_bytes, "source": unchanged}
        if differing := differences(ranks.agree(settings)[0], settings):
            raise CheckpointError(f"rank {ranks.rank} does not do what rank 0 does: {differing[0]} here")
        first = ranks.rank == 0
        with Journal(work, output, settings, resume=resume) if first else nullcontext() as journal, _told(ranks, work):
            begun = None if journal is None else (journal.records, journal.is_renamed, uuid.uuid4().hex[:8])
            records, is_renamed, job = ranks.agree(begun)[0]
            where = output if is_renamed else work / MODEL
            finished = finished_shards(where, shards, records, ranks)
            if is_renamed and len(finished) < len(shards):
                raise CheckpointError(f"{where}: already exists, and is not what was converted; remove it")
            temporary = TEMPORARY if ranks.world == 1 else f".{job}{TEMPORARY}"

            def finish(file: str, record: Record) -> None:
                records[file] = record
                if journal is not None:
                    publish(where / file, temporary)
                    journal.record(file, record)

            todo = {file: entries for file, entries in shards.items() if file not in finished}
            units = list(_units(checkpoint, plan, options, calibrated, device, shards))
            progress(sum(unit.size for unit in units if unit.file in finished))
            units = [unit for unit in units if unit.file in todo]
            Stages(units, todo, ranks, Staging(device), where, temporary, MEMORY, finish).run(progress)
            if differing := differences(unchanged, source_files(checkpoint)):
                raise CheckpointError(f"{source}: was changed while it was converted: {differing[0]}; begin again")
            ranks.agree()
            if journal is not None:
                if not is_renamed:
                    _write_rest(where, checkpoint, plan, options, shards, records, calibration)
                journal.finish()
            ranks.agree()
    by_name = {data["name"]: WeightReport.from_json(data) for file in shards for data in records[file]["weights"]}
    reports = tuple(by_name[item.name.full] for item in plan.quantized)
    scales = {report.name: report.tensor_scale for report in reports}
    return Report(
        output=output,
        options=options,
        impl=ops.pick("auto", torch.device(device)),
        weights=reports,
        source_bytes=checkpoint.stored_bytes,
        output_bytes=_nbytes(shards),
        fused_groups=sum(len(group) > 1 for group in plan.groups),
        unequal_fused_scales=sum(len({scales.get(item.name.full) for item in group}) > 1 for group in plan.groups),
        to_search=sum(is_search(item.format) for item in plan),
        kept=sum(item.format is None for item in plan),
        shards=len(shards),
        resumed_shards=len(finished),
        seconds=time.monotonic() - start,
        encoded=_encoded(checkpoint, plan, reports),
        model_type=str(text_config(checkpoint.config).get("model_type")),
    )


def _encoded(checkpoint: Checkpoint, plan: Plan, reports: Iterable[WeightReport]) -> Encoded | None:
    if not isinstance(checkpoint, DecodedCheckpoint):
        return None
    decoded = [item for item in plan if item.decoded]
    kept = tuple(item.name.module for item in decoded if item.format is None)
    names = {item.name.full for item in decoded}
    mxfp8 = [r.squared_error == 0 for r in reports if r.name in names and isinstance(r.format, MXFP8)]
    return Encoded(checkpoint.declared.what, len(decoded), kept, len(mxfp8), sum(mxfp8), checkpoint.left_out)


@contextlib.contextmanager
def _told(ranks: Ranks, work: Path) -> Iterator[None]:
    """Errors are told to the other ranks before this one tidies up; rank 0's journal says what can be done."""
    with said(work) if ranks.rank > 0 else nullcontext(), ranks.telling():
        yield


def _write_rest(
    where: Path,
    checkpoint: Checkpoint,
    plan: Plan,
    options: Options,
    shards: Mapping[str, Mapping[str, Entry]],
    records: Mapping[str, Record],
    calibration: dict[str, Any] | None,
) -> None:
    """What makes a model of the shards; the config is the last of it."""
    copy_companions(checkpoint.directory, where)
    digests = {name: digest for file in shards for name, digest in records[file]["tensors"].items()}
    write_manifest(where, options, digests, calibration)
    if len(shards) > 1:
        write_index(where, {name: file for file, entries in shards.items() for name in entries}, _nbytes(shards))
    write_configs(where, checkpoint, plan, options)


def _nbytes(shards: Mapping[str, Mapping[str, Entry]]) -> int:
    return sum(TensorInfo("", *entry).nbytes for entries in shards.values() for entry in entries.values())


def _units(
    checkpoint: Checkpoint,
    plan: Plan,
    options: Options,
    calibrated: Calibrated | None,
    device: torch.device | str,
    shards: Mapping[str, Mapping[str, Entry]],
) -> Iterator[Unit]:
    """Every group, in the plan's order, and then the scales of KV caches."""
    file_of = {name: file for file, entries in shards.items() for name in entries}

    def read(group: tuple[Planned, ...], pin: bool) -> list[Fetched]:
        return fetch_group(checkpoint, group, pin=pin)

    def convert(group: tuple[Planned, ...], fetched: list[Fetched]) -> Converted:
        tensors: dict[str, Tensor] = {}
        reports: list[Callable[[], WeightReport]] = []
        for _, part, report in convert_group(checkpoint, group, options, device, calibrated, fetched):
            tensors |= part
            reports += [report] if report else []
        return tensors, reports

    for group in plan.groups:
        entries = group_entries(group, options)
        size = sum(item.nbytes for item in group)
        written = sum(TensorInfo("", *entry).nbytes for entry in entries.values())
        on_device = group[0].format is not None or group[0].decoded
        file = file_of[next(iter(entries))]
        yield Unit(file, size, written, on_device, partial(read, group), partial(convert, group))
    if entries := _kv_entries(plan, options):
        file = file_of[next(iter(entries))]
        yield Unit(file, 0, 0, False, lambda pin: [], lambda none: (kv_scales(plan, options, calibrated), []))


def output_entries(plan: Plan, options: Options) -> list[dict[str, Entry]]:
    """Name → (dtype, shape) of all that will be written, one dict per group: a group never straddles shards."""
    groups = [group_entries(group, options) for group in plan.groups]
    groups.append(_kv_entries(plan, options))
    return [entries for entries in groups if entries]


def group_entries(group: tuple[Planned, ...], options: Options) -> dict[str, Entry]:
    """The same of one group."""
    entries: dict[str, Entry] = {}
    for item in group:
        if item.format is not None:
            activations = options.activations != "none"
            entries |= weight_entries(options.layout, item.format, item.name.module, item.shape, activations)
        else:
            entries[item.name.full] = (item.kept_dtype, item.shape)
    return entries


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
    fetched: list[Fetched] | None = None,
) -> Iterator[tuple[Planned, dict[str, Tensor], Callable[[], WeightReport] | None]]:
    """The output tensors of each member of a group, quantized under one tensor scale; and what tells how it fared.

    fetched: what `fetch_group` gives for it, where that was done before.
    """
    fmt = group[0].format
    found = fetch_group(checkpoint, group) if fetched is None else fetched
    if fmt is None:
        yield group[0], {group[0].name.full: kept_tensor(group[0], found[0], device)}, None
        return
    weights = [weight(device) for weight in found]
    given = [calibrated.weight(item.name.full) if calibrated else None for item in group]
    given = [None if q is None else cast(QuantizedTensor, q.to(device)) for q in given]
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
        yield item, tensors, partial(report_weight, item, weight, q)


def kept_tensor(item: Planned, fetched: Fetched, device: torch.device | str = "cpu") -> Tensor:
    """What is written of a tensor that is not quantized."""
    kept = fetched(device if item.decoded else "cpu").to(DTYPES[item.kept_dtype])
    if item.decoded and not bool(kept.isfinite().all()):
        raise CheckpointError(f"{item.source}: decodes to NaN or infinity; download the model again")
    return kept.cpu()


def weight_group(checkpoint: Checkpoint, group: tuple[Planned, ...], weights: list[Tensor], fmt: Format) -> WeightGroup:
    """A planned group with its weights, for `quantize_groups`."""
    where = [f"{checkpoint.directory / checkpoint.tensors[item.source].file}: " for item in group]
    return WeightGroup(fmt, weights, [item.name.full for item in group], where)


def fetch_group(checkpoint: Checkpoint, group: tuple[Planned, ...], *, pin: bool = False) -> list[Fetched]:
    """The source's tensors of a group, read but not decoded."""
    return checkpoint.fetch_group([(item.source, item.index) for item in group], pin=pin)


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
    beside = hf_quant_config(quantization)
    if beside is not None:
        write_json(target / "hf_quant_config.json", beside)
    config = {**checkpoint.config, "quantization_config": quantization_config(quantization)}
    write_json(target / "config.json", config)  # last: without it, no engine takes this for a model


def _config_groups(plan: Plan, options: Options) -> tuple[Group, ...]:
    """One group for all Linears, or where precision is mixed one for each format."""
    formats: tuple[Format, ...] = (MXFP8(), NVFP4())
    modules = [(fmt, [i.name for i in plan.quantized if type(i.format) is type(fmt)]) for fmt in formats]
    used = [(fmt, names) for fmt, names in modules if names]
    if len(used) == 1:
        return (Group(used[0][0], linear_targets(options.layout, used[0][1])),)
    return tuple(Group(fmt, target_list(options.layout, names)) for fmt, names in used)
