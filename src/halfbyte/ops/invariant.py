"""What a model computes beside matmuls, in an order that does not depend on the batch. No gradients.

Elementwise functions belong here on a CPU only: torch gives what is left over at the end of a tensor to other code than
the rest, so that an element's last bit depends on how many there are. Additions, products, divisions and square roots
are rounded to the nearest, and so are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ShapeError, UnsupportedError
from ..numerics import rows
from .backends import pick
from .checks import FLOAT_DTYPES

FEW = 16  # terms that are added one operation at a time: no kernel would be faster
CHUNK = 4096  # elements: a multiple of all vectors, and too few to be shared out among threads


def row_sum(x: Tensor) -> Tensor:
    """x (…, n) float32 or float64 → (…), as `numerics.rows.row_sum`, bit for bit."""
    if x.device.type == "cpu" or x.shape[-1] <= FEW or x.dtype != torch.float32 or not _on_triton(x):
        return rows.row_sum(x)
    from ..kernels import rows as kernel

    return kernel.row_sum(x)


def elementwise(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), elementwise, each element by the same code: x's shape."""
    if x.device.type != "cpu" or not x.is_floating_point():
        return function(x)
    flat = x.reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % CHUNK), value=1.0) if flat.numel() % CHUNK else flat
    if padded.data_ptr() % 64 or padded.numel() == 0:
        padded = padded.clone()
    parts = [function(part) for part in padded.split(CHUNK)]
    return torch.cat(parts)[: flat.numel()].reshape(x.shape)


def softmax(x: Tensor) -> Tensor:
    """Along the last dimension of x, in its own precision."""
    if x.dtype == torch.float32 and _on_triton(x):
        return _softmax_kernel(x, False)
    e = elementwise(torch.exp, x - x.amax(-1, keepdim=True))
    return e / row_sum(e)[..., None]


def log_softmax(x: Tensor) -> Tensor:
    """Along the last dimension of x, in its own precision."""
    if x.dtype == torch.float32 and _on_triton(x):
        return _softmax_kernel(x, True)
    x = x - x.amax(-1, keepdim=True)
    total = row_sum(elementwise(torch.exp, x))
    return x - elementwise(torch.log, total)[..., None]


def _softmax_kernel(x: Tensor, log: bool) -> Tensor:
    from ..kernels import rows as kernel

    return kernel.softmax(x, log)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    bounds: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """softmax(softcap · tanh(query · keyᵀ · scaling / softcap))·value over the keys that mask has, for each query.

    A query's result depends on the query, and on its keys and values in their order, alone: not on other queries, not
    on keys that it does not attend to, nor on where its own begin.

    Args:
        query: (B, H, Q, D) float32, bfloat16 or float16.
        key, value: (B, H / g, K, D) and (B, H / g, K, V) of query's dtype; g heads share one.
        mask: bool (B, 1, Q, K), True where a query attends. One that attends to nothing gives zeros.
        scaling: of the scores. softcap: bound of their magnitude, or None.
        bounds: `key_bounds(mask)`, where many calls have one mask.

    Returns:
        (B, H, Q, V) of query's dtype.

    Numerics: float32 scores and sums. On a GPU shares are rounded to query's dtype before they multiply values.
    """
    _check(query, key, value, mask)
    softcap = float(softcap or 0.0)
    if query.device.type == "cpu" and not _on_triton(query):
        from ..kernels.cpu import invariant

        return invariant.attention(query, key, value, mask, scaling, softcap).to(query.dtype)
    if not _on_triton(query):
        raise UnsupportedError(f"batch-invariant attention on {query.device}: needs a CPU, or an NVIDIA GPU from sm_80")
    from ..kernels import attention as kernel

    return kernel.attention(query, key, value, mask, bounds or key_bounds(mask), scaling, softcap)


def _on_triton(x: Tensor) -> bool:
    return pick("auto", x.device) == "triton"


def key_bounds(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each query's first key, the first that it does not see after that, and its last plus one (0: none).

    int32 (B, Q) each. A causal query sees all of its keys: the second is the third.
    """
    keys = mask.shape[-1]
    key = torch.arange(keys, dtype=torch.int32, device=mask.device)
    first = torch.where(mask, key, 0x7FFFFFFF).amin(-1, keepdim=True)
    until = torch.where(mask | (key < first), keys, key).amin(-1)
    last = torch.where(mask, key + 1, 0).amax(-1)
    return first[:, 0, :, 0].contiguous(), until[:, 0].contiguous(), last[:, 0].contiguous()


def _check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> None:
    batch, heads, queries, size = query.shape
    good = query.dtype in FLOAT_DTYPES and key.dtype == value.dtype == query.dtype and key.shape[:3] == value.shape[:3]
    if not good or key.shape[0] != batch or key.shape[3] != size or heads % max(key.shape[1], 1):
        raise ShapeError(
            f"query is {query.dtype} {tuple(query.shape)}, key {key.dtype} {tuple(key.shape)}, value {value.dtype} "
            f"{tuple(value.shape)}; needs (B, H, Q, D), (B, H / g, K, D) and (B, H / g, K, V) of one dtype"
        )
    if mask.dtype != torch.bool or tuple(mask.shape) != (batch, 1, queries, key.shape[2]):
        raise ShapeError(
            f"mask is {mask.dtype} {tuple(mask.shape)}; needs torch.bool {(batch, 1, queries, key.shape[2])}"
        )
