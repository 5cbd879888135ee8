"""Attention of a query over the keys that it attends to, in an order that nothing else changes.

A query's keys are taken in blocks of 32, counted from its first one: not from where the batch's tensor begins, which
padding, or a cache that forgets, moves. The running maximum, the sum and the output follow block by block up to its
last key; blocks after that do not touch them. A program serves 64 queries of one key head, those of its group of heads
together, and goes over the keys once for each first key that they have: once for causal attention, for every query in
a sliding window. Blocks that all of these queries see take no mask, which is a matter of speed: bits are the same.

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

QUERIES, KEYS = 64, 32  # of a tile; half of the queries with float32, which tensor cores do not take
STAGES = 4  # blocks of keys and values on their way, where there is room
ONES = tl.constexpr(16)  # columns, the fewest of a matmul
NONE = tl.constexpr(0x7FFFFFFF)


@jit
def _rows(ptr, row, rows, SIZE: tl.constexpr, PADDED: tl.constexpr, WHOLE: tl.constexpr, KIND, NATIVE: tl.constexpr):
    """Rows of SIZE elements, padded with zeros; WHOLE: all of these rows are there."""
    column = tl.arange(0, PADDED)
    ptr += row[:, None] * SIZE + column[None, :]
    if not WHOLE:
        x = tl.load(ptr, mask=(row < rows)[:, None] & (column < SIZE)[None, :], other=0.0)
    elif SIZE != PADDED:
        x = tl.load(ptr, mask=(column < SIZE)[None, :], other=0.0)
    else:
        x = tl.load(ptr)
    if NATIVE == 0:  # the interpreter multiplies bfloat16's bits
        x = as_float32(x, KIND)
    return x


@jit
def _block(
    q, k_ptr, v_ptr, seen_ptr, chosen, last, start, most, total, out, keys, scaling, softcap,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr, SOFTCAP: tl.constexpr,
    KIND: tl.constexpr, NATIVE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The state of a tile's queries after one more block of keys; seen_ptr: where each query's row of the mask begins.

    WHOLE: all chosen queries see all of the block, which changes no bit of what they get: shares are added by the
    matmul that multiplies values, since a sum's order would follow the layout that the mask was loaded in.
    """
    key = start + tl.arange(0, BN)
    k = _rows(k_ptr, key, keys, D, BD, WHOLE, KIND, NATIVE)
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling  # [BM, BN]
    if SOFTCAP:
        e = tl.exp(tl.abs(score) / softcap * -2.0)
        score = tl.where(score < 0, -softcap, softcap) * ((1.0 - e) / (1.0 + e))  # softcap · tanh(score / softcap)
    if not WHOLE:
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
    v = _rows(v_ptr, key, keys, V, BV, WHOLE, KIND, NATIVE)
    before = tl.exp(most - base)
    ones = tl.full((BN, ONES), 1.0, rounded.dtype)
    sums = tl.dot(rounded, ones, total * before[:, None], input_precision="ieee")
    products = tl.dot(rounded, v, out * before[:, None], input_precision="ieee")
    if WHOLE:
        return new, sums, products
    going = start < last  # what comes after a query's last key is not even multiplied by zero
    return (
        tl.where(going, new, most), tl.where(going[:, None], sums, total), tl.where(going[:, None], products, out),
    )  # fmt: skip


@jit
def _blocks(
    q, k_ptr, v_ptr, seen_ptr, chosen, last, start, end, most, total, out, keys, scaling, softcap,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr, SOFTCAP: tl.constexpr,
    KIND: tl.constexpr, NATIVE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """`_block` for all blocks from start up to end."""
    if NATIVE == 0:  # the interpreter's range takes no tensors
        while start < end:
            most, total, out = _block(
                q, k_ptr, v_ptr, seen_ptr, chosen, last, start, most, total, out, keys, scaling, softcap,
                D, V, BD, BV, BN, SOFTCAP, KIND, NATIVE, WHOLE,
            )  # fmt: skip
            start += BN
    else:
        for at in range(start, end, BN):
            most, total, out = _block(
                q, k_ptr, v_ptr, seen_ptr, chosen, last, at, most, total, out, keys, scaling, softcap,
                D, V, BD, BV, BN, SOFTCAP, KIND, NATIVE, WHOLE,
            )  # fmt: skip
    return most, total, out


@jit_varying("queries", "keys", "scaling", "softcap")
def _attention(
    q_ptr, k_ptr, v_ptr, seen_ptr, first_ptr, until_ptr, last_ptr, out_ptr, kv_heads, queries, keys, scaling, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, SOFTCAP: tl.constexpr, KIND: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    # first, until, last: see `halfbyte.ops.invariant.key_bounds`
    tiles = tl.cdiv(queries * GROUP, BM)
    pair = (tl.program_id(0) // tiles).to(tl.int64)  # of batch and key head
    batch = pair // kv_heads
    place = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    query, head = place // GROUP, pair * GROUP + place % GROUP
    valid = query < queries
    bound = batch * queries + query
    first = tl.load(first_ptr + bound, mask=valid, other=NONE)
    until = tl.load(until_ptr + bound, mask=valid, other=0)
    last = tl.load(last_ptr + bound, mask=valid, other=0)
    row = head * queries + query
    d, dv = tl.arange(0, BD), tl.arange(0, BV)
    q = tl.load(q_ptr + row[:, None] * D + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0)  # [BM, BD]
    if NATIVE == 0:
        q = as_float32(q, KIND)
    k_ptr += pair * keys * D
    v_ptr += pair * keys * V
    seen_ptr += bound * keys
    left = valid & (last > 0)
    origin = tl.min(tl.where(left, first, NONE), 0)
    while origin < NONE:
        chosen = left & (first == origin)
        whole = tl.min(tl.where(chosen, until, NONE), 0)
        middle = origin + (whole - origin) // BN * BN
        end = tl.max(tl.where(chosen, last, 0), 0)
        most = tl.full((BM,), -float("inf"), tl.float32)
        total = tl.zeros((BM, ONES), tl.float32)  # alike in all columns
        out = tl.zeros((BM, BV), tl.float32)
        most, total, out = _blocks(
            q, k_ptr, v_ptr, seen_ptr, chosen, last, origin, middle, most, total, out, keys, scaling, softcap,
            D, V, BD, BV, BN, SOFTCAP, KIND, NATIVE, True,
        )  # fmt: skip
        most, total, out = _blocks(
            q, k_ptr, v_ptr, seen_ptr, chosen, last, middle, end, most, total, out, keys, scaling, softcap,
            D, V, BD, BV, BN, SOFTCAP, KIND, NATIVE, False,
        )  # fmt: skip
        value = tl.div_rn(out, tl.where(chosen, tl.max(total, 1), 1.0)[:, None])
        store(out_ptr + row[:, None] * V + dv[None, :], value, chosen[:, None] & (dv < V)[None, :], KIND, NATIVE)
        left = left & (first != origin)
        origin = tl.min(tl.where(left, first, NONE), 0)


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, bounds: tuple[Tensor, Tensor, Tensor], scaling: float,
    softcap: float,
) -> Tensor:  # fmt: skip
    """As `halfbyte.ops.invariant.attention`; bounds: as `halfbyte.ops.invariant.key_bounds`."""
    batch, heads, queries, size = query.shape
    kv_heads, keys, width = key.shape[1], key.shape[2], value.shape[3]
    out = torch.zeros((batch, heads, queries, width), dtype=query.dtype, device=query.device)
    if out.numel() == 0 or keys == 0:
        return out
    group = heads // kv_heads
    bm, bn = QUERIES if query.dtype != torch.float32 else QUERIES // 2, KEYS
    bd, bv = max(16, next_power_of_2(size)), max(16, next_power_of_2(width))
    room = (160 if _target.has_large_shared_memory(query.device) else 96) << 10
    stages = (room // query.itemsize - bm * bd) // (bn * (bd + bv))
    launch(
        _attention, cdiv(queries * group, bm) * batch * kv_heads,
        (aligned(query), aligned(key), aligned(value), mask.contiguous(), *bounds, out),
        (kv_heads,), (queries, keys, float(scaling), float(softcap)),
        GROUP=group, D=size, V=width, BD=bd, BV=bv, BM=bm, BN=bn, SOFTCAP=softcap > 0, KIND=KINDS[query.dtype],
        NATIVE=_target.native_level(query.device), num_stages=min(max(stages, 1), STAGES),
    )  # fmt: skip
    return out
