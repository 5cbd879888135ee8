"""NVFP4 back to float32, bfloat16 or float16, with or without the tensor scale.

Fewest bytes, to bf16: 0.5 + 0.0625 read and 2 written per element; the floor is those over the copy bandwidth.
A thread owns whole blocks: 8 bytes in, 32 bytes out.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import torch
import triton.language as tl
from torch import Tensor

from . import _target
from ._e2m1 import e2m1_values
from ._fp8 import e4m3_value
from ._launch import cdiv, launch
from ._primitives import jit, words_of
from ._tiles import KINDS

BLOCKS = 512


@jit
def _dequantize(
    packed_ptr, scale_ptr, tensor_scale_ptr, out_ptr, blocks, blocks_per_scale,
    BB: tl.constexpr, SCALES: tl.constexpr, KIND: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * BB
    first = start.to(tl.int64)
    within = tl.arange(0, BB)  # [BB]
    pairs = tl.arange(0, 8)
    mask = start + within < blocks
    offsets = within[:, None] * 8 + pairs[None, :]  # [BB, 8]
    packed = tl.load(packed_ptr + first * 8 + offsets, mask=mask[:, None], other=0)
    scale = e4m3_value(tl.load(scale_ptr + first + within, mask=mask, other=0))  # [BB]
    if SCALES == "one":
        scale *= tl.load(tensor_scale_ptr)
    elif SCALES == "many":
        scale *= tl.load(tensor_scale_ptr + (start + within) // blocks_per_scale, mask=mask, other=0.0)
    lo, hi = e2m1_values(packed)
    if KIND == 2:
        out = (out_ptr + first * 16).to(tl.pointer_type(tl.int64))
    else:
        out = (out_ptr + first * 16).to(tl.pointer_type(tl.int32))
    tl.store(out + offsets, words_of(lo * scale[:, None], hi * scale[:, None], KIND, NATIVE), mask=mask[:, None])


def dequantize(
    packed: Tensor, block_scale: Tensor, tensor_scale: Tensor | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """As `halfbyte.numerics.nvfp4.dequantize`, rounded once to dtype; without tensor_scale the exact q·s."""
    packed, block_scale = packed.contiguous(), block_scale.contiguous()
    shape = (*packed.shape[:-1], 2 * packed.shape[-1])
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    blocks = math.prod(shape) // 16
    if blocks == 0:
        return out
    scales = "none" if tensor_scale is None else "one" if tensor_scale.numel() == 1 else "many"
    given = out if tensor_scale is None else tensor_scale.contiguous()
    launch(
        _dequantize, cdiv(blocks, BLOCKS), (packed, block_scale, given, out),
        (blocks, max(blocks // given.numel(), 1)),
        BB=BLOCKS, SCALES=scales, KIND=KINDS[dtype], NATIVE=_target.native_level(packed.device),
    )  # fmt: skip
    return out
