"""Quantize x.mT from contiguous x, alone or together with x itself (what training needs).

Fewest bytes, for bf16: 2 read and 0.5625 written per element, or 1.125 written for both; the floor is those over the
copy bandwidth. A program takes T·16 rows and 2·CW columns. A thread holds all 16 rows of a word (two columns), so that
maxima and codes of the transposed blocks need no exchange; only the bytes, a quarter of the input, change threads on
the way out. Tiles are tall because the stores rule: 16 blocks give 128 consecutive bytes of output, and a row of the
tile is still a whole 32-byte sector.

Given up: both outputs from one read. A kernel with both took 172 µs for 8192×8192 on an H200 at the best of 11
tilings, since the two want opposite tiles; the two kernels one after the other take 121 µs.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import UnsupportedError
from ..formats import NVFP4
from . import _target
from ._maxima import block_abs_max
from ._primitives import e4m3_code, jit, join8, tensor_scales, unpack_words
from ._rules import block_scales, encode, hadamard
from ._tiles import Matrices, as_matrices
from .amax import amax as compute_amax
from .quantize import quantize as quantize_rows
from .quantize import signed

T, CW = 16, 8
Quantized = tuple[Tensor, Tensor, Tensor, Tensor]


@jit
def _row_words(x_ptr, offsets, i: tl.constexpr, words_per_row, mask, KIND: tl.constexpr):
    word: tl.constexpr = tl.int64 if KIND == 2 else tl.int32
    return tl.load(x_ptr.to(tl.pointer_type(word)) + offsets + i * words_per_row, mask=mask, other=0)


@jit
def load_columns(x_ptr, offsets, words_per_row, mask, KIND: tl.constexpr):
    """Words of 16 rows below each offset [T, CW]: those of the even rows, of the odd rows, each [T, CW, 8]."""
    w0 = _row_words(x_ptr, offsets, 0, words_per_row, mask, KIND)
    w1 = _row_words(x_ptr, offsets, 1, words_per_row, mask, KIND)
    w2 = _row_words(x_ptr, offsets, 2, words_per_row, mask, KIND)
    w3 = _row_words(x_ptr, offsets, 3, words_per_row, mask, KIND)
    w4 = _row_words(x_ptr, offsets, 4, words_per_row, mask, KIND)
    w5 = _row_words(x_ptr, offsets, 5, words_per_row, mask, KIND)
    w6 = _row_words(x_ptr, offsets, 6, words_per_row, mask, KIND)
    w7 = _row_words(x_ptr, offsets, 7, words_per_row, mask, KIND)
    w8 = _row_words(x_ptr, offsets, 8, words_per_row, mask, KIND)
    w9 = _row_words(x_ptr, offsets, 9, words_per_row, mask, KIND)
    w10 = _row_words(x_ptr, offsets, 10, words_per_row, mask, KIND)
    w11 = _row_words(x_ptr, offsets, 11, words_per_row, mask, KIND)
    w12 = _row_words(x_ptr, offsets, 12, words_per_row, mask, KIND)
    w13 = _row_words(x_ptr, offsets, 13, words_per_row, mask, KIND)
    w14 = _row_words(x_ptr, offsets, 14, words_per_row, mask, KIND)
    w15 = _row_words(x_ptr, offsets, 15, words_per_row, mask, KIND)
    return join8(w0, w2, w4, w6, w8, w10, w12, w14), join8(w1, w3, w5, w7, w9, w11, w13, w15)


@jit
def _column_pairs(
    x_ptr, offsets, words_per_row, mask, HADAMARD: tl.constexpr, KIND: tl.constexpr, NATIVE: tl.constexpr
):  # fmt: skip
    """Pairs along rows, [T, CW, 8] each: (lo, hi) of even columns, (lo, hi) of odd ones; the block maxima of both."""
    even_rows, odd_rows = load_columns(x_ptr, offsets, words_per_row, mask, KIND)
    lo0, lo1 = unpack_words(even_rows, KIND)
    hi0, hi1 = unpack_words(odd_rows, KIND)
    if HADAMARD:
        lo0, hi0 = hadamard(lo0, hi0, KIND)
        lo1, hi1 = hadamard(lo1, hi1, KIND)
    max0 = block_abs_max(lo0, lo0, hi0, KIND, False, NATIVE)
    max1 = block_abs_max(lo1, lo1, hi1, KIND, False, NATIVE)
    return lo0, hi0, lo1, hi1, max0, max1


@jit
def _quantize(
    x_ptr, packed_ptr, scale_ptr, amax_ptr, tensor_scale_ptr, amax_out_ptr,
    rows, columns, blocks_per_column, row_tiles, column_tiles, amax_stride,
    seed: tl.int64, offset: tl.int64, first_block: tl.int64,
    T: tl.constexpr, CW: tl.constexpr, KIND: tl.constexpr, F: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tiles = row_tiles * column_tiles
    p = pid // tiles
    row0 = (pid % tiles) // column_tiles * (16 * T)
    word0 = (pid % column_tiles) * CW
    x_ptr += (p.to(tl.int64) * rows + row0) * columns + 2 * word0
    t = tl.arange(0, T)
    cw = tl.arange(0, CW)
    words_per_row = columns // 2
    mask = (row0 + t[:, None] * 16 < rows) & (word0 + cw[None, :] < words_per_row)  # [T, CW]
    offsets = t[:, None] * (16 * words_per_row) + cw[None, :]
    lo0, hi0, lo1, hi1, max0, max1 = _column_pairs(x_ptr, offsets, words_per_row, mask, F.hadamard, KIND, NATIVE)
    amax = tl.load(amax_ptr + p * amax_stride)
    encode_scale, decode_scale = tensor_scales(amax, F.e4m3_max, NATIVE)
    first = (p.to(tl.int64) * columns + 2 * word0) * blocks_per_column + row0 // 16  # block number of the tile's first
    number = first_block + first + (2 * cw[None, :]) * blocks_per_column + t[:, None]  # [T, CW]
    scale0, element = block_scales(lo0, hi0, max0, mask, encode_scale, decode_scale, amax, F, NATIVE)  # [T, CW]
    packed0 = encode(lo0, hi0, element, number, seed, offset, F, NATIVE)
    number += blocks_per_column
    scale1, element = block_scales(lo1, hi1, max1, mask, encode_scale, decode_scale, amax, F, NATIVE)
    packed1 = encode(lo1, hi1, element, number, seed, offset, F, NATIVE)
    packed = tl.join(packed0, packed1).permute(1, 3, 0, 2).reshape(2 * CW, T, 8)
    column = tl.arange(0, 2 * CW)[:, None]
    ok = (2 * word0 + column < columns) & (row0 + 16 * t[None, :] < rows)  # [2CW, T]
    local = column.to(tl.int64) * blocks_per_column + t[None, :]
    pairs = tl.arange(0, 8)[None, None, :]
    tl.store(packed_ptr + first * 8 + local[:, :, None] * 8 + pairs, packed, mask=ok[:, :, None])
    scale = tl.join(e4m3_code(scale0), e4m3_code(scale1)).permute(1, 2, 0).reshape(2 * CW, T)
    tl.store(scale_ptr + first + local, scale, mask=ok)
    if (row0 == 0) & (word0 == 0):
        tl.store(tensor_scale_ptr + p, decode_scale)
        tl.store(amax_out_ptr + p, amax)


@jit
def _amax(
    x_ptr, bits_ptr, row_bits_ptr, rows, columns, row_tiles, column_tiles,
    T: tl.constexpr, CW: tl.constexpr, BOTH: tl.constexpr, KIND: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tiles = row_tiles * column_tiles
    p = pid // tiles
    row0 = (pid % tiles) // column_tiles * (16 * T)
    word0 = (pid % column_tiles) * CW
    x_ptr += (p.to(tl.int64) * rows + row0) * columns + 2 * word0
    t = tl.arange(0, T)[:, None]
    cw = tl.arange(0, CW)[None, :]
    mask = (row0 + t * 16 < rows) & (word0 + cw < columns // 2)  # [T, CW]
    even_rows, odd_rows = load_columns(x_ptr, t * (8 * columns) + cw, columns // 2, mask, KIND)
    lo0, lo1 = unpack_words(even_rows, KIND)
    hi0, hi1 = unpack_words(odd_rows, KIND)
    if BOTH:
        plain = tl.maximum(
            block_abs_max(lo0, lo0, hi0, KIND, False, NATIVE).to(tl.int32, bitcast=True),
            block_abs_max(lo1, lo1, hi1, KIND, False, NATIVE).to(tl.int32, bitcast=True),
        )
        tl.atomic_max(row_bits_ptr + p, tl.max(tl.max(plain, 1), 0), sem="relaxed")
    lo0, hi0 = hadamard(lo0, hi0, KIND)
    lo1, hi1 = hadamard(lo1, hi1, KIND)
    largest = tl.maximum(
        block_abs_max(lo0, lo0, hi0, KIND, False, NATIVE).to(tl.int32, bitcast=True),
        block_abs_max(lo1, lo1, hi1, KIND, False, NATIVE).to(tl.int32, bitcast=True),
    )
    tl.atomic_max(bits_ptr + p, tl.max(tl.max(largest, 1), 0), sem="relaxed")


def supports(x: Tensor, fmt: NVFP4) -> bool:
    """Whether x.mT can be quantized to fmt here; `quantize.quantize(x.mT, …)` does all the rest."""
    if x.dim() < 2 or x.numel() == 0 or x.shape[-1] % 16 or x.shape[-2] % 16:
        return False
    return fmt.block == (1, 16) and fmt.scaling == "tensor" and as_matrices(x, True).dense


def quantize(
    x: Tensor,
    fmt: NVFP4,
    *,
    amax: Tensor | None = None,
    rng: tuple[int, int] | None = None,
    first_block: int = 0,
    rowwise: NVFP4 | None = None,
    rowwise_amax: Tensor | None = None,
    rowwise_rng: tuple[int, int] | None = None,
    rowwise_first_block: int = 0,
) -> tuple[Quantized, Quantized | None]:
    """x (…, M, K) → (x.mT in fmt, x in the format `rowwise` or None), one tensor scale per matrix.

    Each of the two is (packed, block_scale, tensor_scale, amax), its bytes those of
    `numerics.nvfp4.quantize(x.mT, fmt, per_matrix=True)` and `numerics.nvfp4.quantize(x, rowwise, per_matrix=True)`.
    One read gives both maxima, also when only the transposed one follows a Hadamard transform.

    Raises:
        UnsupportedError: `supports(x, fmt)` is False.
    """
    if not supports(x, fmt):
        raise UnsupportedError(f"x of shape {tuple(x.shape)}, {fmt}: quantize x.mT by itself instead")
    m = as_matrices(x, True)
    if amax is None:
        share = rowwise is not None and rowwise.scaling == "tensor" and not rowwise.hadamard and rowwise_amax is None
        amax, plain = _maxima(m, fmt, share)
        rowwise_amax = plain if share else rowwise_amax
    out = _empty(x.mT)
    seed, offset = (0, 0) if rng is None else rng
    row_tiles, column_tiles = triton.cdiv(m.rows, 16 * T), triton.cdiv(m.columns, 2 * CW)
    _quantize[(m.matrices * row_tiles * column_tiles,)](
        m.x, out[0], out[1].view(torch.uint8), amax, out[2], out[3],
        m.rows, m.columns, m.rows // 16, row_tiles, column_tiles, int(amax.numel() > 1),
        signed(seed), signed(offset), first_block,
        T=T, CW=CW, KIND=m.kind, F=fmt, NATIVE=_target.native_level(x.device), num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    if rowwise is None:
        return out, None
    rows = quantize_rows(
        x, rowwise, amax=rowwise_amax, per_matrix=True, rng=rowwise_rng, first_block=rowwise_first_block
    )
    return out, rows


def _maxima(m: Matrices, fmt: NVFP4, share: bool) -> tuple[Tensor, Tensor]:
    """A of the transposed matrices in fmt, and, where share, of the matrices as they are; (P,) each."""
    if not fmt.hadamard:
        result = compute_amax(m, fmt)
        return result, result
    bits = torch.zeros((2, m.matrices), dtype=torch.float32, device=m.x.device)
    row_tiles, column_tiles = triton.cdiv(m.rows, 16 * T), triton.cdiv(m.columns, 2 * CW)
    _amax[(m.matrices * row_tiles * column_tiles,)](
        m.x, bits[0].view(torch.int32), bits[1].view(torch.int32), m.rows, m.columns, row_tiles, column_tiles,
        T=T, CW=CW, BOTH=share, KIND=m.kind, NATIVE=_target.native_level(m.x.device),
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return bits[0], bits[1]


def _empty(x: Tensor) -> Quantized:
    lead, device = x.shape[:-1], x.device
    return (
        torch.empty((*lead, x.shape[-1] // 2), dtype=torch.uint8, device=device),
        torch.empty((*lead, x.shape[-1] // 16), dtype=torch.float8_e4m3fn, device=device),
        torch.empty(x.shape[:-2], dtype=torch.float32, device=device),
        torch.empty(x.shape[:-2], dtype=torch.float32, device=device),
    )
