"""Matmul and attention on the CPU in an order of additions that is written down, whatever else is in the batch.

A dot product goes by sixteen lanes: lane i adds the products of elements i, i + 16, i + 32, … in this order, from 0;
what is left over goes one after the other into the lanes from 0 on; then lanes i and i + 8 are added, i + 4, i + 2,
i + 1. Each product and each sum is one float32 rounding. Threads share out results, never a sum.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .compile import jit, kernel, parts, run
from .source import memory
from .vector import LANES, from_bits, int_lanes, item, load, put, store

_ZERO = np.float32(0)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) · b (N, K)ᵀ in float32: (M, N)."""
    a, b = a.float().contiguous(), b.float().contiguous()
    (rows, k), columns = a.shape, b.shape[0]
    out = torch.zeros((rows, columns))
    if out.numel() == 0 or k == 0:
        return out
    arguments = memory(a), memory(b), memory(out), k, columns
    threads = torch.get_num_threads()

    def task(row: int, row_end: int, column: int, column_end: int) -> None:
        _matmul(*arguments, np.zeros(LANES, np.float32), row, row_end, column, column_end)

    run(task, parts(rows, columns, k, threads), threads)
    return out


@jit
def _dot(a: Any, start: int, b: Any, b_start: int, k: int, lanes: Any) -> Any:
    """The dot product of k elements of a and b; lanes: sixteen float32 of room."""
    total = from_bits(int_lanes(0))
    whole = k // LANES * LANES
    for i in range(0, whole, LANES):
        total = total + load(a, start + i) * load(b, b_start + i)
    store(lanes, 0, total)
    for i in range(whole, k):
        put(lanes, i - whole, item(lanes, i - whole) + item(a, start + i) * item(b, b_start + i))
    step = LANES // 2
    while step:
        for i in range(step):
            put(lanes, i, item(lanes, i) + item(lanes, i + step))
        step //= 2
    return item(lanes, 0)


@kernel
def _matmul(
    a: Any, b: Any, out: Any, k: int, columns: int, lanes: Any, row: int, row_end: int, column: int, column_end: int
) -> None:
    for n in range(column, column_end):  # a row of b is read once for all rows of a
        for m in range(row, row_end):
            put(out, m * columns + n, _dot(a, m * k, b, n * k, k, lanes))


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, softcap: float) -> Tensor:
    """As `halfbyte.ops.invariant.attention`, in float32: (B, H, Q, V).

    Keys that a query does not attend to are left out of its sums, the others are added in their order.
    """
    batch, heads, queries, size = query.shape
    keys, width = key.shape[2], value.shape[3]
    out = torch.zeros((batch, heads, queries, width))
    if out.numel() == 0:
        return out
    tensors = [t.float().contiguous() for t in (query, key, value)]
    q, k, v = map(memory, tensors)
    arguments = (
        q, k, v, memory(mask.contiguous().view(torch.uint8)), memory(out),
        (heads, heads // key.shape[1], queries, keys, size, width), np.float32(scaling), np.float32(softcap),
    )  # fmt: skip
    threads = torch.get_num_threads()

    def task(row: int, row_end: int, *_: int) -> None:
        _attention(*arguments, np.zeros(LANES, np.float32), np.zeros(keys, np.float32), row, row_end)

    work = parts(batch * heads * queries, 1, keys * (size + width), threads)
    run(task, sorted({(row, row_end, 0, 1) for row, row_end, *_ in work}), threads)
    return out


@kernel
def _attention(
    query: Any, key: Any, value: Any, mask: Any, out: Any, sizes: Any, scaling: Any, softcap: Any, lanes: Any,
    scores: Any, row: int, row_end: int,
) -> None:  # fmt: skip
    heads, group, queries, keys, size, width = sizes
    for r in range(row, row_end):
        head, position = r // queries, r % queries  # heads of all batches
        shared = head // heads * (heads // group) + head % heads // group  # its key and value head
        seen = (head // heads * queries + position) * keys
        most = np.float32(-np.inf)
        for j in range(keys):
            if mask[seen + j]:
                score = _dot(query, r * size, key, (shared * keys + j) * size, size, lanes) * scaling
                if softcap > _ZERO:
                    score = np.float32(math.tanh(np.float64(score / softcap))) * softcap
                put(scores, j, score)
                most = max(most, score)
        total = _ZERO
        for j in range(keys):
            if mask[seen + j]:
                share = np.float32(math.exp(np.float64(item(scores, j) - most)))
                total += share
                for d in range(width):
                    out[r * width + d] += share * value[(shared * keys + j) * width + d]
        if total > _ZERO:
            for d in range(width):
                out[r * width + d] /= total
