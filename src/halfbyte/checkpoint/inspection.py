"""A quantized checkpoint in numbers: sizes, errors, scale bytes, and what stands out. For any tool's checkpoints."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

from .. import names
from ..errors import CheckpointError
from . import load_checks as check
from . import load_values as values
from .load_case import Case, Declared, declared_for
from .loaders import Verdict, judge
from .manifest import FILE as MANIFEST
from .measure import Measured, measure, relative_error, snr
from .schema import SCALE_PARAMETERS
from .shards import read_json
from .sources import open_source
from .survey import Survey, survey

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
STANDS_OUT = 1.5
"""A layer's error is reported beyond this many times the median of the same place in all layers."""


@dataclass(frozen=True)
class Remark:
    """Something worth knowing."""

    severity: Severity
    where: str
    what: str

    def to_json(self) -> dict[str, str]:
        """Plain values."""
        return {"severity": self.severity, "where": self.where, "what": self.what}


@dataclass(frozen=True)
class Row:
    """Several weights taken together; errors are those of one long vector.

    Attributes:
        place: (tower, layer, kind, leaf, format); layer is None where all layers are taken together.
    """

    place: tuple[str, int | None, str, str, str]
    weights: int
    elements: int
    nbytes: int
    blocks: int
    saturated: int
    flushed: int
    clipped: int | None
    dead: int
    squared_error: float | None
    squared_norm: float | None

    @property
    def label(self) -> str:
        """What it is, in words."""
        tower, layer, kind, leaf, _ = self.place
        parts = [tower if tower != "decoder" else "", "" if layer is None else f"layer {layer}", kind, leaf]
        return " ".join(part for part in parts if part)

    @property
    def bits(self) -> float:
        """Bits an element, scales included."""
        return 8 * self.nbytes / max(self.elements, 1)

    @property
    def relative_error(self) -> float | None:
        """‖decoded − original‖ / ‖original‖."""
        return relative_error(self.squared_error, self.squared_norm)

    @property
    def snr(self) -> float | None:
        """Signal to noise, in dB."""
        return snr(self.squared_error, self.squared_norm)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        tower, layer, kind, leaf, fmt = self.place
        counts = {key: getattr(self, key) for key in ("weights", "elements", "blocks", "saturated", "flushed", "dead")}
        place = {"tower": tower, "layer": layer, "kind": kind, "leaf": leaf, "format": fmt}
        error = {"relative_error": self.relative_error, "snr_db": self.snr, "clipped": self.clipped}
        return {**place, **counts, "bytes": self.nbytes, "bits": self.bits, **error}


@dataclass(frozen=True)
class Inspection:
    """All that is known of a checkpoint.

    Attributes:
        scales, codes: format and kind → counts, summed over its weights: of the 256 scale bytes, of the 8 magnitudes.
        kept: kind → (tensors, bytes) of what is not quantized; input and cache scales are a kind of their own.
    """

    path: Path
    source: Path | None
    schemes: dict[str, str]  # file → what it declares
    producer: str
    layers: tuple[Row, ...]
    kinds: tuple[Row, ...]
    total: Row
    weights: tuple[Measured, ...]
    scales: dict[str, Tensor]
    codes: dict[str, Tensor]
    kept: dict[str, tuple[int, int]]
    nbytes: int
    remarks: tuple[Remark, ...]
    verdicts: tuple[Verdict, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "path": str(self.path),
            "against": None if self.source is None else str(self.source),
            "producer": self.producer,
            "declared": self.schemes,
            "bytes": self.nbytes,
            "quantized": self.total.to_json(),
            "kept": {kind: {"tensors": count, "bytes": size} for kind, (count, size) in self.kept.items()},
            "kinds": [row.to_json() for row in self.kinds],
            "layers": [row.to_json() for row in self.layers],
            "weights": [weight.to_json() for weight in self.weights],
            "scale_bytes": {name: counts.tolist() for name, counts in self.scales.items()},
            "codes": {name: counts.tolist() for name, counts in self.codes.items()},
            "findings": [remark.to_json() for remark in self.remarks],
            "engines": [verdict.to_json() for verdict in self.verdicts],
        }


def inspect(
    path: Path,
    source: Path | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] = lambda done: None,
) -> Inspection:
    """Read all of a quantized checkpoint, and of its source where one is given; memory does not grow with either.

    Raises:
        CheckpointError: one of them cannot be read, or nothing in the checkpoint is quantized as NVFP4 or MXFP8.
    """
    found = survey(path)
    if not found.weights:
        seen = next((f"; {tensor} is {what}" for tensor, what in found.unknown.items()), "")
        raise CheckpointError(f"{path}: no weight is quantized as NVFP4 or MXFP8{seen}")
    original = None if source is None else open_source(source, requantize=True)
    measured = tuple(measure(found, original, device, progress))
    histograms = {result.weight.name.full: result.scales for result in measured}
    layers = tuple(_rows(measured, by_layer=True))
    declared = [d for d in (declared_for(found, "vllm"), declared_for(found, "tensorrt-llm")) if d is not None]
    case = Case(found, "vllm", declared[0] if declared else Declared("config.json", "", "", (), {}), 1, histograms)
    return Inspection(
        path=path,
        source=source,
        schemes={d.file: d.scheme for d in declared},
        producer=_producer(found),
        layers=layers,
        kinds=tuple(_rows(measured, by_layer=False)),
        total=_row(("", None, "all", "", ""), measured),
        weights=measured,
        scales=_sums((m for m in measured if m.blocks), lambda result: result.scales),
        codes=_sums((m for m in measured if int(m.codes.sum())), lambda result: result.codes),
        kept=_kept(found),
        nbytes=found.checkpoint.nbytes,
        remarks=tuple(sorted(_remarks(case, measured), key=lambda remark: SEVERITIES.index(remark.severity))),
        verdicts=tuple(judge(found, histograms=histograms)),
    )


def _producer(found: Survey) -> str:
    manifest = found.checkpoint.directory / MANIFEST
    if manifest.exists():
        return f"halfbyte {read_json(manifest).get('halfbyte_version', '')}".strip()
    for raw in (found.declared, found.sidecar):
        producer = raw.get("producer") if raw else None
        if isinstance(producer, dict):
            return f"{producer.get('name', 'unknown')} {producer.get('version', '')}".strip()
    version = (found.declared or {}).get("version")
    return f"compressed-tensors {version}" if version else "not said"


def _place(result: Measured, by_layer: bool) -> tuple[str, int | None, str, str, str]:
    name = result.weight.name
    leaf = name.leaf if name.parameter == "weight" else name.parameter  # stacked experts have no module of their own
    return name.tower, name.layer if by_layer else None, name.kind, leaf, type(result.weight.format).__name__


def _rows(measured: Iterable[Measured], by_layer: bool) -> Iterator[Row]:
    groups: defaultdict[tuple[str, int | None, str, str, str], list[Measured]] = defaultdict(list)
    for result in measured:
        groups[_place(result, by_layer)].append(result)
    for place, members in groups.items():
        yield _row(place, members)


def _row(place: tuple[str, int | None, str, str, str], members: Iterable[Measured]) -> Row:
    members = list(members)

    def total(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) if known else None

    clipped = total(m.clipped for m in members)
    return Row(
        place=place,
        weights=len(members),
        elements=sum(m.weight.elements for m in members),
        nbytes=sum(m.weight.nbytes for m in members),
        blocks=sum(m.blocks for m in members),
        saturated=sum(m.saturated for m in members),
        flushed=sum(m.flushed for m in members),
        clipped=None if clipped is None else int(clipped),
        dead=sum(m.dead for m in members),
        squared_error=total(m.squared_error for m in members),
        squared_norm=total(m.squared_norm for m in members),
    )


def _sums(measured: Iterable[Measured], counts: Callable[[Measured], Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for result in measured:
        key = f"{type(result.weight.format).__name__} {result.weight.name.kind}"
        found[key] = found[key] + counts(result) if key in found else counts(result).clone()
    return found


def _kept(found: Survey) -> dict[str, tuple[int, int]]:
    used = {
        weight.tensor(part)
        for weight in found.weights
        for part in (weight.spelling.elements, weight.spelling.block_scale, weight.spelling.tensor_scale)
    }
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for tensor, info in found.checkpoint.tensors.items():
        if tensor not in used:
            name = names.parse(tensor)
            kind = "scale" if name.parameter in SCALE_PARAMETERS else name.kind
            counts[kind] += 1
            sizes[kind] += info.nbytes
    return {kind: (counts[kind], size) for kind, size in sizes.most_common()}


_SHARED: tuple[tuple[Severity, Callable[[Case], check.Places]], ...] = (
    ("error", check.unknown_tensors),
    ("note", check.other_formats),
    ("error", check.no_tensor_scale),
    ("error", check.no_scalars),
    ("warning", check.rounded_scalars),
    ("error", values.bad_scales),
    ("error", values.experts_incomplete),
    ("error", values.experts_partly_quantized),
    ("warning", values.tensor_scales_differ),
    ("warning", values.mostly_flushed_by_marlin),
    ("note", values.flushed_by_marlin),
)


def _remarks(case: Case, measured: tuple[Measured, ...]) -> Iterator[Remark]:
    for severity, places in _SHARED:
        for where, what in places(case):
            yield Remark(severity, where, what)
    for result in measured:
        if result.problem is not None:
            yield Remark("error", result.weight.name.full, result.problem)
    yield from _dead(measured)
    alive = tuple(_rows((result for result in measured if not result.dead), by_layer=True))  # the dead were named
    yield from _lost_blocks(alive)
    yield from _outliers(alive)


def _dead(measured: tuple[Measured, ...]) -> Iterator[Remark]:
    """Weights that decode to zero everywhere; of an expert, all of them together."""
    parts: defaultdict[str, list[Measured]] = defaultdict(list)
    for result in measured:
        name = result.weight.name
        parts[name.full if name.expert is None else f"{name.experts_module}.{name.expert}"].append(result)
    for where, members in parts.items():
        dead = [member.weight.name.leaf for member in members if member.dead]
        lost = any(member.dead and member.flushed for member in members)
        but = ", though their codes or their original are not" if lost else ""
        if dead and len(dead) == len(members) and members[0].weight.name.expert is not None:
            yield Remark("warning", where, f"dead expert: all its weights are zero{but}")
        elif dead:
            yield Remark("warning", where, f"all zero{'' if len(members) == 1 else ' in ' + ', '.join(dead)}{but}")


def _lost_blocks(layers: tuple[Row, ...]) -> Iterator[Remark]:
    for row in layers:
        if row.flushed:
            what = f"{row.flushed} of {row.blocks} blocks decode to zero though they are not: their scale is too small"
            yield Remark("warning", row.label, what)
        if row.clipped:
            what = f"{row.clipped} of {row.blocks} blocks have elements beyond the largest that their scale can hold"
            yield Remark("warning" if row.clipped > 0.01 * row.blocks else "note", row.label, what)
        if row.saturated > 0.05 * row.blocks:
            yield Remark("note", row.label, f"{row.saturated} of {row.blocks} block scales are the largest there is")


def _outliers(layers: tuple[Row, ...]) -> Iterator[Remark]:
    """Layers with far more error than the same place in the others."""
    places: defaultdict[Any, list[Row]] = defaultdict(list)
    for row in layers:
        if row.relative_error is not None:
            places[(row.place[0], *row.place[2:])].append(row)
    for rows in places.values():
        middle = median(row.relative_error or 0.0 for row in rows)
        for row in rows:
            if len(rows) > 2 and (error := row.relative_error or 0.0) > STANDS_OUT * middle:
                yield Remark(
                    "warning", row.label, f"relative error {error:.2%}, the median of its kind is {middle:.2%}"
                )
