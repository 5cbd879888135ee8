"""Quantize the same tensors again and again, into the same places, in one launch however many there are.

Fewest bytes and floor as in `many.py`, to which this is the sequel: there addresses travel as arguments and every
program searches a table of at most 128 tensors. Here the tables outlive the launch, so they are made once, on the
host: one word for each program says which tile of which tensor it takes. Tensors of one group share a maximum.

The order is that of `many.py`: the maximum's tiles of tensor i come before the quantization of tensor m if they begin
less than `ahead` tiles after the last tile of m's group.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from ..formats import NVFP4
from . import _target, quantize
from ._launch import cdiv, launch
from ._primitives import jit
from ._tiles import KINDS
from ._waiting import publish, wait
from .many import _DTYPES, ALIGNED, Quantized, supports
from .stacked import AHEAD, AMAX_BLOCKS, AMAX_STEPS, amax_tile, tile_blocks

COLUMNS = 8  # of a tensor's row in the table: address, blocks, first block of the output, group, its tiles
_IS_AMAX = 1 << 62


@jit
def _quantize(
    work_ptr, table_ptr, state_ptr, amax_ptr, out_ptr, scale_ptr, tensor_scale_ptr, amax_out_ptr,
    COLUMNS: tl.constexpr, PART: tl.constexpr, BB: tl.constexpr, EVEN: tl.constexpr, AMAX_BB: tl.constexpr,
    AMAX_STEPS: tl.constexpr, DTYPE: tl.constexpr, KIND: tl.constexpr, F: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    # work: [programs]; state: of each group, its maximum's bit pattern and its finished tiles
    work = tl.load(work_ptr + tl.program_id(0))
    i = (work >> 32) & 0x3FFFFFFF
    tile = (work & 0x7FFFFFFF).to(tl.int32)
    row_ptr = table_ptr + i * COLUMNS
    x_ptr = tl.multiple_of(tl.load(row_ptr).to(tl.pointer_type(DTYPE)), 16)
    blocks = tl.load(row_ptr + 1).to(tl.int32)
    first = tl.multiple_of(tl.load(row_ptr + 2), ALIGNED)
    group = tl.load(row_ptr + 3)
    wanted = tl.load(row_ptr + 4).to(tl.int32)
    zero = tl.zeros((), tl.int64)
    slot_ptr = state_ptr + group * 2
    if PART == "values":
        quantize.quantize_tile(
            x_ptr, out_ptr + first * 8, scale_ptr + first, amax_ptr + group, tensor_scale_ptr + i, amax_out_ptr + i,
            None, None, None, zero, tile * BB, blocks, 1, 0, 0, 0, 0, 1, zero, zero, zero,
            BB, EVEN, True, KIND, "packed", F, NATIVE, False,
        )  # fmt: skip
    elif PART == "maxima":
        amax_tile(x_ptr, slot_ptr, zero, tile, blocks, 1, AMAX_BB, AMAX_STEPS, KIND, F.hadamard, NATIVE)
    else:
        if ((work >> 62) & 1) != 0:
            amax_tile(x_ptr, slot_ptr, zero, tile, blocks, 1, AMAX_BB, AMAX_STEPS, KIND, F.hadamard, NATIVE)
            publish(slot_ptr + 1)
        else:
            wait(slot_ptr + 1, wanted, NATIVE)
            quantize.quantize_tile(
                x_ptr, out_ptr + first * 8, scale_ptr + first, slot_ptr.to(tl.pointer_type(tl.float32)),
                tensor_scale_ptr + i, amax_out_ptr + i,
                None, None, None, zero, tile * BB, blocks, 1, 0, 0, 0, 0, 1, zero, zero, zero,
                BB, EVEN, True, KIND, "packed", F, NATIVE, True,
            )  # fmt: skip


class Prepared:
    """Tensors and where they go; see `halfbyte.ops.prepare_many`. xs must satisfy `many.supports`."""

    def __init__(
        self, xs: Sequence[Tensor], groups: Sequence[int], firsts: Sequence[int], fmt: NVFP4, out: Quantized
    ) -> None:
        self.fmt, self.out = fmt, out
        self.xs = list(xs)  # their memory must stay
        x, self.bb = xs[0], tile_blocks(fmt)
        amax_bb = AMAX_BLOCKS * AMAX_STEPS
        blocks = np.array([x.numel() // 16 for x in xs], np.int64)
        of = np.array(groups, np.int64)
        self.even = bool((blocks % self.bb == 0).all())
        amax_tiles, tiles = -(-blocks // amax_bb), -(-blocks // self.bb)
        count = int(of.max()) + 1
        table = np.zeros((len(xs), COLUMNS), np.int64)
        table[:, 0] = [x.data_ptr() for x in xs]
        table[:, 1], table[:, 2], table[:, 3] = blocks, np.array(firsts, np.int64), of
        table[:, 4] = np.bincount(of, amax_tiles, count).astype(np.int64)[of]
        self.table = torch.from_numpy(table).to(x.device)
        self.state = torch.zeros(count, 2, dtype=torch.int32, device=x.device)
        ahead = cdiv(AHEAD, amax_bb * 16 * x.element_size())
        self._tiles = amax_tiles, tiles, of, count, ahead
        self._work: dict[str, Tensor] = {}

    def maxima(self) -> Tensor:
        """Of each group, float32 (groups,)."""
        self._launch("maxima", self.state)
        return self.state.view(torch.float32)[:, 0].contiguous()

    def run(self, maxima: Tensor | None = None) -> None:
        """Quantize all, under the maxima (groups,) of others, or under their own."""
        if maxima is None:
            self._launch("both", self.state)
        else:
            self._launch("values", maxima.contiguous())

    def _launch(self, part: str, maxima: Tensor) -> None:
        if part != "values":
            self.state.zero_()
        x = self.xs[0]
        if part not in self._work:
            self._work[part] = torch.from_numpy(_order(part, *self._tiles)).to(x.device)
        work = self._work[part]
        launch(
            _quantize, len(work), (work, self.table, self.state, maxima, *self.out), (),
            COLUMNS=COLUMNS, PART=part, BB=self.bb, EVEN=self.even, AMAX_BB=AMAX_BLOCKS, AMAX_STEPS=AMAX_STEPS,
            DTYPE=_DTYPES[x.dtype], KIND=KINDS[x.dtype], F=self.fmt, NATIVE=_target.native_level(x.device),
        )  # fmt: skip


def _order(part: str, amax_tiles, tiles, groups, count: int, ahead: int):
    """A word for each program of a part."""
    n = len(tiles)
    until = np.cumsum(amax_tiles)
    group_until = np.zeros(count, np.int64)
    np.maximum.at(group_until, groups, until)
    tensor = np.concatenate((np.arange(n), np.arange(n)))
    is_amax = np.repeat([True, False], n)
    at = np.concatenate((until - amax_tiles, group_until[groups] + ahead))
    order = np.lexsort((tensor, is_amax, at))  # of equals the quantization first
    if part != "both":
        order = order[is_amax[order] == (part == "maxima")]
    lengths = np.concatenate((amax_tiles, tiles))[order]
    tile = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.repeat(tensor[order] << 32 | np.where(is_amax[order], _IS_AMAX, 0), lengths) | tile


__all__ = ["Prepared", "supports"]
