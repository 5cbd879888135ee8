from typing import Any

import pytest
import torch

from halfbyte import MXFP8, NVFP4, QuantizedTensor, ShapeError, quantize

from .check import close, equal, same_bits, true

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPE = (2, 3, 64)


def example(fmt: NVFP4 | MXFP8, rng: torch.Generator, **options: Any) -> tuple[torch.Tensor, QuantizedTensor]:
    x = torch.randn(SHAPE, generator=rng)
    return x, quantize(x, fmt, **options)


@pytest.mark.parametrize(
    ("fmt", "options", "scale_shape"),
    [
        (NVFP4(), {}, ()),
        (NVFP4(), {"per_matrix": True}, (2,)),
        (NVFP4(scaling="row"), {}, (2, 3)),
        (NVFP4(scaling="row"), {"per_matrix": True}, (2, 3)),
        (NVFP4(block=(16, 16), scale_rule="four_over_six"), {"per_matrix": True}, (2,)),
    ],
)
def test_nvfp4_parts(rng: torch.Generator, fmt: NVFP4, options: dict, scale_shape: tuple[int, ...]) -> None:
    _, q = example(fmt, rng, **options)
    equal((q.packed.dtype, tuple(q.packed.shape)), (torch.uint8, (2, 3, 32)))
    equal((q.block_scale.dtype, tuple(q.block_scale.shape)), (torch.float8_e4m3fn, (2, 3, 4)))
    for part in (q.tensor_scale, q.amax):
        equal((part.dtype, tuple(part.shape)), (torch.float32, scale_shape))
    equal((tuple(q.shape), q.device, q.format), (SHAPE, torch.device("cpu"), fmt))
    equal(q.nbytes, 2 * 3 * 32 + 2 * 3 * 4 + 4 * q.tensor_scale.numel())


def test_mxfp8_parts(rng: torch.Generator) -> None:
    _, q = example(MXFP8(), rng)
    equal((q.packed.dtype, tuple(q.packed.shape)), (torch.float8_e4m3fn, SHAPE))
    equal((q.block_scale.dtype, tuple(q.block_scale.shape)), (torch.uint8, (2, 3, 2)))
    equal((q.tensor_scale, q.amax), (None, None))
    equal((tuple(q.shape), q.nbytes), (SHAPE, 2 * 3 * 64 + 2 * 3 * 2))


@pytest.mark.parametrize("fmt", [NVFP4(), NVFP4(scaling="row", scale_rule="four_over_six")], ids=repr)
def test_nvfp4_values_are_near(rng: torch.Generator, fmt: NVFP4) -> None:
    """Half the widest gap of E2M1 is 1 of 6, or 1 of 4 where the maximum became 4; a scale is off by 1/16 at most."""
    x, q = example(fmt, rng)
    block_amax = x.unflatten(-1, (-1, 16)).abs().amax(-1).repeat_interleave(16, -1)
    close(q.dequantize(), x, block_amax * (1 / 6 + 1 / 16))


def test_mxfp8_values_are_near(rng: torch.Generator) -> None:
    """3 mantissa bits: half an ulp is 2^-4 of the value, or 2^-10 of a scale that is at most 2/448 of the maximum."""
    x, q = example(MXFP8(), rng)
    block_amax = x.unflatten(-1, (-1, 32)).abs().amax(-1).repeat_interleave(32, -1)
    close(q.dequantize(), x, x.abs() * 2.0**-4 + block_amax * 2.0**-10 / 224)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", [NVFP4(), NVFP4(scaling="row"), MXFP8()], ids=repr)
def test_dequantize_rounds_once(rng: torch.Generator, fmt: NVFP4 | MXFP8, dtype: torch.dtype) -> None:
    _, q = example(fmt, rng)
    equal(q.dequantize().dtype, torch.float32)
    same_bits(q.dequantize(dtype), q.dequantize().to(dtype))
    same_bits(q.dequantize(dtype, impl="reference"), q.dequantize(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e4m3fn])
def test_dequantize_refuses_other_dtypes(rng: torch.Generator, dtype: torch.dtype) -> None:
    for fmt in (NVFP4(), MXFP8()):
        with pytest.raises(ShapeError, match="dequantize gives float32, bfloat16 or float16"):
            example(fmt, rng)[1].dequantize(dtype)


def test_dequantize_needs_the_tensor_scale(rng: torch.Generator) -> None:
    _, q = example(NVFP4(), rng)
    with pytest.raises(ShapeError, match="tensor_scale=None; decoding needs S_dec"):
        q.replace(tensor_scale=None).dequantize()


def test_dequantize_does_not_need_amax(rng: torch.Generator) -> None:
    _, q = example(NVFP4(), rng)
    same_bits(q.replace(amax=None).dequantize(), q.dequantize())


def test_hadamard_is_not_undone(rng: torch.Generator) -> None:
    x, q = example(NVFP4(hadamard=True), rng)
    true((q.dequantize() - x).abs().max() > 1, "decoded values should be transformed ones")
    energy = q.dequantize().square().sum() / x.square().sum()
    close(energy, torch.tensor(1.0), 0.05)


def test_columnwise(rng: torch.Generator) -> None:
    x = torch.randn(32, 48, generator=rng)
    q = quantize(x.mT, NVFP4())
    equal(tuple(q.shape), (48, 32))
    same_bits(q.packed, quantize(x.mT.contiguous(), NVFP4()).packed)


@pytest.mark.parametrize("fmt", [NVFP4(), NVFP4(scale_rule="four_over_six"), NVFP4(hadamard=True), MXFP8()])
def test_carries_no_gradient(fmt: NVFP4 | MXFP8) -> None:
    parameter = torch.nn.Parameter(torch.ones(4, 32))
    q = quantize(parameter, fmt)
    tensors = (q.packed, q.block_scale, q.tensor_scale, q.amax, q.dequantize())
    true(not any(t.requires_grad for t in tensors if t is not None), "a quantized tensor is a constant")
    true(parameter.requires_grad, "the input is left alone")


def test_repr(rng: torch.Generator) -> None:
    _, q = example(MXFP8(), rng)
    equal(repr(q), "QuantizedTensor(shape=(2, 3, 64), format=MXFP8(), device=cpu)")
