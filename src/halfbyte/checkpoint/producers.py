"""How other tools quantize a weight to NVFP4, in a few lines each: a checkpoint's bytes can be traced to a rule.

Each is equal, byte for byte, to the package that it is named after; tests compare them. None is used for converting.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats import E2M1_MAX, E4M3_MAX, NVFP4
from ..functional import quantize
from ..tensor import QuantizedTensor

BLOCK = 16
SMALLEST = 2.0**-9  # above zero, in E4M3
_BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


@dataclass(frozen=True)
class Producer:
    """A tool, and how it quantizes.

    Attributes:
        quantize: (weight [N, K], its amax or its fused group's, []) → the same as halfbyte would hold it.
        peculiar: what tells its bytes from others'.
        source: where its rule is written.
    """

    name: str
    quantize: Callable[[Tensor, Tensor], QuantizedTensor]
    peculiar: str
    source: str


def transformer_engine(fmt: NVFP4) -> Callable[[Tensor, Tensor], QuantizedTensor]:
    """halfbyte's own contract."""
    return lambda weight, amax: quantize(weight, fmt, amax=amax.float())


def modelopt_dynamic(weight: Tensor, amax: Tensor) -> QuantizedTensor:
    """Block scales from the weight: b / (6 · scale_2), where scale_2 = A / 2688 is rounded already."""
    scale_2 = amax.float() / (E2M1_MAX * E4M3_MAX)
    largest = _block_amax(weight).float()
    return _modelopt(weight, largest / (E2M1_MAX * scale_2), scale_2)


def modelopt_static(weight: Tensor, amax: Tensor) -> QuantizedTensor:
    """Block scales from maxima that calibration kept: (b / 6) · 448 / (A / 6)."""
    largest = _block_amax(weight).float() / E2M1_MAX
    largest = torch.where(largest == 0, 1.0, largest)
    scale = largest * E4M3_MAX / (amax.float() / E2M1_MAX)
    return _modelopt(weight, scale, amax.float() / (E2M1_MAX * E4M3_MAX))


def compressed_tensors(weight: Tensor, amax: Tensor) -> QuantizedTensor:
    """b / 6 and 2688 / A are rounded to the weight's own dtype; a block scale that becomes 0 is 0.125."""
    tiny = torch.finfo(weight.dtype).tiny
    divisor = torch.nan_to_num(E4M3_MAX * E2M1_MAX / amax.to(weight.dtype).clamp(min=tiny), nan=1.0, posinf=1.0)
    divisor = divisor.float()
    scale = (divisor.reshape(1) * (_block_amax(weight) / E2M1_MAX)).clamp(-E4M3_MAX, E4M3_MAX)
    scale = scale.to(torch.float8_e4m3fn).float()
    scale = torch.where(scale == 0, 0.125, scale)
    y = _blocks(weight) / (scale / divisor).unsqueeze(-1)
    packed = _pack(y.flatten(-2))
    return QuantizedTensor(packed, scale.to(torch.float8_e4m3fn), 1.0 / divisor, None, NVFP4())


def compressed_tensors_float32(weight: Tensor, amax: Tensor) -> QuantizedTensor:
    """The same with maxima kept in float32, as some observers keep them."""
    return compressed_tensors(weight.float(), amax.float())


def _modelopt(weight: Tensor, scale: Tensor, scale_2: Tensor) -> QuantizedTensor:
    scale = torch.where(scale == 0, 1.0, scale)  # an all-zero block
    stored = scale.clamp(min=SMALLEST, max=E4M3_MAX).to(torch.float8_e4m3fn)
    y = _blocks(weight) / (stored.float() * scale_2).unsqueeze(-1)
    return QuantizedTensor(_pack(y.flatten(-2)), stored, scale_2, None, NVFP4())


def _blocks(weight: Tensor) -> Tensor:
    blocks: Tensor = weight.unflatten(-1, (-1, BLOCK))
    return blocks


def _block_amax(weight: Tensor) -> Tensor:
    largest: Tensor = _blocks(weight).abs().amax(-1)
    return largest


def _pack(y: Tensor) -> Tensor:
    """Nearest codes, ties to even, two to a byte; the sign is that of y < 0."""
    bounds = torch.tensor(_BOUNDS, device=y.device, dtype=y.dtype)
    magnitude = y.abs()
    code = torch.bucketize(magnitude, bounds)  # a tie goes down …
    for i in (1, 3, 5):
        code += magnitude == bounds[i]  # … but for these three
    code = (code + 8 * (y < 0)).to(torch.uint8)
    packed: Tensor = code[..., ::2] | code[..., 1::2] << 4
    return packed


_MODELOPT = "nvidia-modelopt, torch/quantization/qtensor/nvfp4_tensor.py"
_COMPRESSED_TENSORS = "compressed-tensors, quantization/utils/helpers.py and lifecycle/forward_helpers.py"
_TE = "TransformerEngine 2.20's reference quantizer; docs/numerics.md"
PRODUCERS = (
    Producer(
        "TransformerEngine, halfbyte",
        transformer_engine(NVFP4()),
        "the tensor scale is 1 / (2688 / A), which for a quarter of all A is not A / 2688",
        _TE,
    ),
    Producer(
        "TransformerEngine, halfbyte (16×16 blocks)",
        transformer_engine(NVFP4(block=(16, 16))),
        "16 rows share each block scale",
        _TE,
    ),
    Producer(
        "TransformerEngine, halfbyte (four over six)",
        transformer_engine(NVFP4(scale_rule="four_over_six")),
        "some blocks' maxima are mapped to 4; the largest block scale is 256, or 384 where mapped to 4",
        _TE,
    ),
    Producer(
        "halfbyte (search)",
        transformer_engine(NVFP4(scale_rule="search")),
        "each block scale is the best of all",
        "docs/numerics.md",
    ),
    Producer(
        "ModelOpt (dynamic)",
        modelopt_dynamic,
        "weight_scale_2 = A / 2688; no block scale below 2^-9; all-zero blocks have scale 1.0",
        _MODELOPT,
    ),
    Producer(
        "ModelOpt (static)",
        modelopt_static,
        "weight_scale_2 = A / 2688; no block scale below 2^-9; all-zero blocks have scale 2688 / A, at most 448",
        _MODELOPT,
    ),
    Producer(
        "compressed-tensors",
        compressed_tensors,
        "A and block maxima are divided in the weight's own dtype; no block scale is 0, it becomes 0.125",
        _COMPRESSED_TENSORS,
    ),
    Producer(
        "compressed-tensors (float32 maxima)",
        compressed_tensors_float32,
        "no block scale is 0, it becomes 0.125",
        _COMPRESSED_TENSORS,
    ),
)
