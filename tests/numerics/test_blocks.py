"""Decoding weights that others quantized, and that powers of two survive MXFP8."""

import pytest
import torch

from halfbyte.numerics import blocks, e2m1, mxfp8

from ..check import equal, same_bits


@pytest.mark.parametrize("block", [(1, 32), (16, 16), (128, 128), (48, 40), (1, 160), (96, 160), (7, 3)], ids=str)
def test_rounds_once(block: tuple[int, int]) -> None:
    """The product in float64 is exact, since it has 28 significant bits; ragged edges have the last scale."""
    rng = torch.Generator().manual_seed(1)
    byte = torch.randint(0, 127, (96, 160), generator=rng) + 128 * torch.randint(0, 2, (96, 160), generator=rng)
    elements = byte.to(torch.uint8).view(torch.float8_e4m3fn)
    grid = (-(-96 // block[0]), -(-160 // block[1]))
    scale = torch.exp2(torch.rand(grid, generator=rng) * 40 - 20)
    rows, columns = torch.arange(96) // block[0], torch.arange(160) // block[1]
    wanted = elements.double() * scale.double()[rows][:, columns]
    same_bits(blocks.decode(elements, scale, block), wanted.float())


def test_every_e2m1_pair() -> None:
    packed = torch.arange(256, dtype=torch.uint8).reshape(4, 64)
    scale = torch.exp2(torch.arange(16.0).reshape(4, 4) - 8)
    wanted = e2m1.decode(e2m1.unpack(packed)) * scale.repeat_interleave(32, 1)
    same_bits(blocks.decode(packed, scale, (1, 32)), wanted)


def test_scales() -> None:
    exponents = torch.arange(255, dtype=torch.uint8)
    wanted = torch.exp2(exponents.double() - 127).float()
    same_bits(blocks.decode_scale(exponents), wanted)
    same_bits(blocks.decode_scale(exponents.view(torch.float8_e8m0fnu)), wanted)
    equal(bool(blocks.decode_scale(torch.tensor([255], dtype=torch.uint8)).isnan()), True)
    same_bits(blocks.decode_scale(torch.tensor([0.1]).bfloat16()), torch.tensor([0.1]).bfloat16().float())


@pytest.mark.parametrize("exponents", [range(-127, -60), range(-60, 60), range(60, 120)], ids=str)
def test_powers_of_two_survive_mxfp8(exponents: range) -> None:
    """Blocks with every E4M3 maximum, beside every kind of smaller element, under every power of two: bit for bit."""
    rng = torch.Generator().manual_seed(exponents.start)
    largest = torch.arange(127)[:, None]  # the code of each block's maximum
    codes = (torch.rand(127, 32, generator=rng) * (largest + 1)).long()
    codes[:, :8] = torch.arange(8).clamp(max=largest)  # subnormals, which a larger scale would lose
    codes[:, 31:] = largest
    signs = torch.randint(0, 2, codes.shape, generator=rng) << 7
    elements = (codes | signs).to(torch.uint8).view(torch.float8_e4m3fn)
    for k in exponents:
        x = blocks.decode(elements, torch.full((1, 1), 2.0).double().pow(k).float(), (127, 32))
        packed, scale = mxfp8.quantize(x)
        same_bits(mxfp8.dequantize(packed, scale), x, f"2^{k}")
        equal(bool((scale.int() <= k + 127).all()), True, "no scale is larger than the source's")


def test_below_the_smallest_scale_they_round() -> None:
    """E8M0 ends at 2^-127: what is smaller loses subnormals, which the docs say."""
    elements = torch.arange(32, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(1, 32)
    x = blocks.decode(elements, torch.full((1, 1), 2.0**-130), (1, 32))
    equal(torch.equal(mxfp8.dequantize(*mxfp8.quantize(x)), x), False)
