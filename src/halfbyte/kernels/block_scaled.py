"""torch's scaled matmul, on GPUs whose tensor cores multiply NVFP4 (or MXFP8) with their block scales.

Nothing is decoded: codes and swizzled block scales go to cuBLAS as they are. Where both tensor scales are one value, it
multiplies by them too; row scales, a bias and a buffer take the epilogue's kernel, after float32 sums.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _target
from .epilogue import epilogue


def supports(device: torch.device, rows: int, columns: int, k: int) -> bool:
    """Whether x (rows, k) · w (columns, k)ᵀ can run here: cuBLAS wants 16 bytes of codes, and 16 columns."""
    return _target.has_fp4_matmul(device) and rows > 0 and columns > 0 and columns % 16 == 0 and k > 0 and k % 32 == 0


def block_scaled_matmul(
    a: Tensor,
    a_block_scale: Tensor,
    b: Tensor,
    b_block_scale: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    *,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    accumulate_into: Tensor | None,
) -> Tensor:
    """a, b: uint8 (NVFP4) or float8_e4m3fn (MXFP8), contiguous rows; block scales 1-D, as `swizzle` gives them.

    The rest as `halfbyte.kernels.epilogue.scaled_matmul`.
    """
    scales = (a_scale, b_scale)
    simple = bias is None and accumulate_into is None and all(s is None or s.dim() == 0 for s in scales)
    if simple and (a_scale is None) == (b_scale is None):
        return _multiply(a, a_block_scale, b, b_block_scale, a_scale, b_scale, out_dtype)
    total = _multiply(a, a_block_scale, b, b_block_scale, None, None, torch.float32)
    out = accumulate_into
    if out is None:
        out = total if out_dtype == torch.float32 else torch.empty_like(total, dtype=out_dtype)
    return epilogue(total, a_scale, b_scale, bias, out, accumulate=accumulate_into is not None)


def _multiply(
    a: Tensor,
    a_block_scale: Tensor,
    b: Tensor,
    b_block_scale: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    if a.dtype == torch.uint8:
        a, b = a.view(torch.float4_e2m1fn_x2), b.view(torch.float4_e2m1fn_x2)
        kind = F.ScalingType.BlockWise1x16
    else:
        a_block_scale, b_block_scale = (s.view(torch.float8_e8m0fnu) for s in (a_block_scale, b_block_scale))
        kind = F.ScalingType.BlockWise1x32
    recipe, order = [kind], [F.SwizzleType.SWIZZLE_32_4_4]
    a_scales, b_scales = [a_block_scale], [b_block_scale]
    if a_scale is not None and b_scale is not None:
        recipe, order = [kind, F.ScalingType.TensorWise], [*order, F.SwizzleType.NO_SWIZZLE]
        a_scales, b_scales = [a_block_scale, a_scale], [b_block_scale, b_scale]
    result: Tensor = F.scaled_mm(
        a, b.mT, a_scales, recipe, b_scales, recipe, swizzle_a=order, swizzle_b=order, output_dtype=out_dtype
    )
    return result
