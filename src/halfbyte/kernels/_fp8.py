"""E4M3 and E8M0, the types of block scales and of MXFP8's elements: rounded to, encoded, decoded.

`NATIVE` as in `_primitives.py`.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton.language as tl

from ._primitives import jit, minimum, power_of_two_floor


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
def e4m3_value(code):
    """float32 of E4M3 bytes, sign and NaN included."""
    code = code.to(tl.int32)
    bits = ((code & 0x80) << 24) | ((code & 0x7F) << 20)
    value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    return tl.where((code & 0x7F) == 0x7F, float("nan"), value)


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
