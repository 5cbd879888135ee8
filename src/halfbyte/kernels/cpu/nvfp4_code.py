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
from .group import AMAX, DECODE, ELEMENT_SCALE, ENCODE, RANDOM, SCALE, TERMS, element_scales, sum_of_rows
from .philox import random_for_blocks, random_halves
from .search_code import HessianSearch, Search, best_scales, only_down
from .source import Source, read_across, read_down, row_start
from .vector import (
    bits,
    from_bits,
    int_lanes,
    item,
    load,
    load_nibbles,
    maximum_of,
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


Rule = Amax | Stochastic | FourOverSix | Search | HessianSearch


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


# --- sixteen blocks at a time: `group.py` says what lies where in g ---------------------------------------------------


@jit
def _maxima(g: Any, count: int, tile: bool) -> Any:
    """max |x| of each block, or of all of them; those beyond count become zeros."""
    for i in range(count, 16):
        store(g, i * 16, from_bits(int_lanes(0)))
    for i in range(16):
        put(g, SCALE + i, from_bits(maximum_of(bits(load(g, i * 16)) & MAGNITUDE)))
    if tile:
        return from_bits(int_lanes(maximum_of(bits(load(g, SCALE)))))
    return load(g, SCALE)


def block_scales(g: Any, maxima: Any, tile: bool, rule: Rule, block: int, across: bool) -> Any:
    """Scale bytes of sixteen blocks; of a tile the same in every lane. block: its column; the first of those across."""
    raise NotImplementedError  # compiled code only


@overload(block_scales, jit_options={"forceinline": True})
def _block_scales(g: Any, maxima: Any, tile: Any, rule: Any, block: Any, across: Any) -> Any:
    def by_amax(g: Any, maxima: Any, tile: Any, rule: Any, block: Any, across: Any) -> Any:
        return e4m3(maxima * (load(g, ENCODE) * _SIXTH))

    def four_over_six(g: Any, maxima: Any, tile: Any, rule: Any, block: Any, across: Any) -> Any:
        base = (maxima / _SIX) * load(g, ENCODE)
        scale, scale4 = e4m3(base), e4m3(base * _ONE_HALF_MORE)
        error, error4 = _errors(g, scale, tile, rule), _errors(g, scale4, tile, rule)
        return where(error4 < error, scale4, scale)

    def search(g: Any, maxima: Any, tile: Any, rule: Any, block: Any, across: Any) -> Any:
        return best_scales(g, maxima, tile, rule, block, across)

    if rule.instance_class in (Search, HessianSearch):
        return search
    return four_over_six if rule.instance_class is FourOverSix else by_amax


@jit_apart
def _errors(g: Any, scale: Any, tile: bool, rule: FourOverSix) -> Any:
    """Error of each block, or of the tile, for the given scale bytes."""
    store(g, SCALE, e4m3_value(scale))
    store(g, ELEMENT_SCALE, element_scales(g, e4m3_value(scale)))
    for i in range(16):
        x = load(g, i * 16)
        product = e2m1_value(e2m1(x * item(g, ELEMENT_SCALE + i))) * item(g, SCALE + i)
        if rule.fp16:
            d = product - x * item(g, ENCODE + i)  # the product is exact in fp16: nothing to round
        else:
            d = (product * item(g, AMAX + i)) / rule.six_e - x
        store(g, TERMS + i * 16, d * d if rule.squared else from_bits(bits(d) & MAGNITUDE))
    transpose(g, TERMS)
    total = load(g, TERMS)
    for i in range(1, 16):  # elements in order; lanes are blocks
        total = total + load(g, TERMS + i * 16)
    return sum_of_rows(total) if tile else total


def store_codes(g: Any, rule: Rule, packed: Any, first: int, step: int, count: int) -> None:
    """Codes of the elements by the scales in ELEMENT_SCALE; block i is block first + i·step of the output."""
    raise NotImplementedError  # compiled code only


@overload(store_codes, jit_options={"forceinline": True})
def _store_codes(g: Any, rule: Any, packed: Any, first: Any, step: Any, count: Any) -> Any:
    def nearest(g: Any, rule: Any, packed: Any, first: Any, step: Any, count: Any) -> Any:
        for i in range(count):
            y = load(g, i * 16) * item(g, ELEMENT_SCALE + i)
            store_nibbles(packed, (first + i * step) * 8, e2m1(y))

    def stochastic(g: Any, rule: Any, packed: Any, first: Any, step: Any, count: Any) -> Any:
        random_for_blocks(rule.first_block + first, step, rule.rng, g, RANDOM)
        for i in range(count):
            y = load(g, i * 16) * item(g, ELEMENT_SCALE + i)
            store_nibbles(packed, (first + i * step) * 8, e2m1_stochastic(y, random_halves(g, RANDOM + i)))

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
    down = tile or x.step != 1 or out.blocks < 8 or only_down(rule)
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
            put(g, AMAX + i, scales.amax[shared])
            put(g, ENCODE + i, scales.encode[shared])
            put(g, DECODE + i, scales.decode[shared])
        for b in range(block, block_end, 1 if down else 16):
            count, step = rows, out.blocks
            if down:
                read_down(x, row, b * 16, count, g)
            else:
                count, step = min(16, block_end - b), 1
                read_across(x, row, b * 16, 16, count, g)
            scale = block_scales(g, _maxima(g, count, tile), tile, rule, b, not down)
            store(g, ELEMENT_SCALE, element_scales(g, e4m3_value(scale)))
            first = row * out.blocks + b
            store_codes(g, rule, out.packed, first, step, count)
            if count == 16 and step == 1:
                store(out.block_scale, first, scale)
            else:
                store(g, SCALE, from_bits(scale))
                for i in range(count):
                    put(out.block_scale, first + i * step, bits(item(g, SCALE + i)))


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
