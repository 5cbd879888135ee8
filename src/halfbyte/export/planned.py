"""An export of the same parameters again and again: planned once, then little but kernels.

Where everything lies is decided at the first time: which weights are one matrix, in which bucket they go, at which
byte. Kernels write there; nothing is copied but what stays in high precision. Each later export checks that the
parameters are where they were, and plans anew if not.

Memory, besides the tables (a byte for about 4,000 weights): two buckets, of which one is filled while the other is
sent, so that a bucket's bytes last until the next one is asked for. An engine that reads a sync's buckets only at its
end, as those with IPC handles may, needs keep=True: each bucket then has memory of its own, as much as the quantized
model in all, at the same addresses every time.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from ..checkpoint.schema import weight_names
from ..checkpoint.shards import tensor_dtype
from ..checkpoint.weights import CONSTANT_INPUT_SCALE, WeightGroup, adjacent
from ..errors import CheckpointError
from ..formats import MXFP8, NVFP4, Format
from ..ops.copies import prepare_copies
from ..ops.prepared import Into, Prepared, places, prepare_many
from .collect import Collector, Ready
from .layout import SEAL_BYTES, Layout, Slot, aligned
from .pieces import Piece, whole_tensors
from .shards import ordered_pieces, ordering

if TYPE_CHECKING:
    from .exporter import Exporter

Named = tuple[str, Tensor] | Piece


@dataclass(eq=False)
class FlatBucket:
    """A bucket in one run of bytes: what `Bucket` is, and the memory itself.

    Attributes:
        index: its place in the sync.
        layout: what is where.
        flat: uint8, layout.nbytes and room for a seal.
        ready: on a GPU: when it is filled, for streams other than the current one, which waits anyway.
    """

    index: int
    layout: Layout
    flat: Tensor
    ready: Any = None

    @property
    def nbytes(self) -> int:
        """Of all data."""
        return self.layout.nbytes

    @functools.cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """Its tensors, sharing its memory."""
        return tuple(self.layout.views(self.flat))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """As `Bucket.tensors`."""
        return whole_tensors(self.pieces)


@dataclass(eq=False)
class _Unit:
    """Weights under one maximum, as the matrices that they are quantized as: one where they lie behind one another."""

    group: WeightGroup
    pieces: list[Piece]
    matrices: list[Tensor]


@dataclass(eq=False)
class _Job:
    """Units of one format, whose maxima are reduced or not, and where they go in a bucket."""

    format: Format
    units: list[_Unit]
    elements: int = 0  # first bytes of each kind
    block_scale: int = 0
    tensor_scale: int = 0
    amax: int = 0  # its first place among all maxima
    prepared: Prepared | None = None
    encode_scale: Tensor | None = None

    @property
    def matrices(self) -> list[Tensor]:
        return [matrix for unit in self.units for matrix in unit.matrices]


@dataclass(eq=False)
class _Draft:
    """A bucket that is being planned."""

    groups: list[Ready]
    gathers: list[tuple[Tensor, int, Tensor, Tensor]]  # parameter, dimension, indices, what it is put in order in
    jobs: list[_Job] = field(default_factory=list)
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


class PreparedExport:
    """See `Exporter.prepare`."""

    def __init__(self, exporter: Exporter, named: Iterable[Named], *, keep: bool = False) -> None:
        self._exporter, self._named, self._keep = exporter, list(named), keep
        self._stream: Any = None
        self._drafts: list[_Draft] = []
        self._buffers: list[Tensor] = []
        self.buckets: list[FlatBucket] = []
        self._make()

    @property
    def nbytes(self) -> int:
        """Of all buckets."""
        return sum(bucket.nbytes for bucket in self.buckets)

    @property
    def buffer_bytes(self) -> int:
        """Of the memory that buckets are in."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def export(self) -> Iterator[FlatBucket]:
        """All buckets, of the parameters as they are now; the same objects every time.

        On a GPU the next bucket is quantized on a stream of its own while this one is used. What is done with a bucket
        must be on the current stream, or have been waited for by it, when the next one is asked for: its memory is
        filled anew then, unless the export was prepared with keep.

        Raises:
            CheckpointError: a weight contains NaN or inf, which is seen at the end; or, planning anew, as `export`.
        """
        if self._device.type != "cuda":
            if self._moved(len(self._tensors)):
                self._make()
            for draft, bucket in zip(self._drafts, self.buckets, strict=True):
                self._fill(draft, bucket)
                yield bucket
        else:
            yield from self._overlapped()
        self._check()

    def _moved(self, count: int) -> bool:
        """Whether one of the first so many parameters is not where it was when the export was planned."""
        return self._addresses[:count] != list(map(Tensor.data_ptr, self._tensors[:count]))

    def _overlapped(self) -> Iterator[FlatBucket]:
        side: Any = self._stream
        filled: list[Any] = []
        free: list[Any] = []
        side.wait_stream(torch.cuda.current_stream(self._device))

        def fill_next() -> None:
            k = len(filled)
            if not self._keep and k >= 2:
                side.wait_event(free[k - 2])
            with torch.cuda.stream(side):
                self._fill(self._drafts[k], self.buckets[k])
                filled.append(side.record_event())
                self.buckets[k].ready = filled[k]

        if self.buckets and not self._moved(self._in_first):
            fill_next()  # while the other addresses are looked at, which takes as long
        if self._moved(len(self._tensors)):
            side.synchronize()  # what it fills may be freed next
            filled.clear()
            self._make()
        try:
            for i, bucket in enumerate(self.buckets):
                while len(filled) < min(i + 2, len(self.buckets)):  # this one, and the next one behind it
                    fill_next()
                torch.cuda.current_stream(self._device).wait_event(filled[i])
                yield bucket
                free.append(torch.cuda.current_stream(self._device).record_event())
        finally:  # also when given up in the middle: what is filled may be freed next
            torch.cuda.current_stream(self._device).wait_stream(side)

    def _fill(self, draft: _Draft, bucket: FlatBucket) -> None:
        for source, dim, indices, target in draft.gathers:
            torch.index_select(source.detach(), dim, indices, out=target)
        for job in draft.jobs:
            assert job.prepared is not None
            maxima = None
            if job.units[0].group.reduce is not None and isinstance(job.format, NVFP4):
                maxima = self._reduced(job, job.prepared.maxima())
            job.prepared.run(maxima)
            if job.encode_scale is not None and isinstance(job.format, NVFP4):
                amax = self._amax[job.amax : job.amax + len(job.encode_scale)]
                job.encode_scale.copy_(ops.tensor_scales(amax, job.format)[0])
        assert draft.copy is not None
        draft.copy()
        for scale in draft.block_scales:
            self._wrong |= (scale >= 254).any()  # 255 is NaN, 254 inf: no finite float reaches it

    @staticmethod
    def _reduced(job: _Job, maxima: Tensor) -> Tensor:
        by_reduce: defaultdict[Any, list[int]] = defaultdict(list)
        for i, unit in enumerate(job.units):
            by_reduce[unit.group.reduce].append(i)
        for reduce, which in by_reduce.items():
            maxima[which] = reduce(maxima[which])
        return maxima

    def _check(self) -> None:
        """By what was computed anyway, with one wait for the device."""
        good = self._amax.isfinite().all() & ~self._wrong
        if bool(good):
            return
        self._wrong.zero_()
        for unit in (unit for draft in self._drafts for job in draft.jobs for unit in job.units):
            for piece in unit.pieces:
                if not bool(piece.tensor.isfinite().all()):
                    raise CheckpointError(
                        f"tensor {piece.name}: contains NaN or inf; repair the model, or exclude it with "
                        f"--ignore {piece.name.removesuffix('.weight')}"
                    )
        raise CheckpointError("another rank's part of a weight contains NaN or inf; repair the model")

    # --- planning ---------------------------------------------------------------------------------------------------

    def _make(self) -> None:
        self._tensors = [entry.tensor if isinstance(entry, Piece) else entry[1] for entry in self._named]
        self._addresses: list[int] = []  # until planning has succeeded
        devices = {tensor.device for tensor in self._tensors}
        if len(devices) != 1:
            raise CheckpointError(f"parameters on {sorted(map(str, devices))}: an export is prepared for one device")
        (self._device,) = devices
        self._drafts, self._buffers, self.buckets = [], [], []  # the old memory goes first
        self._drafts = self._collect()
        for draft in self._drafts:
            self._lay_out(draft)
        maxima = 0
        for job in (job for draft in self._drafts for job in draft.jobs):
            job.amax, maxima = maxima, maxima + aligned(4 * len(job.matrices)) // 4  # kernels like alignment
        self._amax = torch.zeros(maxima, device=self._device)
        self._scales = torch.empty(maxima, device=self._device)  # S_dec where the layout has S_enc
        self._wrong = torch.zeros((), dtype=torch.bool, device=self._device)
        sizes = [draft.end + SEAL_BYTES for draft in self._drafts]
        wanted = sizes if self._keep else [max(sizes[i::2]) for i in range(min(2, len(sizes)))]
        self._buffers = [torch.zeros(size, dtype=torch.uint8, device=self._device) for size in wanted]
        for i, (draft, size) in enumerate(zip(self._drafts, sizes, strict=True)):
            flat = self._buffers[i % len(self._buffers)][:size]
            self._bind(draft, flat)
            self.buckets.append(FlatBucket(i, Layout(tuple(draft.slots), draft.end), flat))
        if self._device.type == "cuda" and self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]

    def _collect(self) -> list[_Draft]:
        """The parameters' groups, in buckets, in the order in which `Exporter.export` would yield them."""
        exporter, collected = self._exporter, self._exporter.collector()
        scratch: dict[tuple[Any, ...], Tensor] = {}  # buckets are filled one after the other: they share it
        drafts: list[_Draft] = []
        gathers: list[tuple[Tensor, int, Tensor, Tensor]] = []

        def close(collected: Collector) -> None:
            drafts.append(_Draft(collected.take(), list(gathers)))
            gathers.clear()

        self._in_first = len(self._named)  # parameters that the first bucket needs
        for number, entry in enumerate(self._named):
            order = None
            if not isinstance(entry, Piece) and entry[0] not in exporter.sources:
                order = ordering(exporter.model, entry[0], entry[1], exporter.placement)
            if order is None or isinstance(entry, Piece):
                pieces = exporter.pieces_of(entry)
            else:
                name, tensor = entry
                key = len(gathers), tensor.shape, tensor.dtype
                into = scratch.setdefault(key, torch.empty_like(tensor.detach()))
                gathers.append((tensor, order[0], order[1].to(tensor.device), into))
                pieces = ordered_pieces(exporter.model, name, into, exporter.placement)
            collected.add(entry.name if isinstance(entry, Piece) else entry[0], pieces)
            if collected.ready_bytes >= exporter.bucket_bytes:
                if not drafts:
                    self._in_first = number + 1
                close(collected)
        collected.check_complete()
        if collected.ready:
            close(collected)
        return drafts

    def _lay_out(self, draft: _Draft) -> None:
        """Decide at which byte everything is."""
        exporter = self._exporter
        jobs: dict[tuple[Format, bool], _Job] = {}
        unit_of: dict[int, tuple[_Job, _Unit]] = {}
        for ready in draft.groups:
            if ready.format is not None:
                group = exporter.weight_group(ready)
                joined = adjacent(group)
                unit = _Unit(group, ready.pieces, list(group.weights) if joined is None else [joined])
                job = jobs.setdefault((ready.format, group.reduce is not None), _Job(ready.format, []))
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
            draft.raw.append((ones, torch.full((), CONSTANT_INPUT_SCALE, device=self._device)))
        for ready in draft.groups:
            if id(ready) not in unit_of:
                for piece in ready.pieces:
                    self._add_raw(draft, piece)
            else:
                job, unit = unit_of[id(ready)]
                row = 0
                for i, piece in enumerate(ready.pieces):
                    is_joined = len(unit.matrices) < len(ready.pieces)
                    matrix = unit.matrices[0 if is_joined else i]
                    draft.slots += self._slots(piece, job, *at[id(matrix)], row if is_joined else 0, ones)
                    row += len(piece.tensor)
            for name, scale in exporter.kv_scales_with(ready):
                self._add_raw(draft, Piece(name, scale.to(self._device)))

    @staticmethod
    def _add_raw(draft: _Draft, piece: Piece) -> None:
        tensor = piece.tensor
        offset = draft.take(tensor.nbytes)
        draft.slots.append(Slot(piece.name, tensor_dtype(tensor), tuple(tensor.shape), offset, piece.dim, piece.start))
        if tensor.numel():
            draft.raw.append((offset, tensor))

    def _slots(self, piece: Piece, job: _Job, first: int, number: int, row: int, ones: int | None) -> Iterator[Slot]:
        """A quantized piece's tensors, as `checkpoint.schema.weight_tensors` has them."""
        fmt, module = job.format, piece.name.removesuffix(".weight")
        names = weight_names(self._exporter.layout, fmt)
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

    def _bind(self, draft: _Draft, flat: Tensor) -> None:
        """Prepare what fills a bucket's memory."""
        for job in draft.jobs:
            matrices = job.matrices
            groups = [i for i, unit in enumerate(job.units) for _ in unit.matrices]
            _, blocks = places(matrices, job.format)
            scale = flat[job.block_scale : job.block_scale + blocks]
            amax = self._amax[job.amax : job.amax + len(matrices)]
            tensor_scale = self._scales[job.amax : job.amax + len(matrices)]
            if isinstance(job.format, MXFP8):
                elements = flat[job.elements : job.elements + 32 * blocks].view(torch.float8_e4m3fn)
                draft.block_scales.append(scale)
            else:
                elements = flat[job.elements : job.elements + 8 * blocks]
                scale = scale.view(torch.float8_e4m3fn)
                stored = flat[job.tensor_scale : job.tensor_scale + 4 * len(matrices)].view(torch.float32)
                if weight_names(self._exporter.layout, job.format).divisors:
                    job.encode_scale = stored
                else:
                    tensor_scale = stored
            job.prepared = prepare_many(matrices, groups, job.format, Into(elements, scale, tensor_scale, amax))
        draft.copy = prepare_copies(
            (flat[offset : offset + source.nbytes].view(source.dtype).view(source.shape), source.detach())
            for offset, source in draft.raw
        )
