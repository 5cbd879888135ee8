"""What flows into a layer's weights: hooks on its Linears, and a forward of its own for fused experts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError

EXPERTS = "halfbyte_observed"
Tap = Callable[[Tensor], None]  # called with tokens (…, K)


def register() -> None:
    """Make transformers know the observed forward of fused experts."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, _forward)


@contextlib.contextmanager
def observed(layer: nn.Module, taps: Mapping[str, Tap], every_expert: bool) -> Iterator[dict[str, Tensor]]:
    """Call taps with the inputs of modules while the layer runs.

    Args:
        taps: by a module's path in the layer; those of fused experts are "….experts.3.gate_proj" (for gate and up)
            and "….experts.3.down_proj".
        every_expert: show every token to every expert, though only the chosen ones count in the output.

    Yields:
        how many tokens were routed to each expert, by the path of the module that holds them; grows as the layer runs.
    """
    modules = dict(layer.named_modules())
    device = next(layer.parameters()).device
    counts: dict[str, Tensor] = {}
    with contextlib.ExitStack() as stack:
        fused: dict[str, dict[tuple[int, str], Tap]] = {}
        for path, tap in taps.items():
            if path in modules:
                stack.enter_context(_hooked(modules[path], tap))
                continue
            experts, expert, leaf = path.rsplit(".", 2)
            fused.setdefault(experts, {})[int(expert), leaf] = tap
        for path, own in fused.items():
            module: Any = modules.get(path)
            if module is None or not hasattr(module, "has_gate"):
                raise UnsupportedError(
                    f"{path}: neither Linears nor fused experts of transformers; use --ignore {path}"
                )
            counts[path] = torch.zeros(module.num_experts, dtype=torch.int64, device=device)
            module.halfbyte = (own, every_expert, counts[path])
            stack.callback(delattr, module, "halfbyte")
        for path, listed in modules.items():
            if path.endswith("experts") and isinstance(listed, nn.ModuleList):
                counts[path] = torch.zeros(len(listed), dtype=torch.int64, device=device)
                for one, count in zip(listed, counts[path].unbind(), strict=True):
                    stack.enter_context(_hooked(one, partial(_count, count)))
                if every_expert:
                    stack.enter_context(_shown_to_all(modules[path.rpartition(".")[0]], listed, counts[path]))
        yield counts


@contextlib.contextmanager
def _hooked(module: nn.Module, tap: Tap) -> Iterator[None]:
    handle = module.register_forward_pre_hook(lambda _, args: tap(args[0]))
    try:
        yield
    finally:
        handle.remove()


def _count(total: Tensor, x: Tensor) -> None:
    total += x.numel() // x.shape[-1]


@contextlib.contextmanager
def _shown_to_all(block: nn.Module, experts: nn.ModuleList, counts: Tensor) -> Iterator[None]:
    """Run every expert on all tokens before the block routes them; what is routed then comes on top."""

    def show(_: nn.Module, args: tuple[Any, ...]) -> None:
        routed = counts.clone()
        for expert in experts:
            expert(args[0].reshape(-1, args[0].shape[-1]))
        counts.copy_(routed)

    handle = block.register_forward_pre_hook(show)
    try:
        yield
    finally:
        handle.remove()


def _forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' experts, one after the other, with their inputs shown to taps."""
    if not self.has_gate or self.has_bias or self.is_transposed or not self.is_concatenated:
        raise UnsupportedError(f"{type(self).__name__}: only gated experts [E, 2I, H] without biases are calibrated")
    observed: tuple[dict[tuple[int, str], Tap], bool, Tensor | None] = getattr(self, "halfbyte", ({}, False, None))
    taps, every_expert, counts = observed
    everything = every_expert and bool(taps)
    out = torch.zeros_like(hidden_states)
    last: Tap | None = None
    for expert in range(self.num_experts):
        token, position = torch.where(top_k_index == expert)
        if counts is not None:
            counts[expert] += len(token)
        if not len(token) and not everything:
            continue
        x = hidden_states if everything else hidden_states[token]
        if taps:
            tap = taps.get((expert, "gate_proj"))
            if tap is not None and tap is not last:  # shared by all experts, which see the same
                tap(x)
            last = tap if everything else None
        middle = self._apply_gate(nn.functional.linear(x, self.gate_up_proj[expert]))
        if (tap := taps.get((expert, "down_proj"))) is not None:
            tap(middle)
        middle = middle[token] if everything else middle
        y = nn.functional.linear(middle, self.down_proj[expert]) * top_k_weights[token, position, None]
        out.index_add_(0, token, y.to(out.dtype))
    return out
