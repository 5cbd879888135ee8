"""Parts of tensors: what a rank has of a model, and many ranks' parts put together again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint.schema import Entry
from ..checkpoint.shards import DTYPES
from ..errors import CheckpointError


@dataclass(frozen=True, eq=False)
class Piece:
    """A tensor, or a contiguous part of one along one dimension.

    Attributes:
        name: of the whole tensor, as Hugging Face or the engine calls it.
        tensor: the data, a view where possible.
        dim: along which it is a part; None: it is the whole.
        start: where along dim it begins in the whole.
        expert: whether it is cut by expert tensor parallelism, so that those ranks hold the other parts.
    """

    name: str
    tensor: Tensor
    dim: int | None = None
    start: int = 0
    expert: bool = False


def whole_tensors(pieces: Iterable[Piece]) -> dict[str, Tensor]:
    """Name → tensor.

    Raises:
        CheckpointError: some are parts.
    """
    found = {}
    for piece in pieces:
        if piece.dim is not None:
            raise CheckpointError(f"{piece.name}: this rank has a part of it; merge the buckets of all ranks first")
        found[piece.name] = piece.tensor
    return found


def merge(pieces: Iterable[Piece], entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """Whole tensors from the pieces of all ranks, in the order of entries; replicas count once.

    Args:
        pieces: of any ranks, in any order.
        entries: name → (dtype, shape) of everything that is expected.

    Raises:
        CheckpointError: something is missing, unknown, overlaps, or has another shape or dtype; replicas differ.
    """
    found: defaultdict[str, dict[tuple[int | None, int], Tensor]] = defaultdict(dict)
    for piece in pieces:
        if piece.name not in entries:
            raise CheckpointError(f"{piece.name}: came, but the export has no such tensor")
        place = (piece.dim, piece.start)
        if piece.tensor.numel() == 0 and piece.dim is not None:
            continue
        other = found[piece.name].setdefault(place, piece.tensor)
        if other is not piece.tensor and not same_bytes(other, piece.tensor):
            raise CheckpointError(f"{piece.name}: two ranks that should hold the same bytes hold different ones")
    if missing := [name for name in entries if name not in found]:
        raise CheckpointError(f"{missing[0]} and {len(missing) - 1} others never came: is a rank or an expert missing?")
    return {name: _joined(name, found[name], entry) for name, entry in entries.items()}


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether dtype, shape and every byte agree."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(as_bytes(a), as_bytes(b))


def as_bytes(tensor: Tensor) -> Tensor:
    """A tensor's data as it lies in a file, (n,) uint8; a view if it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _joined(name: str, parts: dict[tuple[int | None, int], Tensor], entry: Entry) -> Tensor:
    dims = {dim for dim, _ in parts}
    dim = next(iter(dims))
    if len(dims) > 1 or (dim is None and len(parts) > 1):
        raise CheckpointError(f"{name}: came whole and in parts, or cut along two dimensions; send it one way")
    ordered = sorted(parts.items(), key=lambda item: item[0][1])
    if dim is not None:
        end = 0
        for (_, start), part in ordered:
            if start != end:
                what = "overlap" if start < end else "leave a gap"
                raise CheckpointError(f"{name}: its parts {what} at {min(start, end)} of dimension {dim}")
            end += part.shape[dim]
    whole = ordered[0][1] if len(ordered) == 1 else torch.cat([part for _, part in ordered], dim or 0)
    dtype, shape = entry
    if whole.dtype != DTYPES[dtype] or tuple(whole.shape) != shape:
        raise CheckpointError(
            f"{name}: has dtype {whole.dtype} and shape {list(whole.shape)}; expected {DTYPES[dtype]}, {list(shape)}"
        )
    return whole
