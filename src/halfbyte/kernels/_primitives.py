"""The only jit functions that round, pack or unpack; every kernel is made of these.

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
from ._ptx import e2m1_conversion_ptx, e2m1_ptx


def jit(fn: Callable[..., Any]) -> Any:
    """`triton.jit`, typed: triton ships no annotations."""
    return triton.jit(fn)


def jit_varying(*names: str) -> Callable[[Callable[..., Any]], Any]:
    """`jit` with parameters by whose values nothing is specialised: they change from call to call."""
    return lambda fn: triton.jit(fn, do_not_specialize=names)


FLT_MAX = tl.constexpr(_FLT_MAX)
SIXTH = tl.constexpr(0.1666666716337204)  # 1/6 in float32
M = tl.constexpr(8388608.0)  # 2^23: adding it rounds to an integer, which is then in the low bits


# ---------------------------------------------------------------------------------------------------- load and store
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


# ------------------------------------------------------------------------------------------------------------ scales
@jit
def minimum(a, b):
    """The smaller; NaN wins."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@jit
def tensor_scales(amax, E: tl.constexpr, NATIVE: tl.constexpr):
    """(S_enc, S_dec) of an amax."""
    raw = minimum(tl.div_rn(6.0 * E, amax), FLT_MAX)
    encode_scale = tl.where((amax == 0) | (raw == 0), 1.0, raw)
    return encode_scale, reciprocal(encode_scale, NATIVE)


@jit
def power_of_two_floor(a, LEAST: tl.constexpr):
    """2^floor(log2 a) of non-negative a, at least LEAST (a power of two); infinity for NaN and infinity."""
    power = (a.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.maximum(power, LEAST)


@jit
def e4m3_round(v):
    """Non-negative v → the nearest E4M3 value, saturating at 448, as float32; NaN → NaN.

    Adding 2^20 times v's binade leaves 3 mantissa bits, rounded to nearest even; below 2^-6 the step stays 2^-9.
    """
    v = minimum(v, 448.0)
    magic = power_of_two_floor(v, 0.015625) * 1048576.0
    return (v + magic) - magic


@jit
def e4m3_round_two(a, b, NATIVE: tl.constexpr):
    """`e4m3_round` of both."""
    if NATIVE >= 2:
        a, b = tl.inline_asm_elementwise(
            _E4M3_ROUND_PTX, "=r,=r,r,r", [a, b], dtype=(tl.float32, tl.float32), is_pure=True, pack=1
        )
    else:
        a, b = e4m3_round(a), e4m3_round(b)
    return a, b


_E4M3_ROUND_PTX = tl.constexpr("""{ .reg .b16 w, a, b; .reg .b32 h;
cvt.rn.satfinite.e4m3x2.f32 w, $3, $2;
cvt.rn.f16x2.e4m3x2 h, w;
mov.b32 {a, b}, h;
cvt.f32.f16 $0, a;
cvt.f32.f16 $1, b; }""")


@jit
def e4m3_code(value):
    """Byte (as uint8) of a float32 that is an E4M3 value ≥ 0; NaN → 0x7F.

    2^-120 moves E4M3's exponent range onto float32's, subnormals onto subnormals.
    """
    code = (value * 7.52316384526264e-37).to(tl.int32, bitcast=True) >> 20
    return tl.where(value == value, code, 0x7F).to(tl.uint8)


@jit
def e4m3_element_code(v):
    """Byte of float32 v rounded to E4M3, saturating, sign kept (-0 too); v is not NaN."""
    bits = v.to(tl.int32, bitcast=True)
    return e4m3_code(e4m3_round(tl.abs(v))) | ((bits >> 24) & 0x80).to(tl.uint8)


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
def sixth(x, NATIVE: tl.constexpr):
    """x/6 of finite float32 x ≥ 2^-123 or 0, rounded to nearest even."""
    if NATIVE:
        quotient = x * SIXTH
        result = tl.fma(tl.fma(quotient, -6.0, x), SIXTH, quotient)
    else:
        result = tl.div_rn(x, 6.0)
    return result


@jit
def element_scale(scale, decode_scale, NATIVE: tl.constexpr):
    """e = min(1 / (s · S_dec), FLT_MAX)."""
    return minimum(reciprocal(scale * decode_scale, NATIVE), FLT_MAX)


@jit
def e4m3_value(code):
    """float32 of E4M3 bytes, sign and NaN included."""
    code = code.to(tl.int32)
    bits = ((code & 0x80) << 24) | ((code & 0x7F) << 20)
    value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    return tl.where((code & 0x7F) == 0x7F, float("nan"), value)


@jit
def e8m0_code(v):
    """Non-negative float32 rounded up to a power of two: biased exponents, int32; NaN → 255, infinity → 254."""
    bits = v.to(tl.int32, bitcast=True)
    exponent = bits >> 23
    mantissa = bits & 0x7FFFFF
    up = (mantissa > 0) & ((exponent > 0) | (mantissa > 0x400000))
    return tl.where(v == v, tl.minimum(exponent + up.to(tl.int32), 254), 255)


@jit
def power_of_two(biased):
    """2^(biased - 127) as float32 for int32 biased 0..254; 0 stands for the subnormal 2^-127."""
    return tl.where(biased == 0, 0x400000, biased << 23).to(tl.float32, bitcast=True)


@jit
def e4m3_pair(lo, hi, NATIVE: tl.constexpr):
    """Two E4M3 bytes in an int16, lo in the lower; saturating, -0 kept."""
    if NATIVE >= 2:
        code = tl.inline_asm_elementwise(_E4M3_PTX, "=r,r,r,r,r", [lo, hi], dtype=tl.int16, is_pure=True, pack=2)
    else:
        code = e4m3_element_code(lo).to(tl.int16) | (e4m3_element_code(hi).to(tl.int16) << 8)
    return code


_E4M3_PTX = tl.constexpr("""{ .reg .b16 a, b;
cvt.rn.satfinite.e4m3x2.f32 a, $3, $1;
cvt.rn.satfinite.e4m3x2.f32 b, $4, $2;
mov.b32 $0, {a, b}; }""")


@jit
def e4m3_pair_values(words, NATIVE: tl.constexpr):
    """float32 of the two E4M3 bytes of int16 words, the lower first; anything with NaN's sign for NaN."""
    if NATIVE >= 2:
        lo, hi = tl.inline_asm_elementwise(
            _E4M3_VALUE_PTX, "=r,=r,r", [words.to(tl.int32)], dtype=(tl.float32, tl.float32), is_pure=True, pack=1
        )
    else:
        lo = e4m3_value(words & 0xFF)
        hi = e4m3_value((words >> 8) & 0xFF)
    return lo, hi


_E4M3_VALUE_PTX = tl.constexpr("""{ .reg .b16 w, a, b; .reg .b32 h;
cvt.u16.u32 w, $2;
cvt.rn.f16x2.e4m3x2 h, w;
mov.b32 {a, b}, h;
cvt.f32.f16 $0, a;
cvt.f32.f16 $1, b; }""")


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


# ---------------------------------------------------------------------------------------------------------- elements
@jit
def e2m1_values(packed):
    """The two values of a packed byte as float32: the even column, then the odd."""
    byte = packed.to(tl.int32)
    return e2m1_code_value(byte), e2m1_code_value(byte >> 4)


@jit
def e2m1_code_value(code):
    """The value of E2M1 codes (int32; higher bits are ignored) as float32; code 8 is -0.0."""
    bits = ((code & 8) << 28) | ((code & 7) << 22)  # E2M1's exponents, as float32's lowest
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126


@jit
def e2m1_code(y):
    """E2M1 code (int32) of float32 y, nearest even; NaN → 0; the sign bit where y < 0."""
    a = tl.abs(y)
    rounded = tl.minimum(tl.minimum(2.0 * a + M, a + (2.0 + M)), tl.minimum(0.5 * a + (4.0 + M), 7.0 + M))
    code = rounded.to(tl.int32, bitcast=True) & 7
    code = tl.where(y == y, code, 0)
    return tl.where(y < 0, code | 8, code)


@jit
def e2m1_pair(lo, hi, scale, SAFE: tl.constexpr, NATIVE: tl.constexpr):
    """Packed byte (uint8) of E2M1(lo · scale), E2M1(hi · scale); scale broadcasts.

    SAFE: no product of a non-zero element underflows to zero when halved, which saves an instruction per element.
    """
    lo, scale = tl.broadcast(lo, scale)
    if NATIVE >= 3:
        packed = tl.inline_asm_elementwise(
            E2M1_CONVERSION_SAFE_PTX if SAFE else E2M1_CONVERSION_PTX, "=r,r,r,r,r,r,r,r,r,r,r,r,r", [lo, hi, scale],
            dtype=tl.uint8, is_pure=True, pack=4,
        )  # fmt: skip
    elif NATIVE and SAFE:
        packed = tl.inline_asm_elementwise(
            E2M1_SAFE_PTX, "=r,r,r,r,r,r,r,r,r,r,r,r,r", [lo, hi, 0.5 * scale], dtype=tl.uint8, is_pure=True, pack=4
        )
    elif NATIVE:
        packed = tl.inline_asm_elementwise(
            E2M1_PTX, "=r,r,r,r,r,r,r,r,r,r,r,r,r", [lo, hi, scale], dtype=tl.uint8, is_pure=True, pack=4
        )
    else:
        packed = (e2m1_code(lo * scale) | (e2m1_code(hi * scale) << 4)).to(tl.uint8)
    return packed


@jit
def e2m1_value(a):
    """The E2M1 value nearest to a ≥ 0 (ties to even), as float32; anything for NaN."""
    a = tl.minimum(a, 6.0)
    power = power_of_two_floor(a, 1.0)
    return tl.fma(power, -4194304.0, tl.fma(power, 4194304.0, a))  # both products are exact


@jit
def _uniform(words):
    """The halves of a 32-bit random word as float32 in (0, 1), low half first; exact."""
    low = ((words & 0xFFFF).to(tl.float32) + 0.5) * 1.52587890625e-05
    high = ((words >> 16).to(tl.float32) + 0.5) * 1.52587890625e-05
    return low, high


@jit
def random_words(words_ptr, seed, offset, GIVEN: tl.constexpr):
    """(seed, offset), or where GIVEN what int64 (2,) at words_ptr holds by the time that the kernel runs."""
    if GIVEN:
        seed = tl.load(words_ptr)
        offset = tl.load(words_ptr + 1)
    return seed, offset


@jit
def philox_pairs(blocks, seed, offset):
    """Random float32 for the pairs of blocks with int64 numbers [...]: (low, high), each [..., 8]."""
    LEADING: tl.constexpr = blocks.shape
    counter = 2 * blocks.expand_dims(-1) + tl.arange(0, 2).to(tl.int64)  # [..., 2]
    zero = tl.zeros_like(counter)
    w0, w1, w2, w3 = tl.philox(
        seed, _low(counter), _low(counter >> 32), _low(zero + offset), _low((zero + offset) >> 32)
    )
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(LEADING + (8,))
    return _uniform(words)


@jit
def _low(x):
    return (x & 0xFFFFFFFF).to(tl.uint32)


@jit
def _e2m1_stochastic_code(y, u):
    a = tl.minimum(tl.abs(y), 6.0)
    position = tl.minimum(tl.minimum(2.0 * a, a + 2.0), 0.5 * a + 4.0)
    position = tl.where(y == y, tl.minimum(position + u, 7.0), 0.0)
    code = position.to(tl.int32)
    return tl.where(y < 0, code | 8, code)


@jit
def e2m1_stochastic_pair(lo, hi, scale, u_lo, u_hi):
    """Packed byte of the elements rounded up where the distance from the lower code plus u reaches 1."""
    low = _e2m1_stochastic_code(lo * scale, u_lo)
    return (low | (_e2m1_stochastic_code(hi * scale, u_hi) << 4)).to(tl.uint8)


E2M1_PTX = tl.constexpr(e2m1_ptx(safe=False))
E2M1_SAFE_PTX = tl.constexpr(e2m1_ptx(safe=True))
E2M1_CONVERSION_PTX = tl.constexpr(e2m1_conversion_ptx(safe=False))
E2M1_CONVERSION_SAFE_PTX = tl.constexpr(e2m1_conversion_ptx(safe=True))


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
