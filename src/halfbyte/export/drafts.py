"""Where everything of a prepared export goes: which weights are one matrix, in which bucket, at which byte."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint.schema import weight_names
from ..checkpoint.shards import tensor_dtype
from ..checkpoint.weights import CONSTANT_INPUT_SCALE, WeightGroup, adjacent
from ..formats import MXFP8, NVFP4, Format
from ..ops.copies import prepare_copies
from ..ops.prepared import PLACE_BLOCKS, Into, Prepared, places, prepare_many
from .collect import Collector, Ready
from .layout import Slot, aligned
from .pieces import Piece
from .shards import ordered_pieces, ordering

if TYPE_CHECKING:
    from .exporter import Exporter

Named = tuple[str, Tensor] | Piece


class Gather(NamedTuple):
    """A parameter that is put in order before its parts are views of it."""

    source: Tensor
    dim: int
    indices: Tensor
    target: Tensor

    def __call__(self) -> None:
        """Make it."""
        torch.index_select(self.source.detach(), self.dim, self.indices, out=self.target)

    def runs(self, part: Tensor) -> list[Tensor]:
        """The parameter's rows that are a part of the target's, in as few pieces as they lie in."""
        first = (part.storage_offset() - self.target.storage_offset()) // part.shape[1]
        indices = self.indices[first : first + len(part)]
        begins = [0, *((indices.diff() != 1).nonzero().flatten() + 1).tolist()]
        source, rows = self.source.detach(), indices.tolist()
        return [source[rows[i] : rows[i] + end - i] for i, end in zip(begins, [*begins[1:], len(rows)], strict=True)]


@dataclass(eq=False)
class Unit:
    """Weights under one maximum, as the matrices that they are quantized as.

    Attributes:
        matrices: one where they lie behind one another; a parameter's own rows, where those need not be gathered.
        where: of each piece: the matrix that it begins in, and the row there.
        gather: the one that needs not be made.
    """

    group: WeightGroup
    pieces: list[Piece]
    matrices: list[Tensor]
    where: list[tuple[int, int]]
    gather: Gather | None = None


@dataclass(eq=False)
class Job:
    """Units of one format, whose maxima are reduced or not, and where they go in a bucket."""

    format: Format
    units: list[Unit]
    elements: int = 0  # first bytes of each kind
    block_scale: int = 0
    tensor_scale: int = 0
    amax: int = 0  # its first place among all maxima
    prepared: Prepared | None = None
    encode_scale: Tensor | None = None

    @property
    def matrices(self) -> list[Tensor]:
        """Of all units."""
        return [matrix for unit in self.units for matrix in unit.matrices]


@dataclass(eq=False)
class Draft:
    """A bucket that is being planned."""

    groups: list[Ready]
    gathers: list[Gather]
    until: int  # how many parameters it and the buckets before it need
    jobs: list[Job] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    raw: list[tuple[int, Tensor]] = field(default_factory=list)  # first byte, and what is copied there
    end: int = 0
    copy: Callable[[], None] | None = None
    block_scales: list[Tensor] = field(default_factory=list)  # MXFP8's

    def take(self, nbytes: int) -> int:
        """Room for so many bytes."""
        start = self.end
        self.end = aligned(start + nbytes)
        return start


def collect(exporter: Exporter, named: Sequence[Named]) -> list[Draft]:
    """The parameters' groups, in buckets, in the order in which `Exporter.export` would yield them."""
    collected = exporter.collector()
    scratch: dict[tuple[Any, ...], Tensor] = {}  # buckets are filled one after the other: they share it
    drafts: list[Draft] = []
    gathers: list[Gather] = []

    def close(collected: Collector, until: int) -> None:
        drafts.append(Draft(collected.take(), list(gathers), until))
        gathers.clear()

    for number, entry in enumerate(named, 1):
        order = None
        if not isinstance(entry, Piece) and entry[0] not in exporter.sources:
            order = ordering(exporter.model, entry[0], entry[1], exporter.placement)
        if order is None or isinstance(entry, Piece):
            pieces = exporter.pieces_of(entry)
        else:
            name, tensor = entry
            key = len(gathers), tensor.shape, tensor.dtype
            into = scratch.setdefault(key, torch.empty_like(tensor.detach()))
            gathers.append(Gather(tensor, order[0], order[1].to(tensor.device), into))
            pieces = ordered_pieces(exporter.model, name, into, exporter.placement)
        collected.add(entry.name if isinstance(entry, Piece) else entry[0], pieces)
        if collected.ready_bytes >= exporter.bucket_bytes:
            close(collected, number)
    collected.check_complete()
    if collected.ready:
        close(collected, len(named))
    return drafts


def lay_out(exporter: Exporter, draft: Draft, device: torch.device) -> None:
    """Decide at which byte everything is."""
    jobs: dict[tuple[Format, bool], Job] = {}
    unit_of: dict[int, tuple[Job, Unit]] = {}
    for ready in draft.groups:
        if ready.format is not None:
            group = exporter.weight_group(ready)
            unit = _unit(group, ready.pieces, draft.gathers)
            job = jobs.setdefault((ready.format, group.reduce is not None), Job(ready.format, []))
            job.units.append(unit)
            unit_of[id(ready)] = job, unit
    draft.jobs = list(jobs.values())
    at: dict[int, tuple[int, int]] = {}  # matrix → first block, number in its job
    for job in draft.jobs:
        firsts, blocks = places(job.matrices, job.format)
        is_nvfp4 = isinstance(job.format, NVFP4)
        job.elements = draft.take(blocks * (8 if is_nvfp4 else 32))
        job.block_scale = draft.take(blocks)
        job.tensor_scale = draft.take(4 * len(firsts)) if is_nvfp4 else 0
        at |= {id(matrix): (firsts[i], i) for i, matrix in enumerate(job.matrices)}
    ones = None
    if draft.jobs and exporter.sends_input_scales:
        ones = draft.take(4)
        draft.raw.append((ones, torch.full((), CONSTANT_INPUT_SCALE, device=device)))
    for ready in draft.groups:
        if id(ready) not in unit_of:
            for piece in ready.pieces:
                _add_raw(draft, piece)
        else:
            job, unit = unit_of[id(ready)]
            for piece, (number, row) in zip(ready.pieces, unit.where, strict=True):
                draft.slots += _slots(exporter, piece, job, *at[id(unit.matrices[number])], row, ones)
        for name, scale in exporter.kv_scales_with(ready):
            _add_raw(draft, Piece(name, scale.to(device)))


def _unit(group: WeightGroup, pieces: list[Piece], gathers: list[Gather]) -> Unit:
    if (joined := adjacent(group)) is not None:
        rows = [0, *itertools.accumulate(len(weight) for weight in group.weights)]
        return Unit(group, pieces, [joined], [(0, row) for row in rows[:-1]])
    for i, gather in enumerate(gathers):
        if (runs := _runs_instead(gather, group)) is not None:
            del gathers[i]
            firsts = [0, *itertools.accumulate(map(len, runs))]
            where = [(first, 0) for first in firsts[:-1]]
            return Unit(group, pieces, [run for some in runs for run in some], where, gather)
    return Unit(group, pieces, list(group.weights), [(i, 0) for i in range(len(group.weights))])


def _runs_instead(gather: Gather, group: WeightGroup) -> list[list[Tensor]] | None:
    """Each weight's rows where they are, if the gather makes these weights and no others, and they can be quantized
    from there: runs of rows are whole blocks, and where the results of one end the next one's begin."""
    target, fmt = gather.target, group.format
    if not (isinstance(fmt, NVFP4) and gather.dim == 0 and gather.source.is_contiguous()):
        return None
    memory = target.untyped_storage().data_ptr()
    mine = all(w.untyped_storage().data_ptr() == memory and w.is_contiguous() for w in group.weights)
    if not mine or sum(w.numel() for w in group.weights) != target.numel():
        return None
    if not all(w.numel() for w in group.weights):  # with more ranks than query groups some have no keys
        return None
    runs = [gather.runs(weight) for weight in group.weights]
    room, height = fmt.block_columns * PLACE_BLOCKS, fmt.block[0]
    fits = all(run.numel() % room == 0 and len(run) % height == 0 for some in runs for run in some)
    return runs if fits else None


def _add_raw(draft: Draft, piece: Piece) -> None:
    tensor = piece.tensor
    offset = draft.take(tensor.nbytes)
    draft.slots.append(Slot(piece.name, tensor_dtype(tensor), tuple(tensor.shape), offset, piece.dim, piece.start))
    if tensor.numel():
        draft.raw.append((offset, tensor))


def _slots(
    exporter: Exporter, piece: Piece, job: Job, first: int, number: int, row: int, ones: int | None
) -> Iterator[Slot]:
    """A quantized piece's tensors, as `checkpoint.schema.weight_tensors` has them."""
    fmt, module = job.format, piece.name.removesuffix(".weight")
    names = weight_names(exporter.layout, fmt)
    rows, columns = piece.tensor.shape
    is_mxfp8 = isinstance(fmt, MXFP8)
    per, block = (1, 32) if is_mxfp8 else (2, 16)
    kinds = [
        (names.elements, "F8_E4M3" if is_mxfp8 else "U8", per, job.elements + first * (block // per)),
        (names.block_scale, "U8" if is_mxfp8 else "F8_E4M3", block, job.block_scale + first),
    ]
    for name, dtype, ratio, base in kinds:
        start = piece.start // ratio if piece.dim == 1 else piece.start
        shape = (rows, columns // ratio)
        yield Slot(f"{module}.{name}", dtype, shape, base + row * (columns // ratio), piece.dim, start)
    if not is_mxfp8:
        offset = job.tensor_scale + 4 * number
        yield Slot(f"{module}.{names.tensor_scale}", "F32", names.scalar_shape, offset)
        if ones is not None:
            yield Slot(f"{module}.{names.input_scale}", "F32", names.scalar_shape, ones)


def bind(exporter: Exporter, draft: Draft, flat: Tensor, maxima: Tensor, scales: Tensor) -> None:
    """Prepare what fills a bucket's memory.

    maxima, scales: float32, of all buckets' matrices; S_dec goes to scales where the layout has S_enc.
    """
    for job in draft.jobs:
        matrices = job.matrices
        groups = [i for i, unit in enumerate(job.units) for _ in unit.matrices]
        firsts, blocks = places(matrices, job.format)
        scale = flat[job.block_scale : job.block_scale + blocks]
        amax = maxima[job.amax : job.amax + len(matrices)]
        tensor_scale = scales[job.amax : job.amax + len(matrices)]
        if isinstance(job.format, MXFP8):
            elements = flat[job.elements : job.elements + 32 * blocks].view(torch.float8_e4m3fn)
            counts = [matrix.numel() // 32 for matrix in matrices]
            exact = [scale[first : first + count] for first, count in zip(firsts, counts, strict=True)]
            draft.block_scales += [scale] if sum(counts) == blocks else exact  # another bucket's bytes between
        else:
            elements = flat[job.elements : job.elements + 8 * blocks]
            scale = scale.view(torch.float8_e4m3fn)
            stored = flat[job.tensor_scale : job.tensor_scale + 4 * len(matrices)].view(torch.float32)
            if weight_names(exporter.layout, job.format).divisors:
                job.encode_scale = stored
            else:
                tensor_scale = stored
        job.prepared = prepare_many(matrices, groups, job.format, Into(elements, scale, tensor_scale, amax))
    draft.copy = prepare_copies(
        (flat[offset : offset + source.nbytes].view(source.dtype).view(source.shape), source.detach())
        for offset, source in draft.raw
    )
