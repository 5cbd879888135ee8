"""The one autograd function: y = x·wᵀ + bias with what a `LayerRecipe` says of x, w and their gradients.

    forward           y = x̂·ŵᵀ + bias             x̂ = Q(x), ŵ = Q(w); q·s multiplied in bf16, exactly
    quantized         dx = Q(dy)·ŵ₂               ŵ₂ᵀ = Q(wᵀ); with 16×16 blocks ŵ₂ = ŵ
                      dw = Q(H·dy)ᵀ·Q(H·x)        quantized along the tokens; H is the Hadamard transform, or nothing
    high_precision    dx = dy·w, dw = dyᵀ·x       of the originals, which are saved
    dequantized       dx = dy·ŵ, dw = dyᵀ·x̂       decoded, each rounded once to dy's dtype; 4-bit data is saved

Given up: a backward that is differentiable itself; whoever asks for it is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..formats import NVFP4
from ..ops.matmul import scaled_matmul
from ..recipe.training import LayerRecipe
from .operands import (
    AmaxGroups,
    Encoded,
    Operand,
    decode,
    encode_and_decode,
    encode_columns,
    encode_gradient,
    encode_transposed,
    fake,
    first_rows,
    shared_amax,
    unscaled,
)


class Weight(NamedTuple):
    """A weight as the forward pass multiplies it.

    Attributes:
        operand: q·s and the tensor scale.
        encoded: what is saved where backward multiplies by the same; None otherwise.
        amax: the maximum that it was quantized with, where that is not its own.
    """

    operand: Operand
    encoded: Encoded | None
    amax: Tensor | None


def quantize_weight(weight: Tensor, layer: LayerRecipe, amax: Tensor | None) -> Weight:
    """weight (N, K) quantized once."""
    if layer.weights is None:
        return Weight(Operand(weight, None), None, None)
    square = isinstance(layer.weights, NVFP4) and layer.weights.block == (16, 16)
    if layer.backward == "dequantized" or (layer.backward == "quantized" and square):
        encoded, operand = encode_and_decode(weight, layer.weights, amax)
        return Weight(operand, encoded, amax)
    return Weight(fake(weight, layer.weights, amax), None, amax)


class QuantizedLinear(torch.autograd.Function):
    """See above. apply(x (M, K), weight (N, K), bias, *weight's parts, main_grad, state, layer, groups) → (M, N)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor,
        scale: Tensor | None,
        packed: Tensor | None,
        block_scale: Tensor | None,
        weight_amax: Tensor | None,
        main_grad: Tensor | None,
        state: Tensor,
        layer: LayerRecipe,
        groups: AmaxGroups,
    ) -> Tensor:
        """Compute y and save what the recipe's backward needs, for those inputs that need a gradient."""
        needs_x, needs_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        group = groups.of("activations", layer.activations)
        saved: list[Tensor | None] = []
        kept = x  # of x, for wgrad
        if layer.activations is None:
            x_operand = Operand(x, None)
        elif layer.backward == "quantized" and needs_weight:
            wgrad: Any = layer.wgrad_activations, layer.token_block, groups, "activations"
            if isinstance(layer.activations, NVFP4) and layer.activations.scaling == "row":  # two reads in any case
                x_operand = fake(x, layer.activations, shared_amax(x, layer.activations, group))
                saved = list(encode_columns(x, *wgrad))
            else:
                rows, columns = encode_transposed(x, layer.activations, *wgrad)
                x_operand = first_rows(unscaled(rows, layer.activations), x.shape[0])
                saved = list(columns)
        else:
            amax = shared_amax(x, layer.activations, group)
            if layer.backward == "dequantized" and needs_weight:
                encoded, x_operand = encode_and_decode(x, layer.activations, amax)
                saved = list(encoded)
            else:
                x_operand = fake(x, layer.activations, amax)
        y = _forward_matmul(x_operand, Operand(values, scale), bias, x.dtype, layer.batch_invariant)
        if needs_weight and not saved:
            saved = [kept, None, None]
        saved = saved if needs_weight else [None, None, None]
        if not needs_x:
            of_weight: list[Tensor | None] = [None] * 3
        else:
            of_weight = [weight, None, None] if packed is None else [packed, block_scale, scale]
        ctx.save_for_backward(*saved, *of_weight, weight_amax)
        ctx.main_grad, ctx.state = main_grad, state  # not saved: both are written to, between forward and backward too
        ctx.layer, ctx.groups = layer, groups
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        """Gradients of x, weight and bias."""
        *saved, weight_amax = ctx.saved_tensors
        main_grad, state = ctx.main_grad, ctx.state
        of_x, of_weight = saved[:3], saved[3:]
        layer, groups = ctx.layer, ctx.groups
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dx = dw = None
        if layer.backward == "quantized" and (needs_x or needs_weight):
            rows, columns = encode_gradient(
                dy, layer.gradients, layer.wgrad_gradients, layer.token_block, groups, state
            )
            if needs_x:
                g = first_rows(unscaled(rows, layer.gradients), dy.shape[0])
                w = _dgrad_weight(of_weight, layer, weight_amax, groups)
                dx = scaled_matmul(g.values, w.values, g.scale, w.scale, out_dtype=dy.dtype)
            if needs_weight:
                g = unscaled(columns, layer.wgrad_gradients)
                x = unscaled(Encoded(*of_x), layer.wgrad_activations)
                dw = _wgrad(g, x, ctx.weight_dtype, main_grad)
        else:
            if needs_x:
                dx = dy @ original_or_decoded(of_weight, layer.weights, dy.dtype)
            if needs_weight:
                x_seen = original_or_decoded(of_x, layer.activations, dy.dtype)
                if main_grad is None:
                    dw = (dy.mT @ x_seen).to(ctx.weight_dtype)
                else:
                    dw = _wgrad(Operand(dy.mT, None), Operand(x_seen.mT, None), ctx.weight_dtype, main_grad)
        db = dy.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if needs_bias else None
        return dx, dw, db, *(None,) * 9


def _forward_matmul(
    x: Operand, w: Operand, bias: Tensor | None, out_dtype: torch.dtype, batch_invariant: bool
) -> Tensor:
    """Operands of one dtype: both q·s in bf16, or, where one is not quantized, the wider of the two."""
    a, b = x.values, w.values
    if a.dtype != b.dtype:
        dtype = torch.promote_types(a.dtype, b.dtype)
        a, b = a.to(dtype), b.to(dtype)
    return scaled_matmul(a, b, x.scale, w.scale, bias=bias, out_dtype=out_dtype, batch_invariant=batch_invariant)


def _dgrad_weight(
    saved: Sequence[Tensor | None], layer: LayerRecipe, amax: Tensor | None, groups: AmaxGroups
) -> Operand:
    """ŵ₂ᵀ (K, N): what forward saw where that was saved, as 16×16 blocks are; else wᵀ quantized by itself."""
    fmt, (data, block_scale, tensor_scale) = layer.weights, saved
    assert fmt is not None  # checked when the recipe was built
    assert data is not None  # saved where x needs a gradient
    if block_scale is not None:
        values, scale = unscaled(Encoded(data, block_scale, tensor_scale), fmt)
        return Operand(values.mT, scale)
    weight = data.detach()
    if isinstance(fmt, NVFP4) and fmt.scaling == "row":  # amax is of w's rows; wᵀ has others
        amax = shared_amax(weight.mT, fmt, groups.of("weights", fmt, transposed=True))
    return fake(weight.mT, fmt, amax)


def original_or_decoded(saved: Sequence[Tensor | None], fmt: Any, dtype: torch.dtype) -> Tensor:
    """What was saved of an operand: the tensor itself, or what it was encoded to, decoded."""
    data, block_scale, tensor_scale = saved
    assert data is not None  # saved for exactly the inputs that need a gradient
    return data.to(dtype) if block_scale is None else decode(Encoded(data, block_scale, tensor_scale), fmt, dtype)


def _wgrad(g: Operand, x: Operand, dtype: torch.dtype, main_grad: Tensor | None) -> Tensor | None:
    if main_grad is None:
        return scaled_matmul(g.values, x.values, g.scale, x.scale, out_dtype=dtype)
    scaled_matmul(g.values, x.values, g.scale, x.scale, accumulate_into=main_grad)
    return None
