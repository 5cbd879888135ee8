"""Quantize the same tensors again and again, into the same places, in one launch however many there are.

Fewest bytes and floor as in `many.py`, to which this is the sequel: there addresses travel as arguments and every
program searches a table of at most 128 tensors. Here the table outlives the launch, so it is made once, on the host:
a row of 32 bytes for each program, in which it finds all that it needs. (A word for each program that led to a row of
each tensor was a second wait for memory, and 7% slower; rows that come from device memory were another 3%.) Tensors of
one group share a maximum.

The order is that of `many.py`: the maximum's tiles of tensor i come before the quantization of tensor m if they begin
less than `ahead` tiles after the last tile of m's group.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from ..formats import NVFP4
from . import _target, quantize
from ._launch import cdiv, launch
from ._primitives import jit, tensor_scales
from ._tiles import KINDS
from ._waiting import SLOTS, maximum_words, publish_maximum, wait_maximum
from .many import _DTYPES, ALIGNED, Quantized, supports
from .stacked import AHEAD, amax_tile, tile_blocks

TILE, AMAX_BLOCKS, AMAX_STEPS = 512, 128, 16  # smaller than those of `stacked`, since a program here starts sooner
REGISTERS = 80  # a thread's, which is six programs at a time where 16-bit elements are rounded the plain way
PREFETCH = tl.constexpr(512)  # programs ahead whose rows of the table are brought into the L2 cache
_IS_AMAX = np.int64(-1) << 63


@jit
def _quantize(
    table_ptr, state_ptr, amax_ptr, out_ptr, scale_ptr, tensor_scale_ptr, amax_out_ptr,
    PART: tl.constexpr, BB: tl.constexpr, EVEN: tl.constexpr, AMAX_BB: tl.constexpr, AMAX_STEPS: tl.constexpr,
    DTYPE: tl.constexpr, KIND: tl.constexpr, F: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    # table: see `_table`; state: of each group, what `publish_maximum` wants
    row_ptr = table_ptr + tl.program_id(0).to(tl.int64) * 4
    x_ptr = tl.multiple_of(tl.load(row_ptr).to(tl.pointer_type(DTYPE)), 16)
    second, third, fourth = tl.load(row_ptr + 1), tl.load(row_ptr + 2), tl.load(row_ptr + 3)
    if NATIVE:
        _prefetch(row_ptr + PREFETCH * 4)
    first = tl.multiple_of(second & 0x7FFFFFFFFFFFFFFF, ALIGNED)
    place, amax_tiles = third >> 32, third.to(tl.int32)
    tensor, blocks = fourth >> 32, fourth.to(tl.int32)
    zero = tl.zeros((), tl.int64)
    if PART == "maxima":
        bits = amax_tile(x_ptr, zero, 0, blocks, 1, AMAX_BB, AMAX_STEPS, KIND, F.hadamard, NATIVE)
        tl.atomic_max(state_ptr + place, bits, sem="relaxed")
    elif PART == "values":
        _values(
            x_ptr, out_ptr, scale_ptr, amax_ptr + place, tensor_scale_ptr, amax_out_ptr, first, tensor, blocks,
            BB, EVEN, KIND, F, NATIVE, None,
        )  # fmt: skip
    elif second < 0:
        bits = amax_tile(x_ptr, zero, 0, blocks, 1, AMAX_BB, AMAX_STEPS, KIND, F.hadamard, NATIVE)
        publish_maximum(state_ptr + place, bits, 0, amax_tiles)
    else:
        _values(
            x_ptr, out_ptr, scale_ptr, state_ptr + place, tensor_scale_ptr, amax_out_ptr,
            first, tensor, blocks, BB, EVEN, KIND, F, NATIVE, amax_tiles,
        )  # fmt: skip


@jit
def _prefetch(ptr):
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ptr], dtype=tl.int32, is_pure=False, pack=1
    )


@jit
def _values(
    x_ptr, out_ptr, scale_ptr, amax_ptr, tensor_scale_ptr, amax_out_ptr, first, tensor, blocks,
    BB: tl.constexpr, EVEN: tl.constexpr, KIND: tl.constexpr, F: tl.constexpr, NATIVE: tl.constexpr, amax_tiles,
):  # fmt: skip
    """A tile at x_ptr; its tensor's scales too, from the first of its tiles."""
    zero = tl.zeros((), tl.int64)
    quantize.quantize_tile(
        x_ptr, out_ptr + first * 8, scale_ptr + first, amax_ptr, None, None, None, None, None,
        zero, 0, blocks, 1, 0, 0, 0, 0, 1, zero, zero, zero, BB, EVEN, True, KIND, "packed", F, NATIVE,
        amax_tiles is not None, amax_tiles=amax_tiles,
    )  # fmt: skip
    if tensor >= 0:
        if amax_tiles is None:
            amax = tl.load(amax_ptr)
        else:
            amax = wait_maximum(amax_ptr, amax_tiles, NATIVE)
        tl.store(tensor_scale_ptr + tensor, tensor_scales(amax, F.e4m3_max, NATIVE)[1])
        tl.store(amax_out_ptr + tensor, amax)


class Prepared:
    """Tensors and where they go; see `halfbyte.ops.prepare_many`. xs must satisfy `many.supports`."""

    def __init__(
        self, xs: Sequence[Tensor], groups: Sequence[int], firsts: Sequence[int], fmt: NVFP4, out: Quantized
    ) -> None:
        self.fmt, self.out = fmt, out
        self.xs = list(xs)  # their memory must stay
        columns = [x.data_ptr() for x in xs], [x.numel() // 16 for x in xs], firsts, groups
        self._tensors = _Tensors._make(np.array(column, np.int64) for column in columns)
        self._bb = min(TILE, tile_blocks(fmt))
        self._even = bool((self._tensors.blocks % self._bb == 0).all())
        self._launches: dict[str, tuple[Tensor, Tensor]] = {}  # part → its table, its state

    def maxima(self) -> Tensor:
        """Of each group, float32 (groups,)."""
        return self._launch("maxima", None).view(torch.float32).clone()

    def run(self, maxima: Tensor | None = None) -> None:
        """Quantize all, under the maxima (groups,) of others, or under their own."""
        if maxima is None:
            self._launch("both", None)
        else:
            self._launch("values", maxima.contiguous())

    def _launch(self, part: str, maxima: Tensor | None) -> Tensor:
        """Returns the part's state."""
        x = self.xs[0]
        is_plain = self.fmt.scale_rule == "amax" and not self.fmt.hadamard and x.dtype != torch.float32
        if part not in self._launches:
            rows, words = _table(part, self._tensors, 16 * x.element_size(), self._bb)
            padded = np.concatenate((rows, np.zeros((PREFETCH.value, 4), np.int64)))
            state = torch.empty(words, dtype=torch.int32, device=x.device)
            self._launches[part] = torch.from_numpy(padded).to(x.device), state
        table, state = self._launches[part]
        if part != "values":
            state.zero_()
        launch(
            _quantize, len(table) - PREFETCH.value, (table, state, state if maxima is None else maxima, *self.out), (),
            PART=part, BB=self._bb, EVEN=self._even, AMAX_BB=AMAX_BLOCKS, AMAX_STEPS=AMAX_STEPS,
            DTYPE=_DTYPES[x.dtype], KIND=KINDS[x.dtype], F=self.fmt, NATIVE=_target.native_level(x.device),
            maxnreg=REGISTERS if is_plain and part == "both" else None,
        )  # fmt: skip
        return state


class _Tensors(NamedTuple):
    """What is to be quantized, an int64 for each tensor."""

    address: Any
    blocks: Any
    first: Any  # block of the outputs
    group: Any


def _table(part: str, t: _Tensors, block_bytes: int, bb: int) -> tuple[Any, int]:
    """A row for each program of a part, int64 (programs, 4), and how many words of state they need.

    A row: the address of its tile; its first block of the outputs, negative where it is the maximum's; place · 2³² +
    tiles of its group's maximum; tensor · 2³² + blocks from its tile on. place: in the state, or the group where a
    group is a word. tensor: whose scales it writes, −1 for none.
    """
    n, amax_bb = len(t.blocks), AMAX_BLOCKS * AMAX_STEPS
    amax_tiles, tiles = -(-t.blocks // amax_bb), -(-t.blocks // bb)
    until = np.cumsum(amax_tiles)
    count = int(t.group.max()) + 1
    group_until, group_tiles = np.zeros(count, np.int64), np.zeros(count, np.int64)
    np.maximum.at(group_until, t.group, until)
    np.add.at(group_tiles, t.group, amax_tiles)
    tensor = np.concatenate((np.arange(n), np.arange(n)))
    is_amax = np.repeat([True, False], n)
    ahead = cdiv(AHEAD, amax_bb * block_bytes)
    at = np.concatenate((until - amax_tiles, group_until[t.group] + ahead))
    order = np.lexsort((tensor, is_amax, at))  # of equals the quantization first
    if part != "both":
        order = order[is_amax[order] == (part == "maxima")]
    lengths = np.concatenate((amax_tiles, tiles))[order]
    tile = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    i, is_amax = np.repeat(tensor[order], lengths), np.repeat(is_amax[order], lengths)
    group = t.group[i]
    if part == "both":
        has_slots = group_tiles <= SLOTS.value
        sizes = np.array([maximum_words(tiles) for tiles in group_tiles.tolist()], np.int64)
        words = int(sizes.sum())
        by_group = np.argsort(t.group, kind="stable")
        earlier = np.empty(n, np.int64)  # tiles of the group's tensors before this one
        earlier[by_group] = (np.cumsum(amax_tiles[by_group]) - amax_tiles[by_group]) - (
            np.cumsum(group_tiles) - group_tiles
        )[t.group[by_group]]
        place = (np.cumsum(sizes) - sizes)[group] + np.where(is_amax & has_slots[group], earlier[i] + tile, 0)
    else:
        words, place = count, group
    start = tile * np.where(is_amax, amax_bb, bb)
    table = np.empty((len(i), 4), np.int64)
    table[:, 0] = t.address[i] + start * block_bytes
    table[:, 1] = np.where(is_amax, _IS_AMAX, 0) | (t.first[i] + start)
    table[:, 2] = place << 32 | group_tiles[group]
    table[:, 3] = np.where(tile == 0, i, -1) << 32 | (t.blocks[i] - start)
    return table, words


__all__ = ["Prepared", "supports"]
