import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from halfbyte.numerics import mxfp8

from ..check import equal, same_bits
from . import oracle

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(rng: torch.Generator, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    info = torch.finfo(dtype)
    x = {
        "ordinary": torch.randn(5, 64, generator=rng),
        "wide": torch.randn(5, 64, generator=rng) * torch.exp2(torch.randint(-20, 20, (5, 64), generator=rng)),
        "zero": torch.zeros(1, 64),
        "negative zero": -torch.zeros(1, 64),
        "subnormal": torch.randint(-3, 4, (3, 64), generator=rng) * info.smallest_normal * info.eps,
        "huge": torch.full((1, 64), info.max),
        "powers": torch.full((20, 32), 448.0) * torch.exp2(torch.arange(-10, 10))[:, None],
    }
    x["powers"][:, 1] *= 1 + 2.0**-7  # just beyond what the scale 2^k reaches
    for v in (math.inf, -math.inf, math.nan):
        x[str(v)] = torch.randn(2, 64, generator=rng)
        x[str(v)][1, 40] = v
    return {name: value.to(dtype) for name, value in x.items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_oracle(rng: torch.Generator, dtype: torch.dtype) -> None:
    for name, x in inputs(rng, dtype).items():
        elements, scale = mxfp8.quantize(x)
        want_elements, want_scale = oracle.mxfp8(x)
        equal(scale, torch.from_numpy(want_scale), f"{name}: block_scale")
        equal(elements.view(torch.uint8), torch.from_numpy(want_elements), f"{name}: elements")


def test_every_scale_decodes_exactly() -> None:
    codes = torch.arange(256, dtype=torch.uint8)[:, None]
    elements = torch.ones(256, 32).to(torch.float8_e4m3fn)
    powers = torch.tensor([2.0 ** (c - 127) for c in range(255)] + [math.nan])
    equal(mxfp8.dequantize(elements, codes), powers[:, None].expand(256, 32))


def test_every_element_survives_a_round_trip() -> None:
    """With 448 in the block the scale is 1, and each of the 254 finite E4M3 values comes back, −0 too."""
    finite = torch.tensor([b for b in range(256) if b & 0x7F != 0x7F], dtype=torch.uint8)
    blocks = torch.cat((finite, torch.tensor([0x7E, 0xFE], dtype=torch.uint8))).view(8, 32)
    blocks[:, 0] = 0x7E
    elements, scale = mxfp8.quantize(blocks.view(torch.float8_e4m3fn).float())
    equal(scale, torch.full((8, 1), 127, dtype=torch.uint8))
    same_bits(elements.view(torch.uint8), blocks)


def test_by_hand() -> None:
    x = torch.zeros(5, 32)
    x[0, :2] = torch.tensor([448.0, -0.0])
    x[1, 0] = 448.5  # beyond 448: the scale goes up
    x[2, 0] = math.inf
    x[3, 0] = math.nan
    elements, scale = mxfp8.quantize(x)
    equal(scale.flatten().tolist(), [127, 128, 254, 255, 0])
    equal(elements.view(torch.uint8)[:, 0].tolist(), [0x7E, 0x76, 0x7E, 0, 0])
    equal(elements.view(torch.uint8)[0, 1].item(), 0x80)
    equal(mxfp8.dequantize(elements, scale)[3].isnan().all().item(), True)


@pytest.mark.parametrize("shape", [(0, 32), (3, 0), (0, 0), (32,), (2, 3, 4, 64)], ids=str)
def test_shapes(rng: torch.Generator, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=rng)
    elements, scale = mxfp8.quantize(x)
    equal(tuple(elements.shape), shape)
    equal(tuple(scale.shape), (*shape[:-1], shape[-1] // 32))
    equal(tuple(mxfp8.dequantize(elements, scale).shape), shape)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(rows=st.integers(1, 9), blocks=st.integers(1, 3), step=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_strides_do_not_matter(rows: int, blocks: int, step: int, seed: int) -> None:
    stored = torch.randn(32 * blocks * step, rows * step, generator=torch.Generator().manual_seed(seed))
    x = stored[::step, ::step].mT
    for got, want in zip(mxfp8.quantize(x), mxfp8.quantize(x.contiguous()), strict=True):
        same_bits(got, want)
