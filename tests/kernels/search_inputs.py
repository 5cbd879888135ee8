"""What the scale rule `search` is tried on, for the CPU and the Triton kernels alike."""

import torch
from torch import Tensor

from halfbyte import NVFP4

BASES = [((1, 16), "tensor"), ((16, 16), "tensor"), ((1, 16), "row")]
ERRORS = ("mse", "mae", "hessian")
FORMATS = [NVFP4(block, scaling, "search", error=error) for error in ERRORS for block, scaling in BASES]
SIZES = [-80, -30, 0, 60, 100]


def searched(rng: torch.Generator, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """Blocks at both ends of E4M3, of all magnitudes, and such that many scales are as good as each other."""
    x = torch.randn(shape, generator=rng)
    sizes = torch.exp2(-26 * torch.rand(shape[0], shape[1] // 16, generator=rng)).repeat_interleave(16, 1)
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    exact = grid[torch.randint(8, shape, generator=rng)] * torch.randint(-1, 2, shape, generator=rng)
    near = exact * (1 + 2.0**-20 * torch.randint(-8, 9, shape, generator=rng))
    out = {
        "mixed": x * sizes,
        "exact": exact * torch.exp2(torch.randint(-12, 1, (shape[0], 1), generator=rng).float()),
        "near": near,
        "few": torch.randint(-3, 4, shape, generator=rng).float(),
        "ones": torch.randint(-1, 2, shape, generator=rng).float(),
        "steps": (x * 4).round() * sizes.log2().round().exp2(),
    }
    if dtype != torch.float16:
        out |= {f"2^{e}": x * torch.exp(torch.randn(shape, generator=rng)) * 2.0**e for e in SIZES}
    return {name: value.to(dtype) for name, value in out.items()}


def extras(rng: torch.Generator, fmt: NVFP4, columns: int) -> list[dict[str, Tensor]]:
    """Further arguments: importances, or Hessians that are well conditioned, singular, and hardly positive definite."""
    if fmt.error != "hessian":
        w = torch.rand(columns, generator=rng) ** 4
        w[::7] = 0
        return [{}, {"importance": w}]
    a = torch.randn(columns // 16, 24, 16, generator=rng)
    b = a[:, :3] + 4 * torch.randn(columns // 16, 3, 1, generator=rng)
    return [{"hessian": h} for h in (a.mT @ a, b.mT @ b, b.mT @ b + 1e-3 * torch.eye(16))]


def overflowing() -> list[tuple[Tensor, Tensor, Tensor]]:
    """(x, amax, Hessian) such that d · d overflows but its error does not, and that twice H does."""
    x = torch.full((2, 16), 2.0**70)
    return [
        (x, torch.tensor(2688.0), torch.eye(16)[None] * 2.0**-50),
        (x * 2.0**-135, torch.tensor(2.0**-65), torch.eye(16)[None] * 2.0**127),
    ]
