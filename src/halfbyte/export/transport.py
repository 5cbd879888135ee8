"""Live weights over torch.distributed: the sending end. `receiver` has the other, `link` what connects them.

A sync: the sender says which version comes; every receiver accepts or refuses; buckets; every receiver says whether
all of them arrived; all take over, or none does.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import SyncError
from .delta import Delta
from .exporter import BUCKET_BYTES, Bucket
from .layout import SEAL_BYTES, Layout, named, pack, place, salt_of, seal
from .link import SENDER, Link
from .pieces import Piece
from .planned import FlatBucket


class Sender:
    """Sends versions of a model's weights over a link; on its rank 0."""

    def __init__(self, link: Link) -> None:
        """
        Raises:
            SyncError: this is not the link's sending end.
        """
        if link.rank != SENDER:
            raise SyncError(f"rank {link.rank} receives; rank {SENDER} of a link sends")
        self.link = link
        self._known: set[str] = set()  # layouts that every receiver has
        self._flat: Tensor | None = None
        # a seal that waits for room behind the next bucket's quantization holds up its own bucket
        self._stream: Any = torch.cuda.Stream(link.device, priority=-1) if link.device.type == "cuda" else None

    def send(self, buckets: Iterable[Bucket | FlatBucket], version: int) -> None:
        """Send all of a model's weights.

        Args:
            buckets: of `Exporter.export`, in which this rank has the whole of each tensor, of `PreparedExport.export`,
                or `in_buckets`.
            version: of these weights, newer than the receivers'.

        Raises:
            SyncError: a receiver refused, is gone, or did not get everything: all of them serve what they served.
            Anything that buckets raise, such as CheckpointError; the receivers hear of it, and serve on too.
        """
        self._begin(version, None)
        self._send(buckets, version)

    def send_delta(self, delta: Delta, version: int, base_version: int) -> None:
        """Send what changed since base_version.

        Raises:
            SyncError: as `send`; also where a receiver's weights are not those that the delta is for.
        """
        changes = {name: (change.dtype, change.shape) for name, change in delta.changes.items()}
        about = {"base_version": base_version, "base": delta.base, "result": delta.result, "changes": changes}
        self._begin(version, about)
        pieces = []
        for name, change in delta.changes.items():
            pieces.append(Piece(f"{name}:values", change.values))
            if change.positions is not None:
                pieces.append(Piece(f"{name}:positions", change.positions))
        self._send(_buckets(pieces), version)

    def _begin(self, version: int, delta: dict[str, object] | None) -> None:
        self.link.say({"what": "start", "version": version, "delta": delta})
        self.link.agree(None, "the start of a sync")

    def _send(self, buckets: Iterable[Bucket | FlatBucket], version: int) -> None:
        layouts: list[Layout] = []
        try:
            for bucket in buckets:
                layout, flat = self._flatten(bucket)
                message = {"what": "bucket", "layout": layout.digest}
                if layout.digest not in self._known:
                    message["text"] = layout.text
                try:
                    self.link.say(message)
                    self._known.add(layout.digest)
                    self._broadcast(bucket, flat, layout.nbytes, salt_of(version, len(layouts)))
                except BaseException:
                    self.link.close()  # receivers wait for its bytes: nothing else may be said
                    raise
                layouts.append(layout)
        except BaseException as error:
            if self.link.problem is None:
                self.link.say({"what": "abort", "reason": f"{type(error).__name__}: {error}"})
            raise
        self.link.say({"what": "finish", "buckets": len(layouts)})  # while the last one travels
        self.link.settle()
        self.link.agree(None, "whether everything arrived")
        self._known = {layout.digest for layout in layouts}
        self.link.agree(None, "whether everyone has taken over")

    def _broadcast(self, bucket: Bucket | FlatBucket, flat: Tensor, nbytes: int, salt: int) -> None:
        """Seal and send; on a GPU a prepared bucket's seal is computed while the one before it is still travelling."""
        elsewhere = isinstance(bucket, FlatBucket) and flat.device != bucket.flat.device  # copied on this stream
        if self._stream is None or not isinstance(bucket, FlatBucket) or bucket.ready is None or elsewhere:
            seal(flat, nbytes, salt)
            self.link.broadcast(flat)
            return
        consumer = torch.cuda.current_stream(self.link.device)
        self._stream.wait_event(bucket.ready)
        with torch.cuda.stream(self._stream):
            seal(flat, nbytes, salt)
            self.link.broadcast(flat, consumer)

    def _flatten(self, bucket: Bucket | FlatBucket) -> tuple[Layout, Tensor]:
        """A bucket in one run of bytes on the link's device."""
        if isinstance(bucket, FlatBucket):
            return bucket.layout, bucket.flat.to(self.link.device)
        layout = place(bucket.pieces)
        size = layout.nbytes + SEAL_BYTES
        if self._flat is None or len(self._flat) < size:
            self._flat = torch.empty(size, dtype=torch.uint8, device=self.link.device)
        pack(bucket.pieces, layout, self._flat)
        return layout, self._flat[:size]


def in_buckets(tensors: Mapping[str, Tensor]) -> Iterator[Bucket]:
    """Tensors that are there already, such as those of `merge`, in buckets of about the usual size, in their order."""
    return _buckets(named(tensors))


def _buckets(pieces: list[Piece]) -> Iterator[Bucket]:
    index, some, size = itertools.count(), [], 0
    for piece in pieces:
        some.append(piece)
        size += piece.tensor.nbytes
        if size >= BUCKET_BYTES:
            yield Bucket(next(index), tuple(some))
            some, size = [], 0
    if some:
        yield Bucket(next(index), tuple(some))
