"""The gradients of many experts' weights in one call: a matmul that sums over each expert's tokens alone.

dw[e, n, k] = (Σ_t g[n, t]·x[k, t]) · (g_scale[e] · x_scale[e])      t over the tokens of expert e
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import ShapeError
from . import custom
from .backends import pick
from .matmul import _check_buffer, _check_offsets, _check_out_dtype, _operand, _scale, _spell, run


def scaled_grouped_wgrad(
    g: Tensor,
    x: Tensor,
    offsets: Tensor,
    g_scale: Tensor | None,
    x_scale: Tensor | None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    accumulate_into: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """g (N, T) · x (K, T)ᵀ over each expert's tokens: (E, N, K). It carries no gradient.

    Args:
        g: (N, T) bfloat16 on a GPU; float32 or float16 too elsewhere. Tokens are sorted by expert; those past the last
            expert's are left out.
        x: (K, T) of g's dtype.
        offsets: int32 (E,), for each expert its last token plus one; not decreasing, at most T. An expert without
            tokens gets zeros. On a GPU the values are not looked at, and where tokens lie next to each other in memory
            they and T must be multiples of 8.
        g_scale: float32 () or (E,), or None.
        x_scale: the same.
        out_dtype: float32, bfloat16 or float16; of no effect with accumulate_into.
        accumulate_into: float32 (E, N, K), to which the float32 result is added in place; it is returned.
        impl: as in `scaled_matmul`.

    Raises:
        ShapeError, FormatError, UnsupportedError: as `scaled_matmul`.

    Numerics: as `scaled_matmul`, but that on a GPU torch's grouped matmul rounds the sums to bfloat16, its only output,
    before they are scaled and added: one more rounding, of at most 2^-8 of the sum.
    """
    g, x = _operand(g, "g"), _operand(x, "x")
    if x.dtype != g.dtype or x.device != g.device or g.shape[1] != x.shape[1]:
        raise ShapeError(f"g is {_spell(g)}, x {_spell(x)}; needs (N, T) and (K, T) of one dtype on one device")
    experts = offsets.numel() if isinstance(offsets, Tensor) else 0
    _check_offsets(offsets, g.mT, experts)
    g_scale = _scale(g_scale, "g_scale", g, ((), (experts,)), "() or (E,)")
    x_scale = _scale(x_scale, "x_scale", g, ((), (experts,)), "() or (E,)")
    _check_out_dtype(out_dtype)
    if accumulate_into is not None:
        _check_buffer(accumulate_into, g, (experts, g.shape[0], x.shape[0]))
    name = pick(impl, g.device)
    if name == "triton" and g.device.type == "cuda" and g.dtype != torch.bfloat16:
        raise ShapeError(f"g is {_spell(g)}; torch's grouped matmul takes bfloat16, which holds q·s: convert both")
    operands = g, x, offsets, g_scale, x_scale
    if custom.wanted():
        if accumulate_into is None:
            return _wgrad(*operands, out_dtype, name)  # type: ignore[no-any-return]
        _wgrad_accumulate(*operands, accumulate_into, name)
        return accumulate_into
    return run_wgrad(name)(*operands, out_dtype=out_dtype, accumulate_into=accumulate_into)


@functools.cache
def run_wgrad(name: str) -> Callable[..., Tensor]:
    """`scaled_grouped_wgrad` of that implementation, without its checks."""
    if name == "triton":
        from ..kernels import epilogue

        return epilogue.scaled_grouped_wgrad
    return functools.partial(_one_by_one, run(name))


def _one_by_one(
    matmul: Callable[..., Tensor],
    g: Tensor,
    x: Tensor,
    offsets: Tensor,
    g_scale: Tensor | None,
    x_scale: Tensor | None,
    *,
    out_dtype: torch.dtype,
    accumulate_into: Tensor | None,
) -> Tensor:
    out = accumulate_into
    if out is None:
        out = torch.empty((offsets.shape[0], g.shape[0], x.shape[0]), dtype=out_dtype, device=g.device)
    start = 0
    for e, end in enumerate(offsets.tolist()):
        scales = (s[e] if s is not None and s.dim() else s for s in (g_scale, x_scale))
        into = None if accumulate_into is None else accumulate_into[e]
        dw = matmul(g[:, start:end], x[:, start:end], *scales, bias=None, out_dtype=out_dtype, accumulate_into=into)
        if into is None:
            out[e] = dw
        start = end
    return out


@torch.library.custom_op("halfbyte::scaled_grouped_wgrad", mutates_args=())
def _wgrad(
    g: Tensor,
    x: Tensor,
    offsets: Tensor,
    g_scale: Tensor | None,
    x_scale: Tensor | None,
    out_dtype: torch.dtype,
    impl: str,
) -> Tensor:
    """`scaled_grouped_wgrad` as one opaque operator, as those of custom.py."""
    return run_wgrad(impl)(g, x, offsets, g_scale, x_scale, out_dtype=out_dtype, accumulate_into=None)


@_wgrad.register_fake
def _(g: Tensor, x: Tensor, offsets: Tensor, g_scale: Any, x_scale: Any, out_dtype: torch.dtype, impl: str) -> Tensor:
    return g.new_empty((offsets.shape[0], g.shape[0], x.shape[0]), dtype=out_dtype)


@torch.library.custom_op("halfbyte::scaled_grouped_wgrad_accumulate", mutates_args=("accumulate_into",))
def _wgrad_accumulate(
    g: Tensor,
    x: Tensor,
    offsets: Tensor,
    g_scale: Tensor | None,
    x_scale: Tensor | None,
    accumulate_into: Tensor,
    impl: str,
) -> None:
    run_wgrad(impl)(g, x, offsets, g_scale, x_scale, out_dtype=torch.float32, accumulate_into=accumulate_into)


@_wgrad_accumulate.register_fake
def _(*_: Any) -> None:
    return None
