"""Sums of rows, and softmax, in one written order of additions: a program does a row, whatever the other rows are.

Fewest bytes: 4 read per element, and 4 written by softmax, which reads a row twice more, from the L2 cache. A row's sum
is a tree, so that `tl.sum`, whose order is Triton's, adds two at a time.
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
    tl.store(out_ptr + row + tl.arange(0, 1), _tree(total, WIDTH, LOG))


@jit
def _tree(x, WIDTH: tl.constexpr, LOG: tl.constexpr):
    """The sum of x [WIDTH], [1]: the second half onto the first, LOG times."""
    for i in tl.static_range(LOG):
        x = tl.sum(x.reshape((2, WIDTH >> (i + 1))), 0)
    return x


@jit
def _softmax(x_ptr, out_ptr, N: tl.constexpr, WIDTH: tl.constexpr, LOG: tl.constexpr, IS_LOG: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    x_ptr += row * N
    out_ptr += row * N
    most = tl.load(x_ptr + column, mask=column < N, other=-float("inf"))
    for start in range(WIDTH, N, WIDTH):
        most = tl.maximum(most, tl.load(x_ptr + start + column, mask=start + column < N, other=-float("inf")))
    most = tl.max(most, 0)
    total = tl.exp(tl.load(x_ptr + column, mask=column < N, other=-float("inf")) - most)
    for start in range(WIDTH, N, WIDTH):
        total += tl.exp(tl.load(x_ptr + start + column, mask=start + column < N, other=-float("inf")) - most)
    total = _tree(total, WIDTH, LOG)
    for start in range(0, N, WIDTH):
        mask = start + column < N
        x = tl.load(x_ptr + start + column, mask=mask, other=0.0) - most
        y = x - tl.log(total) if IS_LOG else tl.div_rn(tl.exp(x), total)
        tl.store(out_ptr + start + column, y, mask=mask)


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


def softmax(x: Tensor, log: bool) -> Tensor:
    """As `halfbyte.ops.invariant.softmax`, or log_softmax, of float32."""
    n = x.shape[-1]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        width = min(SPAN, next_power_of_2(n))
        launch(
            _softmax, x.numel() // n, (x.contiguous(), out), (),
            N=n, WIDTH=width, LOG=width.bit_length() - 1, IS_LOG=log, num_warps=max(1, min(8, width // 256)),
        )  # fmt: skip
    return out
