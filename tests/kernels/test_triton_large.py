"""Triton kernels where 32 bits do not count elements: large tensors, and elements that lie far apart."""

# mypy: disable-error-code="no-untyped-def"

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from halfbyte import NVFP4
from halfbyte.kernels import _target, mxfp8, quantize, transposed
from halfbyte.kernels.amax import flat_amax
from halfbyte.numerics import mxfp8 as mxfp8_numerics
from halfbyte.numerics import nvfp4

from ..check import equal, same_bits, true
from .test_triton_kernels import DEVICE, INTERPRETING, pytestmark  # noqa: F401

BB, STEPS = 16, 2


@triton.jit
def _first_tile(x_ptr, bits_ptr, blocks, bb: tl.constexpr, steps: tl.constexpr, native: tl.constexpr):
    tl.store(bits_ptr, flat_amax(x_ptr, tl.zeros((), tl.int64), 0, blocks, bb, steps, 2, native))


@pytest.mark.parametrize("blocks", [5, 31, 32, (1 << 28) - 1, 1 << 28, (1 << 28) + 40, (1 << 31) - 1])
def test_maximum_of_a_tile_of_many(blocks: int) -> None:
    """The first tile of so many blocks: of 2^32 elements and more, each counts as it does of few."""
    x = torch.arange(1, BB * STEPS + 1, dtype=torch.float32).repeat_interleave(16).to(DEVICE)  # block b holds b + 1
    bits = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    _first_tile[(1,)](x, bits, blocks, bb=BB, steps=STEPS, native=_target.native_level(bits.device))
    equal(bits.view(torch.float32).item(), float(min(blocks, BB * STEPS)))


@pytest.mark.skipif(not INTERPRETING, reason="a file of holes, in the memory of the CPU")
def test_columns_far_apart(far: Callable[..., Tensor]) -> None:
    x = far((3, 32), (1, (1 << 30) + 8))
    for fmt in (
        NVFP4(),
        NVFP4(hadamard=True),
        NVFP4(block=(16, 16)),
        NVFP4(scaling="row"),
        NVFP4(scaling="row", rounding="stochastic"),
        NVFP4(scale_rule="search", error="hessian"),
    ):
        options = {"rng": (1, 2)} if fmt.rounding == "stochastic" else {}
        if fmt.error == "hessian":
            options = {"hessian": torch.eye(16).expand(2, 16, 16)}
        for actual, expected in zip(
            quantize.quantize(x, fmt, **options), nvfp4.quantize(x, fmt, **options), strict=True
        ):
            same_bits(actual, expected, str(fmt))
    for actual, expected in zip(mxfp8.quantize(x), mxfp8_numerics.quantize(x), strict=True):
        same_bits(actual, expected, "MXFP8")


@pytest.mark.parametrize("block", [(1, 16), (16, 16)], ids=str)
@pytest.mark.parametrize("first_block", [(1 << 31) - 3, (1 << 32) - 3, 1 << 45])
def test_random_bits_of_blocks_beyond_32_bits(first_block: int, block: Any) -> None:
    fmt = NVFP4(block=block, rounding="stochastic")
    x = torch.randn(16, 48, generator=torch.Generator().manual_seed(2))
    for view in (x, x[None].expand(2, -1, -1), x.mT):
        options: Any = {"rng": (1, 2**64 - 1), "first_block": first_block, "per_matrix": view.dim() == 3}
        got = quantize.quantize(view.to(DEVICE), fmt, **options)
        for actual, expected in zip(got, nvfp4.quantize(view, fmt, **options), strict=True):
            same_bits(actual.cpu(), expected, f"{tuple(view.shape)}")


def test_what_no_grid_holds_is_left_to_others() -> None:
    """A grid has at most 65,535 programs down; a tile of both results has 64 rows."""
    for rows, taken in ((65535 * 64, True), (65535 * 64 + 16, False)):
        equal(transposed.supports(torch.empty(rows, 16, device="meta"), NVFP4()), taken, f"{rows} rows")
        m = quantize.as_matrices(torch.empty(rows, 16, device="meta").mT, True)
        equal(transposed.supports_view(m, NVFP4()), taken, f"{rows} rows as they lie")


@pytest.mark.skipif(INTERPRETING, reason="4 billion elements")
def test_beyond_2_32_elements() -> None:
    big = torch.zeros(131072 + 16, 32768, device=DEVICE, dtype=torch.bfloat16)  # 2^32 + 2^19
    ends = torch.randn(32, 32768, generator=torch.Generator().manual_seed(5)).bfloat16()
    ends[3, 7] = 1000.0  # in the first tiles
    big[:16], big[-16:] = ends[:16].to(DEVICE), ends[16:].to(DEVICE)
    for fmt in (NVFP4(), NVFP4(block=(16, 16)), NVFP4(scale_rule="four_over_six")):
        packed, scale, tensor_scale, amax = quantize.quantize(big, fmt)
        wanted = nvfp4.quantize(ends, fmt)
        same_bits(amax.cpu(), wanted.amax, str(fmt))
        same_bits(tensor_scale.cpu(), wanted.tensor_scale, str(fmt))
        same_bits(torch.cat((packed[:16], packed[-16:])).cpu(), wanted.packed, str(fmt))
        same_bits(torch.cat((scale[:16], scale[-16:])).cpu(), wanted.block_scale, str(fmt))
        true(not packed[16:-16].any(), "zeros have other codes")
