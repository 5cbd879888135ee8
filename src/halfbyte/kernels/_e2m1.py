"""E2M1, the type of NVFP4's elements: rounded to nearest or stochastically, packed, unpacked.

Pairs and `NATIVE` as in `_primitives.py`.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton.language as tl

from ._primitives import jit, power_of_two_floor
from ._ptx import e2m1_conversion_ptx, e2m1_ptx

M = tl.constexpr(8388608.0)  # 2^23: adding it rounds to an integer, which is then in the low bits
E2M1_PTX = tl.constexpr(e2m1_ptx(safe=False))
E2M1_SAFE_PTX = tl.constexpr(e2m1_ptx(safe=True))
E2M1_CONVERSION_PTX = tl.constexpr(e2m1_conversion_ptx(safe=False))
E2M1_CONVERSION_SAFE_PTX = tl.constexpr(e2m1_conversion_ptx(safe=True))


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
