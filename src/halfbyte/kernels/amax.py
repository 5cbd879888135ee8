"""max |x| of each matrix, or of each row, with NaN winning: the float's bit pattern, through integer maxima.

Fewest bytes: x once. The floor is bytes(x) / bandwidth.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ..formats import NVFP4
from . import _target
from ._launch import cdiv, launch, next_power_of_2
from ._maxima import block_abs_max, running_abs_max, running_abs_max_bits
from ._primitives import jit, jit_varying
from ._rules import hadamard, hadamard_words
from ._tiles import Matrices, load_blocks

BLOCKS = 256  # 1×16 blocks that a program holds at a time
STEPS = 4


@jit
def flat_amax(
    x_ptr, p, start, blocks,
    BB: tl.constexpr, STEPS: tl.constexpr, KIND: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """The maximum over blocks start … of dense matrix p (int64), word by word; its bit pattern, int32."""
    within = tl.arange(0, BB * 8)
    largest = tl.zeros((BB * 8,), tl.int32)
    for step in tl.static_range(STEPS):
        first = start + step * BB
        mask = within < tl.minimum(blocks - first, BB) * 8  # of what is left eight times may be beyond int32
        words, lo, hi = load_blocks(x_ptr, (p * blocks + first) * 16, within, mask, 1, True, KIND)  # [BB·8]
        largest = running_abs_max(largest, words, lo, hi, KIND, NATIVE)
    return tl.max(running_abs_max_bits(largest, KIND, NATIVE), 0)


@jit
def block_amax_tiles(
    x_ptr, p, start, blocks, blocks_per_row, stride_p, stride_m, stride_k,
    BB: tl.constexpr, STEPS: tl.constexpr, DENSE: tl.constexpr, KIND: tl.constexpr, HADAMARD: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """As `flat_amax`, of any strides, and after the Hadamard transform if asked."""
    pairs = tl.arange(0, 8)
    largest = tl.zeros((BB,), tl.int32)
    for step in tl.static_range(STEPS):
        block = start + step * BB + tl.arange(0, BB)  # [BB]
        mask = (block < blocks)[:, None]
        if DENSE:
            base = (p * blocks + start + step * BB) * 16
            offsets = tl.arange(0, BB)[:, None] * 8 + pairs[None, :]  # [BB, 8]
        else:
            base = p * stride_p
            row = (block // blocks_per_row).to(tl.int64)
            column = (block % blocks_per_row).to(tl.int64)
            offsets = row[:, None] * stride_m + (column[:, None] * 8 + pairs[None, :]) * 2 * stride_k
        words, lo, hi = load_blocks(x_ptr, base, offsets, mask, stride_k, DENSE, KIND)  # [BB, 8]
        if HADAMARD:
            words, lo, hi = hadamard_words(lo, hi, KIND, NATIVE)
        maxima = block_abs_max(words, lo, hi, KIND, DENSE or HADAMARD, NATIVE)  # [BB]
        largest = tl.maximum(largest, maxima.to(tl.int32, bitcast=True))
    return tl.max(largest, 0)


@jit_varying("blocks", "blocks_per_row", "programs")
def _tensor_amax(
    x_ptr, amax_ptr, blocks, blocks_per_row, programs, stride_p, stride_m, stride_k,
    BB: tl.constexpr, STEPS: tl.constexpr, DENSE: tl.constexpr, KIND: tl.constexpr, HADAMARD: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    p = (tl.program_id(0) // programs).to(tl.int64)
    start = tl.program_id(0) % programs * (BB * STEPS)
    if DENSE and not HADAMARD:
        bits = flat_amax(x_ptr, p, start, blocks, BB, STEPS, KIND, NATIVE)
    else:
        bits = block_amax_tiles(
            x_ptr, p, start, blocks, blocks_per_row, stride_p, stride_m, stride_k,
            BB, STEPS, DENSE, KIND, HADAMARD, NATIVE,
        )  # fmt: skip
    tl.atomic_max(amax_ptr.to(tl.pointer_type(tl.int32)) + p, bits, sem="relaxed")


@jit_varying("rows", "columns")
def _row_amax(
    x_ptr, amax_ptr, rows, columns, stride_p, stride_m, stride_k,
    NB: tl.constexpr, STEPS: tl.constexpr, DENSE: tl.constexpr, KIND: tl.constexpr, HADAMARD: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if DENSE:
        base = pid.to(tl.int64) * columns
    else:
        base = (pid // rows).to(tl.int64) * stride_p + (pid % rows).to(tl.int64) * stride_m
    pairs = tl.arange(0, 8)
    bits = tl.zeros((), tl.int32)
    for step in tl.static_range(STEPS):
        block = step * NB + tl.arange(0, NB)  # [NB]
        offsets = block[:, None] * 8 + pairs[None, :]  # [NB, 8]
        if not DENSE:
            offsets = offsets.to(tl.int64) * 2 * stride_k
        words, lo, hi = load_blocks(x_ptr, base, offsets, (block < columns // 16)[:, None], stride_k, DENSE, KIND)
        if HADAMARD:
            lo, hi = hadamard(lo, hi, KIND)
        blocks_max = block_abs_max(words, lo, hi, KIND, DENSE and not HADAMARD, NATIVE).to(tl.int32, bitcast=True)
        bits = tl.maximum(bits, tl.max(blocks_max, 0))
    tl.store(amax_ptr + pid, bits.to(tl.float32, bitcast=True))


def amax(m: Matrices, fmt: NVFP4) -> Tensor:
    """A, float32: (P,) for tensor scaling, (P·M,) for row scaling; after the Hadamard transform if fmt has one."""
    native = _target.native_level(m.x.device)
    if fmt.scaling == "row":
        result = torch.empty(m.matrices * m.rows, dtype=torch.float32, device=m.x.device)
        if result.numel() and m.columns:
            nb = min(1024, next_power_of_2(m.columns // 16))
            launch(
                _row_amax, m.matrices * m.rows, (m.x, result),
                (m.rows, m.columns, m.stride_p, m.stride_m, m.stride_k),
                NB=nb, STEPS=cdiv(m.columns // 16, nb), DENSE=m.dense, KIND=m.kind, HADAMARD=fmt.hadamard,
                NATIVE=native,
            )  # fmt: skip
            return result
        return result.zero_()
    result = torch.zeros(m.matrices, dtype=torch.float32, device=m.x.device)
    blocks = m.rows * m.columns // 16
    if m.matrices and blocks:
        programs = cdiv(blocks, BLOCKS * STEPS)
        launch(
            _tensor_amax, programs * m.matrices, (m.x, result),
            (blocks, m.columns // 16, programs, m.stride_p, m.stride_m, m.stride_k),
            BB=BLOCKS, STEPS=STEPS, DENSE=m.dense, KIND=m.kind, HADAMARD=fmt.hadamard, NATIVE=native,
        )  # fmt: skip
    return result
