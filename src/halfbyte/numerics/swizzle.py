"""The order in which Blackwell's scaled matmul reads block scales: tiles of 128 rows by 4 columns of scales."""

import math

import torch
from torch import Tensor

ROWS, COLUMNS = 128, 4


def swizzle(scale: Tensor) -> Tensor:
    """Block scales (…, R, C) of one byte each → (…, tiles·512), the same dtype; every matrix by itself.

    A matrix is padded with zeros to multiples of 128 rows and 4 columns. Its tiles follow one another row-major, 512
    bytes each; scale (r, c) of a tile lies at (r mod 32)·16 + (r // 32)·4 + c.
    """
    *lead, rows, columns = scale.shape
    down, across = -(-rows // ROWS), -(-columns // COLUMNS)
    padded = torch.zeros((*lead, down * ROWS, across * COLUMNS), dtype=torch.uint8, device=scale.device)
    padded[..., :rows, :columns] = scale.view(torch.uint8)
    tiles = padded.view(*lead, down, 4, 32, across, COLUMNS).movedim(-2, -4)  # [..., down, across, 4, 32, 4]
    return tiles.transpose(-2, -3).reshape(*lead, swizzled_size(rows, columns)).view(scale.dtype)


def unswizzle(swizzled: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse: (…, tiles·512) → (…, rows, columns), without the padding."""
    lead = swizzled.shape[:-1]
    down, across = -(-rows // ROWS), -(-columns // COLUMNS)
    tiles = swizzled.view(torch.uint8).reshape(*lead, down, across, 32, 4, COLUMNS).transpose(-2, -3)
    padded = tiles.movedim(-4, -2).reshape(*lead, down * ROWS, across * COLUMNS)
    return padded[..., :rows, :columns].contiguous().view(swizzled.dtype)


def swizzled_size(rows: int, columns: int) -> int:
    """Bytes of one swizzled matrix."""
    return math.prod((-(-rows // ROWS), -(-columns // COLUMNS), ROWS, COLUMNS))
