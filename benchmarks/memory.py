"""What a module's forward pass leaves in memory for its backward pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """What autograd keeps, parameters and what they share memory with left out; each storage counted once."""
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(kept.values())
