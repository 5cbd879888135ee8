"""x → the value that its quantization decodes to, in one pass, without the bytes in between.

Fewest bytes, for bf16: 2 read and 2 written per element (2 more read when a tensor's amax must be computed first); the
floor is those over the copy bandwidth. The kernels are those of `quantize`, with another last step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import NVFP4
from . import quantize
from ._tiles import as_matrices


def fake_quantize(
    x: Tensor,
    fmt: NVFP4,
    *,
    amax: Tensor | None = None,
    per_matrix: bool = False,
    rng: tuple[int, int] | None = None,
    first_block: int = 0,
) -> Tensor:
    """`numerics.nvfp4.dequantize` of `numerics.nvfp4.quantize`, rounded once to x's dtype."""
    return _run(x, fmt, amax, per_matrix, rng, first_block, "decoded")


def fake_quantize_exact(
    x: Tensor,
    fmt: NVFP4,
    *,
    amax: Tensor | None = None,
    per_matrix: bool = False,
    rng: tuple[int, int] | None = None,
    first_block: int = 0,
) -> Tensor:
    """q·s without the tensor scale, exact in x's dtype: what a bf16 tensor-core matmul takes before α = S_dec·S_dec."""
    return _run(x, fmt, amax, per_matrix, rng, first_block, "exact")


def _run(
    x: Tensor,
    fmt: NVFP4,
    amax: Tensor | None,
    per_matrix: bool,
    rng: tuple[int, int] | None,
    first_block: int,
    mode: str,
) -> Tensor:
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        unused = result.view(torch.uint8) if result.dim() else result
        out = (result, unused, result, result)
        quantize.dispatch(as_matrices(x, per_matrix), fmt, amax, out, rng, first_block, mode)
    return result
