"""Quotients without a division, which the kernels rest on: every mantissa, beside the division that rounds right."""

# mypy: disable-error-code="no-untyped-def"

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from halfbyte import NVFP4
from halfbyte.formats import E4M3_MAX_CHOICES
from halfbyte.kernels import _target
from halfbyte.kernels._four_over_six import _error_term
from halfbyte.kernels._primitives import normal_reciprocal, sixth

from ..check import same_bits
from .test_triton_kernels import DEVICE, INTERPRETING, pytestmark  # noqa: F401

MANTISSAS = 1 << (10 if INTERPRETING else 23)


def native() -> int:
    return 0 if INTERPRETING else _target.native_level(torch.device(DEVICE))


@triton.jit
def _divide(x_ptr, sixth_ptr, by_six_ptr, inverse_ptr, by_one_ptr, native: tl.constexpr, n: tl.constexpr):
    i = tl.program_id(0) * n + tl.arange(0, n)
    x = tl.load(x_ptr + i)
    tl.store(sixth_ptr + i, sixth(x, native))
    tl.store(by_six_ptr + i, tl.div_rn(x, 6.0))
    tl.store(inverse_ptr + i, normal_reciprocal(x, native))
    tl.store(by_one_ptr + i, tl.div_rn(1.0, x))


@triton.jit
def _errors(amax_ptr, fast_ptr, exact_ptr, fmt: tl.constexpr, fast: tl.constexpr, n: tl.constexpr):
    i = tl.program_id(0) * n + tl.arange(0, n)
    amax = tl.load(amax_ptr + i)
    one = tl.full((n,), 1.0, tl.float32)
    x = one[:, None]
    tl.store(fast_ptr + i[:, None], _error_term(x, one, one, one, amax, fmt, fast))
    tl.store(exact_ptr + i[:, None], _error_term(x, one, one, one, amax, fmt, False))


def all_mantissas(first: float) -> torch.Tensor:
    """As many floats from a power of two up."""
    start = torch.tensor(first).view(torch.int32)
    return (start + torch.arange(MANTISSAS, dtype=torch.int32)).view(torch.float32).to(DEVICE)


@pytest.mark.parametrize("exponent", [-121, -60, -1, 0, 63, 124])
def test_sixths_and_reciprocals(exponent: int) -> None:
    x = all_mantissas(2.0**exponent)
    out = [torch.empty_like(x) for _ in range(4)]
    _divide[(MANTISSAS // 256,)](x, *out, native=native(), n=256, enable_fp_fusion=False)
    same_bits(out[0].cpu(), out[1].cpu(), "sixth")
    same_bits(out[2].cpu(), out[3].cpu(), "reciprocal")


@pytest.mark.parametrize("e4m3_max", E4M3_MAX_CHOICES)
def test_errors_of_four_over_six(e4m3_max: int) -> None:
    """(q·s·A)/6E − x for q·s = x = 1, which shows every bit of the quotient as long as that is near 1."""
    fmt = NVFP4(scale_rule="four_over_six", e4m3_max=e4m3_max)
    for first in (1024.0, 2048.0):
        amax = all_mantissas(first)
        fast, exact = torch.empty_like(amax), torch.empty_like(amax)
        _errors[(MANTISSAS // 256,)](amax, fast, exact, fmt=fmt, fast=native() > 0, n=256, enable_fp_fusion=False)
        same_bits(fast.cpu(), exact.cpu(), f"A from {first}")
