"""Scale rule `search` in Triton, against the contract; on a GPU, or a little of it in the interpreter."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from halfbyte import NVFP4
from halfbyte.kernels import fake_quantize, quantize, transposed
from halfbyte.kernels.cpu import nvfp4 as cpu
from halfbyte.numerics import nvfp4

from ..check import true
from .search_inputs import FORMATS, extras, overflowing, searched
from .test_cpu import same, views
from .test_triton_kernels import DEVICE, INTERPRETING, pytestmark  # noqa: F401

on_gpu = pytest.mark.skipif(INTERPRETING, reason="too much for the interpreter")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check(x: Tensor, fmt: NVFP4, **kwargs: object) -> None:
    moved = {name: v.to(DEVICE) if isinstance(v, Tensor) else v for name, v in kwargs.items()}
    actual = quantize.quantize(x.to(DEVICE), fmt, **moved)
    expected = nvfp4.quantize(x, fmt, **kwargs)
    for name, a, e in zip(expected._fields, actual, expected, strict=True):
        same(a.cpu(), e, f"{name} of {tuple(x.shape)} {x.dtype}, {fmt}, {sorted(kwargs)}")


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_equals_the_contract(fmt: NVFP4, rng: torch.Generator) -> None:
    if INTERPRETING:  # slow: one kind of extra argument each, and every third input; bounds say nothing of a singular H
        x = torch.stack(list(searched(rng, (3, 16), torch.bfloat16).values())[::3])
        other = fmt.scaling == "row" if fmt.error == "hessian" else FORMATS.index(fmt) % 2
        x = x[:1] if other and fmt.error == "hessian" else x
        return check(x, fmt, per_matrix=True, **extras(rng, fmt, 16)[other])
    for dtype in DTYPES if fmt == FORMATS[0] else (torch.bfloat16, torch.float32):
        x = torch.stack(list(searched(rng, (37, 144), dtype).values()))
        for extra in extras(rng, fmt, 144):
            check(x, fmt, per_matrix=True, **extra)
    return None


@on_gpu
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_given_amax(fmt: NVFP4, rng: torch.Generator) -> None:
    given = torch.tensor([0.0, 1.0, 2.5, 1e-30, 1e-42, 1e30, 3e38, math.inf, math.nan])
    x = searched(rng, (17, 48), torch.float32)["mixed"].expand(len(given), -1, -1)
    amax = given[:, None].expand(-1, 17) if fmt.scaling == "row" else given
    for extra in extras(rng, fmt, 48):
        check(x, fmt, per_matrix=True, amax=amax, **extra)


@pytest.mark.parametrize("error", ["mse"] if INTERPRETING else ["mse", "mae"])
def test_on_the_brink(error: str, rng: torch.Generator) -> None:
    """Blocks of which half is multiplied by the last factor that keeps the best scale, and by the next float."""
    fmt = NVFP4(scale_rule="search", error=error)
    for exponent in (0,) if INTERPRETING else (-40, -3, 0, 17, 40):
        for coarse in (False,) if INTERPRETING else (False, True):
            rows, amax = 32 if INTERPRETING else 4096, torch.tensor(1.37 * 2.0**exponent)
            x = torch.randn(rows, 16, generator=rng)
            x = (3 * x).round() / 2 if coarse else x
            x = x / x.abs().amax(1, keepdim=True) * amax * torch.exp2(-7 * torch.rand(rows, 1, generator=rng))
            x[:, :8] *= 0.99  # so that the largest may be in either half

            def blocks(factor: Tensor, x: Tensor = x) -> Tensor:
                return torch.cat((x[:, :8] * factor[:, None], x[:, 8:]), 1)

            def best(factor: Tensor, amax: Tensor = amax, blocks: Callable[[Tensor], Tensor] = blocks) -> Tensor:
                return cpu.quantize(blocks(factor), fmt, amax=amax).block_scale.view(torch.uint8)[:, 0]

            low, high = torch.full((rows,), 0.5), torch.ones(rows)
            first = best(low)
            true((best(high) != first).any(), "some blocks have a brink")
            for _ in range(25):
                middle = ((low.view(torch.int32) + high.view(torch.int32)) // 2).view(torch.float32)
                same_one = best(middle) == first
                low, high = torch.where(same_one, middle, low), torch.where(same_one, high, middle)
            for factor in (low, high):
                check(blocks(factor), fmt, amax=amax)


@pytest.mark.parametrize("case", [pytest.param(c, marks=on_gpu) if i == 0 else c for i, c in enumerate(overflowing())])
def test_hessian_errors_at_the_ends_of_float32(case: tuple[Tensor, ...]) -> None:
    x, amax, hessian = case
    check(x, NVFP4(scale_rule="search", error="hessian"), amax=amax, hessian=hessian)


@on_gpu
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_nan_infinity_and_strides(fmt: NVFP4, rng: torch.Generator) -> None:
    x = torch.randn(33, 96, generator=rng)
    x[3, 5], x[20, 50] = math.nan, math.inf
    for extra in extras(rng, fmt, 96)[-1:]:
        check(x, fmt, **extra)
        check(x, fmt, amax=torch.full((33,) if fmt.scaling == "row" else (), 2.5), **extra)
    if fmt.error == "mae":
        return  # how elements are found does not depend on the error
    few = ("transposed", "offset columns", "every other column", "permuted, last too")
    for view in (view for name, view in views(rng, torch.bfloat16).items() if name in few):
        moved = view.to(DEVICE)  # the same strides, but for broadcast ones
        for extra in extras(rng, fmt, view.shape[-1])[-1:]:
            got = quantize.quantize(moved, fmt, **{name: v.to(DEVICE) for name, v in extra.items()})
            for a, e in zip(got, nvfp4.quantize(view, fmt, **extra), strict=True):
                same(a.cpu(), e, str(fmt))


@on_gpu
def test_hadamard_decoded_and_transposed(rng: torch.Generator) -> None:
    x = torch.randn(112, 96, generator=rng).bfloat16()
    for fmt in (NVFP4(scale_rule="search"), NVFP4(scale_rule="search", hadamard=True, e4m3_max=288)):
        check(x, fmt)
        q = nvfp4.quantize(x, fmt)
        decoded = nvfp4.dequantize(q.packed, q.block_scale, q.tensor_scale, torch.bfloat16)
        same(fake_quantize.fake_quantize(x.to(DEVICE), fmt)[0].cpu(), decoded, "decoded")
        for a, e in zip(transposed.quantize(x.to(DEVICE), fmt)[0], nvfp4.quantize(x.mT, fmt), strict=True):
            same(a.cpu(), e, "transposed")


@on_gpu
@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.error != "hessian"], ids=str)
def test_a_hundred_million_elements(fmt: NVFP4) -> None:
    """Against the contract on the GPU: ordinary, heavy-tailed and coarse values, as bfloat16 and float32."""
    g = torch.Generator(DEVICE).manual_seed(1)
    for dtype in (torch.bfloat16, torch.float32):
        for kind in range(3):
            x = torch.randn(4096, 4096, generator=g, device=DEVICE)
            if kind == 1:
                x = x * torch.exp(torch.randn(4096, 4096, generator=g, device=DEVICE))
            if kind == 2:
                x = (4 * x).round()
            x = x.to(dtype)
            for a, e in zip(quantize.quantize(x, fmt), nvfp4.quantize(x, fmt), strict=True):
                true(torch.equal(a.reshape(-1).view(torch.uint8), e.reshape(-1).view(torch.uint8)), f"{fmt}, {kind}")
