import pytest
import torch

from halfbyte import NVFP4
from halfbyte.numerics import matmul, nvfp4

from ..check import close, equal, same_bits

TENSOR, ROW, TILES = NVFP4(), NVFP4(scaling="row"), NVFP4(block=(16, 16), scale_rule="four_over_six")
PAIRS = [(TENSOR, TENSOR), (ROW, TENSOR), (TENSOR, ROW), (ROW, ROW), (ROW, TILES)]


def operands(rng: torch.Generator, x_fmt: NVFP4, w_fmt: NVFP4) -> tuple[nvfp4.Encoded, nvfp4.Encoded]:
    x, w = torch.randn(5, 64, generator=rng), torch.randn(48, 64, generator=rng)
    return nvfp4.quantize(x, x_fmt), nvfp4.quantize(w, w_fmt)


@pytest.mark.parametrize(("x_fmt", "w_fmt"), PAIRS, ids=lambda f: f"{f.scaling}-{f.block[0]}x16")
def test_equals_integer_arithmetic(rng: torch.Generator, x_fmt: NVFP4, w_fmt: NVFP4) -> None:
    """q·s is a multiple of 2^-10 below 2^12, so 64 products sum to below 2^50 in units of 2^-20: exact in int64."""
    x, w = operands(rng, x_fmt, w_fmt)
    xi, wi = (nvfp4.decode_without_tensor_scale(q.packed, q.block_scale).double() * 1024 for q in (x, w))
    equal(xi, xi.round())
    total = (xi.long() @ wi.long().mT).double() * 2.0**-20
    alpha = x.tensor_scale.double().reshape(-1, 1) * w.tensor_scale.double().reshape(1, -1)
    same_bits(matmul.matmul(x, w), (total * alpha).float())


@pytest.mark.parametrize(("x_fmt", "w_fmt"), PAIRS, ids=lambda f: f"{f.scaling}-{f.block[0]}x16")
def test_agrees_with_the_dequantized_product(rng: torch.Generator, x_fmt: NVFP4, w_fmt: NVFP4) -> None:
    """`dequantize` rounds s·S_dec and the value, for both operands, and the result rounds once: 5 halves of an ulp."""
    x, w = operands(rng, x_fmt, w_fmt)
    xv, wv = (nvfp4.dequantize(*q[:3]).double() for q in (x, w))
    close(matmul.matmul(x, w), xv @ wv.mT, 5 * 2.0**-24 * (1 + 2.0**-20) * (xv.abs() @ wv.abs().mT))


def test_what_is_multiplied_is_exact_in_16_bits(rng: torch.Generator) -> None:
    """Every E2M1 times every non-negative finite E4M3, both signs: bfloat16 and float16 hold the product."""
    scale = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None]
    packed = (torch.arange(16, dtype=torch.uint8).view(8, 2) * torch.tensor([1, 16], dtype=torch.uint8)).sum(-1)
    value = nvfp4.decode_without_tensor_scale(packed.to(torch.uint8).expand(127, 8), scale)
    equal(value.shape, torch.Size((127, 16)))
    equal(value.abs().amax().item(), 2688.0)
    for dtype in (torch.bfloat16, torch.float16):
        same_bits(value.to(dtype).float(), value)
