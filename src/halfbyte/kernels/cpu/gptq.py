"""One step of GPTQ: sixteen columns rounded one after the other, under sixteen candidate scales at once.

A lane is a candidate, so that the search costs little more than rounding once.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .compile import kernel, run
from .elements import F32_MAX, e2m1, e2m1_value, e4m3_value
from .vector import LANES, bits, from_bits, int_lanes, item, load, put, store, where

COLUMNS = 16
BELOW = 8  # candidates below the smallest scale that clips nothing; the others are that one and seven above
LAST = 126
_LANE = np.arange(LANES, dtype=np.uint8)
_ZERO, _ONE, _SIX, _INFINITY = (np.float32(v) for v in (0, 1, 6, np.inf))
# Float32 memory for one block: the columns, their errors and codes (by their bits), each under every candidate.
_ERROR, _CODE, _CANDIDATE, _LOSS, GROUP = 256, 512, 768, 784, 800


def round_block(
    weight: Tensor, factor: Tensor, decode_scale: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `halfbyte.numerics.gptq.round_block`."""
    rows = len(weight)
    codes = torch.empty(rows, COLUMNS, dtype=torch.uint8)
    chosen = torch.empty(rows, dtype=torch.uint8)
    error = torch.empty(rows, COLUMNS)
    given = torch.empty(0, dtype=torch.uint8) if scale is None else scale.contiguous().view(torch.uint8)
    arguments = (
        weight.contiguous().view(-1).numpy(),
        factor.contiguous().view(-1).numpy(),
        np.float32(decode_scale.item()),
        given.numpy(),
        _LANE,
        codes.view(-1).numpy(),
        chosen.numpy(),
        error.view(-1).numpy(),
    )
    threads = torch.get_num_threads()
    ends = [rows * i // threads for i in range(threads + 1)]

    def task(row: int, row_end: int, *_: int) -> None:
        _round(*arguments, np.empty(GROUP, np.float32), row, row_end)

    run(task, [(row, row_end, 0, 0) for row, row_end in itertools.pairwise(ends)], threads)
    return codes, chosen.view(torch.float8_e4m3fn), error


@kernel
def _round(
    weight: Any,
    factor: Any,
    decode_scale: Any,
    given: Any,
    lane: Any,
    codes: Any,
    chosen: Any,
    error: Any,
    g: Any,
    row: int,
    row_end: int,
) -> None:
    for r in range(row, row_end):
        largest = _ZERO
        for j in range(COLUMNS):
            w = item(weight, r * COLUMNS + j)
            largest = max(largest, abs(w))
            store(g, j * LANES, from_bits(int_lanes(bits(w))))
        if given.size > 0:
            candidate = int_lanes(given[r])
        elif largest == _ZERO:
            candidate = int_lanes(0)
        else:
            low, high = 1, LAST  # ends at the smallest code whose grid reaches the largest weight
            while low < high:
                middle = (low + high) // 2
                if _SIX * e4m3_value(middle) * decode_scale >= largest:
                    high = middle
                else:
                    low = middle + 1
            candidate = load(lane, 0) + (low - BELOW)
            candidate = where(candidate < 1, 1, where(candidate > LAST, LAST, candidate))
        store(g, _CANDIDATE, from_bits(candidate))
        scale = e4m3_value(candidate) * decode_scale
        element_scale = _ONE / scale
        element_scale = where(element_scale > F32_MAX, F32_MAX, element_scale)
        loss = from_bits(int_lanes(0))
        for j in range(COLUMNS):
            x = load(g, j * LANES)
            code = e2m1(x * element_scale)
            e = (x - e2m1_value(code) * scale) / item(factor, j * COLUMNS + j)
            loss = loss + e * e
            store(g, _ERROR + j * LANES, e)
            store(g, _CODE + j * LANES, from_bits(code))
            for k in range(j + 1, COLUMNS):
                store(g, k * LANES, load(g, k * LANES) - e * item(factor, j * COLUMNS + k))
        store(g, _LOSS, where(loss < _INFINITY, loss, _INFINITY))  # NaN too
        best = 0
        for c in range(1, LANES):
            if item(g, _LOSS + c) < item(g, _LOSS + best):
                best = c
        put(chosen, r, bits(item(g, _CANDIDATE + best)))
        for j in range(COLUMNS):
            put(codes, r * COLUMNS + j, bits(item(g, _CODE + j * LANES + best)))
            put(error, r * COLUMNS + j, item(g, _ERROR + j * LANES + best))
