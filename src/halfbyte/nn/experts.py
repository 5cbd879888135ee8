"""Experts as modules: `GroupedLinear`, and those of transformers; what they compute is in grouped.py."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import experts as routing
from ..errors import ShapeError
from ..recipe.training import LayerRecipe, TrainingRecipe
from .grouped import aligned, grouped_linear, grouped_rows
from .linear import Quantization, misfit, quantization_of
from .operands import autocasted

FUNCTION = "halfbyte"
_ATTRIBUTE = "_experts_implementation"


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
        self.quantization = quantization_of(recipe, recipe, self.weight.device)
        with torch.no_grad():
            self.weight.uniform_(-(in_features**-0.5), in_features**-0.5)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x (T, K) sorted by expert, offsets int32 (E,), each expert's last row plus one → (T, N) of x's dtype, or
        autocast's.
        """
        if x.dim() != 2 or x.shape[1] != self.weight.shape[2] or offsets.shape != self.weight.shape[:1]:
            raise ShapeError(
                f"x has shape {tuple(x.shape)}, offsets {tuple(offsets.shape)}; needs (T, {self.weight.shape[2]}) "
                f"and ({self.weight.shape[0]},)"
            )
        x = autocasted(x)
        if not self.training and self.quantization.layer.evaluation == "high_precision":
            return grouped_rows(aligned(x), self.weight.to(x.dtype).mT, offsets)
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

    def multiply(rows: Tensor, weight: str, offsets: Tensor) -> Tensor:
        return grouped_linear(rows, getattr(self, weight), offsets, q)

    x = autocasted(hidden_states)
    return routing.forward(self, x, top_k_index, top_k_weights, multiply, hidden_states.dtype)
