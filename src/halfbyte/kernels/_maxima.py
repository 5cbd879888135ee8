"""Maxima of magnitudes where NaN wins, and two elements at a time where the words allow it."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton.language as tl

from ._primitives import jit, unpack_words


@jit
def _maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@jit
def _maximum_bfloat16x2(a, b):
    return tl.inline_asm_elementwise(_MAXIMUM_BF16, "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@jit
def _maximum_float16x2(a, b):
    return tl.inline_asm_elementwise(_MAXIMUM_F16, "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@jit
def _magnitude_bfloat16x2(a, b):  # the sign of the result means nothing
    return tl.inline_asm_elementwise(
        "max.NaN.xorsign.abs.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )


@jit
def _magnitude_float16x2(a, b):
    return tl.inline_asm_elementwise(
        "max.NaN.xorsign.abs.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )


_MAXIMUM_BF16 = tl.constexpr("{ .reg .b32 a, b; abs.bf16x2 a, $1; abs.bf16x2 b, $2; max.NaN.bf16x2 $0, a, b; }")
_MAXIMUM_F16 = tl.constexpr("{ .reg .b32 a, b; abs.f16x2 a, $1; abs.f16x2 b, $2; max.NaN.f16x2 $0, a, b; }")


@jit
def block_abs_max(words, lo, hi, KIND: tl.constexpr, PACKED: tl.constexpr, NATIVE: tl.constexpr):
    """max |x| of each block, over the last axis; NaN wins. PACKED: from the words, two elements at a time."""
    if PACKED and NATIVE >= 2 and KIND == 0:
        low, high = unpack_words(tl.reduce(words, len(lo.shape) - 1, _magnitude_bfloat16x2), KIND)
        result = _maximum(tl.abs(low), tl.abs(high))
    elif PACKED and NATIVE >= 2 and KIND == 1:
        low, high = unpack_words(tl.reduce(words, len(lo.shape) - 1, _magnitude_float16x2), KIND)
        result = _maximum(tl.abs(low), tl.abs(high))
    elif PACKED and NATIVE and KIND == 0:
        low, high = unpack_words(tl.reduce(words, len(lo.shape) - 1, _maximum_bfloat16x2), KIND)
        result = _maximum(tl.abs(low), tl.abs(high))
    elif PACKED and NATIVE and KIND == 1:
        low, high = unpack_words(tl.reduce(words, len(lo.shape) - 1, _maximum_float16x2), KIND)
        result = _maximum(tl.abs(low), tl.abs(high))
    else:
        result = reduce_max(_maximum(tl.abs(lo), tl.abs(hi)), len(lo.shape) - 1, NATIVE)
    return result


@jit
def halves_abs_max(even, odd, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """max |x| over the last axis of both, apart for the first and the second elements of the words; NaN wins."""
    axis: tl.constexpr = len(even.shape) - 1
    if NATIVE >= 2 and KIND == 0:
        both = _magnitude_bfloat16x2(
            tl.reduce(even, axis, _magnitude_bfloat16x2), tl.reduce(odd, axis, _magnitude_bfloat16x2)
        )
        low, high = unpack_words(both, KIND)
        low, high = tl.abs(low), tl.abs(high)
    elif NATIVE >= 2 and KIND == 1:
        both = _magnitude_float16x2(
            tl.reduce(even, axis, _magnitude_float16x2), tl.reduce(odd, axis, _magnitude_float16x2)
        )
        low, high = unpack_words(both, KIND)
        low, high = tl.abs(low), tl.abs(high)
    else:
        even_low, even_high = unpack_words(even, KIND)
        odd_low, odd_high = unpack_words(odd, KIND)
        low = reduce_max(_maximum(tl.abs(even_low), tl.abs(odd_low)), axis, NATIVE)
        high = reduce_max(_maximum(tl.abs(even_high), tl.abs(odd_high)), axis, NATIVE)
    return low, high


@jit
def running_abs_max(largest, words, lo, hi, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """Elementwise maximum so far, int32: packed magnitudes for 16-bit words, else bit patterns of float32."""
    if NATIVE >= 2 and KIND == 0:
        largest = _magnitude_bfloat16x2(largest, words)
    elif NATIVE >= 2 and KIND == 1:
        largest = _magnitude_float16x2(largest, words)
    else:
        largest = tl.maximum(largest, _maximum(tl.abs(lo), tl.abs(hi)).to(tl.int32, bitcast=True))
    return largest


@jit
def running_abs_max_bits(largest, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """Bit patterns of float32, whose integer order puts NaN above all, from `running_abs_max`."""
    if NATIVE >= 2 and KIND < 2:
        lo, hi = unpack_words(largest, KIND)
        largest = _maximum(tl.abs(lo), tl.abs(hi)).to(tl.int32, bitcast=True)
    return largest


@jit
def reduce_max(x, axis: tl.constexpr, NATIVE: tl.constexpr):
    """Maximum of non-negative float32 over an axis (None: over all); NaN wins."""
    if NATIVE:
        result = tl.reduce(x, axis, _maximum)
    else:  # the bit patterns of non-negative floats have their order, and NaN's lie above infinity's
        result = tl.max(x.to(tl.int32, bitcast=True), axis).to(tl.float32, bitcast=True)
    return result
