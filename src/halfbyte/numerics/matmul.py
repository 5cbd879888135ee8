"""The reference matmul: what an NVFP4 tensor core computes, without its rounding."""

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
