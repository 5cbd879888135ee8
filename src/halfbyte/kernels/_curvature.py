"""What clipping one element costs at least under a Hessian: the bound of the last section of `docs/search.md`."""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDINGS = 40 * 2.0**-24  # of the computed dᵀHd, relative to Σ|dᵢ||Hᵢⱼ||dⱼ|; 34 would do
LEAST = 2.0**-60
"""Below this, of a curvature or of an error, underflow might matter: no bound."""


def doubled(hessian: Tensor) -> Tensor:
    """(B, 16, 16) float32 with what is above the diagonal doubled and what is below left out, contiguous."""
    return (2 * hessian.triu(1) + torch.diag_embed(hessian.diagonal(dim1=-2, dim2=-1))).contiguous()


def curvature(hessian: Tensor) -> Tensor:
    """(B, 16, 16) float32 → μ, (B, 16) float32: a computed dᵀHd is at least μᵢ·dᵢ², whatever the other elements are.

    The least of dᵀHd over the others is dᵢ² / (H⁻¹)ᵢᵢ. Roundings take at most Σᵢ dᵢ² γ Σⱼ|Hᵢⱼ|, so twice that comes off
    the diagonal first: once for them, once for those of this function. Where nothing positive definite is left, μ is 0.
    """
    upper = hessian.triu().double()
    h = upper + upper.triu(1).mT
    h = h - torch.diag_embed(2 * _ROUNDINGS * h.abs().sum(-1))
    eye = torch.eye(16, dtype=h.dtype, device=h.device)
    usable = h.isfinite().all(-1).all(-1)
    root, failed = torch.linalg.cholesky_ex(torch.where(usable[:, None, None], h, eye))
    usable &= failed == 0
    root = torch.where(usable[:, None, None], root, eye)
    inverse = torch.linalg.solve_triangular(root, eye.expand_as(root), upper=False)
    mu = 0.98 / inverse.square().sum(-2)  # 2 % for the float32 in which kernels use it
    return torch.where(usable[:, None] & (mu > LEAST), mu, 0.0).float()
