"""Quantize x.mT from contiguous x, alone or together with x itself (what training needs).

Fewest bytes, for bf16: 2 read and 0.5625 written per element, or 1.125 written for both; the floor is those over the
copy bandwidth. Both come from one read of device memory: a program quantizes its tile along the columns, then reads it
again, from the caches, in the pairing that the rows want. That takes 29 instructions per element, and they bound it.

The tile is tall for the columns alone (its scales are stored after an exchange, in longer pieces), and wide for both.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ..errors import UnsupportedError
from ..formats import NVFP4
from . import _target
from . import quantize as rows_first
from ._columns import column_pairs, load_tile, store_tile
from ._fp8 import e4m3_code
from ._launch import cdiv, launch
from ._maxima import block_abs_max, halves_abs_max
from ._philox import random_words
from ._primitives import jit, jit_varying, tensor_scales
from ._rules import block_scales, hadamard_words, store_elements
from ._tiles import Matrices, as_matrices, load_blocks
from .amax import amax as compute_amax

ALONE, TOGETHER = (128, 64), (64, 128)  # rows and columns of a tile
GRID = 65535  # programs along the second and third dimension of a grid
BLOCKS = 256  # blocks of the rows that a program holds at a time: two a thread
Quantized = tuple[Tensor, Tensor, Tensor, Tensor]


@jit
def _quantize_rows(
    x_ptr, packed_ptr, scale_ptr, p, row0, column0, rows, columns, amax,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BB: tl.constexpr, EVEN: tl.constexpr, KIND: tl.constexpr,
    F: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Quantize the tile at x_ptr along its rows, to nearest."""
    ACROSS: tl.constexpr = COLUMNS // 16
    encode_scale, decode_scale = tensor_scales(amax, F.e4m3_max, NATIVE)
    first = (p * rows + row0) * (columns // 16) + column0 // 16
    pairs = tl.arange(0, 8)[None, :]
    for step in range(ROWS * ACROSS // BB):
        n = step * BB + tl.arange(0, BB)
        if EVEN:
            mask = tl.full((BB,), True, tl.int1)
        else:
            mask = (row0 + n // ACROSS < rows) & (column0 + n % ACROSS * 16 < columns)
        block = n // ACROSS * (columns // 16) + n % ACROSS
        offsets = block[:, None] * 8 + pairs
        words, lo, hi = load_blocks(x_ptr, 0, offsets, mask[:, None], 1, True, KIND)
        if F.hadamard:
            words, lo, hi = hadamard_words(lo, hi, KIND, NATIVE)
        block_amax = block_abs_max(words, lo, hi, KIND, True, NATIVE)
        scale, element = block_scales(lo, hi, block_amax, mask, encode_scale, decode_scale, amax, F, NATIVE)
        store_elements(
            packed_ptr, first, offsets, mask[:, None], lo, hi, scale, element, encode_scale, decode_scale, block, 0, 0,
            "packed", F, KIND, NATIVE,
        )  # fmt: skip
        tl.store(scale_ptr + first + block, e4m3_code(scale), mask=mask)


@jit_varying("amax_stride", "row_amax_stride", "seed", "offset", "first_block")
def _quantize(
    x_ptr, packed_ptr, scale_ptr, amax_ptr, tensor_scale_ptr, amax_out_ptr,
    row_packed_ptr, row_scale_ptr, row_amax_ptr, row_tensor_scale_ptr, row_amax_out_ptr, words_ptr,
    rows, columns, amax_stride, row_amax_stride, seed: tl.int64, offset: tl.int64, first_block: tl.int64,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BB: tl.constexpr, EVEN: tl.constexpr, KIND: tl.constexpr,
    OUT: tl.constexpr, F: tl.constexpr, R: tl.constexpr, WORDS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    # F: of the columns; OUT: what of them is stored. R: of the rows, or None.
    seed, offset = random_words(words_ptr, seed, offset, WORDS)
    p = tl.program_id(2).to(tl.int64)
    row0 = tl.program_id(1) * ROWS
    column0 = tl.program_id(0) * COLUMNS
    amax = tl.load(amax_ptr + p * amax_stride)
    x_ptr += (p * rows + row0) * columns + column0
    even0, odd0, even1, odd1, block, column, mask = load_tile(
        x_ptr, row0, column0, rows, columns, ROWS, COLUMNS, EVEN, KIND
    )
    encode_scale, decode_scale = tensor_scales(amax, F.e4m3_max, NATIVE)
    store_tile(
        packed_ptr, scale_ptr, even0, odd0, even1, odd1, block, column, mask, p, row0, column0, rows, columns,
        amax, encode_scale, decode_scale, seed, offset, first_block,
        ROWS, COLUMNS, R is None, EVEN, KIND, OUT, F, NATIVE,
    )  # fmt: skip
    is_first = (row0 == 0) & (column0 == 0)
    if is_first:
        tl.store(tensor_scale_ptr + p, decode_scale)
        tl.store(amax_out_ptr + p, amax)
    if R is not None:
        row_amax = tl.load(row_amax_ptr + p * row_amax_stride)
        _quantize_rows(
            x_ptr, row_packed_ptr, row_scale_ptr, p, row0, column0, rows, columns, row_amax,
            ROWS, COLUMNS, BB, EVEN, KIND, R, NATIVE,
        )  # fmt: skip
        if is_first:
            tl.store(row_tensor_scale_ptr + p, tensor_scales(row_amax, R.e4m3_max, NATIVE)[1])
            tl.store(row_amax_out_ptr + p, row_amax)


@jit
def _amax(
    x_ptr, bits_ptr, row_bits_ptr, rows, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BOTH: tl.constexpr, EVEN: tl.constexpr, KIND: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(2).to(tl.int64)
    row0 = tl.program_id(1) * ROWS
    column0 = tl.program_id(0) * COLUMNS
    x_ptr += (p * rows + row0) * columns + column0
    even0, odd0, even1, odd1, _, _, _ = load_tile(x_ptr, row0, column0, rows, columns, ROWS, COLUMNS, EVEN, KIND)
    if BOTH:
        max0, max1 = halves_abs_max(even0, odd0, KIND, NATIVE)
        max2, max3 = halves_abs_max(even1, odd1, KIND, NATIVE)
        tl.atomic_max(row_bits_ptr + p, _largest(max0, max1, max2, max3), sem="relaxed")
    _, _, max0, _, _, max1 = column_pairs(even0, odd0, True, KIND, NATIVE)
    _, _, max2, _, _, max3 = column_pairs(even1, odd1, True, KIND, NATIVE)
    tl.atomic_max(bits_ptr + p, _largest(max0, max1, max2, max3), sem="relaxed")


@jit
def _largest(a, b, c, d):
    """The largest of non-negative float32, as bits; NaN wins."""
    first = tl.maximum(a.to(tl.int32, bitcast=True), b.to(tl.int32, bitcast=True))
    second = tl.maximum(c.to(tl.int32, bitcast=True), d.to(tl.int32, bitcast=True))
    return tl.max(tl.maximum(first, second), 0)


def supports(x: Tensor, fmt: NVFP4) -> bool:
    """Whether x.mT can be quantized to fmt here; `quantize.quantize(x.mT, …)` does all the rest."""
    if x.dim() < 2 or x.numel() == 0 or x.shape[-1] % 16 or x.shape[-2] % 16:
        return False
    if fmt.block != (1, 16) or fmt.scaling != "tensor":
        return False
    m = as_matrices(x, True)
    return m.dense and _in_a_grid(m)


def supports_view(m: Matrices, fmt: NVFP4) -> bool:
    """Whether m, as it is, is the transpose of dense matrices that can be quantized to fmt here."""
    if m.stride_m != 1 or m.stride_k != m.rows or m.rows % 16 or fmt.block != (1, 16) or fmt.scaling != "tensor":
        return False
    together = m.matrices == 1 or m.stride_p == m.rows * m.columns
    aligned = m.x.data_ptr() % (8 if m.kind == 2 else 4) == 0
    return (
        together and aligned and _in_a_grid(m) and fmt.scale_rule != "search"
    )  # its own kernel has the threads for it


def _in_a_grid(m: Matrices) -> bool:
    return max(m.rows, m.columns) <= GRID * TOGETHER[0] and m.matrices <= GRID


def quantize_into(
    m: Matrices,
    fmt: NVFP4,
    amax: Tensor | None,
    out: Quantized,
    rng: tuple[int, int] | Tensor | None,
    first_block: int,
) -> None:
    """Quantize m, for which `supports_view`; amax: one value, or one per matrix; see `quantize.quantize`."""
    lying = m._replace(rows=m.columns, columns=m.rows, stride_m=m.rows, stride_k=1, dense=True)
    amax = _maxima(lying, fmt, False)[0] if amax is None else amax.contiguous()
    _launch(lying, fmt, amax, out, rng, first_block)


def quantize(
    x: Tensor,
    fmt: NVFP4,
    *,
    amax: Tensor | None = None,
    rng: tuple[int, int] | Tensor | None = None,
    first_block: int = 0,
    rowwise: NVFP4 | None = None,
    rowwise_amax: Tensor | None = None,
    rowwise_rng: tuple[int, int] | Tensor | None = None,
    rowwise_first_block: int = 0,
) -> tuple[Quantized, Quantized | None]:
    """x (…, M, K) → (x.mT in fmt, x in the format `rowwise` or None), one tensor scale per matrix.

    Each of the two is (packed, block_scale, tensor_scale, amax), its bytes those of
    `numerics.nvfp4.quantize(x.mT, fmt, per_matrix=True)` and `numerics.nvfp4.quantize(x, rowwise, per_matrix=True)`.
    One read gives both maxima, also when only the transposed one follows a Hadamard transform.

    One read of x gives both results where `rowwise` is tensor-scaled 1×16, nearest, by the rule "amax", with its amax
    given or computed along with the other. Everything else about `rowwise` takes a second kernel, with its own read.

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
    columns = _empty(x.mT)
    if rowwise is not None and rowwise_amax is not None and _from_one_read(fmt, rowwise):
        rows = _empty(x)
        _launch(m, fmt, amax, columns, rng, first_block, rowwise, rowwise_amax, rows)
        return columns, rows
    _launch(m, fmt, amax, columns, rng, first_block)
    if rowwise is None:
        return columns, None
    rows = rows_first.quantize(
        x, rowwise, amax=rowwise_amax, per_matrix=True, rng=rowwise_rng, first_block=rowwise_first_block
    )
    return columns, rows


def fake_quantize(
    x: Tensor,
    fmt: NVFP4,
    *,
    unscaled: bool,
    amax: Tensor | None,
    rng: tuple[int, int] | Tensor | None,
    first_block: int,
) -> tuple[Tensor, Tensor]:
    """x (…, M, K), for which `supports` → as `fake_quantize.fake_quantize(x.mT, …, per_matrix=True)`.

    Fewest bytes, for bf16: 2 read and 2 written per element, and 2 more read where the amax must be computed.
    """
    m = as_matrices(x, True)
    amax = _maxima(m, fmt, False)[0] if amax is None else amax.contiguous()
    values = torch.empty(x.mT.shape, dtype=x.dtype, device=x.device)
    tensor_scale, out_amax = torch.empty((2, *x.shape[:-2]), dtype=torch.float32, device=x.device)
    out = values, values.view(torch.uint8), tensor_scale, out_amax  # the second is not written
    _launch(m, fmt, amax, out, rng, first_block, mode="exact" if unscaled else "decoded")
    return values, tensor_scale


def _from_one_read(fmt: NVFP4, rowwise: NVFP4) -> bool:
    plain = rowwise.block == (1, 16) and rowwise.scaling == "tensor" and rowwise.rounding == "nearest"
    return plain and rowwise.scale_rule == "amax" and fmt.scale_rule == "amax"


def _launch(
    m: Matrices,
    fmt: NVFP4,
    amax: Tensor,
    out: Quantized,
    rng: tuple[int, int] | Tensor | None,
    first_block: int,
    rowwise: NVFP4 | None = None,
    row_amax: Tensor | None = None,
    rows: Quantized | None = None,
    mode: str = "packed",
) -> None:
    words, seed, offset = rows_first.random_arguments(rng, amax)
    row_amax, rows = amax if row_amax is None else row_amax, out if rows is None else rows
    tile_rows, tile_columns = ALONE if rowwise is None else TOGETHER
    launch(
        _quantize, (cdiv(m.columns, tile_columns), cdiv(m.rows, tile_rows), m.matrices),
        (m.x, out[0], out[1], amax, out[2], out[3], rows[0], rows[1], row_amax, rows[2], rows[3], words),
        (m.rows, m.columns, int(amax.numel() > 1), int(row_amax.numel() > 1)),
        (seed, offset, first_block),
        ROWS=tile_rows, COLUMNS=tile_columns, BB=BLOCKS, EVEN=m.rows % tile_rows == 0 and m.columns % tile_columns == 0,
        KIND=m.kind, OUT=mode, F=fmt, R=rowwise, WORDS=words is rng, NATIVE=_target.native_level(m.x.device),
    )  # fmt: skip


def _maxima(m: Matrices, fmt: NVFP4, share: bool) -> tuple[Tensor, Tensor]:
    """A of the transposed matrices in fmt, and, where share, of the matrices as they are; (P,) each."""
    if not fmt.hadamard:
        result = compute_amax(m, fmt)
        return result, result
    bits = torch.zeros((2, m.matrices), dtype=torch.float32, device=m.x.device)
    rows, columns = ALONE
    launch(
        _amax, (cdiv(m.columns, columns), cdiv(m.rows, rows), m.matrices),
        (m.x, bits[0].view(torch.int32), bits[1].view(torch.int32)), (m.rows, m.columns),
        ROWS=rows, COLUMNS=columns, BOTH=share, EVEN=m.rows % rows == 0 and m.columns % columns == 0, KIND=m.kind,
        NATIVE=_target.native_level(m.x.device),
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
