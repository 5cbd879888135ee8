"""Weights that others quantized, decoded on the CPU as `halfbyte.numerics.blocks` does: a table, times the scale."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .compile import kernel, parts, run
from .source import empty, memory

_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_CODES = np.concatenate((_MAGNITUDES, -_MAGNITUDES))
_E2M1 = np.stack((np.tile(_CODES, 16), np.repeat(_CODES, 16)), 1).reshape(-1)  # low nibble, high nibble


def decode(elements: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """elements (N, K) float8_e4m3fn or (N, K/2) uint8, scale (⌈N/m⌉, ⌈K/n⌉) float32 → (N, K) float32."""
    rows, columns = elements.shape
    each = 2 if elements.dtype == torch.uint8 else 1
    table = _E2M1 if each == 2 else torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    out, values = empty((rows, columns * each), torch.float32)
    if out.numel():
        arguments = (memory(elements.contiguous()), memory(scale.contiguous()), scale.shape[1], columns * each, each)
        threads = torch.get_num_threads()
        pieces = parts(rows, 1, columns * each, threads)
        run(lambda *piece: _decode(*arguments, block[0], block[1], table, values, *piece), pieces, threads)
    return out


@kernel
def _decode(
    elements: Any,
    scale: Any,
    grid: int,
    columns: int,
    each: int,
    height: int,
    width: int,
    table: Any,
    out: Any,
    row: int,
    row_end: int,
    _block: int,
    _block_end: int,
) -> None:
    for r in range(row, row_end):
        for g in range(grid):
            s = scale[r // height * grid + g]
            first, end = r * columns + g * width, r * columns + min(columns, (g + 1) * width)
            if each == 1:
                for i in range(first, end):
                    out[i] = table[elements[i]] * s
            else:  # blocks of E2M1 have whole bytes
                for i in range(first // 2, end // 2):
                    byte = np.int64(elements[i])
                    out[2 * i], out[2 * i + 1] = table[2 * byte] * s, table[2 * byte + 1] * s
