"""Experts of transformers ≥ 5: tokens sorted by expert, and put back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Multiply = Callable[[Tensor, str, Tensor], Tensor]


def forward(
    module: Any, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, multiply: Multiply, dtype: torch.dtype
) -> Tensor:
    """x (T, H) through the chosen experts (T, k), weighted: (T, H) of dtype.

    multiply: rows sorted by expert, the name of a stacked weight, and int32 offsets (E,), each expert's last row plus
    one → the rows times their expert's weight; zeros for rows past the last one.
    """
    tokens, k = top_k_index.shape
    expert, order = torch.sort(top_k_index.reshape(-1), stable=True)
    # From num_experts on: tokens that another rank serves. They come last, and no expert's rows reach there.
    counts = torch.zeros(module.num_experts + 1, dtype=torch.int32, device=x.device)
    counts = counts.scatter_add(0, expert.clamp(max=module.num_experts), torch.ones_like(expert, dtype=torch.int32))
    offsets = counts[:-1].cumsum(0, dtype=torch.int32)
    gate_up = multiply(x[order // k], "gate_up_proj", offsets)
    rows = multiply(module._apply_gate(gate_up), "down_proj", offsets)
    rows = rows * top_k_weights.reshape(-1)[order, None]
    rows = rows[torch.argsort(order)].view(tokens, k, -1)
    result: Tensor = rows.sum(1).to(dtype)
    return result


def is_experts(module: Any) -> bool:
    """Whether a module is one of transformers' experts with stacked parameters."""
    return all(hasattr(module, name) for name in ("down_proj", "num_experts", "has_gate", "is_transposed")) and (
        isinstance(module.down_proj, torch.nn.Parameter)
    )


def unsupported(module: Any) -> str | None:
    """Why `forward` does not serve a module, or None."""
    if not module.has_gate or module.has_bias or module.is_transposed or not module.is_concatenated:
        return "experts other than gated ones [E, 2I, H] without biases"
    if getattr(module, "has_post_expert_norm", False):
        return "experts with a norm after them"
    return None
