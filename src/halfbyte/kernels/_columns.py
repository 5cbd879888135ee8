"""A tile of x quantized along its columns: what the transposed kernels are made of.

A tile has ROWS · COLUMNS = 8192 elements and belongs to 128 threads; each holds 16 rows of four columns, two words, so
that maxima and codes of the transposed blocks need no exchange. Of 32 consecutive threads, 8 lie along a row and 4
along a column: a row gives 64 consecutive bytes of input, a column 32 of output, both whole sectors, and the bytes go
out from where they are. Scales, one byte a block, may change threads first, for longer pieces: a sector of the L2 cache
that is written in part costs as much as several whole ones.
"""

# mypy: disable-error-code="no-untyped-def,assignment,misc"

from __future__ import annotations

import triton.language as tl

from ._fp8 import e4m3_code
from ._maxima import block_abs_max, halves_abs_max
from ._primitives import jit, join8, unpack_words
from ._rules import SAFE_ABOVE, block_scales, encode, hadamard_words, store_values

THREADS = tl.constexpr(128)


@jit
def load_tile(
    x_ptr, row0, column0, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """Words of the tile at x_ptr: of even rows and of odd rows, [128, 8], of each thread's first and second word; then
    the block along the column, the first column and whether they exist, [128]."""
    n = tl.arange(0, THREADS)
    across: tl.constexpr = COLUMNS // 32
    block = n // 32 // across * 4 + n // 8 % 4
    column = (n // 32 % across * 8 + n % 8) * 4
    if EVEN:
        mask = tl.full((THREADS,), True, tl.int1)
    else:
        mask = (row0 + block * 16 < rows) & (column0 + column < columns)
    stride = (columns // 2).to(tl.int64)
    x_ptr = x_ptr.to(tl.pointer_type(tl.int64 if KIND == 2 else tl.int32))
    pointers = x_ptr + (block * 16 * stride + column // 2)[:, None] + tl.arange(0, 2)[None, :]
    a = ()
    b = ()
    for _ in tl.static_range(16):
        first, second = tl.split(tl.load(pointers, mask=mask[:, None], other=0))
        a = a + (first,)
        b = b + (second,)
        pointers += stride
    even0 = join8(a[0], a[2], a[4], a[6], a[8], a[10], a[12], a[14])
    odd0 = join8(a[1], a[3], a[5], a[7], a[9], a[11], a[13], a[15])
    even1 = join8(b[0], b[2], b[4], b[6], b[8], b[10], b[12], b[14])
    odd1 = join8(b[1], b[3], b[5], b[7], b[9], b[11], b[13], b[15])
    return even0, odd0, even1, odd1, block, column, mask


@jit
def column_pairs(even, odd, HADAMARD: tl.constexpr, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """Pairs along the two columns of a word and their maxima: lo, hi, max of the first; lo, hi, max of the second."""
    lo0, lo1 = unpack_words(even, KIND)
    hi0, hi1 = unpack_words(odd, KIND)
    if HADAMARD:
        words, lo0, hi0 = hadamard_words(lo0, hi0, KIND, NATIVE)
        max0 = block_abs_max(words, lo0, hi0, KIND, True, NATIVE)
        words, lo1, hi1 = hadamard_words(lo1, hi1, KIND, NATIVE)
        max1 = block_abs_max(words, lo1, hi1, KIND, True, NATIVE)
    else:
        max0, max1 = halves_abs_max(even, odd, KIND, NATIVE)
    return lo0, hi0, max0, lo1, hi1, max1


@jit
def _store_column(
    packed_ptr, block, mask, lo, hi, block_max, amax, encode_scale, decode_scale, seed, offset, first_block,
    SAFE: tl.constexpr, OUT: tl.constexpr, KIND: tl.constexpr, F: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Store the bytes, or the values that OUT names; → the scales as E4M3 bytes."""
    scale, element = block_scales(lo, hi, block_max, mask, encode_scale, decode_scale, amax, F, NATIVE)
    packed = encode(lo, hi, element, first_block + block, seed, offset, F, NATIVE, SAFE)
    offsets = block[:, None] * 8 + tl.arange(0, 8)[None, :]
    if OUT == "packed":
        tl.store(packed_ptr + offsets, packed, mask=mask[:, None])
    else:
        store_values(packed_ptr, 0, offsets, mask[:, None], packed, scale, decode_scale, OUT, KIND, NATIVE)
    return e4m3_code(scale)


@jit
def _store_word(
    packed_ptr, block, blocks_per_column, mask, even, odd, amax, encode_scale, decode_scale, seed, offset, first_block,
    SAFE: tl.constexpr, OUT: tl.constexpr, KIND: tl.constexpr, F: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """As `_store_column`, for both columns of a word."""
    lo0, hi0, max0, lo1, hi1, max1 = column_pairs(even, odd, F.hadamard, KIND, NATIVE)
    scale0 = _store_column(
        packed_ptr, block, mask, lo0, hi0, max0, amax, encode_scale, decode_scale, seed, offset, first_block,
        SAFE, OUT, KIND, F, NATIVE,
    )  # fmt: skip
    scale1 = _store_column(
        packed_ptr, block + blocks_per_column, mask, lo1, hi1, max1, amax, encode_scale, decode_scale, seed, offset,
        first_block, SAFE, OUT, KIND, F, NATIVE,
    )  # fmt: skip
    return scale0, scale1


@jit
def _store_tile(
    packed_ptr, scale_ptr, even0, odd0, even1, odd1, block, column, mask, first, row0, column0, rows, columns,
    amax, encode_scale, decode_scale, seed, offset, first_block,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GATHER: tl.constexpr, EVEN: tl.constexpr, SAFE: tl.constexpr,
    OUT: tl.constexpr, KIND: tl.constexpr, F: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    blocks_per_column = (rows // 16).to(tl.int64)
    block = first + column * blocks_per_column + block  # of the output
    scale0, scale1 = _store_word(
        packed_ptr, block, blocks_per_column, mask, even0, odd0, amax, encode_scale, decode_scale,
        seed, offset, first_block, SAFE, OUT, KIND, F, NATIVE,
    )  # fmt: skip
    scale2, scale3 = _store_word(
        packed_ptr, block + 2 * blocks_per_column, blocks_per_column, mask, even1, odd1, amax, encode_scale,
        decode_scale, seed, offset, first_block, SAFE, OUT, KIND, F, NATIVE,
    )  # fmt: skip
    if OUT == "packed" and GATHER:
        scale = tl.join(tl.join(scale0, scale2), tl.join(scale1, scale3))  # [128, 2, 2]: the last two are the column
        scale = scale.reshape(ROWS // 64, COLUMNS // 32, 4, 8, 2, 2).permute(1, 3, 4, 5, 0, 2)
        along = tl.arange(0, ROWS // 16)[None, :]
        across = tl.arange(0, COLUMNS)[:, None]
        if EVEN:
            exists = tl.full((COLUMNS, ROWS // 16), True, tl.int1)
        else:
            exists = (row0 + 16 * along < rows) & (column0 + across < columns)
        scale_ptr += first + across * blocks_per_column + along
        tl.store(scale_ptr, scale.reshape(COLUMNS, ROWS // 16), mask=exists)
    elif OUT == "packed":
        tl.store(scale_ptr + block, scale0, mask=mask)
        tl.store(scale_ptr + block + blocks_per_column, scale1, mask=mask)
        tl.store(scale_ptr + block + 2 * blocks_per_column, scale2, mask=mask)
        tl.store(scale_ptr + block + 3 * blocks_per_column, scale3, mask=mask)


@jit
def store_tile(
    packed_ptr, scale_ptr, even0, odd0, even1, odd1, block, column, mask, p, row0, column0, rows, columns,
    amax, encode_scale, decode_scale, seed, offset, first_block,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GATHER: tl.constexpr, EVEN: tl.constexpr, KIND: tl.constexpr,
    OUT: tl.constexpr, F: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Quantize what `load_tile` gave, of matrix p (int64), and store it. GATHER: scales change threads.

    OUT: "packed" bytes and scales, or values alone: "exact" or "decoded".
    """
    first = (p * columns + column0) * (rows // 16) + row0 // 16
    if NATIVE and KIND != 2 and F.rounding == "nearest" and F.scale_rule == "amax":
        if encode_scale > SAFE_ABOVE:
            _store_tile(
                packed_ptr, scale_ptr, even0, odd0, even1, odd1, block, column, mask, first, row0, column0, rows,
                columns, amax, encode_scale, decode_scale, seed, offset, first_block,
                ROWS, COLUMNS, GATHER, EVEN, True, OUT, KIND, F, NATIVE,
            )  # fmt: skip
        else:
            _store_tile(
                packed_ptr, scale_ptr, even0, odd0, even1, odd1, block, column, mask, first, row0, column0, rows,
                columns, amax, encode_scale, decode_scale, seed, offset, first_block,
                ROWS, COLUMNS, GATHER, EVEN, False, OUT, KIND, F, NATIVE,
            )  # fmt: skip
    else:
        _store_tile(
            packed_ptr, scale_ptr, even0, odd0, even1, odd1, block, column, mask, first, row0, column0, rows, columns,
            amax, encode_scale, decode_scale, seed, offset, first_block,
            ROWS, COLUMNS, GATHER, EVEN, False, OUT, KIND, F, NATIVE,
        )  # fmt: skip
