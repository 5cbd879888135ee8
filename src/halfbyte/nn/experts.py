"""Experts as modules: `GroupedLinear`, and those of transformers; what they compute is in grouped.py."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ShapeError
from ..recipe.training import LayerRecipe, TrainingRecipe
from .grouped import grouped_linear
from .linear import Quantization, misfit, quantization_of

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
        """x (T, K) sorted by expert, offsets int32 (E,), each expert's last row plus one → (T, N)."""
        if x.dim() != 2 or x.shape[1] != self.weight.shape[2] or offsets.shape != self.weight.shape[:1]:
            raise ShapeError(
                f"x has shape {tuple(x.shape)}, offsets {tuple(offsets.shape)}; needs (T, {self.weight.shape[2]}) "
                f"and ({self.weight.shape[0]},)"
            )
        return grouped_linear(x, self.weight, offsets, self.quantization)


def is_experts(module: nn.Module) -> bool:
    """Whether a module is one of transformers' experts with stacked parameters."""
    return all(hasattr(module, name) for name in ("down_proj", "num_experts", "has_gate", "is_transposed")) and (
        isinstance(module.down_proj, nn.Parameter)
    )


def unsupported(module: Any) -> str | None:
    """Why experts cannot be converted, or None."""
    if not module.has_gate or module.has_bias or module.is_transposed or not module.is_concatenated:
        return "experts other than gated ones [E, 2I, H] without biases"
    if getattr(module, "has_post_expert_norm", False):
        return "experts with a norm after them"
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
    tokens, k = top_k_index.shape
    expert, order = torch.sort(top_k_index.reshape(-1), stable=True)
    # From num_experts on: tokens that another rank serves. They come last, and no expert's rows reach there.
    counts = torch.zeros(self.num_experts + 1, dtype=torch.int32, device=x.device)
    counts = counts.scatter_add(0, expert.clamp(max=self.num_experts), torch.ones_like(expert, dtype=torch.int32))
    offsets = counts[:-1].cumsum(0, dtype=torch.int32)
    gate_up = grouped_linear(x[order // k], self.gate_up_proj, offsets, q)
    rows = grouped_linear(self._apply_gate(gate_up), self.down_proj, offsets, q)
    rows = rows * top_k_weights.reshape(-1)[order, None]
    rows = rows[torch.argsort(order)].view(tokens, k, -1)
    result: Tensor = rows.sum(1).to(dtype)
    return result
