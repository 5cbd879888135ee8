"""How a bucket lies in one run of bytes: what travels, and by what it is known to be whole."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint.shards import DTYPES, tensor_dtype
from ..errors import SyncError
from .pieces import Piece, as_bytes

ALIGNMENT = 16  # bytes; any tensor may begin there, whatever its dtype, and kernels write to it
SEAL_BYTES = 16  # after the tensors: the checksum, and zeros
_ROW = 1024  # words of a checksum's row
_ODD = -7046029254386353131  # 2^64 / golden ratio, odd, as int64


class Slot(NamedTuple):
    """Where one tensor lies, or a part of one.

    Attributes:
        name, dtype: of the whole tensor, the dtype by its safetensors name.
        shape: of what is here.
        offset: its first byte.
        dim, start: along which dimension it is a part, and where that begins; None, 0: it is the whole.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    dim: int | None = None
    start: int = 0

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Layout:
    """What is where in a bucket.

    Attributes:
        slots: two may share bytes, as the scales of one fused group do.
        nbytes: of all tensors, a multiple of `ALIGNMENT`; the seal follows.
    """

    slots: tuple[Slot, ...]
    nbytes: int

    @functools.cached_property
    def text(self) -> str:
        """As JSON."""
        return json.dumps({"nbytes": self.nbytes, "slots": self.slots}, separators=(",", ":"))

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @staticmethod
    def parse(text: str) -> Layout:
        """The inverse of `text`.

        Raises:
            SyncError: it describes no bucket.
        """
        try:
            data: Any = json.loads(text)
            slots = tuple(Slot(n, t, tuple(shape), at, dim, start) for n, t, shape, at, dim, start in data["slots"])
            layout = Layout(slots, int(data["nbytes"]))
            good = layout.nbytes >= 0 and layout.nbytes % ALIGNMENT == 0
            for slot in slots:
                good &= (
                    slot.offset >= 0
                    and slot.offset % DTYPES[slot.dtype].itemsize == 0
                    and min(slot.shape, default=0) >= 0
                )
                good &= slot.offset + slot.nbytes <= layout.nbytes
        except (ValueError, KeyError, TypeError) as error:
            raise SyncError(f"a bucket's layout cannot be read: {error!r}; both ends need the same halfbyte") from error
        if not good:
            raise SyncError("a bucket's layout says that tensors lie outside of it; it is damaged")
        return layout

    def views(self, flat: Tensor) -> list[Piece]:
        """The tensors of a bucket, sharing its memory."""
        found = []
        for slot in self.slots:
            data = flat[slot.offset : slot.offset + slot.nbytes].view(DTYPES[slot.dtype]).view(slot.shape)
            found.append(Piece(slot.name, data, slot.dim, slot.start))
        return found


def place(pieces: Iterable[Piece]) -> Layout:
    """A layout of pieces one behind the other; those of the same memory lie in the same bytes."""
    slots: list[Slot] = []
    places: dict[tuple[int, torch.dtype, torch.Size], int] = {}
    end = 0
    for piece in pieces:
        tensor = piece.tensor
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape)
        offset = places.get(key, end) if tensor.is_contiguous() and tensor.numel() else end
        slots.append(Slot(piece.name, tensor_dtype(tensor), tuple(tensor.shape), offset, piece.dim, piece.start))
        if offset == end:
            if tensor.is_contiguous():  # a transposed view has the same address
                places[key] = offset
            end = aligned(end + tensor.nbytes)
    return Layout(tuple(slots), end)


def pack(pieces: Iterable[Piece], layout: Layout, flat: Tensor) -> None:
    """Copy pieces to where a layout has them; flat: uint8, layout.nbytes + SEAL_BYTES or more."""
    sources, targets, seen = [], [], set()
    for piece, slot in zip(pieces, layout.slots, strict=True):
        if slot.offset in seen or not slot.nbytes:
            continue
        seen.add(slot.offset)
        sources.append(as_bytes(piece.tensor))
        targets.append(flat[slot.offset : slot.offset + slot.nbytes])
    if sources:
        torch._foreach_copy_(targets, sources)


def aligned(offset: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def seal(flat: Tensor, nbytes: int, salt: int) -> None:
    """Write the checksum behind the tensors, without waiting for the device. salt: which bucket of which sync it is."""
    flat[nbytes : nbytes + SEAL_BYTES].view(torch.int64).copy_(_seal(flat, nbytes, salt))


def is_broken(flat: Tensor, nbytes: int, salt: int) -> Tensor:
    """Whether the checksum is another: bool (), on flat's device."""
    return (flat[nbytes : nbytes + SEAL_BYTES].view(torch.int64) != _seal(flat, nbytes, salt)).any()


def salt_of(version: int, index: int) -> int:
    """So that a bucket of another version, or another one of this, is not taken for the right one."""
    word = hashlib.sha256(f"{version} {index}".encode()).digest()[:8]
    return int.from_bytes(word, "little", signed=True)


def _seal(flat: Tensor, nbytes: int, salt: int) -> Tensor:
    """(checksum, 0), int64: sums of rows of 8 KiB, weighed by where they are, modulo 2^64.

    Any flipped bit changes it, and so does a row that is lost, moved or old, but for one in 2^64. It is no signature.
    """
    words = flat[:nbytes].view(torch.int64)
    rows = len(words) // _ROW
    sums = words[: rows * _ROW].view(rows, _ROW).sum(1)
    sums = torch.cat((sums, words[rows * _ROW :].sum().view(1)))
    weights = (torch.arange(rows + 1, device=flat.device) * 2 + 1) * _ODD
    total = (sums * weights).sum() + salt
    return torch.stack((total, torch.zeros_like(total)))


def named(tensors: Mapping[str, Tensor]) -> list[Piece]:
    """Whole tensors as pieces."""
    return [Piece(name, tensor) for name, tensor in tensors.items()]
