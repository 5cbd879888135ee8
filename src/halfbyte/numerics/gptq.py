"""One step of GPTQ in plain torch: sixteen columns rounded one after the other, each error passed on to the next.

With U the upper Cholesky factor of an inverse Hessian, rounding column j with error e = (x − q) / U[j, j] moves the
columns after it by −e · U[j, j+1:]; Σ e² is what the layer's output loses once all later columns have made up for it
as well as they can. So it is also what a block's scale is chosen by.
"""

import torch
from torch import Tensor

from ..formats import E2M1_MAX, FLT_MAX
from . import e2m1

COLUMNS = 16
BELOW, ABOVE = 8, 7  # candidates below and above the smallest scale that clips nothing
_CHUNK = 1 << 22  # elements of a temporary


def round_block(
    weight: Tensor, factor: Tensor, decode_scale: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Round weight (N, 16) in order of its columns.

    Args:
        weight: float32, already moved by the errors of earlier columns.
        factor: (16, 16) float32, upper triangular, its diagonal positive: U's diagonal block.
        decode_scale: S_dec.
        scale: (N,) float8_e4m3fn to round with; None: the best of sixteen around the one that clips nothing, by Σ e².

    Returns:
        codes (N, 16) uint8; scale (N,) float8_e4m3fn; errors e (N, 16) float32.
    """
    if scale is not None:
        codes, error = _round(weight, factor, decode_scale, scale.float()[:, None])
        return codes[:, 0], scale, error[:, 0]
    values = torch.arange(127, dtype=torch.uint8, device=weight.device).view(torch.float8_e4m3fn).float()
    steps = torch.arange(-BELOW, ABOVE + 1, device=weight.device)
    parts = [
        _search(rows, factor, decode_scale, values, steps)
        for rows in weight.split(max(1, _CHUNK // (COLUMNS * len(steps))))
    ]
    codes, scale, error = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return codes, scale, error


def _search(
    weight: Tensor, factor: Tensor, decode_scale: Tensor, values: Tensor, steps: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    largest = weight.abs().amax(1)
    first = torch.searchsorted(E2M1_MAX * values * decode_scale, largest)  # values[first] is the first to reach it
    candidate = (first.clamp(1, len(values) - 1)[:, None] + steps).clamp(1, len(values) - 1)
    candidate = torch.where(largest[:, None] == 0, 0, candidate)  # [N, C]
    codes, error = _round(weight, factor, decode_scale, values[candidate])
    loss = torch.zeros_like(error[..., 0])
    for e in error.unbind(-1):  # in the order of columns
        loss += e * e
    best = loss.nan_to_num(nan=torch.inf, posinf=torch.inf).argmin(1)  # a tie keeps the smaller scale
    rows = torch.arange(len(weight), device=weight.device)
    chosen = candidate[rows, best].to(torch.uint8).view(torch.float8_e4m3fn)
    return codes[rows, best], chosen, error[rows, best]


def _round(weight: Tensor, factor: Tensor, decode_scale: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, 16], values [N, C] → codes and errors [N, C, 16]."""
    scale = values * decode_scale
    element_scale = (1.0 / scale).clamp(max=FLT_MAX)
    x = weight.t()[:, :, None].repeat(1, 1, values.shape[1])  # [16, N, C]
    codes, errors = torch.empty_like(x, dtype=torch.uint8), torch.empty_like(x)
    for j in range(COLUMNS):
        codes[j] = e2m1.encode((x[j] * element_scale).clamp(-E2M1_MAX, E2M1_MAX))
        errors[j] = (x[j] - e2m1.decode(codes[j]) * scale) / factor[j, j]
        x[j + 1 :] -= factor[j, j + 1 :, None, None] * errors[j]
    return codes.movedim(0, -1), errors.movedim(0, -1)
