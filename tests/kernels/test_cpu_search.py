"""Scale rule `search` on the compiled CPU path: the bytes of `halfbyte.numerics`, whatever its bounds leave out."""

import math

import pytest
import torch

from halfbyte import NVFP4
from halfbyte.kernels._curvature import curvature
from halfbyte.numerics import search

from ..check import true
from .search_inputs import FORMATS, extras, overflowing, searched
from .test_cpu import DTYPES, check_nvfp4, nasty, threads, views

__all__ = ["threads"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_every_format(rng: torch.Generator, fmt: NVFP4, dtype: torch.dtype) -> None:
    x = torch.stack([*nasty(rng, (19, 80), dtype).values(), *searched(rng, (19, 80), dtype).values()])
    for extra in extras(rng, fmt, 80):
        check_nvfp4(x, fmt, decode=False, per_matrix=True, **extra)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_given_amax(rng: torch.Generator, fmt: NVFP4) -> None:
    given = torch.tensor([0.0, 1.0, 1e-30, 1e-42, 1e30, 3e38, math.inf, math.nan])
    x = searched(rng, (17, 48), torch.float32)["mixed"].expand(len(given), -1, -1)
    amax = given[:, None].expand(-1, 17) if fmt.scaling == "row" else given
    for extra in extras(rng, fmt, 48):
        check_nvfp4(x, fmt, decode=False, per_matrix=True, amax=amax, **extra)


@pytest.mark.parametrize("fmt", [NVFP4(scale_rule="search"), *FORMATS[4:9:2]], ids=str)
def test_shapes_strides_and_parts(rng: torch.Generator, threads: int, fmt: NVFP4) -> None:
    inputs = [torch.randn(shape, generator=rng) for shape in [(16,), (3, 16), (17, 272), (2, 3, 32)]]
    inputs += [x[..., : x.shape[-1] // 16 * 16] for x in list(views(rng, torch.bfloat16).values())[::3]]
    for x in inputs:
        for extra in extras(rng, fmt, x.shape[-1])[-1:]:
            check_nvfp4(x, fmt, decode=False, **extra)
            if x.dim() > 2:
                check_nvfp4(x, fmt, decode=False, per_matrix=True, **extra)


def test_hadamard_and_other_maxima(rng: torch.Generator) -> None:
    x = torch.randn(33, 96, generator=rng)
    check_nvfp4(x, NVFP4(scale_rule="search", hadamard=True))
    for e4m3_max in (256, 288, 320):
        check_nvfp4(x, NVFP4(scale_rule="search", e4m3_max=e4m3_max))


@pytest.mark.parametrize("case", overflowing(), ids=["distances", "Hessian"])
def test_hessian_errors_at_the_ends_of_float32(case: tuple[torch.Tensor, ...]) -> None:
    x, amax, hessian = case
    for block in ((1, 16), (16, 16)):
        check_nvfp4(x, NVFP4(block, scale_rule="search", error="hessian"), amax=amax, hessian=hessian)


@pytest.mark.parametrize("name", ["identity", "random", "correlated", "nearly singular"])
def test_curvature_is_below_the_error(name: str, rng: torch.Generator) -> None:
    """Of any d, in the contract's arithmetic; and of the d that makes the error least for one element."""
    a = torch.randn(4, 40, 16, generator=rng)
    if name == "correlated":
        a = a + 5 * torch.randn(4, 40, 1, generator=rng)
    if name == "nearly singular":
        a[..., 3] = a[..., 2] + 0.1 * a[..., 3]
    h = torch.eye(16).expand(4, 16, 16) if name == "identity" else a.mT @ a
    mu = curvature(h).view(1, 1, 4, 16)
    true(bool((mu > 0).all()), "no bound")
    worst = torch.linalg.inv(h.double()).float().transpose(0, 1)  # row i: the best completion of element i
    d = torch.cat((worst, torch.randn(1000, 4, 16, generator=rng)))[None]  # [1, M, 4, 16]
    least = (mu * d * d).amax(-1, keepdim=True)
    true(bool((search._hessian_error(d, h) >= least).all()), "the bound is too high")


def test_no_curvature_without_a_definite_matrix() -> None:
    indefinite = torch.eye(16) - 2 * torch.diag(torch.arange(16) == 3)
    for h in (
        torch.zeros(16, 16),
        torch.ones(16, 16),
        torch.full((16, 16), math.nan),
        1e-30 * torch.eye(16),
        indefinite,
    ):
        true(bool((curvature(h[None].float()) == 0).all()), "a bound")
