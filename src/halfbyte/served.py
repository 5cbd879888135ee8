"""Modules that multiply by a checkpoint's weights as training does: q·s, scaled after the matmul; batch-invariant.

A weight is a QuantizedTensor, so that its bytes can be written to in place; q·s is kept beside it. `load` without
batch_invariant decodes weights to the model's dtype, one rounding more than a trainer computes with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .formats import MXFP8, NVFP4, Format
from .tensor import QuantizedTensor

MATMUL_DTYPE = torch.bfloat16  # holds every q·s exactly


class Input(nn.Module):
    """How a module's input is quantized.

    Args:
        fmt: its format; None leaves it as it is.
        amax: float32 () or, one for each expert, (E,), where it is fixed; for NVFP4 otherwise each row has its own.
    """

    amax: Tensor | None

    def __init__(self, fmt: Format | None = None, amax: Tensor | None = None) -> None:
        super().__init__()
        self.fmt = fmt
        self.register_buffer("amax", amax, persistent=False)

    def forward(self, x: Tensor, offsets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """x (T, K) → q·s, and what multiplies it after the matmul."""
        if self.fmt is None:
            return x, None
        if isinstance(self.fmt, MXFP8):
            return ops.dequantize_mxfp8(*ops.quantize_mxfp8(x, self.fmt), MATMUL_DTYPE), None
        amax = self.amax
        if amax is not None and amax.dim() and offsets is not None:
            row = torch.arange(x.shape[0], dtype=offsets.dtype, device=x.device)
            expert = torch.searchsorted(offsets, row, right=True).clamp(max=offsets.shape[0] - 1)
            amax = amax[expert]
        elif amax is not None:
            amax = amax.expand(x.shape[0])
        values, scale = ops.fake_quantize(x, NVFP4(scaling="row"), unscaled=True, amax=amax)
        return values.to(MATMUL_DTYPE), scale


class Linear(nn.Linear):
    """torch's, whose weight (N, K) is a QuantizedTensor."""

    weight: QuantizedTensor
    input: Input
    values: Values

    def forward(self, x: Tensor) -> Tensor:
        """(…, K) → (…, N)."""
        with torch._C.DisableTorchFunction():  # the mode has nothing to do here
            a, a_scale = self.input(x.reshape(-1, self.in_features))
            a, b = _alike(a, self.values(self.weight))
            scales = a_scale, self.weight.tensor_scale
            y = ops.scaled_matmul(a, b, *scales, bias=self.bias, out_dtype=x.dtype, batch_invariant=True)
        return y.view(*x.shape[:-1], self.out_features)


def serve_linear(module: nn.Linear, weight: QuantizedTensor, quantize_input: Input) -> None:
    """A module of torch's becomes one that multiplies by that weight."""
    served: Any = module
    served.__class__ = Linear
    served.weight = nn.Parameter(weight, requires_grad=False)
    served.input, served.values = quantize_input, Values()


class Experts(nn.Module):
    """Beside stacked weights (E, N, K) that are QuantizedTensors: by their names, how inputs are quantized."""

    def __init__(self, inputs: dict[str, Input]) -> None:
        super().__init__()
        self.inputs = nn.ModuleDict(inputs)
        self.values = {name: Values() for name in inputs}

    def forward(self, x: Tensor, weight: QuantizedTensor, name: str, offsets: Tensor) -> Tensor:
        """Rows (T, K), sorted by expert, times their expert's weight of that name: (T, N)."""
        with torch._C.DisableTorchFunction():
            a, a_scale = self.inputs[name](x, offsets)
            a, b = _alike(a, self.values[name](weight))
            scales = a_scale, weight.tensor_scale
            return ops.scaled_grouped_matmul(a, b, offsets, *scales, out_dtype=x.dtype, batch_invariant=True)


def serve_experts(module: Any, weights: dict[str, QuantizedTensor], inputs: dict[str, Input]) -> None:
    """transformers' experts become such that multiply by those stacked weights; `invariant.enable` lets them."""
    for name, weight in weights.items():
        setattr(module, name, nn.Parameter(weight, requires_grad=False))
    module.served = Experts(inputs)


class Values:
    """q·s of a weight, kept until its bytes are written to, as a weight sync does."""

    def __init__(self) -> None:
        self._kept: tuple[Tensor, tuple[int, int], Tensor] | None = None

    def __call__(self, weight: QuantizedTensor) -> Tensor:
        """bfloat16, of the weight's shape."""
        parts = weight.packed, weight.block_scale
        # Inference tensors have no version; and a CUDA graph is to decode the bytes that each replay finds.
        capturing = parts[0].is_cuda and torch.cuda.is_current_stream_capturing()
        if capturing or any(part.is_inference() for part in parts):
            return _decode(weight)
        versions = parts[0]._version, parts[1]._version
        if self._kept is None or self._kept[0] is not parts[0] or self._kept[1] != versions:
            self._kept = parts[0], versions, _decode(weight)
        return self._kept[2]


def _decode(weight: QuantizedTensor) -> Tensor:
    values: Tensor = weight.dequantize(MATMUL_DTYPE, unscaled=weight.tensor_scale is not None)
    return values


def _alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)
