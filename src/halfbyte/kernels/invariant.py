"""Matmuls whose rows do not depend on the batch: each result is one accumulator, added to in order of k.

A result starts at 0 and takes 16 products at a time, k from 0 up, in one tensor core accumulator; nothing is split
along k. The instruction that adds them is the same for all tiles below, so a tile's other rows, and how large it is,
do not matter. tests/kernels/test_triton_invariant.py holds every count of rows, and with them every tile, to the same
bits; a GPU on which the tiles differ needs one tile for all.

Fewest bytes: as of any matmul, M·K + N·K operands of 2 bytes read and M·N results written; with few rows it is reading
w that takes the time.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from . import _target
from ._launch import cdiv, launch, next_power_of_2
from ._primitives import as_float32, jit, jit_varying
from ._tiles import KINDS
from .epilogue import axis, scaled, store


class Tile(NamedTuple):
    """Rows, columns and depth of a program's tile, and how it runs."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


FEW = Tile(64, 32, 128, 4, 4)  # many programs, of which each reads w once
MIDDLE = Tile(64, 128, 64, 4, 4)
MANY = Tile(128, 128, 64, 8, 3)
LARGE = Tile(128, 256, 64, 8, 3)  # where a program may have as much shared memory
FLOAT32 = Tile(32, 32, 32, 4, 2)  # without tensor cores
MANY_RESULTS = 1 << 22  # enough for a MANY tile on each multiprocessor


def tile_of(a: Tensor, rows: int, columns: int) -> Tile:
    """The tile for that many rows of results."""
    if a.dtype == torch.float32:
        return FLOAT32
    if rows <= FEW.rows:
        return FEW
    if rows * columns < MANY_RESULTS:
        return MIDDLE
    return LARGE if _target.has_large_shared_memory(a.device) else MANY


@jit
def _tile(
    a_ptr, b_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, out_ptr, first, end, first_column, expert, columns,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KIND: tl.constexpr, OUT: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, BIAS: tl.constexpr, BIAS_KIND: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Rows first to end, at most BM, and BN columns; b_ptr is at the expert's matrix."""
    row = first.to(tl.int64) + tl.arange(0, BM)
    column = first_column + tl.arange(0, BN)
    row_mask, column_mask = row < end, column < columns
    within = tl.arange(0, BK)
    a = a_ptr + row[:, None] * K + within[None, :]  # [BM, BK]
    b = b_ptr + tl.where(column_mask, column, 0).to(tl.int64)[None, :] * K + within[:, None]  # [BK, BN]
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        if K % BK:
            inside = within < K - start
            x = tl.load(a + start, mask=row_mask[:, None] & inside[None, :], other=0.0)
            w = tl.load(b + start, mask=inside[:, None], other=0.0)
        else:
            x = tl.load(a + start, mask=row_mask[:, None], other=0.0)
            w = tl.load(b + start)
        if NATIVE == 0:  # the interpreter multiplies bfloat16's bits
            x, w = as_float32(x, KIND), as_float32(w, KIND)
        total = tl.dot(x, w, total, input_precision="ieee")
    value = scaled(
        total, a_scale_ptr, b_scale_ptr, bias_ptr, row, column, tl.zeros_like(row) + expert, columns, row_mask,
        column_mask, A, B, BIAS, BIAS_KIND,
    )  # fmt: skip
    out = out_ptr + row[:, None] * columns + column[None, :]
    store(out, value, row_mask[:, None] & column_mask[None, :], OUT, NATIVE)


@jit_varying("rows")
def _matmul(
    a_ptr, b_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, out_ptr, columns, rows,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KIND: tl.constexpr, OUT: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, BIAS: tl.constexpr, BIAS_KIND: tl.constexpr, NATIVE: tl.constexpr,
    BAND: tl.constexpr,
):  # fmt: skip
    # Programs that run at a time share rows of a and of b: they go down BAND tiles, then to the next column.
    pid = tl.program_id(0)
    row_tiles, column_tiles = (rows + BM - 1) // BM, (columns + BN - 1) // BN
    band = pid // (BAND * column_tiles)
    height = tl.minimum(row_tiles - band * BAND, BAND)
    place = pid % (BAND * column_tiles)
    _tile(
        a_ptr, b_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, out_ptr, (band * BAND + place % height) * BM, rows,
        place // height * BN, 0, columns, K, BM, BN, BK, KIND, OUT, A, B, BIAS, BIAS_KIND, NATIVE,
    )  # fmt: skip


@jit
def _grouped(
    a_ptr, b_ptr, offsets_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, out_ptr, columns, experts,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BE: tl.constexpr, KIND: tl.constexpr,
    OUT: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BIAS: tl.constexpr, BIAS_KIND: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    # Tiles are counted through the experts; there are more programs than tiles, since nobody asked the GPU for counts.
    pid = tl.program_id(0)
    column_tiles = (columns + BN - 1) // BN
    tile = pid // column_tiles
    e = tl.arange(0, BE)
    ends = tl.load(offsets_ptr + e, mask=e < experts, other=0)
    starts = tl.load(offsets_ptr + e - 1, mask=(e > 0) & (e < experts), other=0)
    tiles = tl.where(e < experts, (ends - starts + BM - 1) // BM, 0)
    after = tl.cumsum(tiles, 0)  # tiles up to each expert's last
    if tile < tl.sum(tiles, 0):
        expert = tl.sum((after <= tile).to(tl.int32), 0)
        mine = e == expert
        first = tl.sum(tl.where(mine, starts + (tile - after + tiles) * BM, 0), 0)
        end = tl.sum(tl.where(mine, ends, 0), 0)
        _tile(
            a_ptr, b_ptr + expert.to(tl.int64) * columns * K, a_scale_ptr, b_scale_ptr, bias_ptr, out_ptr, first, end,
            pid % column_tiles * BN, expert, columns, K, BM, BN, BK, KIND, OUT, A, B, BIAS, BIAS_KIND, NATIVE,
        )  # fmt: skip


def scaled_matmul(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    *,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    tile: Tile | None = None,
) -> Tensor:
    """As `halfbyte.ops.scaled_matmul` with batch_invariant=True, in one launch; tile: for tests."""
    rows, columns = a.shape[0], b.shape[0]
    out = torch.empty((rows, columns), dtype=out_dtype, device=a.device)
    if out.numel() == 0:
        return out
    tile = tile or tile_of(a, rows, columns)
    launch(
        _matmul, cdiv(rows, tile.rows) * cdiv(columns, tile.columns),
        (aligned(a), aligned(b), *_given(a_scale, b_scale, bias, out), out), (columns,), (rows,),
        **_constants(tile, a, a_scale, b_scale, bias, out, ("one", "columns", "")), BAND=8,
    )  # fmt: skip
    return out


def scaled_grouped_matmul(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    *,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """As `halfbyte.ops.scaled_grouped_matmul` with batch_invariant=True, in a fill and one launch."""
    rows, (experts, columns, _) = a.shape[0], b.shape
    out = torch.zeros((rows, columns), dtype=out_dtype, device=a.device)
    if out.numel() == 0 or experts == 0:
        return out
    tile = tile_of(a, rows // experts, columns * experts)
    tiles = min(cdiv(rows, tile.rows) + experts, rows)  # a tile of each expert may be its last, with a row at least
    constants = _constants(tile, a, a_scale, b_scale, bias, out, ("one", "experts", "experts and columns"))
    launch(
        _grouped, tiles * cdiv(columns, tile.columns),
        (aligned(a), aligned(b), offsets.contiguous(), *_given(a_scale, b_scale, bias, out), out),
        (columns, experts), BE=next_power_of_2(experts), **constants,
    )  # fmt: skip
    return out


def aligned(x: Tensor) -> Tensor:
    """Contiguous, from a multiple of 16 bytes on: the compiled kernel depends on it, and so might its sums."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _given(*tensors: Tensor | None) -> list[Tensor]:
    """All but the last; those that are missing as the last, which is not read."""
    *optional, out = tensors
    assert out is not None  # callers give it
    return [out if t is None else t.contiguous() for t in optional]


def _constants(
    tile: Tile,
    a: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    names: tuple[str, str, str],
) -> dict[str, Any]:
    return {
        "K": a.shape[1], "BM": tile.rows, "BN": tile.columns, "BK": tile.depth, "KIND": KINDS[a.dtype],
        "OUT": KINDS[out.dtype],
        "A": axis(a_scale, ("one", "rows", "")), "B": axis(b_scale, names), "BIAS": axis(bias, names),
        "BIAS_KIND": 2 if bias is None else KINDS[bias.dtype], "NATIVE": _target.native_level(a.device),
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
