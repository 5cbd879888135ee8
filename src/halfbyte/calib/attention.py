"""The largest keys and values that an attention would put into its cache, after rotary embeddings and norms."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, UnsupportedError

NAME = "halfbyte_observed"


@contextlib.contextmanager
def observed(layer: nn.Module, wanted: bool) -> Iterator[dict[str, list[Tensor]]]:
    """Note key and value maxima while the layer runs.

    Yields:
        [k, v] maxima, float32 (), by the path of the attention in the layer; filled as the layer runs.

    Raises:
        UnsupportedError: while the layer runs: its attention is none of transformers'.
    """
    if not wanted:
        yield {}
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    configs: dict[int, Any] = {id(m.config): m.config for m in layer.modules() if hasattr(m, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    paths = {id(module): path for path, module in layer.named_modules()}
    maxima: dict[str, list[Tensor]] = {}

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = [x.detach().abs().amax().float() for x in (key, value)]
        if not all(bool(x.isfinite()) for x in found):
            raise CheckpointError(f"{paths[id(module)]}: keys or values contain NaN or inf; try float32")
        old = maxima.get(paths[id(module)])
        new = found if old is None else [torch.maximum(a, b) for a, b in zip(old, found, strict=True)]
        maxima[paths[id(module)]] = new
        name = before[id(module.config)]
        attention = ALL_ATTENTION_FUNCTIONS.get(name, _eager(module))
        if attention is None:
            raise UnsupportedError(f"{paths[id(module)]}: attention {name!r} is not known; use kv_cache=fp8, a cast")
        return attention(module, query, key, value, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    for config in configs.values():
        config._attn_implementation = NAME
    try:
        yield maxima
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def _eager(module: nn.Module) -> Any:
    """What transformers' models fall back to where nothing else computes their attention: each file has its own."""
    files = (sys.modules[cls.__module__] for cls in type(module).__mro__)
    return next((f.eager_attention_forward for f in files if hasattr(f, "eager_attention_forward")), None)
