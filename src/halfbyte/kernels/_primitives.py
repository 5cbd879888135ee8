"""What is beneath the number types of `_e2m1`, `_fp8` and `_philox`: words of memory, exact arithmetic in float32.

Every jit function that rounds, packs or unpacks is in these four files, and in no other.

Layout. A block of 16 elements is 8 *pairs*: `lo` holds the even columns, `hi` the odd ones, both float32 [..., 8].
A pair of 16-bit elements is one 32-bit word of memory, and becomes one packed byte, so a thread that loads a block
(32 bytes) reduces it in registers and stores its 8 bytes; nothing crosses threads.

`NATIVE` is `_target.native_level`: 0 is portable arithmetic, 1 to 3 are inline PTX with the same bits.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from ..formats import FLT_MAX as _FLT_MAX


def jit(fn: Callable[..., Any]) -> Any:
    """`triton.jit`, typed: triton ships no annotations."""
    return triton.jit(fn)


def jit_varying(*names: str) -> Callable[[Callable[..., Any]], Any]:
    """`jit` with parameters by whose values nothing is specialised: they change from call to call."""
    return lambda fn: triton.jit(fn, do_not_specialize=names)


FLT_MAX = tl.constexpr(_FLT_MAX)
SIXTH = tl.constexpr(0.1666666716337204)  # 1/6 in float32


@jit
def unpack_words(words, KIND: tl.constexpr):
    """Two elements of a machine word as float32: the lower address, then the higher.

    KIND: 0 bfloat16 in int32, 1 float16 in int32, 2 float32 in int64.
    """
    if KIND == 0:
        lo = (words << 16).to(tl.float32, bitcast=True)
        hi = (words & -65536).to(tl.float32, bitcast=True)
    elif KIND == 1:
        lo = words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        hi = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        lo = words.to(tl.int32).to(tl.float32, bitcast=True)
        hi = (words >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return lo, hi


@jit
def as_float32(x, KIND: tl.constexpr):
    """Elements of the dtype of KIND as float32."""
    if KIND == 0:  # by bits: the interpreter's cast loses bfloat16's subnormals
        x = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@jit
def round_to_kind(x, KIND: tl.constexpr):
    """Finite float32 rounded to the input's dtype and back."""
    if KIND == 0:  # in integers: the interpreter's cast to bfloat16 is not exact
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    elif KIND == 1:
        x = x.to(tl.float16).to(tl.float32)
    return x


@jit
def words_of(lo, hi, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """The inverse of `unpack_words`: float32 pairs rounded to the dtype of KIND, as machine words."""
    if KIND == 2:
        low = lo.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        words = low | (hi.to(tl.int32, bitcast=True).to(tl.int64) << 32)
    elif KIND == 1:
        low = lo.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        words = low | (hi.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    elif NATIVE:
        words = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [lo, hi], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        low = tl.where(lo == lo, round_to_kind(lo, 0), lo).to(tl.int32, bitcast=True)
        high = tl.where(hi == hi, round_to_kind(hi, 0), hi).to(tl.int32, bitcast=True)
        words = ((low >> 16) & 0xFFFF) | (high & -65536)
    return words


@jit
def split8(x):
    """[..., 8] → eight tensors [...], in order; registers only where a thread owns the 8."""
    LEADING: tl.constexpr = x.shape[:-1]
    even, odd = tl.split(x.reshape(LEADING + (4, 2)))  # [..., 4]
    e0, e1 = tl.split(even.reshape(LEADING + (2, 2)))  # columns 0 4 | 2 6
    o0, o1 = tl.split(odd.reshape(LEADING + (2, 2)))  # 1 5 | 3 7
    x0, x4 = tl.split(e0)
    x2, x6 = tl.split(e1)
    x1, x5 = tl.split(o0)
    x3, x7 = tl.split(o1)
    return x0, x1, x2, x3, x4, x5, x6, x7


@jit
def join8(x0, x1, x2, x3, x4, x5, x6, x7):
    """The inverse of `split8`."""
    LEADING: tl.constexpr = x0.shape
    even = tl.join(tl.join(x0, x4), tl.join(x2, x6)).reshape(LEADING + (4,))
    odd = tl.join(tl.join(x1, x5), tl.join(x3, x7)).reshape(LEADING + (4,))
    return tl.join(even, odd).reshape(LEADING + (8,))


@jit
def minimum(a, b):
    """The smaller; NaN wins."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@jit
def power_of_two_floor(a, LEAST: tl.constexpr):
    """2^floor(log2 a) of non-negative a, at least LEAST (a power of two); infinity for NaN and infinity."""
    power = (a.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.maximum(power, LEAST)


@jit
def reciprocal(x, NATIVE: tl.constexpr):
    """1/x of a float32 tensor, rounded to nearest even."""
    if NATIVE:
        result = tl.inline_asm_elementwise("rcp.rn.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        result = tl.div_rn(1.0, x)
    return result


@jit
def normal_reciprocal(x, NATIVE: tl.constexpr):
    """1/x of a float32 tensor, rounded to nearest even, for normal x and 1/x; NaN or infinity for 0."""
    if NATIVE:
        near = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
        result = tl.fma(near, tl.fma(-x, near, 1.0), near)
    else:
        result = tl.div_rn(1.0, x)
    return result


@jit
def reciprocal_near(x, NATIVE: tl.constexpr):
    """1/x of a normal float32, within two units in the last place; for comparisons that allow for it."""
    if NATIVE:
        result = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        result = 1.0 / x
    return result


@jit
def sixth(x, NATIVE: tl.constexpr):
    """x/6 of finite float32 x ≥ 2^-123 or 0, rounded to nearest even."""
    if NATIVE:
        quotient = x * SIXTH
        result = tl.fma(tl.fma(quotient, -6.0, x), SIXTH, quotient)
    else:
        result = tl.div_rn(x, 6.0)
    return result


@jit
def tensor_scales(amax, E: tl.constexpr, NATIVE: tl.constexpr):
    """(S_enc, S_dec) of an amax."""
    raw = minimum(tl.div_rn(6.0 * E, amax), FLT_MAX)
    encode_scale = tl.where((amax == 0) | (raw == 0), 1.0, raw)
    return encode_scale, reciprocal(encode_scale, NATIVE)


@jit
def element_scale(scale, decode_scale, NATIVE: tl.constexpr):
    """e = min(1 / (s · S_dec), FLT_MAX)."""
    return minimum(reciprocal(scale * decode_scale, NATIVE), FLT_MAX)
