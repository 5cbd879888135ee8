"""Decoders that others wrote read our bytes as we do, and torchao's MXFP8 encoder writes the same."""

import importlib
import warnings
from types import ModuleType

import pytest
import torch

from halfbyte import MXFP8, NVFP4, QuantizedTensor, quantize
from halfbyte.numerics import nvfp4

from .check import close, equal

FORMATS = [NVFP4(), NVFP4(block=(16, 16)), NVFP4(scale_rule="four_over_six"), NVFP4(hadamard=True)]


def import_quietly(name: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, at import
        return importlib.import_module(name)


def weight(rng: torch.Generator, fmt: NVFP4) -> QuantizedTensor:
    x = torch.randn(48, 64, generator=rng)
    x[5, 16:32] = 0  # a block whose scale is 0
    return quantize(x.to(torch.bfloat16), fmt)


def encode_scale(q: QuantizedTensor) -> torch.Tensor:
    """What compressed-tensors stores as weight_global_scale: a divisor."""
    return nvfp4.tensor_scales(q.amax, q.format)[0]


@pytest.mark.slow  # its import
@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
def test_modelopt_decodes_nvfp4(rng: torch.Generator, fmt: NVFP4) -> None:
    """The same products in the same order: bitwise, but for the sign of zero."""
    module = import_quietly("modelopt.torch.quantization.qtensor.nvfp4_tensor")
    q = weight(rng, fmt)
    theirs = module.NVFP4QTensor(q.shape, torch.float32, q.packed).dequantize(
        torch.float32, scale=q.block_scale, double_scale=q.tensor_scale, block_sizes={-1: 16}
    )
    equal(theirs, q.dequantize())


@pytest.mark.slow
def test_modelopt_derives_the_same_scales(rng: torch.Generator) -> None:
    """Where A / 2688 is a power of two both rules are exact, so block scales and codes must be equal too."""
    module = import_quietly("modelopt.torch.quantization.qtensor.nvfp4_tensor")
    x = torch.randn(48, 64, generator=rng).clamp(-5, 5)
    x[0, 0] = 5.25
    data, block_scale, tensor_scale = module.NVFP4QTensor.quantize(x, 16)
    q = quantize(x, NVFP4())
    equal(tensor_scale, q.tensor_scale)
    same = (block_scale.float() == q.block_scale.float()).double().mean()
    close(same, torch.tensor(1.0), 0.005)  # they divide by 6, the contract multiplies by 1/6: a tie may fall otherwise
    equal(data._quantized_data[0, :8], q.packed[0, :8])


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
def test_llm_dequant_decodes_nvfp4(rng: torch.Generator, fmt: NVFP4) -> None:
    """It divides by S_enc where we multiply by S_dec, itself rounded: at most 2 ulp apart, none at powers of two."""
    module = import_quietly("llm_dequant.nvfp4")
    q = weight(rng, fmt)
    theirs = module.dequantize_nvfp4(q.packed, q.block_scale, encode_scale(q), dtype=torch.float32)
    close(theirs, q.dequantize(), q.dequantize().abs() * 2.0**-22)
    if fmt.e4m3_max == 448:
        x = torch.randn(48, 64, generator=rng)
        q = quantize(x, fmt, amax=torch.tensor(5.25))  # S_enc = 2688 / 5.25 = 512
        equal(module.dequantize_nvfp4(q.packed, q.block_scale, encode_scale(q), dtype=torch.float32), q.dequantize())


def test_compressed_tensors_decodes_nvfp4(rng: torch.Generator) -> None:
    helpers = import_quietly("compressed_tensors.compressors.nvfp4.helpers")
    lifecycle = import_quietly("compressed_tensors.quantization.lifecycle.forward")
    arguments = import_quietly("compressed_tensors.quantization").QuantizationArgs
    args = arguments(num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True)
    q = weight(rng, NVFP4())
    values = helpers.unpack_fp4_from_uint8(q.packed, *q.shape, dtype=torch.float32)
    theirs = lifecycle.dequantize(
        x_q=values, scale=q.block_scale.float(), args=args, global_scale=encode_scale(q), dtype=torch.float32
    )
    close(theirs, q.dequantize(), q.dequantize().abs() * 2.0**-22)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchao_rceil_writes_the_same_mxfp8(rng: torch.Generator, dtype: torch.dtype) -> None:
    module = import_quietly("torchao.prototype.mx_formats.mx_tensor")
    x = (torch.randn(64, 256, generator=rng) * torch.exp2(torch.randint(-8, 8, (64, 1), generator=rng))).to(dtype)
    scale, elements = module.to_mx(x, torch.float8_e4m3fn, 32, module.ScaleCalculationMode.RCEIL)
    q = quantize(x, MXFP8())
    equal(scale.view(torch.uint8), q.block_scale)
    equal(elements.view(torch.uint8), q.packed.view(torch.uint8))
