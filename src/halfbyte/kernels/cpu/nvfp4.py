"""NVFP4 on the CPU: quantize and dequantize, as `halfbyte.numerics.nvfp4`.

One pass finds the maxima (with row scaling each row is quantized right after, while it is in cache), one more
quantizes. A block is one vector of sixteen lanes from load to store; 16×16 blocks go through a tile of sixteen
vectors. Nothing of the tensor's size is allocated but the output.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...formats import E2M1_MAX, NVFP4
from . import nvfp4_code as code
from .compile import parts, run
from .group import GROUP
from .search_code import search_rule
from .source import KINDS, empty, memory, rows_of, source

COLUMNS = 16
_WORD = 0xFFFFFFFF
_IN_CACHE = 1 << 19  # bytes that a core still has at hand when it reads them again


class Encoded(NamedTuple):
    """As `halfbyte.numerics.nvfp4.Encoded`."""

    packed: Tensor
    block_scale: Tensor
    tensor_scale: Tensor
    amax: Tensor


def quantize(
    x: Tensor,
    fmt: NVFP4,
    *,
    amax: Tensor | None = None,
    per_matrix: bool = False,
    rng: tuple[int, int] | Tensor | None = None,
    first_block: int = 0,
    importance: Tensor | None = None,
    hessian: Tensor | None = None,
) -> Encoded:
    """Quantize x (…, K), K % 16 == 0, float32/bfloat16/float16, of any strides. Arguments as in `halfbyte.quantize`."""
    shape = tuple(x.shape)
    lead, blocks = shape[:-1], shape[-1] // COLUMNS
    rows = math.prod(lead)
    scale_shape = lead if fmt.scaling == "row" else lead[:-1] if per_matrix else ()
    packed, packed_bytes = empty((*lead, shape[-1] // 2), torch.uint8)
    block_scale, scale_bytes = empty((*lead, blocks), torch.float8_e4m3fn)
    tensor_scale, decode_scales = empty(scale_shape, torch.float32)
    out_amax, amaxes = empty(scale_shape, torch.float32)
    out = Encoded(packed, block_scale, tensor_scale, out_amax)
    count = len(amaxes)
    scales = code.Scales(amaxes, np.empty(count, np.float32), decode_scales, rows // max(count, 1))
    rule, threads = _rule(fmt, rng, first_block, shape[-1], importance, hessian), torch.get_num_threads()
    if amax is not None or x.numel() == 0:
        if amax is None:
            amaxes.fill(0.0)
        else:
            out_amax.copy_(amax.detach())
        code.tensor_scales(np.empty((0, 0), np.int32), scales, rule.six_e, 0, count)
        if x.numel() == 0:
            return out

    rows_in = source(x, rotate=fmt.hadamard)
    result = code.Output(packed_bytes, scale_bytes, blocks)
    matrix_rows, units = 0, rows
    if fmt.block == (16, 16):
        matrix_rows = shape[-2] if per_matrix else rows
        units = rows // matrix_rows * -(-matrix_rows // 16)

    def encode(row: int, row_end: int, block: int, block_end: int) -> None:
        code.quantize(rows_in, scales, rule, result, matrix_rows, _group(), row, row_end, block, block_end)

    def find_maxima(maxima: Any, row: int, row_end: int, block: int, block_end: int) -> None:
        code.row_maxima(rows_in, maxima, _group(), row, row_end, block, block_end)

    def scale_and_encode(row: int, row_end: int, block: int, block_end: int) -> None:
        find_maxima(maxima[0], row, row_end, block, block_end)
        code.tensor_scales(maxima, scales, rule.six_e, row, row_end)
        encode(row, row_end, block, block_end)

    if amax is None:
        own = fmt.scaling == "row"
        pieces = parts(rows, blocks, COLUMNS, threads, most=_IN_CACHE // x.itemsize if own else None)
        starts = sorted({block for _, _, block, _ in pieces})
        maxima = np.empty((len(starts), rows), np.int32)
        if own and len(starts) == 1:  # whole rows: each is read once
            run(scale_and_encode, pieces, threads)
            return out
        run(lambda *piece: find_maxima(maxima[starts.index(piece[2])], *piece), pieces, threads)
        code.tensor_scales(maxima, scales, rule.six_e, 0, count)
    run(encode, parts(units, blocks, rows // units * COLUMNS, threads), threads)
    return out


def _group() -> Any:
    return np.empty(GROUP, np.float32)


def _rule(
    fmt: NVFP4,
    rng: tuple[int, int] | Tensor | None,
    first_block: int,
    columns: int,
    importance: Tensor | None,
    hessian: Tensor | None,
) -> code.Rule:
    assert fmt.e4m3_max is not None  # resolved when the format was built
    six_e = np.float32(E2M1_MAX * fmt.e4m3_max)
    if fmt.scale_rule == "four_over_six":
        return code.FourOverSix(six_e, fmt.error_arithmetic == "fp16", fmt.error == "mse")
    if fmt.scale_rule == "search":
        return search_rule(six_e, fmt.error == "mse", columns // COLUMNS, importance, hessian)
    if fmt.rounding == "stochastic":
        assert rng is not None  # ops checks it
        numbers = rng.tolist() if isinstance(rng, Tensor) else rng
        words = [word & _WORD for number in numbers for word in (number, number >> 32)]
        return code.Stochastic(six_e, (words[0], words[1], words[2], words[3]), first_block)
    return code.Amax(six_e)


def dequantize(
    packed: Tensor, block_scale: Tensor, tensor_scale: Tensor | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """q · (f32(s) · S_dec), rounded once to dtype, (…, K); tensor_scale of any shape that `quantize` gives, or None: 1.

    Inputs that are not contiguous are copied.
    """
    if tensor_scale is None:
        tensor_scale = torch.ones((), dtype=torch.float32)
    rows, blocks = rows_of(packed.shape), block_scale.shape[-1]
    out, values = empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype)
    if out.numel() == 0:
        return out
    lead = packed.shape[:-1]
    scale = tensor_scale.reshape(-1)
    if scale.numel() != 1 and tensor_scale.shape != lead[: tensor_scale.dim()]:
        aligned = tensor_scale.reshape(*tensor_scale.shape, *(1,) * (len(lead) - tensor_scale.dim()))
        scale = aligned.expand(lead).reshape(-1)
    threads = torch.get_num_threads()
    arguments = (
        memory(packed.contiguous()),
        memory(block_scale.contiguous()),
        memory(scale.contiguous()),
        rows // scale.numel(),
        blocks,
        KINDS[dtype],
        values,
    )
    run(lambda *piece: code.dequantize(*arguments, *piece), parts(rows, blocks, COLUMNS, threads), threads)
    return out
