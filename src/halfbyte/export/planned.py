"""An export of the same parameters again and again: planned once, then little but kernels.

Where everything lies is decided at the first time, see `drafts`: which weights are one matrix, in which bucket they go,
at which byte. Kernels write there; nothing is copied but what stays in high precision. Each later export checks that
the parameters are where they were, and plans anew if not.

Memory, besides the tables (a byte for about 150 weights): two buckets, of which one is filled while the other is
sent, so that a bucket's bytes last until the next one is asked for. An engine that reads a sync's buckets only at its
end, as those with IPC handles may, needs keep=True: each bucket then has memory of its own, as much as the quantized
model in all, at the same addresses every time.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from ..errors import CheckpointError
from ..formats import NVFP4
from .drafts import Draft, Job, Named, bind, collect, lay_out
from .layout import SEAL_BYTES, Layout, aligned
from .pieces import Piece, whole_tensors

if TYPE_CHECKING:
    from .exporter import Exporter


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


class PreparedExport:
    """See `Exporter.prepare`."""

    def __init__(self, exporter: Exporter, named: Iterable[Named], *, keep: bool = False) -> None:
        self._exporter, self._named, self._keep = exporter, list(named), keep
        self._stream: Any = None
        self._is_checked = True
        self._drafts: list[Draft] = []
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
        if not self._addresses:
            self._make()
        if not self._is_checked:  # the last export was given up, with what it had found so far
            self._wrong.zero_()
            self._amax.zero_()
        self._is_checked = False
        if self._device.type == "cuda":
            yield from self._overlapped()
        else:
            for i in range(len(self.buckets)):
                self._follow(i)
                self._fill(i)
                yield self.buckets[i]
        self._check()
        self._is_checked = True

    def _follow(self, index: int) -> None:
        """Plan anew, where a parameter that a bucket needs is not where it was.

        What was yielded before stays as it is: buckets' borders depend on names and shapes only. Looking at all
        parameters before the first bucket would take longer than filling it.
        """
        some = slice(self._drafts[index - 1].until if index else 0, self._drafts[index].until)
        if self._addresses[some] != list(map(Tensor.data_ptr, self._tensors[some])):
            if self._stream is not None:
                self._stream.synchronize()  # what it fills may be freed next
            if index:
                self._check()  # planned anew, it begins without the maxima of the buckets before
            self._make()
            if self._stream is not None:
                self._stream.wait_stream(torch.cuda.current_stream(self._device))  # which zeroes the new memory

    def _overlapped(self) -> Iterator[FlatBucket]:
        side: Any = self._stream
        filled: list[FlatBucket] = []
        free: list[Any] = []
        side.wait_stream(torch.cuda.current_stream(self._device))
        try:
            for i in range(len(self.buckets)):
                while len(filled) < min(i + 2, len(self.buckets)):  # this one, and the next one behind it
                    k = len(filled)
                    if not self._keep and k >= 2:
                        side.wait_event(free[k - 2])
                    self._follow(k)
                    with torch.cuda.stream(side):
                        self._fill(k)
                        self.buckets[k].ready = side.record_event()
                    filled.append(self.buckets[k])
                torch.cuda.current_stream(self._device).wait_event(filled[i].ready)
                yield filled[i]
                free.append(torch.cuda.current_stream(self._device).record_event())
        finally:  # also when given up in the middle: what is filled may be freed next
            torch.cuda.current_stream(self._device).wait_stream(side)

    def _fill(self, index: int) -> None:
        draft = self._drafts[index]
        for gather in draft.gathers:
            gather()
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
    def _reduced(job: Job, maxima: Tensor) -> Tensor:
        by_reduce: defaultdict[Any, list[int]] = defaultdict(list)
        for i, unit in enumerate(job.units):
            by_reduce[unit.group.reduce].append(i)
        for reduce, which in by_reduce.items():
            maxima[which] = reduce(maxima[which])
        return maxima

    def _check(self) -> None:
        """By what was computed anyway, with one wait for the device.

        On a GPU for the stream that quantizes: what is done with the buckets may take longer, or, where it is a
        transfer whose partner has died, never end.
        """
        with torch.cuda.stream(self._stream):
            good = bool(self._amax.isfinite().all() & ~self._wrong)
            if not good:
                self._complain()

    def _complain(self) -> None:
        """Name the weight that contains NaN or inf."""
        for unit in (unit for draft in self._drafts for job in draft.jobs for unit in job.units):
            if unit.gather is not None:
                unit.gather()
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
        self._drafts = collect(self._exporter, self._named)
        for draft in self._drafts:
            lay_out(self._exporter, draft, self._device)
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
            bind(self._exporter, draft, flat, self._amax, self._scales)
            self.buckets.append(FlatBucket(i, Layout(tuple(draft.slots), draft.end), flat))
        if self._device.type == "cuda" and self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]
