"""The compiled part of NVFP4: amax, scale rules, codes and errors, and back."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba.extending import overload

from .compile import jit, jit_apart, kernel
from .elements import (
    F32_MAX,
    INFINITY_BITS,
    MAGNITUDE,
    e2m1,
    e2m1_stochastic,
    e2m1_value,
    e4m3,
    e4m3_value,
    hadamard,
    load_floats,
    store_floats,
)
from .philox import random_for_blocks, random_halves
from .source import Source, read_across, read_down, row_start
from .vector import (
    bits,
    from_bits,
    int_lanes,
    item,
    load,
    load_nibbles,
    maximum_of,
    permuted_xor,
    put,
    store,
    store_nibbles,
    transpose,
    where,
)

_ZERO, _ONE, _ONE_HALF_MORE, _SIX, _SIXTH = (np.float32(v) for v in (0, 1, 1.5, 6, 1 / 6))


class Scales(NamedTuple):
    """What a tensor (or matrix, or row) of index row // rows shares: float32 arrays, and how many rows share it."""

    amax: Any
    encode: Any
    decode: Any
    rows: int


class Amax(NamedTuple):
    """The rule `amax`, rounding to nearest. A rule's type picks its code, so that each compiles on its own."""

    six_e: Any  # 6·E, float32


class Stochastic(NamedTuple):
    """The rule `amax`, rounding stochastically."""

    six_e: Any
    rng: tuple[int, int, int, int]  # seed and offset, low word first
    first_block: int


class FourOverSix(NamedTuple):
    """The rule `four_over_six`."""

    six_e: Any
    fp16: bool
    squared: bool


Rule = Amax | Stochastic | FourOverSix


class Output(NamedTuple):
    """packed (rows · blocks · 8) and block_scale (rows · blocks), uint8; and blocks, their number in a row."""

    packed: Any
    block_scale: Any
    blocks: int


# --- maxima and tensor scales ---------------------------------------------------------------------------------------


@kernel
def row_maxima(x: Source, out: Any, g: Any, row: int, row_end: int, block: int, block_end: int) -> None:
    """out[row] = bits of each row's max |x| over the given blocks, int32; NaN wins, for its bits are the largest."""
    if x.step == 1:
        for r in range(row, row_end):
            start = row_start(x, r)
            best = int_lanes(0)
            for b in range(block, block_end):
                values = load_floats(x.data, start + b * 16, x.kind)
                if x.rotate:
                    values = hadamard(values, x.kind)
                a = bits(values) & MAGNITUDE
                best = where(a > best, a, best)
            out[r] = maximum_of(best)
        return
    for group in range(row, row_end, 16):
        count = min(16, row_end - group)
        for r in range(group, group + count):
            out[r] = 0
        for b in range(block, block_end):
            read_down(x, group, b * 16, count, g)
            for i in range(count):
                out[group + i] = max(out[group + i], maximum_of(bits(load(g, i * 16)) & MAGNITUDE))


@kernel
def tensor_scales(maxima: Any, scales: Scales, six_e: Any, first: int, end: int) -> None:
    """Row maxima, (column parts, rows) int32 → amax (no parts: it is given) → S_enc, S_dec; of indices first..end."""
    for i in range(first, end):
        if len(maxima):
            best = 0
            for r in range(i * scales.rows, (i + 1) * scales.rows):
                for part in range(len(maxima)):
                    best = max(best, maxima[part, r])
            scales.amax[i] = np.float32(np.nan) if best > INFINITY_BITS else from_bits(best)
        a = scales.amax[i]
        encode = six_e / a
        encode = where(encode > F32_MAX, F32_MAX, encode)
        if a == _ZERO or encode == _ZERO:
            encode = _ONE
        scales.encode[i], scales.decode[i] = encode, _ONE / encode


# --- sixteen blocks at a time ---------------------------------------------------------------------------------------
# Neighbours in a row, or one below the other. `g` is float32 memory that holds what is known of them: the elements of
# each, then lanes of one value a block; integers by their bits. Elements come first: `read_across` and `read_down`
# fill them.

_TERMS = 256  # errors of the elements, after the elements themselves
_RANDOM = 256  # in the same place: 128 random words, then 32 of counters
_AMAX, _ENCODE, _DECODE = 512, 528, 544  # of the tensor, matrix or row that a block belongs to
_ELEMENT_SCALE, _SCALE = 560, 576  # of the block
GROUP = 592  # floats


@jit
def _element_scales(g: Any, scale: Any) -> Any:
    e = _ONE / (e4m3_value(scale) * load(g, _DECODE))
    return where(e > F32_MAX, F32_MAX, e)


@jit
def _maxima(g: Any, count: int, tile: bool) -> Any:
    """max |x| of each block, or of all of them; those beyond count become zeros."""
    for i in range(count, 16):
        store(g, i * 16, from_bits(int_lanes(0)))
    for i in range(16):
        put(g, _SCALE + i, from_bits(maximum_of(bits(load(g, i * 16)) & MAGNITUDE)))
    if tile:
        return from_bits(int_lanes(maximum_of(bits(load(g, _SCALE)))))
    return load(g, _SCALE)


def block_scales(g: Any, maxima: Any, tile: bool, rule: Rule) -> Any:
    """Scale bytes of sixteen blocks; of a tile the same in every lane."""
    raise NotImplementedError  # compiled code only


@overload(block_scales, jit_options={"forceinline": True})
def _block_scales(g: Any, maxima: Any, tile: Any, rule: Any) -> Any:
    def by_amax(g: Any, maxima: Any, tile: Any, rule: Any) -> Any:
        return e4m3(maxima * (load(g, _ENCODE) * _SIXTH))

    def four_over_six(g: Any, maxima: Any, tile: Any, rule: Any) -> Any:
        base = (maxima / _SIX) * load(g, _ENCODE)
        scale, scale4 = e4m3(base), e4m3(base * _ONE_HALF_MORE)
        error, error4 = _errors(g, scale, tile, rule), _errors(g, scale4, tile, rule)
        return where(error4 < error, scale4, scale)

    return four_over_six if rule.instance_class is FourOverSix else by_amax


@jit_apart
def _errors(g: Any, scale: Any, tile: bool, rule: FourOverSix) -> Any:
    """Error of each block, or of the tile, for the given scale bytes."""
    store(g, _SCALE, e4m3_value(scale))
    store(g, _ELEMENT_SCALE, _element_scales(g, scale))
    for i in range(16):
        x = load(g, i * 16)
        product = e2m1_value(e2m1(x * item(g, _ELEMENT_SCALE + i))) * item(g, _SCALE + i)
        if rule.fp16:
            d = product - x * item(g, _ENCODE + i)  # the product is exact in fp16: nothing to round
        else:
            d = (product * item(g, _AMAX + i)) / rule.six_e - x
        store(g, _TERMS + i * 16, d * d if rule.squared else from_bits(bits(d) & MAGNITUDE))
    transpose(g, _TERMS)
    total = load(g, _TERMS)
    for i in range(1, 16):  # elements in order; lanes are blocks
        total = total + load(g, _TERMS + i * 16)
    if tile:  # lanes are rows: i with i + 8, then i + 4, i + 2, i + 1; the sum in every lane
        total = total + permuted_xor(total, 8)
        total = total + permuted_xor(total, 4)
        total = total + permuted_xor(total, 2)
        total = total + permuted_xor(total, 1)
    return total


def store_codes(g: Any, rule: Rule, packed: Any, first: int, step: int, count: int) -> None:
    """Codes of the elements by the scales in _ELEMENT_SCALE; block i is block first + i·step of the output."""
    raise NotImplementedError  # compiled code only


@overload(store_codes, jit_options={"forceinline": True})
def _store_codes(g: Any, rule: Any, packed: Any, first: Any, step: Any, count: Any) -> Any:
    def nearest(g: Any, rule: Any, packed: Any, first: Any, step: Any, count: Any) -> Any:
        for i in range(count):
            y = load(g, i * 16) * item(g, _ELEMENT_SCALE + i)
            store_nibbles(packed, (first + i * step) * 8, e2m1(y))

    def stochastic(g: Any, rule: Any, packed: Any, first: Any, step: Any, count: Any) -> Any:
        random_for_blocks(rule.first_block + first, step, rule.rng, g, _RANDOM)
        for i in range(count):
            y = load(g, i * 16) * item(g, _ELEMENT_SCALE + i)
            store_nibbles(packed, (first + i * step) * 8, e2m1_stochastic(y, random_halves(g, _RANDOM + i)))

    return stochastic if rule.instance_class is Stochastic else nearest


@kernel
def quantize(
    x: Source,
    scales: Scales,
    rule: Rule,
    out: Output,
    matrix_rows: int,
    g: Any,
    unit: int,
    unit_end: int,
    block: int,
    block_end: int,
) -> None:
    """Quantize some blocks of some rows, or of some tiles where the blocks are 16×16.

    matrix_rows: 0 for 1×16 blocks. Else tiles of 16 rows are numbered through all matrices of so many rows, and none
    crosses from one to the next.
    g: room for GROUP floats.
    """
    tile = matrix_rows > 0
    down = tile or x.step != 1 or out.blocks < 8
    tiles = (matrix_rows + 15) // 16
    while unit < unit_end:
        row, rows, units = unit, 1, 1
        if tile:
            row = unit // tiles * matrix_rows + unit % tiles * 16
            rows = min(16, (unit // tiles + 1) * matrix_rows - row)
        elif down:
            rows = units = min(16, unit_end - unit)
        unit += units
        for i in range(16):
            shared = (row + min(i, rows - 1)) // scales.rows
            put(g, _AMAX + i, scales.amax[shared])
            put(g, _ENCODE + i, scales.encode[shared])
            put(g, _DECODE + i, scales.decode[shared])
        for b in range(block, block_end, 1 if down else 16):
            count, step = rows, out.blocks
            if down:
                read_down(x, row, b * 16, count, g)
            else:
                count, step = min(16, block_end - b), 1
                read_across(x, row, b * 16, 16, count, g)
            scale = block_scales(g, _maxima(g, count, tile), tile, rule)
            store(g, _ELEMENT_SCALE, _element_scales(g, scale))
            first = row * out.blocks + b
            store_codes(g, rule, out.packed, first, step, count)
            if count == 16 and step == 1:
                store(out.block_scale, first, scale)
            else:
                store(g, _SCALE, from_bits(scale))
                for i in range(count):
                    put(out.block_scale, first + i * step, bits(item(g, _SCALE + i)))


# --- decode ---------------------------------------------------------------------------------------------------------


@kernel
def dequantize(
    packed: Any,
    block_scale: Any,
    decode: Any,
    rows_per_scale: int,
    blocks: int,
    kind: int,
    out: Any,
    row: int,
    row_end: int,
    block: int,
    block_end: int,
) -> None:
    """q · (f32(s) · S_dec), rounded once; out: (rows · blocks · 16) float32, or uint16 for a kind of 16 bits."""
    for r in range(row, row_end):
        tensor_scale = decode[r // rows_per_scale]
        for index in range(r * blocks + block, r * blocks + block_end):
            values = e2m1_value(load_nibbles(packed, index * 8)) * (e4m3_value(block_scale[index]) * tensor_scale)
            store_floats(out, index * 16, values, kind)
