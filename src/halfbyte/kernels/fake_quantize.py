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
    unscaled: bool = False,
    amax: Tensor | None = None,
    per_matrix: bool = False,
    rng: tuple[int, int] | None = None,
    first_block: int = 0,
) -> tuple[Tensor, Tensor]:
    """(values in x's dtype, tensor_scale): the decoded ones, rounded once, or the exact q·s where unscaled."""
    shape = x.shape[:-1] if fmt.scaling == "row" else x.shape[:-2] if per_matrix else ()
    values = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tensor_scale, out_amax = torch.empty((2, *shape), dtype=torch.float32, device=x.device)
    if x.numel():
        out = (values, values.view(torch.uint8), tensor_scale, out_amax)  # the second is not written
        quantize.dispatch(
            as_matrices(x, per_matrix), fmt, amax, out, rng, first_block, "exact" if unscaled else "decoded"
        )
    else:
        quantize.scales_only(amax, tensor_scale, out_amax, fmt)
    return values, tensor_scale
