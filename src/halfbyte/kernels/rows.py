"""Sums of rows in one written order of additions: a program adds up a row, whatever the other rows are.

Fewest bytes: 4 read per element. A row's sum is a tree, so that `tl.sum`, whose order is Triton's, adds two at a time.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import torch
import triton.language as tl
from torch import Tensor

from ._launch import launch, next_power_of_2
from ._primitives import jit

SPAN = 4096  # as `numerics.rows`


@jit
def _row_sum(x_ptr, out_ptr, N: tl.constexpr, WIDTH: tl.constexpr, LOG: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    total = tl.load(x_ptr + row * N + column, mask=column < N, other=0.0)
    for start in range(WIDTH, N, WIDTH):
        total += tl.load(x_ptr + row * N + start + column, mask=start + column < N, other=0.0)
    for i in tl.static_range(LOG):
        total = tl.sum(total.reshape((2, WIDTH >> (i + 1))), 0)
    tl.store(out_ptr + row + tl.arange(0, 1), total)


def row_sum(x: Tensor) -> Tensor:
    """As `halfbyte.numerics.rows.row_sum`, of float32."""
    n = x.shape[-1]
    out = torch.zeros(x.shape[:-1], dtype=torch.float32, device=x.device)
    rows = math.prod(x.shape[:-1])
    if rows == 0 or n == 0:
        return out
    width = min(SPAN, next_power_of_2(n))
    launch(_row_sum, rows, (x.contiguous(), out), (), N=n, WIDTH=width, LOG=width.bit_length() - 1)
    return out
