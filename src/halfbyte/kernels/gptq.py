"""One step of GPTQ: sixteen columns rounded one after the other, under sixteen candidate scales at once.

A thread holds one row under one candidate: the sixteen columns in registers, moved as the errors of earlier ones come.
All candidates are rounded for their loss alone; the best is then rounded again, which is a sixteenth of the work, and
stored. 120 multiplications and subtractions move columns, about 30 operations round one: some 600 for a row and a
candidate. A weight of 2048 rows is 32 thousand threads, and launches rule.
"""

# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _target
from ._e2m1 import e2m1_code, e2m1_code_value
from ._primitives import element_scale, jit
from ._search import code_value

COLUMNS = 16
BELOW = tl.constexpr(8)  # candidates below the smallest scale that clips nothing; then that one, and seven above
ROWS = 8  # of a program


@jit
def _column(x, scale, element, factor_ptr, J: tl.constexpr):
    """Round column J of x, sixteen tensors: its code, its error, and x with the columns after it moved."""
    code = e2m1_code(x[J] * element)
    error = tl.div_rn(x[J] - e2m1_code_value(code) * scale, tl.load(factor_ptr + J * 17))
    for k in tl.static_range(J + 1, 16):
        x = x[:k] + (x[k] - tl.load(factor_ptr + (J * 16 + k)) * error,) + x[k + 1 :]
    return code, error, x


@jit
def _first(largest, decode_scale):
    """The smallest code from 1 on whose grid reaches the largest weight, or 126."""
    low = tl.full(largest.shape, 1, tl.int32)
    high = tl.full(largest.shape, 126, tl.int32)
    for _ in tl.static_range(7):
        middle = (low + high) // 2
        reached = (6.0 * code_value(middle)) * decode_scale >= largest
        open_ = low < high
        high = tl.where(open_ & reached, middle, high)
        low = tl.where(open_ & (reached == 0), middle + 1, low)
    return low


@jit
def _round_block(
    w_ptr, factor_ptr, decode_scale_ptr, given_ptr, codes_ptr, chosen_ptr, error_ptr, rows,
    R: tl.constexpr, GIVEN: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * R + tl.arange(0, R)[:, None]  # [R, 1]
    mask = row < rows
    decode_scale = tl.load(decode_scale_ptr)
    w = ()
    largest = tl.zeros((R, 1), tl.float32)
    for j in tl.static_range(16):
        column = tl.load(w_ptr + row * 16 + j, mask=mask, other=0.0)
        largest = tl.maximum(largest, tl.abs(column))
        w = w + (column,)
    if GIVEN:
        chosen = tl.load(given_ptr + row, mask=mask, other=0).to(tl.int32)
    else:
        step = tl.arange(0, 16)[None, :] - BELOW  # [1, 16]
        candidate = tl.minimum(tl.maximum(_first(largest, decode_scale) + step, 1), 126)
        candidate = tl.where(largest == 0, 0, candidate)  # [R, 16]
        scale = code_value(candidate) * decode_scale
        element = element_scale(code_value(candidate), decode_scale, NATIVE)
        x = ()
        for j in tl.static_range(16):
            x = x + (tl.broadcast_to(w[j], (R, 16)),)
        loss = tl.zeros((R, 16), tl.float32)
        for j in tl.static_range(16):
            _, error, x = _column(x, scale, element, factor_ptr, j)
            loss += error * error
        best = tl.argmin(tl.where(loss == loss, loss, float("inf")), 1)[:, None]  # a tie keeps the smaller scale
        chosen = tl.sum(tl.where(tl.arange(0, 16)[None, :] == best, candidate, 0), 1)[:, None]
    value = code_value(chosen)
    scale = value * decode_scale
    element = element_scale(value, decode_scale, NATIVE)
    tl.store(chosen_ptr + row, chosen.to(tl.uint8), mask=mask)
    for j in tl.static_range(16):
        code, error, w = _column(w, scale, element, factor_ptr, j)
        tl.store(codes_ptr + row * 16 + j, code.to(tl.uint8), mask=mask)
        tl.store(error_ptr + row * 16 + j, error, mask=mask)


def round_block(
    weight: Tensor, factor: Tensor, decode_scale: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `halfbyte.numerics.gptq.round_block`."""
    rows = len(weight)
    codes = torch.empty(rows, COLUMNS, dtype=torch.uint8, device=weight.device)
    chosen = torch.empty(rows, dtype=torch.uint8, device=weight.device)
    error = torch.empty(rows, COLUMNS, device=weight.device)
    given = chosen if scale is None else scale.contiguous().view(torch.uint8)
    _round_block[(triton.cdiv(rows, ROWS),)](
        weight.contiguous(), factor.contiguous(), decode_scale, given, codes, chosen, error, rows,
        R=ROWS, GIVEN=scale is not None, NATIVE=_target.native_level(weight.device),
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return codes, chosen.view(torch.float8_e4m3fn), error
