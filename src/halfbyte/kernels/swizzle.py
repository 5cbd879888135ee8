"""The order in which Blackwell's scaled matmul reads block scales: tiles of 128 rows by 4 columns of scales.

Fewest bytes: each scale once in, once out; scales are 1/32 of a bf16 tensor, so that launch overhead rules.

Scales (rows, columns) are padded with zeros to multiples of 128 and 4. Tiles follow one another row-major, 512 bytes
each; scale (r, c) of a tile lies at (r mod 32)·16 + (r // 32)·4 + c. This is cuBLAS's "128x4" layout, torchao's
`to_blocked`.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import ShapeError
from ._primitives import jit


@jit
def _convert(
    source_ptr, target_ptr, rows, columns, column_tiles, stride_m, stride_k, FORWARD: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    byte = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)  # [B], in the tiled layout
    tile = byte // 512
    row = tile // column_tiles * 128 + byte // 4 % 4 * 32 + byte // 16 % 32
    column = tile % column_tiles * 4 + byte % 4
    inside = (row < rows) & (column < columns)
    plain = row * stride_m + column * stride_k
    if FORWARD:
        tl.store(target_ptr + byte, tl.load(source_ptr + plain, mask=inside, other=0))
    else:
        tl.store(target_ptr + plain, tl.load(source_ptr + byte), mask=inside)


def swizzle(scale: Tensor) -> Tensor:
    """Block scales (rows, columns) of one byte each → the same dtype, 1-D, padded, in tiles of 128×4."""
    if scale.dim() != 2 or scale.element_size() != 1:
        raise ShapeError(
            f"scale is {scale.dtype} {tuple(scale.shape)}; needs one byte per scale, shape (rows, columns)"
        )
    rows, columns = scale.shape
    size = _tiled_size(rows, columns)
    result = torch.empty(size, dtype=scale.dtype, device=scale.device)
    if size:
        _convert[(size // 512,)](
            scale.view(torch.uint8), result.view(torch.uint8), rows, columns, triton.cdiv(columns, 4), *scale.stride(),
            FORWARD=True, B=512,
        )  # fmt: skip
    return result


def unswizzle(tiled: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `swizzle`: drops the padding, returns (rows, columns)."""
    size = _tiled_size(rows, columns)
    if tiled.element_size() != 1 or math.prod(tiled.shape) != size:
        raise ShapeError(f"tiled scales of {rows}×{columns} are {size} bytes; got {tiled.dtype} {tuple(tiled.shape)}")
    result = torch.empty((rows, columns), dtype=tiled.dtype, device=tiled.device)
    if result.numel():
        _convert[(size // 512,)](
            tiled.contiguous().view(torch.uint8), result.view(torch.uint8), rows, columns, triton.cdiv(columns, 4),
            columns, 1, FORWARD=False, B=512,
        )  # fmt: skip
    return result


def _tiled_size(rows: int, columns: int) -> int:
    return -(-rows // 128) * 128 * (-(-columns // 4) * 4)
