"""The reference matmul: what an NVFP4 tensor core computes, without its rounding; and what comes after any matmul."""

import torch
from torch import Tensor

from . import nvfp4


def matmul(x: nvfp4.Encoded, w: nvfp4.Encoded) -> Tensor:
    """x (M, K) · w (N, K)ᵀ → (M, N) float32.

    The exact products q·s are accumulated in float64, then scaled by S_dec(x)·S_dec(w) (each a scalar, or a vector
    along its own operand's rows) and rounded once to float32. Numerics: any engine differs from this by its
    accumulation alone, so budgets are relative to Σ|x·w|.
    """
    xv = nvfp4.decode_without_tensor_scale(x.packed, x.block_scale).double()
    wv = nvfp4.decode_without_tensor_scale(w.packed, w.block_scale).double()
    alpha = x.tensor_scale.double().reshape(-1, 1) * w.tensor_scale.double().reshape(1, -1)
    return ((xv @ wv.mT) * alpha).to(torch.float32)


def epilogue(
    total: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    accumulate_into: Tensor | None = None,
) -> Tensor:
    """total · (a_scale · b_scale) + bias for sums (M, N), in their dtype, one rounding an operation, then to out_dtype.

    a_scale: (), (M,) or None, along the rows. b_scale: (), (N,), (M, N) or None, along the columns. bias: (N,), (M, N)
    or None. accumulate_into: (M, N) to which the result, not rounded before, is added in place; it is returned.
    """
    if a_scale is not None and b_scale is not None:
        total = total * (a_scale.to(total.dtype).reshape(-1, 1) * b_scale.to(total.dtype))
    elif a_scale is not None:
        total = total * a_scale.to(total.dtype).reshape(-1, 1)
    elif b_scale is not None:
        total = total * b_scale.to(total.dtype)
    if bias is not None:
        total = total + bias.to(total.dtype)
    if accumulate_into is not None:
        return accumulate_into.add_(total)
    return total.to(out_dtype)
