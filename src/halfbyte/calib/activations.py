"""Samples on their way through a model: hidden states between layers, and what else layers are called with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.files import write_all
from ..checkpoint.shards import tensor_bytes
from ..errors import CheckpointError
from .model import Decoder
from .ranks import SPANS, Ranks


class Activations:
    """This rank's samples on their way through the model, in batches; and what else layers are called with."""

    def __init__(self, ids: Tensor, ranks: Ranks, directory: Path, limit: int) -> None:
        count = len(ids)
        self.batches: dict[int, Tensor] = {}
        for span in range(SPANS):
            rows = ids[span * count // SPANS : (span + 1) * count // SPANS]
            if len(rows) and ranks.owner(span) == ranks.rank:
                self.batches[span] = rows
        if not self.batches:
            raise CheckpointError(f"{count} samples are too few for {ranks.world} ranks; give more, or fewer ranks")
        self.arguments: dict[int, list[dict[str, Any]]] = {}  # span → for each layer, keyword arguments
        self._directory, self._limit = directory, limit
        self._held: dict[int, Tensor] = {}
        self._spilled: dict[int, tuple[torch.dtype, torch.Size]] = {}

    def __getitem__(self, span: int) -> Tensor:
        if span in self._held:
            return self._held[span]
        dtype, shape = self._spilled[span]
        states = torch.empty(shape, dtype=dtype)
        with (self._directory / str(span)).open("rb") as file:
            if file.readinto(tensor_bytes(states)) != states.nbytes:
                raise OSError(f"{file.name}: is shorter than it was written")
        return states

    def __setitem__(self, span: int, states: Tensor) -> None:
        states = states.cpu()
        if states.nbytes * len(self.batches) > self._limit:
            file = os.open(self._directory / str(span), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                write_all(file, tensor_bytes(states))
            finally:
                os.close(file)
            self._spilled[span] = states.dtype, states.shape
        else:
            self._held[span] = states


class _Recorder(nn.Module):
    """In a layer's place: notes what it is called with, and hands the hidden states on."""

    def __init__(self, layer: nn.Module, calls: list[dict[str, Any]]) -> None:
        super().__init__()
        self.halfbyte_layer = [layer]  # in a list, so that it is no submodule
        self.calls = calls

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.halfbyte_layer[0], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args:
            raise CheckpointError(
                f"{type(self.halfbyte_layer[0]).__name__}: transformers calls this layer with positional arguments; "
                "calibration needs one that takes its hidden states and keywords; use a recipe without data"
            )
        self.calls.append(kwargs)
        return hidden_states


def embed(decoder: Decoder, states: Activations, device: torch.device | str) -> None:
    """Run the model with recorders for layers: the embeddings' output, and every layer's other arguments."""
    layers = list(decoder.layers)
    shared: list[Tensor] = []
    for span, ids in states.batches.items():
        calls: list[dict[str, Any]] = []
        inputs: list[Tensor] = []
        for i, layer in enumerate(layers):
            decoder.layers[i] = _Recorder(layer, calls)
        handle = decoder.layers[0].register_forward_pre_hook(lambda _, args, into=inputs: into.append(args[0]))
        try:
            decoder.body(input_ids=ids.to(device), use_cache=False)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # GPT-Neo's takes the first part of what a layer returns
            raise CheckpointError(
                f"{type(decoder.body).__name__}: its layers cannot be run one by one ({error}); "
                "use a recipe without data"
            ) from error
        finally:
            handle.remove()
            for i, layer in enumerate(layers):
                decoder.layers[i] = layer
        if len(calls) != len(layers):
            raise CheckpointError(f"{type(decoder.body).__name__} calls {len(calls)} layers of {len(layers)}")
        states.arguments[span] = [_once(call, shared) for call in calls]
        states[span] = inputs[0]


def _once(value: Any, seen: list[Tensor]) -> Any:
    """The same arguments, equal tensors kept once: masks and rotary embeddings are those of the first batch."""
    if isinstance(value, Tensor):
        for other in seen:
            if other is value or (other.shape == value.shape and other.dtype == value.dtype and other.equal(value)):
                return other
        seen.append(value)
        return value
    if isinstance(value, dict):
        return {key: _once(part, seen) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_once(part, seen) for part in value)
    return value
