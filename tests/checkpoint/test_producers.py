"""Emulations of other tools' numerics against the tools themselves, byte for byte."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from halfbyte.checkpoint import producers
from halfbyte.checkpoint.producers import PRODUCERS
from halfbyte.formats import NVFP4
from halfbyte.functional import quantize
from halfbyte.tensor import QuantizedTensor

from ..check import equal, same_bits, true
from ..test_interop import import_quietly

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def weights(rng: torch.Generator, dtype: torch.dtype) -> list[Tensor]:
    """Ordinary, of many sizes in one tensor, with zeros of both signs, ties, and all zero."""
    x = torch.randn(96, 128, generator=rng)
    spread = x * torch.exp2(torch.randint(-12, 3, (96, 8), generator=rng)).repeat_interleave(16, 1)
    ties = torch.randint(-24, 25, (32, 64), generator=rng) / 4
    zeros = x.clone()
    zeros[3, :32], zeros[4, ::3], zeros[5] = 0, -0.0, -0.0
    return [w.to(dtype) for w in (x, x * 0.02, spread, ties, zeros, -x * 300, x[:, :16])]


def same(actual: QuantizedTensor, packed: Tensor, block_scale: Tensor, tensor_scale: Tensor) -> None:
    same_bits(actual.block_scale, block_scale, "block scales")
    equal(actual.tensor_scale.reshape(()), tensor_scale.reshape(()), "tensor scale")
    same_bits(actual.packed, packed, "codes")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_modelopt_dynamic(rng: torch.Generator, dtype: torch.dtype) -> None:
    theirs = import_quietly("modelopt.torch.quantization.qtensor.nvfp4_tensor").NVFP4QTensor
    for x in (*weights(rng, dtype), torch.zeros(4, 32, dtype=dtype)):
        data, scale, scale_2 = theirs.quantize(x.clone(), 16)
        actual = producers.modelopt_dynamic(x, x.abs().amax())
        if not x.any():
            scale_2, actual = (
                torch.ones(()),
                QuantizedTensor(actual.packed, actual.block_scale, torch.ones(()), None, NVFP4()),
            )
        same(actual, data._quantized_data, scale, scale_2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_modelopt_static(rng: torch.Generator, dtype: torch.dtype) -> None:
    """As its export does with a quantizer that holds maxima."""
    theirs = import_quietly("modelopt.torch.quantization.qtensor.nvfp4_tensor").NVFP4QTensor
    for x in weights(rng, dtype):
        for amax in (x.abs().amax(), 2 * x.abs().amax()):  # its own, or a fused group's
            largest = x.unflatten(-1, (-1, 16)).abs().amax(-1).float()
            quantizer = SimpleNamespace(block_sizes={-1: 16}, global_amax=amax.float(), _amax=largest)
            scale_2 = theirs.get_weights_scaling_factor_2_from_quantizer(quantizer)
            scale, _ = theirs.get_weights_scaling_factor_from_quantizer(quantizer, x, scale_2)
            data, _, _ = theirs.quantize(x.clone(), 16, scale, scale_2)
            same(producers.modelopt_static(x, amax), data._quantized_data, scale, scale_2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compressed_tensors(rng: torch.Generator, dtype: torch.dtype) -> None:
    """Its own global scale, block scales and compressor."""
    helpers = import_quietly("compressed_tensors.quantization.utils.helpers")
    types = import_quietly("compressed_tensors.quantization")
    compressor = import_quietly("compressed_tensors.compressors.nvfp4.base").NVFP4PackedCompressor
    sizes = {"num_bits": 4, "type": "float", "group_size": 16, "symmetric": True}
    args = types.QuantizationArgs(strategy="tensor_group", scale_dtype=torch.float8_e4m3fn, **sizes)
    scheme = types.QuantizationScheme(targets=["Linear"], weights=args)
    for x in weights(rng, dtype):
        for amax in (x.abs().amax(), 2 * x.abs().amax()):
            divisor = helpers.generate_gparam(-amax, amax)
            blocks = x.unflatten(-1, (-1, 16))
            scale, _ = helpers.calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, global_scale=divisor)
            state = {"weight": x.clone(), "weight_scale": scale, "weight_global_scale": divisor}
            made = compressor.compress(state, scheme)
            same(producers.compressed_tensors(x, amax), made["weight_packed"], made["weight_scale"], 1.0 / divisor)
    equal(
        producers.compressed_tensors_float32(x, amax).packed,
        producers.compressed_tensors(x.float(), amax.float()).packed,
    )


def test_transformer_engine_is_halfbyte(rng: torch.Generator) -> None:
    """Which the golden vectors compare with TransformerEngine's reference."""
    x = weights(rng, torch.bfloat16)[0]
    expected = quantize(x, NVFP4())
    same(PRODUCERS[0].quantize(x, x.abs().amax()), expected.packed, expected.block_scale, expected.tensor_scale)


def test_they_differ(rng: torch.Generator) -> None:
    """Otherwise they would explain nothing."""
    x = weights(rng, torch.bfloat16)[4] * 1.37
    made = [producer.quantize(x, x.abs().amax()) for producer in PRODUCERS]
    for i, a in enumerate(made):
        for j, b in enumerate(made[:i]):
            scales = torch.equal(a.block_scale.view(torch.uint8), b.block_scale.view(torch.uint8))
            same_bytes = scales and torch.equal(a.packed, b.packed) and torch.equal(a.tensor_scale, b.tensor_scale)
            true(not same_bytes, f"{PRODUCERS[i].name} = {PRODUCERS[j].name}")
