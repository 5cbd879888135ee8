"""x → the value that its quantization decodes to, in one pass, alone or beside the codes and scales.

Fewest bytes, for bf16: 2 read and 2 written per element, 0.5625 more written with codes and scales, and 2 more read
when a tensor's amax must be computed first; the floor is those over the copy bandwidth. The kernels are those of
`quantize` and `transposed`, with another last step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import NVFP4
from . import quantize, transposed
from ._tiles import as_matrices


def fake_quantize(
    x: Tensor,
    fmt: NVFP4,
    *,
    unscaled: bool = False,
    amax: Tensor | None = None,
    per_matrix: bool = False,
    rng: tuple[int, int] | Tensor | None = None,
    first_block: int = 0,
) -> tuple[Tensor, Tensor]:
    """(values in x's dtype, tensor_scale): the decoded ones, rounded once, or the exact q·s where unscaled.

    The values are contiguous; a transposed view of contiguous matrices is read as it lies.
    """
    if _is_transposed(x, fmt, per_matrix):
        return transposed.fake_quantize(x.mT, fmt, unscaled=unscaled, amax=amax, rng=rng, first_block=first_block)
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


def quantize_with_values(
    x: Tensor,
    fmt: NVFP4,
    *,
    amax: Tensor | None = None,
    per_matrix: bool = False,
    rng: tuple[int, int] | Tensor | None = None,
    first_block: int = 0,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """((packed, block_scale, tensor_scale, amax), q·s in x's dtype, contiguous), from one read after the amax."""
    shape = x.shape
    per_scale = shape[:-1] if fmt.scaling == "row" else shape[:-2] if per_matrix else torch.Size(())
    out = (
        torch.empty((*shape[:-1], shape[-1] // 2), dtype=torch.uint8, device=x.device),
        torch.empty((*shape[:-1], shape[-1] // 16), dtype=torch.float8_e4m3fn, device=x.device),
        torch.empty(per_scale, dtype=torch.float32, device=x.device),
        torch.empty(per_scale, dtype=torch.float32, device=x.device),
    )
    values = torch.empty(shape, dtype=x.dtype, device=x.device)
    if x.numel():
        quantize.dispatch(as_matrices(x, per_matrix), fmt, amax, out, rng, first_block, "both", values=values)
    else:
        quantize.scales_only(amax, out[2], out[3], fmt)
    return out, values


def _is_transposed(x: Tensor, fmt: NVFP4, per_matrix: bool) -> bool:
    """Whether x is a transposed view that the transposed kernel takes; the search has too few threads there."""
    if x.dim() < 2 or x.is_contiguous() or fmt.scale_rule == "search" or not (per_matrix or x.dim() == 2):
        return False
    return transposed.supports(x.mT, fmt)
