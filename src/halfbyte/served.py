"""Modules that multiply by a checkpoint's weights as training does: q·s, scaled after the matmul; batch-invariant.

`load` without batch_invariant decodes weights to the model's dtype, one rounding more than a trainer computes with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .formats import MXFP8, NVFP4, Format

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
    """torch's, whose weight (N, K) holds q·s in bfloat16; weight_scale: float32 (), or None."""

    weight_scale: Tensor | None
    input: Input

    def forward(self, x: Tensor) -> Tensor:
        """(…, K) → (…, N)."""
        with torch._C.DisableTorchFunction():  # the mode has nothing to do here
            a, a_scale = self.input(x.reshape(-1, self.in_features))
            a, b = _alike(a, self.weight)
            scales = a_scale, self.weight_scale
            y = ops.scaled_matmul(a, b, *scales, bias=self.bias, out_dtype=x.dtype, batch_invariant=True)
        return y.view(*x.shape[:-1], self.out_features)


def serve_linear(module: nn.Linear, scale: Tensor | None, quantize_input: Input) -> None:
    """A module of torch's that holds q·s becomes one that multiplies by it."""
    module.__class__ = Linear
    module.weight = nn.Parameter(module.weight.detach().to(MATMUL_DTYPE), requires_grad=False)
    module.register_buffer("weight_scale", scale, persistent=False)
    module.input = quantize_input


class Experts(nn.Module):
    """Beside stacked weights that hold q·s: by name, scales (E, N) or None, and how inputs are quantized."""

    def __init__(self, scales: dict[str, Tensor | None], inputs: dict[str, Input]) -> None:
        super().__init__()
        self.inputs = nn.ModuleDict(inputs)
        for name, scale in scales.items():
            self.register_buffer(f"{name}_scale", scale, persistent=False)

    def forward(self, x: Tensor, weight: Tensor, name: str, offsets: Tensor) -> Tensor:
        """Rows (T, K), sorted by expert, times their expert's weight (E, N, K) of that name: (T, N)."""
        scale: Any = getattr(self, f"{name}_scale")
        with torch._C.DisableTorchFunction():
            a, a_scale = self.inputs[name](x, offsets)
            a, b = _alike(a, weight)
            return ops.scaled_grouped_matmul(a, b, offsets, a_scale, scale, out_dtype=x.dtype, batch_invariant=True)


def serve_experts(module: Any, scales: dict[str, Tensor | None], inputs: dict[str, Input]) -> None:
    """transformers' experts that hold q·s become such that multiply by it; `invariant.enable` lets them."""
    for name in scales:
        setattr(module, name, nn.Parameter(getattr(module, name).detach().to(MATMUL_DTYPE), requires_grad=False))
    module.served = Experts(scales, inputs)


def _alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)
