"""Quantize to row-scaled NVFP4 in one read: a program holds a whole row in registers.

Fewest bytes, for bf16: 2 read and 0.5625 written per element; the floor is those over the copy bandwidth.
Given up: rows of more than 32,768 columns (they take two reads), and rows of K blocks use the lanes of the next power
of two.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from ..formats import NVFP4
from . import _target
from ._fp8 import e4m3_code
from ._launch import launch, next_power_of_2
from ._maxima import block_abs_max, reduce_max
from ._primitives import jit_varying, tensor_scales
from ._rules import block_scales, hadamard, store_elements
from ._tiles import Matrices, load_blocks

LEAST = 32  # blocks: a warp's threads, whether they have work or not


@jit_varying("rows")
def _quantize_row(
    x_ptr, out_ptr, scale_ptr, tensor_scale_ptr, amax_out_ptr, values_ptr,
    rows, blocks_per_row, stride_p, stride_m, stride_k,
    NB: tl.constexpr, EVEN: tl.constexpr, DENSE: tl.constexpr, KIND: tl.constexpr, OUT: tl.constexpr, F: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, NB)  # [NB]
    pairs = tl.arange(0, 8)
    mask = tl.full((NB,), True, tl.int1) if EVEN else block < blocks_per_row
    offsets = block[:, None] * 8 + pairs[None, :]  # [NB, 8]
    if DENSE:
        base = pid * blocks_per_row * 16
    else:
        base = (pid // rows) * stride_p + (pid % rows) * stride_m
        offsets = offsets.to(tl.int64) * 2 * stride_k
    words, lo, hi = load_blocks(x_ptr, base, offsets, mask[:, None], stride_k, DENSE, KIND)
    if F.hadamard:
        lo, hi = hadamard(lo, hi, KIND)
    block_amax = block_abs_max(words, lo, hi, KIND, DENSE and not F.hadamard, NATIVE)  # [NB]
    amax = reduce_max(block_amax, 0, NATIVE)
    encode_scale, decode_scale = tensor_scales(amax, F.e4m3_max, NATIVE)
    scale, element = block_scales(lo, hi, block_amax, mask, encode_scale, decode_scale, amax, F, NATIVE)  # [NB]
    first = pid * blocks_per_row
    store_elements(
        out_ptr, first, block[:, None] * 8 + pairs[None, :], mask[:, None], lo, hi, scale, element, encode_scale,
        decode_scale, block, 0, 0, OUT, F, KIND, NATIVE, values_ptr,
    )  # fmt: skip
    if OUT == "packed" or OUT == "both":
        tl.store(scale_ptr + first + block, e4m3_code(scale), mask=mask)
    tl.store(tensor_scale_ptr + pid, decode_scale)
    tl.store(amax_out_ptr + pid, amax)


def quantize_into(
    m: Matrices,
    fmt: NVFP4,
    packed: Tensor,
    scale: Tensor,
    tensor_scale: Tensor,
    amax_out: Tensor,
    mode: str = "packed",
    values: Tensor | None = None,
    sizes: tuple[int, ...] = (),
) -> None:
    """One launch; see `quantize.quantize`. sizes: what a program may be made for, in blocks; powers of two if empty."""
    blocks_per_row = m.columns // 16
    nb = next(s for s in sizes if s >= blocks_per_row) if sizes else max(next_power_of_2(blocks_per_row), LEAST)
    launch(
        _quantize_row, m.matrices * m.rows,
        (m.x, packed, scale, tensor_scale, amax_out, packed if values is None else values),
        (m.rows, blocks_per_row, m.stride_p, m.stride_m, m.stride_k),
        NB=nb, EVEN=nb == blocks_per_row, DENSE=m.dense, KIND=m.kind, OUT=mode, F=fmt,
        NATIVE=_target.native_level(m.x.device),
        num_warps=min(max(nb // 64, 1), 16),
    )  # fmt: skip
