"""Quantize to MXFP8 and back.

Fewest bytes, for bf16: quantize reads 2 and writes 1 + 1/32 per element, dequantize the reverse; the floor is those
over the copy bandwidth. A thread owns a block of 32: 64 bytes in, 32 bytes out.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import torch
import triton.language as tl
from torch import Tensor

from . import _target
from ._fp8 import e4m3_pair, e4m3_pair_values, e8m0_code, power_of_two
from ._launch import cdiv, launch
from ._maxima import block_abs_max
from ._primitives import jit, words_of
from ._tiles import KINDS, as_matrices, load_blocks

BLOCKS = 256


@jit
def _quantize(
    x_ptr, elements_ptr, scale_ptr, blocks, blocks_per_row, stride_m, stride_k,
    BB: tl.constexpr, DENSE: tl.constexpr, KIND: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * BB
    within = tl.arange(0, BB)
    pairs = tl.arange(0, 16)
    block = start + within  # [BB]
    mask = block < blocks
    if DENSE:
        base = start.to(tl.int64) * 32
        offsets = within[:, None] * 16 + pairs[None, :]  # [BB, 16]
    else:
        base = tl.zeros((), tl.int64)
        column = (block % blocks_per_row).to(tl.int64)
        offsets = (block // blocks_per_row).to(tl.int64)[:, None] * stride_m
        offsets += (column[:, None] * 16 + pairs[None, :]) * 2 * stride_k
    words, lo, hi = load_blocks(x_ptr, base, offsets, mask[:, None], stride_k, DENSE, KIND)  # [BB, 16]
    amax = block_abs_max(words, lo, hi, KIND, DENSE, NATIVE)  # [BB]
    code = e8m0_code(amax * 0.002232142956927419)  # fl32(1/448)
    encode_scale = power_of_two(254 - tl.minimum(code, 254))[:, None]
    poison = (code == 255)[:, None]
    lo = tl.where(poison, 0.0, lo * encode_scale)
    hi = tl.where(poison, 0.0, hi * encode_scale)
    pairs_ptr = (elements_ptr + start.to(tl.int64) * 32).to(tl.pointer_type(tl.int16))
    tl.store(pairs_ptr + within[:, None] * 16 + pairs[None, :], e4m3_pair(lo, hi, NATIVE), mask=mask[:, None])
    tl.store(scale_ptr + start.to(tl.int64) + within, code.to(tl.uint8), mask=mask)


@jit
def _dequantize(
    elements_ptr, scale_ptr, out_ptr, blocks,
    BB: tl.constexpr, KIND: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * BB
    within = tl.arange(0, BB)
    pairs = tl.arange(0, 16)
    mask = start + within < blocks
    first = start.to(tl.int64)
    offsets = within[:, None] * 16 + pairs[None, :]  # [BB, 16]
    words = tl.load((elements_ptr + first * 32).to(tl.pointer_type(tl.int16)) + offsets, mask=mask[:, None], other=0)
    code = tl.load(scale_ptr + first + within, mask=mask, other=0).to(tl.int32)  # [BB]
    scale = tl.where(code == 255, float("nan"), power_of_two(tl.minimum(code, 254)))[:, None]
    lo, hi = e4m3_pair_values(words, NATIVE)
    lo *= scale
    hi *= scale
    if KIND == 2:
        out = (out_ptr + first * 32).to(tl.pointer_type(tl.int64))
    else:
        out = (out_ptr + first * 32).to(tl.pointer_type(tl.int32))
    tl.store(out + offsets, words_of(lo, hi, KIND, NATIVE), mask=mask[:, None])


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """(elements, block_scale); as `halfbyte.numerics.mxfp8.quantize`."""
    elements = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((*x.shape[:-1], x.shape[-1] // 32), dtype=torch.uint8, device=x.device)
    quantize_into(x, elements, scale)
    return elements, scale


def quantize_into(x: Tensor, elements: Tensor, scale: Tensor) -> None:
    """The same, into contiguous memory."""
    m = as_matrices(x, per_matrix=False)
    blocks = x.numel() // 32
    if blocks:
        launch(
            _quantize, cdiv(blocks, BLOCKS), (m.x, elements, scale),
            (blocks, m.columns // 32, m.stride_m, m.stride_k),
            BB=BLOCKS, DENSE=m.dense, KIND=m.kind, NATIVE=_target.native_level(x.device),
        )  # fmt: skip


def dequantize(elements: Tensor, block_scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """As `halfbyte.numerics.mxfp8.dequantize`, rounded once to dtype."""
    elements, block_scale = elements.contiguous(), block_scale.contiguous()
    out = torch.empty(elements.shape, dtype=dtype, device=elements.device)
    blocks = math.prod(elements.shape) // 32
    if blocks:
        launch(
            _dequantize, cdiv(blocks, BLOCKS), (elements, block_scale, out), (blocks,),
            BB=BLOCKS, KIND=KINDS[dtype], NATIVE=_target.native_level(out.device),
        )  # fmt: skip
    return out
