"""The order in which Blackwell's scaled matmul reads block scales: tiles of 128 rows by 4 columns of scales.

Fewest bytes: each scale once in, once out; scales are 1/32 of a bf16 tensor, so that launch overhead rules.

The layout is that of `halfbyte.numerics.swizzle`; a program takes one tile of 512 bytes.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import torch
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, launch
from ._primitives import jit

TILE = 512


@jit
def _convert(
    plain_ptr, swizzled_ptr, rows, columns, row_tiles, column_tiles, stride_p, stride_m, stride_k,
    FORWARD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tiles = row_tiles * column_tiles
    tile = pid % tiles
    byte = tl.arange(0, TILE)  # [TILE], as swizzled
    row = (tile // column_tiles * 128 + byte // 4 % 4 * 32 + byte // 16).to(tl.int64)
    column = (tile % column_tiles * 4 + byte % 4).to(tl.int64)
    inside = (row < rows) & (column < columns)
    plain = plain_ptr + (pid // tiles).to(tl.int64) * stride_p + row * stride_m + column * stride_k
    swizzled = swizzled_ptr + pid.to(tl.int64) * TILE + byte
    if FORWARD:
        tl.store(swizzled, tl.load(plain, mask=inside, other=0))
    else:
        tl.store(plain, tl.load(swizzled), mask=inside)


def swizzle(scale: Tensor) -> Tensor:
    """As `halfbyte.numerics.swizzle.swizzle`."""
    *lead, rows, columns = scale.shape
    tiles = cdiv(rows, 128) * cdiv(columns, 4)
    result = torch.empty((*lead, tiles * TILE), dtype=scale.dtype, device=scale.device)
    _launch(scale.reshape(math.prod(lead), rows, columns), result, True)
    return result


def unswizzle(swizzled: Tensor, rows: int, columns: int) -> Tensor:
    """As `halfbyte.numerics.swizzle.unswizzle`."""
    lead = swizzled.shape[:-1]
    result = torch.empty((*lead, rows, columns), dtype=swizzled.dtype, device=swizzled.device)
    _launch(result.view(math.prod(lead), rows, columns), swizzled.contiguous(), False)
    return result


def _launch(plain: Tensor, swizzled: Tensor, forward: bool) -> None:
    matrices, rows, columns = plain.shape
    row_tiles, column_tiles = cdiv(rows, 128), cdiv(columns, 4)
    if matrices * row_tiles * column_tiles:
        launch(
            _convert, matrices * row_tiles * column_tiles, (plain, swizzled),
            (rows, columns, row_tiles, column_tiles, *plain.stride()), FORWARD=forward, TILE=TILE,
        )  # fmt: skip
