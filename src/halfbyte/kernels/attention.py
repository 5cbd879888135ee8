"""Attention of a query over the keys that it attends to, in an order that nothing else changes.

A query's keys are taken in blocks of 64, counted from its first one: not from where the batch's tensor begins, which
padding, or a cache that forgets, moves. The running maximum, the sum and the output follow block by block up to its
last key; blocks after that do not touch them. A program serves 64 queries of one key head, those of its group of heads
together, and goes over the keys once for each first key that they have: once for causal attention, for every query in
a sliding window.

Fewest bytes: q, k and v read and the output written once. Given up: programs that share a query's keys, so that
decoding few long sequences leaves most of a GPU idle; and a window's keys are read by every query anew.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from . import _target
from ._launch import cdiv, launch, next_power_of_2
from ._primitives import as_float32, jit, jit_varying, round_to_kind
from ._tiles import KINDS
from .epilogue import store
from .invariant import aligned

QUERIES, KEYS = 64, 64  # of a tile; with float32, which tensor cores do not take, half of both
NONE = tl.constexpr(0x7FFFFFFF)


@jit
def _load(ptr, mask, KIND: tl.constexpr, NATIVE: tl.constexpr):
    x = tl.load(ptr, mask=mask, other=0.0)
    if NATIVE == 0:  # the interpreter multiplies bfloat16's bits
        x = as_float32(x, KIND)
    return x


@jit
def _block(
    q, k_ptr, v_ptr, seen_ptr, chosen, last, start, most, total, out, keys, scaling, softcap,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr, SOFTCAP: tl.constexpr,
    KIND: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """The state of 64 queries after one more block of keys; seen_ptr: where each query's row of the mask begins."""
    key = start + tl.arange(0, BN)
    d, dv = tl.arange(0, BD), tl.arange(0, BV)
    k = _load(k_ptr + key[None, :] * D + d[:, None], (key < keys)[None, :] & (d < D)[:, None], KIND, NATIVE)  # [BD, BN]
    score = tl.dot(q, k, input_precision="ieee") * scaling  # [BM, BN]
    if SOFTCAP:
        e = tl.exp(tl.abs(score) / softcap * -2.0)
        score = tl.where(score < 0, -softcap, softcap) * ((1.0 - e) / (1.0 + e))  # softcap · tanh(score / softcap)
    mask = chosen[:, None] & (key < keys)[None, :]
    seen = tl.load(seen_ptr[:, None] + key[None, :], mask=mask, other=0) != 0
    score = tl.where(seen, score, -float("inf"))
    new = tl.maximum(most, tl.max(score, 1))
    base = tl.where(new == -float("inf"), 0.0, new)
    share = tl.exp(score - base[:, None])
    if NATIVE == 0:
        rounded = round_to_kind(share, KIND)
    else:
        rounded = share.to(v_ptr.dtype.element_ty)
    v = _load(v_ptr + key[:, None] * V + dv[None, :], (key < keys)[:, None] & (dv < V)[None, :], KIND, NATIVE)
    before = tl.exp(most - base)
    going = start < last
    out = tl.where(going[:, None], out * before[:, None] + tl.dot(rounded, v, input_precision="ieee"), out)
    total = tl.where(going, total * before + tl.sum(share, 1), total)
    return tl.where(going, new, most), total, out


@jit_varying("queries", "keys", "scaling", "softcap")
def _attention(
    q_ptr, k_ptr, v_ptr, seen_ptr, first_ptr, last_ptr, out_ptr, kv_heads, queries, keys, scaling, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, SOFTCAP: tl.constexpr, KIND: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    # first, last: of each query's keys, int32 [B, Q]; last is one more, and 0 where there are none
    tiles = tl.cdiv(queries * GROUP, BM)
    pair = (tl.program_id(0) // tiles).to(tl.int64)  # of batch and key head
    batch = pair // kv_heads
    place = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    query, head = place // GROUP, pair * GROUP + place % GROUP
    valid = query < queries
    first = tl.load(first_ptr + batch * queries + query, mask=valid, other=NONE)
    last = tl.load(last_ptr + batch * queries + query, mask=valid, other=0)
    row = head * queries + query
    d, dv = tl.arange(0, BD), tl.arange(0, BV)
    q = _load(q_ptr + row[:, None] * D + d[None, :], valid[:, None] & (d < D)[None, :], KIND, NATIVE)  # [BM, BD]
    k_ptr += pair * keys * D
    v_ptr += pair * keys * V
    seen_ptr += (batch * queries + query) * keys
    left = valid & (last > 0)
    origin = tl.min(tl.where(left, first, NONE), 0)
    while origin < NONE:
        chosen = left & (first == origin)
        end = tl.max(tl.where(chosen, last, 0), 0)
        most = tl.full((BM,), -float("inf"), tl.float32)
        total = tl.zeros((BM,), tl.float32)
        out = tl.zeros((BM, BV), tl.float32)
        if NATIVE == 0:  # the interpreter's range takes no tensors
            start = origin
            while start < end:
                most, total, out = _block(
                    q, k_ptr, v_ptr, seen_ptr, chosen, last, start, most, total, out, keys, scaling, softcap,
                    D, V, BD, BV, BN, SOFTCAP, KIND, NATIVE,
                )  # fmt: skip
                start += BN
        else:
            for start in range(origin, end, BN):
                most, total, out = _block(
                    q, k_ptr, v_ptr, seen_ptr, chosen, last, start, most, total, out, keys, scaling, softcap,
                    D, V, BD, BV, BN, SOFTCAP, KIND, NATIVE,
                )  # fmt: skip
        value = tl.div_rn(out, tl.where(chosen, total, 1.0)[:, None])
        store(out_ptr + row[:, None] * V + dv[None, :], value, chosen[:, None] & (dv < V)[None, :], KIND, NATIVE)
        left = left & (first != origin)
        origin = tl.min(tl.where(left, first, NONE), 0)


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, bounds: tuple[Tensor, Tensor], scaling: float,
    softcap: float,
) -> Tensor:  # fmt: skip
    """As `halfbyte.ops.invariant.attention`; bounds: each query's first key and last plus one, int32 (B, Q)."""
    batch, heads, queries, size = query.shape
    kv_heads, keys, width = key.shape[1], key.shape[2], value.shape[3]
    out = torch.zeros((batch, heads, queries, width), dtype=query.dtype, device=query.device)
    if out.numel() == 0 or keys == 0:
        return out
    group = heads // kv_heads
    bm, bn = (QUERIES, KEYS) if query.dtype != torch.float32 else (QUERIES // 2, KEYS // 2)
    bd, bv = max(16, next_power_of_2(size)), max(16, next_power_of_2(width))
    launch(
        _attention, cdiv(queries * group, bm) * batch * kv_heads,
        (aligned(query), aligned(key), aligned(value), mask.contiguous(), *bounds, out),
        (kv_heads,), (queries, keys, float(scaling), float(softcap)),
        GROUP=group, D=size, V=width, BD=bd, BV=bv, BM=bm, BN=bn, SOFTCAP=softcap > 0, KIND=KINDS[query.dtype],
        NATIVE=_target.native_level(query.device), num_stages=2,
    )  # fmt: skip
    return out
