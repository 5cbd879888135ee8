"""MXFP8 on the CPU: quantize and dequantize, as `halfbyte.numerics.mxfp8`; a block is two vectors of sixteen lanes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .compile import kernel, parts, run
from .elements import MAGNITUDE, e4m3, e4m3_value, e8m0_up, power_of_two, store_floats
from .source import KINDS, Source, empty, memory, read_across, read_down, rows_of, source
from .vector import bits, from_bits, item, load, maximum_of, put, store, where

COLUMNS = 32
_NAN_BYTE = 255
_NAN = np.float32(np.nan)
_PER_MAXIMUM = np.float32(1 / 448)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (…, K), K % 32 == 0, of any strides → elements (…, K) float8_e4m3fn, block_scale (…, K/32) uint8 E8M0."""
    rows, blocks = rows_of(x.shape), x.shape[-1] // COLUMNS
    elements, element_bytes = empty(x.shape, torch.float8_e4m3fn)
    block_scale, scale_bytes = empty((*x.shape[:-1], blocks), torch.uint8)
    if x.numel():
        arguments = (source(x), element_bytes, scale_bytes, blocks)
        threads = torch.get_num_threads()
        run(lambda *piece: _quantize(*arguments, *_room(), *piece), parts(rows, blocks, COLUMNS, threads), threads)
    return elements, block_scale


def dequantize(elements: Tensor, block_scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """value · 2^(code-127), rounded once to dtype, (…, K); scale 255 → NaN. Copies inputs that are not contiguous."""
    rows, blocks = rows_of(elements.shape), block_scale.shape[-1]
    out, values = empty(elements.shape, dtype)
    if out.numel():
        arguments = (memory(elements.contiguous()), memory(block_scale.contiguous()), blocks, KINDS[dtype], values)
        threads = torch.get_num_threads()
        run(lambda *piece: _dequantize(*arguments, *piece), parts(rows, blocks, COLUMNS, threads), threads)
    return out


def _room() -> tuple[Any, Any, Any]:
    return np.empty(256, np.float32), np.empty(256, np.float32), np.zeros(32, np.float32)


@kernel
def _quantize(
    x: Source,
    elements: Any,
    block_scale: Any,
    blocks: int,
    left: Any,
    right: Any,
    lanes: Any,
    row: int,
    row_end: int,
    block: int,
    block_end: int,
) -> None:
    """Sixteen blocks at a time: neighbours in a row, or, where x is not contiguous along it, one below the other.

    left, right: (256,) float32, room for both halves of each block; lanes: (32,), for their scales and codes.
    """
    down = x.step != 1 or blocks < 8
    for r in range(row, row_end, 16 if down else 1):
        for b in range(block, block_end, 1 if down else 16):
            if down:
                count, step = min(16, row_end - r), blocks
                read_down(x, r, b * COLUMNS, count, left)
                read_down(x, r, b * COLUMNS + 16, count, right)
            else:
                count, step = min(16, block_end - b), 1
                read_across(x, r, b * COLUMNS, COLUMNS, count, left)
                read_across(x, r, b * COLUMNS + 16, COLUMNS, count, right)
            for i in range(count):
                a, c = bits(load(left, i * 16)) & MAGNITUDE, bits(load(right, i * 16)) & MAGNITUDE
                put(lanes, i, from_bits(maximum_of(where(a > c, a, c))))
            code = e8m0_up(load(lanes, 0) * _PER_MAXIMUM)
            store(lanes, 0, power_of_two(254 - code))  # 2^(127 - code), exact, the smallest a subnormal
            store(lanes, 16, from_bits(code))
            for i in range(count):
                index = r * blocks + b + i * step
                encode, scale = item(lanes, i), bits(item(lanes, 16 + i))
                keep = 0 if scale == _NAN_BYTE else 0xFF  # a block with NaN has elements 0
                put(block_scale, index, scale)
                store(elements, index * COLUMNS, e4m3(load(left, i * 16) * encode) & keep)
                store(elements, index * COLUMNS + 16, e4m3(load(right, i * 16) * encode) & keep)


@kernel
def _dequantize(
    elements: Any,
    block_scale: Any,
    blocks: int,
    kind: int,
    out: Any,
    row: int,
    row_end: int,
    block: int,
    block_end: int,
) -> None:
    for r in range(row, row_end):
        for index in range(r * blocks + block, r * blocks + block_end):
            code = block_scale[index]
            scale = _NAN if code == _NAN_BYTE else power_of_two(code)
            for half in range(0, COLUMNS, 16):
                values = e4m3_value(load(elements, index * COLUMNS + half)) * scale
                store_floats(out, index * COLUMNS + half, values, kind)
