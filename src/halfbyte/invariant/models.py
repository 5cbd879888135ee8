"""A transformers model under `batch_invariant`, with an attention and experts of the same kind."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import experts
from ..errors import UnsupportedError
from ..ops import invariant as ops
from ..ops.matmul import scaled_grouped_matmul
from .mode import batch_invariant, fixed_forward

NAME = "halfbyte_batch_invariant"
"""Of the attention and the experts that are registered with transformers."""
_KEPT = "halfbyte_ordinary"


@dataclass(frozen=True)
class _Ordinary:
    """What `disable` puts back: the hooks to remove, and what computed attention and experts."""

    hooks: tuple[Any, ...]
    attention: Any
    experts: Any


def enable(model: nn.Module) -> None:
    """Make a model's forward pass batch-invariant, in place; parameters and modules stay as they are.

    A transformers model gets an attention of this kind, and experts where it has stacked ones. In any other model,
    what `batch_invariant` refuses raises when it is reached.

    Raises:
        UnsupportedError: its attention cannot be replaced, or its experts are of another kind.
    """
    if hasattr(model, _KEPT):
        return
    attention = implementation = None
    if hasattr(model, "set_attn_implementation"):
        attention, implementation = _replace(model)
    hooks = []
    for module in _entrances(model):
        hooks.append(module.register_forward_pre_hook(_enter))
        hooks.append(module.register_forward_hook(_leave, always_call=True))
    setattr(model, _KEPT, _Ordinary(tuple(hooks), attention, implementation))


def disable(model: nn.Module) -> None:
    """Undo `enable`."""
    kept: _Ordinary | None = model.__dict__.pop(_KEPT, None)
    if kept is None:
        return
    for hook in kept.hooks:
        hook.remove()
    pretrained: Any = model
    if kept.attention is not None:
        pretrained.set_attn_implementation(kept.attention)
    if kept.experts is not None:
        pretrained.set_experts_implementation(kept.experts)


def _replace(model: Any) -> tuple[Any, Any]:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    mixtures = [module for module in model.modules() if experts.is_experts(module)]
    for module in mixtures:
        if reason := experts.unsupported(module):
            raise UnsupportedError(f"{type(module).__name__}: {reason}; they cannot be batch-invariant")
    if not model._can_set_attn_implementation():
        raise UnsupportedError(
            f"{type(model).__name__}: its attention does not go through transformers' AttentionInterface, so it cannot "
            "be batch-invariant"
        )
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    attention = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    if not mixtures:
        return attention, None
    ALL_EXPERTS_FUNCTIONS.register(NAME, _experts)
    implementation = model.config._experts_implementation
    model.set_experts_implementation(NAME)
    return attention, implementation


def _entrances(model: nn.Module) -> Iterator[nn.Module]:
    """Where the mode is entered: the model, its bases, and what activation checkpointing calls again by itself."""
    yield model
    if not hasattr(model, "set_attn_implementation"):
        return
    from transformers import PreTrainedModel
    from transformers.modeling_layers import GradientCheckpointingLayer

    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module is not model:
            yield module
        if isinstance(module, GradientCheckpointingLayer):
            yield from module.children()


_entered = threading.local()


def _enter(module: nn.Module, _: Any) -> None:
    context = batch_invariant()
    context.__enter__()
    if not hasattr(_entered, "stack"):
        _entered.stack = []
    _entered.stack.append((module, context))


def _leave(module: nn.Module, *_: Any) -> None:
    stack: list[tuple[nn.Module, contextlib.AbstractContextManager[None]]] = getattr(_entered, "stack", [])
    if stack and stack[-1][0] is module:  # or another hook raised before _enter was called
        stack.pop()[1].__exit__(None, None, None)


def _mask(*args: Any, **options: Any) -> Any:
    """transformers' mask for torch's attention, always made: True where a query attends."""
    from transformers.masking_utils import sdpa_mask

    always = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: Any = sdpa_mask(*args, **(options | always))
    mask.halfbyte_bounds = ops.key_bounds(mask)  # once for all layers
    return mask


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, softcap: float | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """As transformers' attention functions: (B, H, Q, D), … → (B, Q, H, V)."""
    unknown = {name for name in ("s_aux", "position_bias", "cache") if options.get(name) is not None}
    if dropout or unknown or attention_mask is None or attention_mask.dtype != torch.bool:
        raise UnsupportedError(
            f"{type(module).__name__}: batch-invariant attention takes a mask of booleans, without dropout, sinks or "
            f"biases; got dropout={dropout}, {', '.join(sorted(unknown)) or 'no more'}, mask "
            f"{'None' if attention_mask is None else attention_mask.dtype}"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    mask, bounds = attention_mask, getattr(attention_mask, "halfbyte_bounds", None)

    def fixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q, k, v, mask, scaling=scale, softcap=softcap, bounds=bounds)

    def ordinary(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        if softcap is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        scores = torch.tanh(q @ k.mT * (scale / softcap)) * softcap
        shares = scores.masked_fill(~mask, -float("inf")).softmax(-1, dtype=torch.float32)
        return shares.nan_to_num(0.0).to(q.dtype) @ v

    with torch._C.DisableTorchFunction():
        out = fixed_forward(fixed, ordinary, query, key, value)
    return out.transpose(1, 2).contiguous(), None


def _experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' experts forward, of weights in high precision, or of those that `served` multiplies by."""
    served = getattr(self, "served", None)

    def multiply(x: Tensor, name: str, offsets: Tensor) -> Tensor:
        weight = getattr(self, name)
        if served is not None:
            result: Tensor = served(x, weight, name, offsets)
            return result
        return fixed_forward(
            lambda x, w: scaled_grouped_matmul(x, w, offsets, None, None, out_dtype=x.dtype, batch_invariant=True),
            lambda x, w: _one_by_one(x, w, offsets), x, weight,
        )  # fmt: skip

    return experts.forward(self, hidden_states, top_k_index, top_k_weights, multiply, hidden_states.dtype)


def _one_by_one(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Rows (T, K), sorted by expert, times their expert's weight (E, N, K); zeros past the last."""
    parts, start = [], 0
    for w, end in zip(weight.unbind(0), offsets.tolist(), strict=True):
        parts.append(x[start:end] @ w.mT)
        start = end
    return torch.cat([*parts, x.new_zeros(x.shape[0] - start, weight.shape[1])])
