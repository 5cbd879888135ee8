"""Quantize to NVFP4, 1×16 and 16×16 blocks, every rule, with A given or computed.

Fewest bytes, for bf16: 2 read and 0.5 + 0.0625 written per element, with A known; 2 more read when A must be computed
first (`row` scaling needs no second read: see `row.py`). The floor is those bytes over the copy bandwidth.

1×16: a program takes BB consecutive blocks of a matrix, flat, whatever its shape; a thread owns whole blocks.
16×16: a program takes 16 rows of NB blocks.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ..formats import NVFP4
from . import _target, row, search, stacked, transposed
from ._fp8 import e4m3_code
from ._launch import cdiv
from ._launch import launch as launch_kernel
from ._maxima import block_abs_max
from ._philox import random_words
from ._primitives import jit, jit_varying, tensor_scales
from ._rules import block_scales, hadamard, hadamard_words, store_elements
from ._tiles import Matrices, as_matrices, load_blocks
from ._waiting import wait_maximum
from .amax import amax as compute_amax

BLOCKS, WARPS = 128, 2  # 1×16 blocks of a program, two a thread; the best of eight tilings tried on an H200
ROW_LIMIT = 32768  # columns of a row that one program can hold
SMALL = 32768  # elements of a matrix that one program finishes sooner than three launches start
CACHED = 8 << 20  # bytes of one matrix up to which a launch more costs more than waiting within one


@jit
def quantize_tile(
    x_ptr, out_ptr, scale_ptr, amax_ptr, tensor_scale_ptr, amax_out_ptr, amax, encode_scale, decode_scale,
    p, start, blocks, blocks_per_row,
    amax_stride_p, amax_stride_m, stride_p, stride_m, stride_k, seed, offset, first_block,
    BB: tl.constexpr, EVEN: tl.constexpr, DENSE: tl.constexpr, KIND: tl.constexpr, OUT: tl.constexpr,
    F: tl.constexpr, NATIVE: tl.constexpr, LAST: tl.constexpr = False, values_ptr=None, amax_tiles=None,
):  # fmt: skip
    """Blocks start … start + BB of matrix p (int64). amax and its scales: the matrix's, or None to load them here.

    amax_tiles: how many `publish_maximum` at amax_ptr; None where the maximum is there.
    """
    within = tl.arange(0, BB)  # [BB]
    pairs = tl.arange(0, 8)  # [8]
    block = start + within
    mask = tl.full((BB,), True, tl.int1) if EVEN else block < blocks
    first = p * blocks + start  # of the tile, in the whole tensor
    if DENSE:
        base = first * 16
        offsets = within[:, None] * 8 + pairs[None, :]  # [BB, 8]
    else:
        base = p * stride_p
        column = (block % blocks_per_row).to(tl.int64)
        offsets = (block // blocks_per_row).to(tl.int64)[:, None] * stride_m
        offsets += (column[:, None] * 8 + pairs[None, :]) * 2 * stride_k
    words, lo, hi = load_blocks(x_ptr, base, offsets, mask[:, None], stride_k, DENSE, KIND, LAST)  # [BB, 8]
    if F.hadamard:
        words, lo, hi = hadamard_words(lo, hi, KIND, NATIVE)
    if F.scaling == "row":
        row = (block // blocks_per_row).to(tl.int64)
        amax = tl.load(amax_ptr + p * amax_stride_p + row * amax_stride_m, mask=mask, other=0.0)  # [BB]
        encode_scale, decode_scale = tensor_scales(amax, F.e4m3_max, NATIVE)
    elif amax is None:  # after the elements, whose loads take as long
        if amax_tiles is None:
            amax = tl.load(amax_ptr + p * amax_stride_p)
        else:
            amax = wait_maximum(amax_ptr, amax_tiles, NATIVE)
        encode_scale, decode_scale = tensor_scales(amax, F.e4m3_max, NATIVE)
    block_amax = block_abs_max(words, lo, hi, KIND, DENSE or F.hadamard, NATIVE)
    scale, element = block_scales(lo, hi, block_amax, mask, encode_scale, decode_scale, amax, F, NATIVE)  # [BB]
    store_elements(
        out_ptr, first, within[:, None] * 8 + pairs[None, :], mask[:, None], lo, hi, scale, element, encode_scale,
        decode_scale, first_block + first + within, seed, offset, OUT, F, KIND, NATIVE, values_ptr,
    )  # fmt: skip
    if OUT == "packed" or OUT == "both":
        tl.store(scale_ptr + first + within, e4m3_code(scale), mask=mask)
    if F.scaling == "row":
        head = mask & (block % blocks_per_row == 0)
        index = p * (blocks // blocks_per_row) + row
        tl.store(tensor_scale_ptr + index, decode_scale, mask=head)
        tl.store(amax_out_ptr + index, amax, mask=head)
    elif (tensor_scale_ptr is not None) and start == 0:  # without, the caller writes it
        tl.store(tensor_scale_ptr + p, decode_scale)
        tl.store(amax_out_ptr + p, amax)


@jit_varying(
    "blocks_per_row", "tiles", "amax_stride_p", "amax_stride_m", "reverse", "seed", "offset", "first_block"
)  # fmt: skip
def _quantize_1x16(
    x_ptr, out_ptr, scale_ptr, amax_ptr, tensor_scale_ptr, amax_out_ptr, values_ptr, words_ptr,
    blocks, blocks_per_row, tiles, amax_stride_p, amax_stride_m, stride_p, stride_m, stride_k,
    reverse, seed: tl.int64, offset: tl.int64, first_block: tl.int64,
    BB: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr, SINGLE: tl.constexpr, DENSE: tl.constexpr,
    KIND: tl.constexpr, OUT: tl.constexpr, F: tl.constexpr, WORDS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    seed, offset = random_words(words_ptr, seed, offset, WORDS)
    pid = tl.program_id(0)
    if reverse != 0:  # what the amax kernel read last is still in the L2 cache
        pid = tl.num_programs(0) - 1 - pid
    p = tl.zeros((), tl.int64) if SINGLE else (pid // tiles).to(tl.int64)
    start = pid * (BB * STEPS) if SINGLE else pid % tiles * (BB * STEPS)
    if STEPS == 1:
        quantize_tile(
            x_ptr, out_ptr, scale_ptr, amax_ptr, tensor_scale_ptr, amax_out_ptr, None, None, None,
            p, start, blocks, blocks_per_row,
            amax_stride_p, amax_stride_m, stride_p, stride_m, stride_k, seed, offset, first_block,
            BB, EVEN, DENSE, KIND, OUT, F, NATIVE, False, values_ptr,
        )  # fmt: skip
        return
    amax = tl.load(amax_ptr + p * amax_stride_p)
    encode_scale, decode_scale = tensor_scales(amax, F.e4m3_max, NATIVE)
    for step in range(STEPS):
        quantize_tile(
            x_ptr, out_ptr, scale_ptr, amax_ptr, tensor_scale_ptr, amax_out_ptr, amax, encode_scale, decode_scale,
            p, start + step * BB, blocks, blocks_per_row,
            amax_stride_p, amax_stride_m, stride_p, stride_m, stride_k, seed, offset, first_block,
            BB, EVEN, DENSE, KIND, OUT, F, NATIVE, False, values_ptr,
        )  # fmt: skip


@jit_varying(
    "rows", "blocks_per_row", "row_tiles", "column_tiles", "amax_stride_p", "reverse", "seed", "offset", "first_block"
)  # fmt: skip
def _quantize_16x16(
    x_ptr, out_ptr, scale_ptr, amax_ptr, tensor_scale_ptr, amax_out_ptr, values_ptr, words_ptr,
    rows, blocks_per_row, row_tiles, column_tiles, amax_stride_p, stride_p, stride_m, stride_k,
    reverse, seed: tl.int64, offset: tl.int64, first_block: tl.int64,
    NB: tl.constexpr, EVEN: tl.constexpr, SINGLE: tl.constexpr, DENSE: tl.constexpr,
    KIND: tl.constexpr, OUT: tl.constexpr, F: tl.constexpr, WORDS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    seed, offset = random_words(words_ptr, seed, offset, WORDS)
    pid = tl.program_id(0)
    if reverse != 0:
        pid = tl.num_programs(0) - 1 - pid
    if SINGLE:
        p = tl.zeros((), tl.int64)
        row_tile = pid // column_tiles
    else:
        p = (pid // (row_tiles * column_tiles)).to(tl.int64)
        row_tile = pid // column_tiles % row_tiles
    row0 = row_tile * 16
    column0 = pid % column_tiles * NB
    # Columns come first: a warp's threads then lie along a row, as its memory does.
    column = tl.arange(0, NB)[:, None]
    row = tl.arange(0, 16)[None, :]
    pairs = tl.arange(0, 8)[None, None, :]
    mask = tl.full((NB, 16), True, tl.int1) if EVEN else (column0 + column < blocks_per_row) & (row0 + row < rows)
    local = row * blocks_per_row + column  # [NB, 16]
    first = (p * rows + row0) * blocks_per_row + column0
    if DENSE:
        base = first * 16
        offsets = local[:, :, None] * 8 + pairs  # [NB, 16, 8]
    else:
        base = p * stride_p + row0.to(tl.int64) * stride_m + column0.to(tl.int64) * 16 * stride_k
        offsets = row.to(tl.int64)[:, :, None] * stride_m
        offsets += (column[:, :, None] * 8 + pairs).to(tl.int64) * 2 * stride_k
    words, lo, hi = load_blocks(x_ptr, base, offsets, mask[:, :, None], stride_k, DENSE, KIND)
    if F.hadamard:
        lo, hi = hadamard(lo, hi, KIND)
    amax = tl.load(amax_ptr + p * amax_stride_p)
    encode_scale, decode_scale = tensor_scales(amax, F.e4m3_max, NATIVE)
    block_amax = block_abs_max(words, lo, hi, KIND, DENSE and not F.hadamard, NATIVE)
    scale, element = block_scales(lo, hi, block_amax, mask, encode_scale, decode_scale, amax, F, NATIVE)  # [NB, 1]
    store_elements(
        out_ptr, first, local[:, :, None] * 8 + pairs, mask[:, :, None], lo, hi, scale, element, encode_scale,
        decode_scale, first_block + first + local, seed, offset, OUT, F, KIND, NATIVE, values_ptr,
    )  # fmt: skip
    if OUT == "packed" or OUT == "both":
        tl.store(scale_ptr + first + local, tl.broadcast_to(e4m3_code(scale), (NB, 16)), mask=mask)
    if (row0 == 0) & (column0 == 0):
        tl.store(tensor_scale_ptr + p, decode_scale)
        tl.store(amax_out_ptr + p, amax)


def quantize(
    x: Tensor,
    fmt: NVFP4,
    *,
    amax: Tensor | None = None,
    per_matrix: bool = False,
    rng: tuple[int, int] | Tensor | None = None,
    first_block: int = 0,
    importance: Tensor | None = None,
    hessian: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(packed, block_scale, tensor_scale, amax); arguments and bytes as `halfbyte.numerics.nvfp4.quantize`.

    importance and hessian: of the rule `search`, see `search.py`.

    A transposed view of contiguous matrices is read as it lies (see `transposed.py`), any other strides by element.

    Launches: one with amax given, row scaling, or small matrices; a fill and one by the amax rule for many contiguous
    matrices or one that the L2 cache holds; else a fill, the maximum, and the quantization. Nothing synchronises.
    """
    shape = x.shape
    m = as_matrices(x, per_matrix)
    per_scale = shape[:-1] if fmt.scaling == "row" else shape[:-2] if per_matrix else torch.Size(())
    device = x.device
    out = (
        torch.empty((*shape[:-1], shape[-1] // 2), dtype=torch.uint8, device=device),
        torch.empty((*shape[:-1], shape[-1] // 16), dtype=torch.float8_e4m3fn, device=device),
        torch.empty(per_scale, dtype=torch.float32, device=device),
        torch.empty(per_scale, dtype=torch.float32, device=device),
    )
    if x.numel() == 0:
        scales_only(amax, out[2], out[3], fmt)
    else:
        dispatch(m, fmt, amax, out, rng, first_block, "packed", importance, hessian)
    return out


def dispatch(
    m: Matrices,
    fmt: NVFP4,
    amax: Tensor | None,
    out: tuple[Tensor, Tensor, Tensor, Tensor],
    rng: tuple[int, int] | Tensor | None,
    first_block: int,
    mode: str,
    importance: Tensor | None = None,
    hessian: Tensor | None = None,
    values: Tensor | None = None,
) -> None:
    """Choose the kernels for a non-empty input.

    mode: "packed" fills out; "exact" and "decoded" put values into out[0]; "both" fills out and puts q·s into values.
    """
    plain = fmt.scaling == "tensor" and fmt.block == (1, 16) and m.dense
    if importance is not None or hessian is not None:
        known = compute_amax(m, fmt) if amax is None else amax
        search.launch(m, fmt, known, out, importance, hessian, mode)
    elif mode == "packed" and transposed.supports_view(m, fmt):
        transposed.quantize_into(m, fmt, amax, out, rng, first_block)
    elif amax is not None:
        launch(m, fmt, amax, out, False, rng, first_block, mode, values)
    elif fmt.scaling == "row" and m.columns <= ROW_LIMIT and fmt.rounding == "nearest":
        row.quantize_into(m, fmt, *out, mode, values)
    elif plain and m.rows * m.columns <= SMALL and fmt.rounding == "nearest" and fmt.scale_rule != "search":
        long = m._replace(rows=1, columns=m.rows * m.columns)  # a matrix as one row, and few sizes to compile for
        row.quantize_into(long, fmt, *out, mode, values, sizes=(128, 512, 2048))
    elif plain and mode == "packed" and fmt.scale_rule == "amax" and (m.matrices > 1 or m.x.nbytes <= CACHED):
        stacked.quantize_into(m, fmt, out, rng, first_block)
    else:
        launch(m, fmt, compute_amax(m, fmt), out, True, rng, first_block, mode, values)


def launch(
    m: Matrices,
    fmt: NVFP4,
    amax: Tensor,
    out: tuple[Tensor, Tensor, Tensor, Tensor],
    reverse: bool,
    rng: tuple[int, int] | Tensor | None,
    first_block: int,
    mode: str = "packed",
    values: Tensor | None = None,
) -> None:
    """Quantize with a known amax: one value, or one per matrix or row."""
    packed, scale, tensor_scale, amax_out = out
    values = packed if values is None else values
    shared = amax.dim() == 0 or amax.numel() == 1
    if not shared:
        amax = amax.contiguous()
    blocks_per_row = m.columns // 16
    native = _target.native_level(m.x.device)
    words, seed, offset = random_arguments(rng, amax)
    if fmt.block == (1, 16):
        blocks = m.rows * blocks_per_row
        # A warp settles its own near ties, one block a thread keeps the code short, and eight tiles a program make up
        # for the start of so small a program. A program of the search goes on as long as one of its blocks does.
        alone = fmt.scale_rule == "four_over_six" and fmt.scaling == "tensor" and fmt.error_arithmetic == "exact"
        bb, warps = (32, 1) if alone or fmt.scale_rule == "search" else (BLOCKS, WARPS)
        steps = 8 if alone and blocks * m.matrices >= 1 << 20 else 1
        tiles = cdiv(blocks, bb * steps)
        stride_p = 0 if shared else m.rows if fmt.scaling == "row" else 1
        launch_kernel(
            _quantize_1x16, tiles * m.matrices, (m.x, packed, scale, amax, tensor_scale, amax_out, values, words),
            (blocks, blocks_per_row, tiles, stride_p, 0 if shared else 1, m.stride_p, m.stride_m, m.stride_k),
            (int(reverse), seed, offset, first_block),
            BB=bb, STEPS=steps, EVEN=blocks % (bb * steps) == 0, SINGLE=m.matrices == 1, DENSE=m.dense,
            KIND=m.kind, OUT=mode, F=fmt, WORDS=words is rng, NATIVE=native,
            num_warps=warps, maxnreg=64 if alone else None,
        )  # fmt: skip
        return
    # A thread takes 16 1×16 blocks of plain 16-bit input, of all else 4: what the registers hold.
    plain = fmt.scale_rule == "amax" and not fmt.hadamard and fmt.rounding == "nearest" and m.kind != 2
    nb, warps = (32, 2) if plain else (8, 1)
    row_tiles, column_tiles = cdiv(m.rows, 16), cdiv(blocks_per_row, nb)
    launch_kernel(
        _quantize_16x16, row_tiles * column_tiles * m.matrices,
        (m.x, packed, scale, amax, tensor_scale, amax_out, values, words),
        (m.rows, blocks_per_row, row_tiles, column_tiles, 0 if shared else 1, m.stride_p, m.stride_m, m.stride_k),
        (int(reverse), seed, offset, first_block),
        NB=nb, EVEN=m.rows % 16 == 0 and blocks_per_row % nb == 0,
        SINGLE=m.matrices == 1, DENSE=m.dense, KIND=m.kind, OUT=mode, F=fmt, WORDS=words is rng, NATIVE=native,
        num_warps=warps, maxnreg=96 if fmt.scale_rule == "four_over_six" else None,
    )  # fmt: skip


@jit_varying("amax_stride", "count")
def _scales(
    amax_ptr, tensor_scale_ptr, amax_out_ptr, amax_stride, count, B: tl.constexpr, E: tl.constexpr, NATIVE: tl.constexpr
):
    i = tl.program_id(0) * B + tl.arange(0, B)  # [B]
    amax = tl.load(amax_ptr + i * amax_stride, mask=i < count, other=0.0)
    tl.store(amax_out_ptr + i, amax, mask=i < count)
    tl.store(tensor_scale_ptr + i, tensor_scales(amax, E, NATIVE)[1], mask=i < count)


def scales_only(amax: Tensor | None, tensor_scale: Tensor, amax_out: Tensor, fmt: NVFP4) -> None:
    """The tensor scales of an input without elements."""
    count = tensor_scale.numel()
    if count:
        amax = tensor_scale.new_zeros(()) if amax is None else amax.contiguous()
        launch_kernel(
            _scales, cdiv(count, 128), (amax, tensor_scale, amax_out), (0 if amax.numel() == 1 else 1, count),
            B=128, E=fmt.e4m3_max, NATIVE=_target.native_level(tensor_scale.device),
        )  # fmt: skip


def random_arguments(rng: tuple[int, int] | Tensor | None, unused: Tensor) -> tuple[Tensor, int, int]:
    """(words, seed, offset) for `random_words`: rng itself where it is a tensor, else `unused` and its numbers."""
    if isinstance(rng, Tensor):
        return rng, 0, 0
    return unused, *((0, 0) if rng is None else (signed(rng[0]), signed(rng[1])))


def signed(word: int) -> int:
    """A 64-bit word as the int64 with its bits."""
    word &= 0xFFFFFFFFFFFFFFFF
    return word - (1 << 64) if word >> 63 else word
