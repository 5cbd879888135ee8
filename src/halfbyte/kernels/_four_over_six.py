"""The rule `four_over_six`: the better of mapping a block's maximum to 6 or to 4. Shapes as in `_rules.py`.

The contract's error takes 13 instructions per element and candidate. An estimate takes 5, and decides wherever the two
errors are further apart than both can be wrong; where they are not (one block in 2,000 of bfloat16, most of them exact
ties), the program takes the contract's way.

**Estimate.** With σ = s·A/(6E), an element is y = x/σ steps of its candidate. y·2⁻¹²⁶ puts E2M1's subnormal on
float32's, so that adding half of the last kept bit and clearing those below rounds y to E2M1, sign and all; ties go up,
which changes no distance. |q - y| is then exact, and the sum of 16 nearly.

**Bound**, in u = 2⁻²⁴ and steps σ, per element where |y| < 7, so that |q - y| ≤ 1 and |q| ≤ 6. Nothing underflows, and
A is below 8 or scaled into [1, 2), so that e ≥ 3.4/8.

- e has four roundings: the contract's y is within 5u·|y| ≤ 36u of x/σ.
- e·2⁻¹²⁶ is subnormal where e < 1: 17u. The estimate's and the contract's product: 8u.
- (q·s·A)/6E - x: 13u. Together 74u, since the distance to the nearest value is no steeper than y.
- Sums of 16, in any order: 375u for both. The factor σ of the estimate has three roundings more: 64u.

16·74u + 439u = 1623u < 1e-4 for a candidate; 16×16: 256·74u + 11,900u < 2e-3. For mse the estimate is q·σ - x, whose
q can be the other neighbour within 45u of a tie: 128u for an element, twice that for its square, 4513u < 2.75e-4 for
16; 16×16: 5.5e-3.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton.language as tl

from ._e2m1 import e2m1_value
from ._fp8 import e4m3_round, e4m3_round_two
from ._primitives import (
    FLT_MAX,
    element_scale,
    jit,
    minimum,
    normal_reciprocal,
    power_of_two_floor,
    reciprocal,
    sixth,
    split8,
)
from ._search import sum_of_rows

LEAST_NORMAL = tl.constexpr(1.1754943508222875e-38)  # 2^-126
ITS_INVERSE = tl.constexpr(8.507059173023462e37)


@jit
def four_over_six(lo, hi, valid, block_amax, encode_scale, decode_scale, amax, F: tl.constexpr, NATIVE: tl.constexpr):
    """(scale, element scale), S."""
    if F.error_arithmetic == "exact" and len(amax.shape) == 0:
        LIMIT: tl.constexpr = 1e30 if F.error == "mae" else 1e12  # inside, no error or square under- or overflows
        if (amax > 1 / LIMIT) & (amax < LIMIT):
            scale, element = _in_range(lo, hi, valid, block_amax, encode_scale, decode_scale, amax, F, NATIVE)
        else:
            scale, element = _anywhere(lo, hi, valid, block_amax, encode_scale, decode_scale, amax, F, NATIVE)
    else:
        scale, element = _anywhere(lo, hi, valid, block_amax, encode_scale, decode_scale, amax, F, NATIVE)
    return scale, element


@jit
def _anywhere(lo, hi, valid, block_amax, encode_scale, decode_scale, amax, F: tl.constexpr, NATIVE: tl.constexpr):
    base = tl.div_rn(block_amax, 6.0) * encode_scale
    scale6, scale4 = e4m3_round(base), e4m3_round(1.5 * base)
    element6, element4 = element_scale(scale6, decode_scale, NATIVE), element_scale(scale4, decode_scale, NATIVE)
    pick4 = _pick4(lo, hi, valid, scale6, element6, scale4, element4, encode_scale, amax, F, False)
    return tl.where(pick4, scale4, scale6), tl.where(pick4, element4, element6)


@jit
def _in_range(lo, hi, valid, block_amax, encode_scale, decode_scale, amax, F: tl.constexpr, NATIVE: tl.constexpr):
    # Where b/6 is not rounded right, b is so small that both scales are 0; capping an infinite b changes no scale.
    base = sixth(minimum(block_amax, FLT_MAX), NATIVE) * encode_scale
    scale6, scale4 = e4m3_round_two(base, 1.5 * base, NATIVE)
    step6, step4 = scale6 * decode_scale, scale4 * decode_scale
    element6, element4 = normal_reciprocal(step6, NATIVE), normal_reciprocal(step4, NATIVE)
    if (amax > 1e-12) & (amax < 8.0):
        pick4, certain = _estimate(lo, hi, block_amax, step6, element6, step4, element4, F)
    else:
        up = power_of_two_floor(amax, LEAST_NORMAL)
        down = reciprocal(up, NATIVE)
        pick4, certain = _estimate(
            lo * down, hi * down, block_amax * down, step6 * down, element6 * up, step4 * down, element4 * up, F
        )
    certain = certain | (scale6 == scale4)  # then the errors are equal too: zeros, and blocks beyond A
    if tl.min(certain.to(tl.int32)) == 0:
        element6 = tl.where(scale6 == 0, FLT_MAX, element6)  # here it is infinite, or NaN
        pick4 = _pick4(lo, hi, valid, scale6, element6, scale4, element4, encode_scale, amax, F, NATIVE > 0)
    scale = tl.where(pick4, scale4, scale6)
    return scale, tl.where(scale == 0, FLT_MAX, tl.where(pick4, element4, element6))


@jit
def _estimate(lo, hi, block_amax, step6, element6, step4, element4, F: tl.constexpr):
    """Whether 4 seems better, and whether that is certain; NaN and blocks that reach 7 steps are not."""
    element6, element4 = element6 * LEAST_NORMAL, element4 * LEAST_NORMAL
    more = _estimated_error(lo, hi, step4, element4, F) - _estimated_error(lo, hi, step6, element6, F)
    if F.error == "mae":
        bound = (1e-4 if F.block[0] == 1 else 2e-3) * (step6 + step4)
    else:
        bound = (2.75e-4 if F.block[0] == 1 else 5.5e-3) * (step6 * step6 + step4 * step4)
    return more < 0, (tl.abs(more) > bound) & (block_amax * element6 < 6.97 * LEAST_NORMAL)


@jit
def _estimated_error(lo, hi, step, element, F: tl.constexpr):
    step = step * ITS_INVERSE
    terms = _estimated_term(lo, step, element, F) + _estimated_term(hi, step, element, F)
    total = tl.sum(terms, len(lo.shape) - 1)
    if F.block[0] == 16:
        total = tl.sum(total, 1).expand_dims(1)
    return total * step if F.error == "mae" else total


@jit
def _estimated_term(x, step, element, F: tl.constexpr):
    y = x * element.expand_dims(-1)
    q = ((y.to(tl.int32, bitcast=True) + 0x200000) & -0x400000).to(tl.float32, bitcast=True)
    if F.error == "mae":
        term = tl.abs(q - y)
    else:
        d = tl.fma(q, step.expand_dims(-1), -x)
        term = d * d
    return term


@jit
def _pick4(lo, hi, valid, scale6, element6, scale4, element4, encode_scale, amax, F: tl.constexpr, FAST: tl.constexpr):
    error6 = block_error(lo, hi, valid, scale6, element6, encode_scale, amax, F, FAST)
    error4 = block_error(lo, hi, valid, scale4, element4, encode_scale, amax, F, FAST)
    return error4 < error6  # ties and NaN keep 6


@jit
def block_error(lo, hi, valid, scale, element, encode_scale, amax, F: tl.constexpr, FAST: tl.constexpr):
    """Error of each block, S: over elements 0..15 in order; over 16 rows as a tree."""
    t0, t2, t4, t6, t8, t10, t12, t14 = split8(_error_term(lo, scale, element, encode_scale, amax, F, FAST))
    t1, t3, t5, t7, t9, t11, t13, t15 = split8(_error_term(hi, scale, element, encode_scale, amax, F, FAST))
    total = ((((((((t0 + t1) + t2) + t3) + t4) + t5) + t6) + t7) + t8) + t9
    total = (((((total + t10) + t11) + t12) + t13) + t14) + t15  # [...] or [N, 16]
    if F.block[0] == 16:
        total = tl.where(valid, total, 0.0)
    return sum_of_rows(total, F)


@jit
def _error_term(x, scale, element, encode_scale, amax, F: tl.constexpr, FAST: tl.constexpr):
    """|d| or d·d of each element; the sign of x cancels."""
    a = tl.abs(x)
    product = e2m1_value(a * element.expand_dims(-1)) * scale.expand_dims(-1)  # exact
    if F.error_arithmetic == "exact":
        product = product * _last(amax)
        if FAST:  # one Newton step gives the correctly rounded quotient: checked for every mantissa and every E
            quotient = product * (1.0 / (6.0 * F.e4m3_max))
            quotient = tl.fma(tl.fma(-quotient, 6.0 * F.e4m3_max, product), 1.0 / (6.0 * F.e4m3_max), quotient)
        else:
            quotient = tl.div_rn(product, 6.0 * F.e4m3_max)
        d = quotient - a
    else:
        d = product - a * _last(encode_scale)
    return tl.abs(d) if F.error == "mae" else d * d


@jit
def _last(x):
    """A scalar as it is; a tensor with a last dimension of 1 appended."""
    if len(x.shape) > 0:
        x = x.expand_dims(-1)
    return x
