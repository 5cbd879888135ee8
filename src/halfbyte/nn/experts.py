"""Experts: many Linears in one, with an own tensor scale for each expert's weight.

Tokens are sorted by expert. An expert's tokens are a matrix of their own: with scaling="tensor" each has its own
activation scale, whatever the other experts are given. That is the same as scaling each row by its expert's maximum,
and so one row-scaled quantization serves all.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import experts as routing
from ..errors import ShapeError, UnsupportedError
from ..formats import MXFP8, NVFP4, Format
from ..ops.matmul import scaled_grouped_matmul
from ..recipe.training import LayerRecipe, TrainingRecipe
from .autograd import QuantizedLinear, original_or_decoded, quantize_weight
from .linear import Quantization, main_grad_of, misfit, quantization_of
from .operands import (
    MATMUL_DTYPE,
    AmaxGroups,
    Operand,
    encode_and_decode,
    fake,
    local_amax,
    reduce_amax,
)

FUNCTION = "halfbyte"
_ATTRIBUTE = "_experts_implementation"


class GroupedFunction(torch.autograd.Function):
    """As `QuantizedLinear`, of sorted rows: apply(x (T, K), weight (E, N, K), offsets (E,), …) → (T, N).

    For backward="high_precision" and "dequantized"; "quantized" goes expert by expert.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        offsets: Tensor,
        main_grad: Tensor | None,
        layer: LayerRecipe,
        groups: AmaxGroups,
    ) -> Tensor:
        """Compute y and save what the recipe's backward needs."""
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        dequantized = layer.backward == "dequantized"
        saved: list[Tensor | None] = [x, None, None]
        if layer.activations is None:
            a = Operand(x, None)
        else:
            fmt, amax = by_rows(layer.activations), rows_amax(x, layer.activations, offsets, groups)
            if dequantized and needs_weight:
                encoded, a = encode_and_decode(x, fmt, amax)
                saved = list(encoded)
            else:
                a = fake(x, fmt, amax)
        of_weight: list[Tensor | None] = [weight, None, None]
        if layer.weights is None:
            b = Operand(weight, None)
        else:
            amax = weights_amax(weight, layer.weights, groups)
            if dequantized and needs_x:
                kept, b = encode_and_decode(weight.detach(), layer.weights, amax, per_matrix=True)
                of_weight = list(kept)
            else:
                b = fake(weight.detach(), layer.weights, amax, per_matrix=True)
        ctx.save_for_backward(
            *(saved if needs_weight else [None] * 3), *(of_weight if needs_x else [None] * 3), offsets
        )
        ctx.main_grad = main_grad  # not saved: it is written to, between forward and backward too
        ctx.layer, ctx.weight_dtype = layer, weight.dtype
        values, weights = a.values, b.values
        if values.dtype != weights.dtype:
            dtype = torch.promote_types(values.dtype, weights.dtype)
            values, weights = values.to(dtype), weights.to(dtype)
        return scaled_grouped_matmul(
            values, weights, offsets, a.scale, b.scale, out_dtype=x.dtype, batch_invariant=layer.batch_invariant
        )

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        """Gradients of x and weight."""
        *saved, offsets = ctx.saved_tensors
        layer, main_grad = ctx.layer, ctx.main_grad
        dx = dw = None
        if ctx.needs_input_grad[0]:
            w = original_or_decoded(saved[3:], layer.weights, dy.dtype)
            dx = grouped_rows(dy, w, offsets)
        if ctx.needs_input_grad[1]:
            fmt = None if layer.activations is None else by_rows(layer.activations)
            x = original_or_decoded(saved[:3], fmt, dy.dtype)
            dw = grouped_sums(dy, x, offsets)
            if main_grad is not None:
                main_grad.add_(dw)
            dw = dw.to(ctx.weight_dtype) if main_grad is None else None
        return dx, dw, None, None, None, None


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor, quantization: Quantization) -> Tensor:
    """Rows of x (T, K), sorted by expert, times their expert's matrix of weight (E, N, K), transposed: (T, N).

    offsets: int32 (E,), each expert's last row plus one. Rows past the last one give zeros.
    """
    layer, groups = quantization.layer, quantization.groups
    main_grad = main_grad_of(weight) if quantization.main_grad and torch.is_grad_enabled() else None
    if layer.backward != "quantized":
        y: Tensor = GroupedFunction.apply(  # type: ignore[no-untyped-call]
            x, weight, offsets, main_grad, layer, groups
        )
        return y
    if torch.compiler.is_compiling():
        raise UnsupportedError(
            "experts with backward='quantized' go one by one, by counts that a compiled graph does not know: leave "
            "them out of torch.compile, or use another backward for them"
        )
    fmt = layer.weights
    assert fmt is not None  # backward="quantized" needs it
    amaxes = weights_amax(weight, fmt, groups)
    parts, start = [], 0
    ends = offsets.tolist()
    for expert, (w, end) in enumerate(zip(weight.unbind(0), ends, strict=True)):
        amax = None if amaxes is None else amaxes[expert]
        seen = quantize_weight(w.detach(), layer, amax)
        encoded = (None, None) if seen.encoded is None else seen.encoded[:2]
        into = None if main_grad is None else main_grad[expert]
        parts.append(
            QuantizedLinear.apply(  # type: ignore[no-untyped-call]
                x[start:end], w, None, *seen.operand, *encoded, seen.amax, into, quantization.state, layer, groups
            )
        )
        start = end
    parts.append(x.new_zeros((x.shape[0] - start, weight.shape[1])))
    return torch.cat(parts)


def by_rows(fmt: Format) -> Format:
    """The format whose rows each have a scale."""
    return fmt if isinstance(fmt, MXFP8) else replace(fmt, scaling="row")


def rows_amax(x: Tensor, fmt: Format, offsets: Tensor, groups: AmaxGroups) -> Tensor | None:
    """(T,): for scaling="tensor" each row's expert's maximum; None where each row's own will do."""
    if isinstance(fmt, MXFP8):
        return None
    if fmt.scaling == "row":
        return None if groups.activations is None else reduce_amax(local_amax(x, fmt), groups.activations)
    rows = local_amax(x, NVFP4(scaling="row"))
    expert = torch.searchsorted(offsets, torch.arange(x.shape[0], device=x.device, dtype=offsets.dtype), right=True)
    maxima = rows.new_zeros(offsets.shape[0] + 1).scatter_reduce(0, expert, rows, "amax")
    if groups.activations is not None:
        maxima = reduce_amax(maxima, groups.activations)
    return maxima[expert]


def weights_amax(weight: Tensor, fmt: Format, groups: AmaxGroups) -> Tensor | None:
    """(E,) or (E, N), reduced over the group; None where the weights' own will do."""
    if groups.weights is None or isinstance(fmt, MXFP8):
        return None
    dims = (-1,) if fmt.scaling == "row" else (-2, -1)
    return reduce_amax(weight.detach().abs().amax(dims).float(), groups.weights)


def grouped_rows(dy: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """dy (T, N) times each row's expert's weight (E, N, K): (T, K)."""
    if dy.dtype == MATMUL_DTYPE:
        dx: Tensor = nn.functional.grouped_mm(dy, weight, offs=offsets)
        return _zero_after(dx, offsets)
    dx = dy.new_zeros((dy.shape[0], weight.shape[2]))
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        dx[start:end] = dy[start:end] @ weight[expert]
        start = end
    return dx


def grouped_sums(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """For each expert dyᵀ·x over its rows: (E, N, K)."""
    if dy.dtype == MATMUL_DTYPE:
        dw: Tensor = nn.functional.grouped_mm(dy.mT, x, offs=offsets)
        return dw
    dw = dy.new_zeros((offsets.shape[0], dy.shape[1], x.shape[1]))
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        dw[expert] = dy[start:end].mT @ x[start:end]
        start = end
    return dw


def _zero_after(rows: Tensor, offsets: Tensor) -> Tensor:
    """Rows past the last expert's, which the grouped matmul leaves as they were, as zeros."""
    owned = torch.arange(rows.shape[0], device=rows.device, dtype=offsets.dtype) < offsets[-1]
    return torch.where(owned[:, None], rows, 0.0)


class GroupedLinear(nn.Module):
    """weight (E, N, K): rows sorted by expert, each times its expert's matrix.

    Args:
        experts, in_features, out_features: E, K, N.
        device, dtype: of the weight, which is drawn as torch's Linear draws it.
        recipe: the layer's recipe; policy and overrides are left to `convert`.
    """

    quantization: Quantization

    def __init__(
        self,
        experts: int,
        in_features: int,
        out_features: int,
        device: Any = None,
        dtype: Any = None,
        *,
        recipe: LayerRecipe | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, out_features, in_features, device=device, dtype=dtype))
        recipe = recipe or TrainingRecipe()
        if reason := misfit(self.weight, recipe):
            raise ShapeError(f"GroupedLinear({experts}, {in_features}, {out_features}): {reason}")
        self.quantization = quantization_of(recipe, recipe)
        with torch.no_grad():
            self.weight.uniform_(-(in_features**-0.5), in_features**-0.5)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x (T, K) sorted by expert, offsets int32 (E,), each expert's last row plus one → (T, N)."""
        if x.dim() != 2 or x.shape[1] != self.weight.shape[2] or offsets.shape != self.weight.shape[:1]:
            raise ShapeError(
                f"x has shape {tuple(x.shape)}, offsets {tuple(offsets.shape)}; needs (T, {self.weight.shape[2]}) "
                f"and ({self.weight.shape[0]},)"
            )
        return grouped_linear(x, self.weight, offsets, self.quantization)


def unsupported(module: Any) -> str | None:
    """Why experts cannot be converted, or None."""
    if reason := routing.unsupported(module):
        return reason
    if not hasattr(getattr(module, "config", None), _ATTRIBUTE):
        return "experts without a config that names their implementation"
    return None


def enable(modules: Sequence[Any]) -> None:
    """Let transformers call `forward` for these modules, which get a config of their own."""
    if not modules:
        return
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(FUNCTION, forward)
    for module in modules:
        module.quantization.config = module.config
        module.config = copy.copy(module.config)
        module.config._experts_implementation_internal = FUNCTION


def disable(modules: Sequence[Any]) -> None:
    """Undo `enable`."""
    for module in modules:
        module.config = module.quantization.config


def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' experts forward: hidden_states (T, H), the chosen experts and their weights (T, k) → (T, H)."""
    q: Quantization = self.quantization
    if not self.training and q.layer.evaluation == "high_precision":
        from transformers.integrations.moe import grouped_mm_experts_forward

        plain: Tensor = grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
        return plain
    dtype, device = hidden_states.dtype, hidden_states.device.type
    x = hidden_states.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden_states

    def multiply(rows: Tensor, weight: str, offsets: Tensor) -> Tensor:
        return grouped_linear(rows, getattr(self, weight), offsets, q)

    return routing.forward(self, x, top_k_index, top_k_weights, multiply, dtype)
