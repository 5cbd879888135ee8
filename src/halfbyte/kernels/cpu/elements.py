"""Every rounding of the CPU path, each written once: for a vector of sixteen, and for a scalar where one is rounded.

Constants are float32 objects: a Python float would make numba compute in double. Magnitudes are compared and rounded
as integers where that is exact: the bits of non-negative floats are ordered like the floats, NaN above infinity.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import overload

from ...formats import E4M3_MAX, FLT_MAX
from .compile import jit
from .vector import (
    bits,
    from_bits,
    gather,
    lane_signs,
    load,
    permuted_xor,
    store,
    to_float,
    to_int,
    where,
)

F32_MAX = np.float32(FLT_MAX)
MAGNITUDE = 0x7FFFFFFF
INFINITY_BITS = 0x7F800000

_ZERO, _HALF, _QUARTER, _TWO, _FOUR, _SIX, _SEVEN = (np.float32(v) for v in (0, 0.5, 0.25, 2, 4, 6, 7))

# --- 16-bit floats --------------------------------------------------------------------------------------------------

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
"""What an array holds: the last two lie in uint16."""

_HALF_REBIAS = np.float32(2.0**112)
_HALF_SMALLEST_NORMAL = 0x38800000  # 2^-14
_HALF_MAX_END = 0x477FF000  # 65520: from here on float16 rounds to infinity


@jit
def _from_half(h: Any) -> Any:
    """float16 bits → float32, exact, subnormals too: the exponent is moved by a multiplication."""
    magnitude = h & 0x7FFF
    value = bits(from_bits(magnitude << 13) * _HALF_REBIAS)
    value = where(magnitude > 0x7BFF, value | INFINITY_BITS, value)
    return from_bits(value | ((h & 0x8000) << 16))


@jit
def to_half(x: Any) -> Any:
    """float32 → float16 bits, nearest even; overflow → infinity."""
    b = bits(x)
    a = b & MAGNITUDE
    normal = ((a + (0xFFF + ((a >> 13) & 1))) >> 13) - (112 << 10)
    # Below 2^-14, adding 0.5 leaves just the bits that a float16 subnormal has, rounded.
    subnormal = bits(from_bits(a) + _HALF) - 0x3F000000
    code = where(a < _HALF_SMALLEST_NORMAL, subnormal, normal)
    code = where(a > _HALF_MAX_END - 1, 0x7C00, code)
    code = where(a > INFINITY_BITS, 0x7E00, code)
    return code | ((b >> 16) & 0x8000)


@jit
def to_bfloat16(x: Any) -> Any:
    """float32 → bfloat16 bits, nearest even."""
    b = bits(x)
    code = (b + (0x7FFF + ((b >> 16) & 1))) >> 16
    return where((b & MAGNITUDE) > INFINITY_BITS, 0x7FC0, code)


def load_floats(x: Any, start: int, kind: int) -> Any:
    """Sixteen elements of an array of the given kind, as float32."""
    raise NotImplementedError  # compiled code only


@overload(load_floats, jit_options={"forceinline": True})
def _load_floats(x: Any, start: Any, kind: Any) -> Any:
    def load_32_bits(x: Any, start: Any, kind: Any) -> Any:
        return load(x, start)

    def load_16_bits(x: Any, start: Any, kind: Any) -> Any:
        return _widened(load(x, start), kind)

    return load_32_bits if x.dtype.bitwidth == 32 else load_16_bits


def gather_floats(x: Any, start: int, step: int, kind: int) -> Any:
    """The same from x[start + i·step]."""
    raise NotImplementedError  # compiled code only


@overload(gather_floats, jit_options={"forceinline": True})
def _gather_floats(x: Any, start: Any, step: Any, kind: Any) -> Any:
    def gather_32_bits(x: Any, start: Any, step: Any, kind: Any) -> Any:
        return gather(x, start, step)

    def gather_16_bits(x: Any, start: Any, step: Any, kind: Any) -> Any:
        return _widened(gather(x, start, step), kind)

    return gather_32_bits if x.dtype.bitwidth == 32 else gather_16_bits


@jit
def _widened(raw: Any, kind: int) -> Any:
    return from_bits(raw << 16) if kind == BFLOAT16 else _from_half(raw)


def store_floats(out: Any, start: int, values: Any, kind: int) -> None:
    """Store sixteen float32 values in an array of the given kind, rounded once."""
    raise NotImplementedError  # compiled code only


@overload(store_floats, jit_options={"forceinline": True})
def _store_floats(out: Any, start: Any, values: Any, kind: Any) -> Any:
    def store_32_bits(out: Any, start: Any, values: Any, kind: Any) -> Any:
        store(out, start, values)

    def store_16_bits(out: Any, start: Any, values: Any, kind: Any) -> Any:
        store(out, start, to_bfloat16(values) if kind == BFLOAT16 else to_half(values))

    return store_32_bits if out.dtype.bitwidth == 32 else store_16_bits


# --- E2M1 -----------------------------------------------------------------------------------------------------------

_M = np.float32(2.0**23)  # from here to 2^24 floats are the integers: adding it rounds, and the low bits are the code
_M2, _M4, _M7 = _M + _TWO, _M + _FOUR, _M + _SEVEN


@jit
def _signed(code: Any, y: Any) -> Any:
    """Set the sign bit where y < 0; code 0 where y is NaN."""
    code = where(y < _ZERO, code | 8, code)
    return where((bits(y) & MAGNITUDE) > INFINITY_BITS, 0, code)


@jit
def e2m1(y: Any) -> Any:
    """float32 → E2M1 code, nearest even, saturating; each of the three sums is rounded once and the right one wins."""
    a = from_bits(bits(y) & MAGNITUDE)
    code = _minimum(_minimum(a * _TWO + _M, a + _M2), _minimum(a * _HALF + _M4, _M7))
    return _signed(bits(code) & 7, y)


@jit
def e2m1_stochastic(y: Any, half: Any) -> Any:
    """float32 and 16 random bits → one of the two neighbouring E2M1 codes, up with the probability of the distance."""
    a = from_bits(bits(y) & MAGNITUDE)
    position = _minimum(_minimum(a * _TWO, a + _TWO), a * _HALF + _FOUR)
    u = (to_float(half) + _HALF) * np.float32(2.0**-16)
    code = to_int(_minimum(_minimum(position, _SEVEN) + u, _SEVEN))  # not negative: truncating is floor
    return _signed(code, y)


@jit
def e2m1_value(code: Any) -> Any:
    """E2M1 code → float32; code 8 is -0.0."""
    magnitude = code & 7
    normal = from_bits((magnitude << 22) + (126 << 23))
    value = where(magnitude < 2, to_float(magnitude) * _HALF, normal)
    return from_bits(bits(value) | ((code & 8) << 28))


_BINADE, _ONE_BITS, _TO_ALIGN = 0x7F800000, 127 << 23, 22 << 23


@jit
def e2m1_magnitude(a: Any) -> Any:
    """float32 ≥ 0 → the E2M1 value that it rounds to; 6 for NaN."""
    a = _minimum(a, _SIX)
    binade = bits(a) & _BINADE
    align = from_bits(where(binade < _ONE_BITS, _ONE_BITS, binade) + _TO_ALIGN)  # here floats are as far apart as E2M1
    return (a + align) - align


@jit
def _minimum(a: Any, b: Any) -> Any:
    return where(a < b, a, b)


# --- E4M3 -----------------------------------------------------------------------------------------------------------

_E4M3_MAX_BITS = int(np.float32(E4M3_MAX).view(np.int32))
_E4M3_SMALLEST_NORMAL = 0x3C800000  # 2^-6
_E4M3_ALIGN = np.float32(2.0**14)  # here floats are 2^-9 apart, the spacing of E4M3's subnormals


@jit
def e4m3(x: Any) -> Any:
    """float32 → E4M3 byte, nearest even, saturating at ±448; NaN → 0x7F; -0.0 is kept."""
    b = bits(x)
    magnitude = b & MAGNITUDE
    a = where(magnitude > _E4M3_MAX_BITS, _E4M3_MAX_BITS, magnitude)
    normal = ((a + (0x7FFFF + ((a >> 20) & 1))) >> 20) - (120 << 3)
    subnormal = bits(from_bits(a) + _E4M3_ALIGN) - 0x46800000
    code = where(a < _E4M3_SMALLEST_NORMAL, subnormal, normal) | ((b >> 24) & 0x80)
    return where(magnitude > INFINITY_BITS, 0x7F, code)


@jit
def e4m3_value(code: Any) -> Any:
    """E4M3 byte → float32."""
    magnitude = code & 0x7F
    value = from_bits((magnitude << 20) + (120 << 23))
    value = where(magnitude < 8, to_float(magnitude) * np.float32(2.0**-9), value)
    value = where(magnitude > 0x7E, np.float32(np.nan), value)
    return from_bits(bits(value) | ((code & 0x80) << 24))


# --- E8M0 -----------------------------------------------------------------------------------------------------------


@jit
def e8m0_up(v: Any) -> Any:
    """Non-negative float32 → biased exponent of the next power of two; 0 → 0, inf → 254, NaN → 255."""
    b = bits(v)
    exponent, mantissa = b >> 23, b & 0x7FFFFF
    # 2^-127 is the subnormal with mantissa 0x400000; code 0 stands for it and for all below.
    code = where(b > 0x400000, where(mantissa > 0, exponent + 1, exponent), 0)
    code = where(code > 254, 254, code)
    return where(b > INFINITY_BITS, 255, code)


@jit
def power_of_two(biased: Any) -> Any:
    """Biased exponent 0..254 → 2^(biased - 127), the last of them, 0, a subnormal."""
    return from_bits(where(biased > 0, biased << 23, 0x400000))


# --- Hadamard -------------------------------------------------------------------------------------------------------

_HADAMARD_SIGNS = sum(1 << i for i, sign in enumerate("+++-+------+-+--") if sign == "-")


@jit
def hadamard(x: Any, kind: int) -> Any:
    """Sixteen floats · diag(signs) · H16 / 4, rounded to the kind that they came from.

    A butterfly of stride s: lanes with bit s clear become low + high, the others low - high, which is high with its
    sign flipped plus low.
    """
    y = _flipped(x, lane_signs(_HADAMARD_SIGNS))
    y = permuted_xor(y, 1) + _flipped(y, lane_signs(0xAAAA))
    y = permuted_xor(y, 2) + _flipped(y, lane_signs(0xCCCC))
    y = permuted_xor(y, 4) + _flipped(y, lane_signs(0xF0F0))
    y = permuted_xor(y, 8) + _flipped(y, lane_signs(0xFF00))
    y = y * _QUARTER
    if kind == BFLOAT16:
        return from_bits(to_bfloat16(y) << 16)
    if kind == FLOAT16:
        return _from_half(to_half(y))
    return y


@jit
def _flipped(x: Any, signs: Any) -> Any:
    return from_bits(bits(x) ^ signs)
