"""Parameters as they come, sorted into the groups of a plan; a group is ready once all of its weights are here."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

from ..checkpoint.plan import Plan, Planned
from ..checkpoint.shards import DTYPES, tensor_dtype
from ..errors import CheckpointError
from ..formats import NVFP4, Format
from .pieces import Piece
from .placement import Placement


@dataclass(eq=False)
class Ready:
    """A group of which everything is here."""

    items: tuple[Planned, ...]
    pieces: list[Piece]

    @property
    def format(self) -> Format | None:
        """Of all members; None for what stays as it is."""
        return self.items[0].format


@dataclass(eq=False)
class Collector:
    """What has come so far: groups that wait for members, and those that are ready.

    Attributes:
        plan: what is expected.
        placement: of this rank.
        ready: groups that are complete; ready_bytes: about how many bytes they make. Of what is cut it counts an equal
            share, however uneven the parts: a bucket's maxima are reduced together, so all ranks must close it at the
            same weight.
    """

    plan: Plan
    placement: Placement
    ready: list[Ready] = field(default_factory=list)
    ready_bytes: int = 0
    seen: set[str] = field(default_factory=set)
    waiting: dict[str, dict[str, list[Piece]]] = field(default_factory=dict)  # first member → member → pieces

    def __post_init__(self) -> None:
        self.group_of = {item.name.full: group for group in self.plan.groups for item in group}

    def add(self, origin: str, pieces: list[Piece]) -> None:
        """Take what one parameter holds."""
        by_name: defaultdict[str, list[Piece]] = defaultdict(list)
        for piece in pieces:
            by_name[piece.name].append(piece)
        for name, parts in by_name.items():
            if name in self.seen:
                raise CheckpointError(f"{name}: came twice, the second time from {origin}; give each once")
            if name not in self.group_of:
                raise CheckpointError(f"{name}: is not planned; parts come by the names of the plan's weights")
            self.seen.add(name)
            group = self.group_of[name]
            item = next(item for item in group if item.name.full == name)
            for part in parts:
                _check(item, part)
            members = self.waiting.setdefault(group[0].name.full, {})
            members[name] = parts
            if len(members) == len(group):
                del self.waiting[group[0].name.full]
                self._complete(group, [part for item in group for part in members[item.name.full]])

    def _complete(self, group: tuple[Planned, ...], pieces: list[Piece]) -> None:
        self.ready.append(Ready(group, pieces))
        cut = {piece.name: piece.expert for piece in pieces if piece.dim is not None}
        for item in group:
            size = math.prod(item.shape)
            if item.name.full in cut:
                size = -(-size // self.placement.tensor(cut[item.name.full])[1])
            if item.format is None:
                self.ready_bytes += size * DTYPES[item.dtype].itemsize
            else:
                self.ready_bytes += size * 9 // 16 if isinstance(item.format, NVFP4) else size * 33 // 32

    def take(self) -> list[Ready]:
        """All that is ready; nothing of it is kept."""
        taken, self.ready, self.ready_bytes = self.ready, [], 0
        return taken

    def check_complete(self) -> None:
        """Nothing waits for a partner, and on a rank by itself nothing is missing."""
        for members in self.waiting.values():
            name = next(iter(members))
            missing = [i.name.full for i in self.group_of[name] if i.name.full not in members]
            raise CheckpointError(
                f"{' and '.join(missing)} never came, but {' and '.join(members)} did; engines fuse them under one "
                "tensor scale: give all of them"
            )
        if self.placement.pp_size * self.placement.ep_size == 1:  # all of it is expected here
            missing = [item.name.full for item in self.plan if item.name.full not in self.seen]
            if missing:
                raise CheckpointError(f"{missing[0]} and {len(missing) - 1} other planned tensors never came")


def _check(item: Planned, piece: Piece) -> None:
    """A piece fits what is planned: dtype, place, and blocks that it does not cut."""
    shape, planned = tuple(piece.tensor.shape), item.shape
    if tensor_dtype(piece.tensor) != item.dtype:
        raise CheckpointError(
            f"{piece.name}: is {piece.tensor.dtype}, planned is {item.dtype}, as in the checkpoint; convert it first"
        )
    dim = piece.dim
    whole = list(planned)
    if dim is not None:
        whole[dim] = shape[dim] if dim < len(shape) else -1
    if list(shape) != whole or (dim is not None and piece.start + shape[dim] > planned[dim]):
        raise CheckpointError(
            f"{piece.name}: a part of shape {list(shape)} at {piece.start} of dimension {dim} does not fit the planned "
            f"{list(planned)}: check the placement"
        )
    if item.format is None or dim is None:
        return
    block = item.format.block if isinstance(item.format, NVFP4) else (1, item.format.block_columns)
    cuts = [edge for edge in (piece.start, piece.start + shape[dim]) if edge % block[dim] and edge != planned[dim]]
    if cuts:
        raise CheckpointError(
            f"{piece.name}: a part ends at {cuts[0]} of dimension {dim}, inside a block of {block[dim]}; use a "
            f"tensor-parallel size whose parts are divisible by {block[dim]}, or exclude it with --ignore"
        )
