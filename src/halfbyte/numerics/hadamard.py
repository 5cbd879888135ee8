"""The 16-point random Hadamard transform of the NVFP4 training recipe."""

import torch
from torch import Tensor

from ..formats import HADAMARD_SIZE

SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def transform(x: Tensor) -> Tensor:
    """Multiply each 16 consecutive elements of the last dimension by diag(SIGNS)·H16/4, H16 the Sylvester matrix.

    x: (…, K) with K % 16 == 0. Returns x's shape and dtype, rounded once to it.
    Numerics: a float32 butterfly with strides 1, 2, 4, 8, then · 0.25.
    """
    signs = torch.tensor(SIGNS, dtype=torch.float32, device=x.device)
    y = x.float().unflatten(-1, (-1, HADAMARD_SIZE)) * signs
    for stride in (1, 2, 4, 8):
        pairs = y.unflatten(-1, (HADAMARD_SIZE // (2 * stride), 2, stride))
        low, high = pairs.unbind(-2)
        y = torch.stack((low + high, low - high), dim=-2).flatten(-3)
    out: Tensor = (y * 0.25).flatten(-2).to(x.dtype)
    return out
