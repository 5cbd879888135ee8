"""What changed between two versions of a model's tensors: only the bytes that differ, applied whole or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint.shards import DTYPES, tensor_digest, tensor_dtype
from ..errors import CheckpointError
from .pieces import as_bytes

_POSITION_BYTES = 4


@dataclass(frozen=True, eq=False)
class Change:
    """One tensor's changed bytes.

    Attributes:
        dtype, shape: of the tensor, the dtype by its safetensors name.
        positions: (n,) int32, where in its bytes; None: all of them.
        values: (n,) uint8.
    """

    dtype: str
    shape: tuple[int, ...]
    positions: Tensor | None
    values: Tensor


@dataclass(frozen=True, eq=False)
class Delta:
    """From one version to another.

    Attributes:
        base, result: digests of all tensors before and after; see `digest`.
        changes: tensor → what changed; others are as they were.
    """

    base: str
    result: str
    changes: Mapping[str, Change]

    @property
    def nbytes(self) -> int:
        """What travels, without names."""
        sizes = (c.values.nbytes + (0 if c.positions is None else c.positions.nbytes) for c in self.changes.values())
        return sum(sizes)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor_dtype(tensor)} {list(tensor.shape)} {tensor_digest(tensor)}\n".encode())
    return total.hexdigest()


def make_delta(base: Mapping[str, Tensor], result: Mapping[str, Tensor]) -> Delta:
    """What to send to one who has base, so that it has result.

    Args:
        base, result: name → tensor; the same names, dtypes and shapes. Comparing happens on result's device.

    Raises:
        CheckpointError: names, dtypes or shapes differ: that takes a full export.
    """
    if base.keys() != result.keys():
        name = sorted(base.keys() ^ result.keys())[0]
        raise CheckpointError(f"{name}: is in one of the two versions only; a delta needs the same tensors: export all")
    changes = {}
    for name, new in result.items():
        old = base[name].to(new.device)
        if (old.dtype, old.shape) != (new.dtype, new.shape):
            raise CheckpointError(f"{name}: changed its dtype or shape; a delta needs the same tensors: export all")
        before, after = as_bytes(old), as_bytes(new)
        positions = (before != after).nonzero().reshape(-1)
        if not len(positions):
            continue
        every = len(positions) * (1 + _POSITION_BYTES) >= len(after) or len(after) > torch.iinfo(torch.int32).max
        places, values = (None, after) if every else (positions.int(), after[positions])
        changes[name] = Change(tensor_dtype(new), tuple(new.shape), places, values)
    return Delta(digest(base), digest(result), changes)


def apply_delta(base: Mapping[str, Tensor], delta: Delta) -> dict[str, Tensor]:
    """The new version; base stays as it is, and tensors that did not change are shared with it.

    Raises:
        CheckpointError: base is not the version that the delta is for, or the delta is damaged.
    """
    if (found := digest(base)) != delta.base:
        raise CheckpointError(
            f"this delta is for version {delta.base[:12]}, not for {found[:12]}: ask for a full export"
        )
    result = dict(base)
    for name, change in delta.changes.items():
        old = base.get(name)
        if old is None or (tensor_dtype(old), tuple(old.shape)) != (change.dtype, change.shape):
            raise CheckpointError(f"{name}: the delta does not fit this tensor; it is damaged: ask for a full export")
        data = as_bytes(old).clone()
        places = slice(None) if change.positions is None else change.positions.long().to(data.device)
        if isinstance(places, Tensor) and (len(places) != len(change.values) or _outside(places, len(data))):
            raise CheckpointError(f"{name}: the delta's positions do not fit; it is damaged: ask for a full export")
        if change.positions is None and len(change.values) != len(data):
            raise CheckpointError(f"{name}: the delta has {len(change.values)} of {len(data)} bytes; it is damaged")
        data[places] = change.values.to(data.device)
        result[name] = data.view(DTYPES[change.dtype]).reshape(change.shape)
    if (found := digest(result)) != delta.result:
        raise CheckpointError(f"the result is {found[:12]} instead of {delta.result[:12]}: the delta is damaged")
    return result


def _outside(positions: Tensor, count: int) -> bool:
    return bool(len(positions)) and (int(positions.min()) < 0 or int(positions.max()) >= count)
