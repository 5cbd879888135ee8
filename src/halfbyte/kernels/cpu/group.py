"""Sixteen blocks at a time: what is known of them lies in `g`, float32 memory of a kernel's own.

Neighbours in a row, or one below the other. The elements of each come first (`read_across` and `read_down` fill
them), then lanes of one value a block; integers by their bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .compile import jit
from .elements import F32_MAX
from .vector import load, permuted_xor, where

_ONE = np.float32(1)

TERMS = 256  # errors of the elements, after the elements themselves
RANDOM = 256  # in the same place: 128 random words, then 32 of counters
MAGNITUDES = 256  # in the same place, for the search: lanes are blocks, one vector an element, as in the next two
AMAX, ENCODE, DECODE = 512, 528, 544  # of the tensor, matrix or row that a block belongs to
ELEMENT_SCALE, SCALE = 560, 576  # of the block
TARGETS = 592
WEIGHTS = 848
GROUP = 1104  # floats


@jit
def element_scales(g: Any, value: Any) -> Any:
    """e of sixteen blocks with these block scales (float32)."""
    e = _ONE / (value * load(g, DECODE))
    return where(e > F32_MAX, F32_MAX, e)


@jit
def sum_of_rows(total: Any) -> Any:
    """Lanes are rows: i with i + 8, then i + 4, i + 2, i + 1; the sum in every lane."""
    total = total + permuted_xor(total, 8)
    total = total + permuted_xor(total, 4)
    total = total + permuted_xor(total, 2)
    return total + permuted_xor(total, 1)
