"""Scale rule `search` in Triton: the best E4M3 code of each block, by the bounds of `docs/search.md`.

Sixteen tensors x0 … x15 hold the columns of the blocks, so a thread owns whole blocks and every sum has the order of
the contract. `search` looks at all candidates in the contract's arithmetic; `near_search` ranks them first in five
instructions an element and leaves to `search` only the blocks whose two best are too close to tell.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton.language as tl

from ._curvature import LEAST as _LEAST
from ._e2m1 import e2m1_value
from ._primitives import FLT_MAX, element_scale, jit, reciprocal_near, split8

LEAST = tl.constexpr(_LEAST)
HUGE = tl.constexpr(0x7F000000)  # bits of 2^127


@jit
def columns_of(lo, hi):
    """[..., 8] pairs → sixteen tensors [...]."""
    x0, x2, x4, x6, x8, x10, x12, x14 = split8(lo)
    x1, x3, x5, x7, x9, x11, x13, x15 = split8(hi)
    return x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15


@jit
def sum_of_rows(total, F: tl.constexpr):
    """[A, 16, …] → [A, 1, …] by the contract's tree for 16×16; 1×16 stay."""
    if F.block[0] == 16:
        # A sum of two has one order: the tree is exact whatever the layout.
        A: tl.constexpr = total.shape[0]
        if len(total.shape) == 3:
            N: tl.constexpr = total.shape[2]
            total = tl.sum(total.reshape(A, 2, 8, N), 1)
            total = tl.sum(total.reshape(A, 2, 4, N), 1)
            total = tl.sum(total.reshape(A, 2, 2, N), 1)
        else:
            total = tl.sum(total.reshape(A, 2, 8), 1)
            total = tl.sum(total.reshape(A, 2, 4), 1)
            total = tl.sum(total.reshape(A, 2, 2), 1)
        total = tl.sum(total, 1).expand_dims(1)
    return total


@jit
def code_value(code):
    """float32 of E4M3 codes 0 … 126."""
    return (code << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120


@jit
def first_code(t):
    """The smallest code with 6·v ≥ t, from 1 on; 126 if there is none, 1 for NaN."""
    # Down to a code near t/6, then up: it is at most two away, and one below where t is subnormal in E4M3.
    scaled = tl.minimum(tl.maximum(t, 0.0), 2688.0) * 0.1666666
    code = tl.maximum(((scaled * 7.52316384526264e-37).to(tl.int32, bitcast=True) >> 20), 1)
    code += (6.0 * code_value(code) < t).to(tl.int32)
    code += (6.0 * code_value(code) < t).to(tl.int32)
    return tl.minimum(code, 126)


@jit
def codes(
    lo, hi, block_amax, encode_scale, decode_scale, w_lo, w_hi, h_ptr, mu_ptr,
    WEIGHTED: tl.constexpr, F: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Codes (int32, S) of blocks with these pairs; 0 for zeros and 0x7F where b · S_enc is NaN.

    block_amax: S, already of the 16×16 block where they are that. w_lo, w_hi: weights, with WEIGHTED, broadcasting
    against lo and hi. h_ptr, mu_ptr: for error="hessian", of the one column of blocks that the tile lies in.
    """
    largest = block_amax * encode_scale
    unknown = largest != largest
    going = (block_amax != 0) & (unknown == 0)
    x = columns_of(lo, hi)
    w = columns_of(w_lo, w_hi) if WEIGHTED else x
    if F.block[0] == 1 and F.error != "hessian" and not WEIGHTED:
        code, other, close, open_ = near_search(x, block_amax, largest, encode_scale, going, F, NATIVE)
        if tl.max((close | open_).to(tl.int32)) > 0:
            code = tl.where(close, _better(x, code, other, encode_scale, decode_scale, F, NATIVE), code)
            if tl.max(open_.to(tl.int32)) > 0:
                exact = search(x, largest, encode_scale, decode_scale, open_, w, h_ptr, mu_ptr, WEIGHTED, F, NATIVE)
                code = tl.where(open_, exact, code)
    else:
        code = search(x, largest, encode_scale, decode_scale, going, w, h_ptr, mu_ptr, WEIGHTED, F, NATIVE)
    code = tl.where(block_amax == 0, 0, code)
    return tl.where(unknown, 0x7F, code)


# ------------------------------------------------------------------------------------------------------------- exactly
@jit
def search(
    x, largest, encode_scale, decode_scale, going, w, h_ptr, mu_ptr,
    WEIGHTED: tl.constexpr, F: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """The best code of each block in `going`, downwards; a tie goes to the later, smaller one."""
    if F.error == "hessian":  # where all codes are zero, every larger one is as good
        code = first_code(tl.abs(largest) * 24.1)
    else:
        code = tl.minimum(tl.maximum(first_code(largest) + 7, 15), 126)
    x, t = _targets(x, encode_scale, F)
    best = tl.full(code.shape, FLT_MAX, tl.float32)  # an infinite error never wins
    chosen = tl.full(code.shape, 1, tl.int32)
    step = 0
    while tl.max(going.to(tl.int32)) > 0:
        value = code_value(tl.maximum(code, 1))
        if step > 7:
            going = going & (_clipped(t, value, w, mu_ptr, WEIGHTED, F) <= best)
        element = element_scale(value, decode_scale, NATIVE)
        if F.error == "hessian":
            total = _hessian_error(x, t, value, element, h_ptr)
        else:
            total = _error(x, t, value, tl.abs(element), w, WEIGHTED, F)
        total = sum_of_rows(total, F)
        better = going & (total <= best) & (total >= -FLT_MAX)
        best = tl.where(better, total, best)
        chosen = tl.where(better, code, chosen)
        code -= 1
        going = going & (code > 0)
        step += 1
    return chosen


@jit
def _better(x, code, other, encode_scale, decode_scale, F: tl.constexpr, NATIVE: tl.constexpr):
    """The better of two codes that are not 0, the smaller on a tie; their errors are finite."""
    x, t = _targets(x, encode_scale, F)
    low, high = tl.minimum(code, other), tl.maximum(code, other)
    low_value, high_value = code_value(low), code_value(high)
    low_error = _error(x, t, low_value, tl.abs(element_scale(low_value, decode_scale, NATIVE)), x, False, F)
    high_error = _error(x, t, high_value, tl.abs(element_scale(high_value, decode_scale, NATIVE)), x, False, F)
    return tl.where(high_error < low_error, high, low)


@jit
def _targets(x, encode_scale, F: tl.constexpr):
    """(x, x · S_enc), magnitudes unless the error has mixed terms."""
    if F.error != "hessian":
        encode_scale = tl.abs(encode_scale)
    a = x
    t = x
    for i in tl.static_range(16):
        b = x[i] if F.error == "hessian" else tl.abs(x[i])
        a = a[:i] + (b,) + a[i + 1 :]
        t = t[:i] + (b * encode_scale,) + t[i + 1 :]
    return a, t


@jit
def _error(a, t, value, element, w, WEIGHTED: tl.constexpr, F: tl.constexpr):
    """Σ over the columns in order, of weighted |d| or d·d."""
    total = tl.zeros(t[0].shape, tl.float32)
    for i in tl.static_range(16):
        d = e2m1_value(a[i] * element) * value - t[i]  # the product is exact
        total += _term(d, w[i], WEIGHTED, F)
    return total


@jit
def _term(d, w, WEIGHTED: tl.constexpr, F: tl.constexpr):
    term = d * d if F.error == "mse" else tl.abs(d)
    if WEIGHTED:
        term = w * term
    return term


@jit
def _hessian_error(x, t, value, element, h_ptr):
    d = x
    for i in tl.static_range(16):
        y = x[i] * element
        q = e2m1_value(tl.abs(y))
        d = d[:i] + (tl.where(y < 0, -q, q) * value - t[i],) + d[i + 1 :]
    total = tl.zeros(t[0].shape, tl.float32)
    for i in tl.static_range(16):
        row = tl.load(h_ptr + i * 17) * d[i]
        for j in tl.static_range(i + 1, 16):
            row += tl.load(h_ptr + (i * 16 + j)) * d[j]
        total += d[i] * row
    return total


@jit
def _clipped(t, value, w, mu_ptr, WEIGHTED: tl.constexpr, F: tl.constexpr):
    """What any scale up to this value costs at least, for its clipping alone."""
    total = tl.zeros(t[0].shape, tl.float32)
    for i in tl.static_range(16):
        d = tl.maximum(tl.abs(t[i]) - 6.0 * value, 0.0)
        if F.error == "hessian":
            total = tl.maximum(total, d * (d * tl.load(mu_ptr + i)))  # d · d may overflow where this does not
        else:
            total += _term(d, w[i], WEIGHTED, F)
    total = sum_of_rows(total, F)
    if F.error == "hessian":
        total = tl.where(total > LEAST, total, -FLT_MAX)
    return total


# ----------------------------------------------------------------------------------------------------- nearly, but fast
# Units: a block's targets times the power of two that brings v(c0) into [1/2, 1). There a candidate is
# n = (8 + m) / 16 · 2^k, its bits count up like codes, and y/2^126 has E2M1's subnormals where float32 has its own:
# adding a quarter of the mantissa's top bits and cutting the rest rounds to E2M1.


@jit
def near_search(x, block_amax, largest, encode_scale, going, F: tl.constexpr, NATIVE: tl.constexpr):
    """(code, second best code, close, open).

    close: one of the two is the best, but which must be found in the contract's arithmetic. open: it may be any, and
    `search` must find it.

    With u = 2^-24, a target τ and a candidate n, this y and the contract's are within 5uτ/n + u of the real quotient,
    so both |d| are within δ = 10uτ + 2un of the real distance, and no smaller. `_apart` takes it from there.
    """
    DOWN: tl.constexpr = 8 if F.error == "mse" else 16
    first = first_code(largest)
    exponent = first >> 3
    encode, largest = tl.broadcast(tl.abs(encode_scale), largest)
    # Codes below 8 are not like the others; and nothing here may over- or underflow, but targets that vanish.
    good = going & (first >= 8 + DOWN) & (encode > 2.168404344971009e-19) & (encode < 4.611686018427388e18)
    good = good & (largest <= 6.0 * 448.0)
    factor = encode * ((133 - exponent) << 23).to(tl.float32, bitcast=True)
    t = x
    for i in tl.static_range(16):
        t = t[:i] + (tl.abs(x[i]) * factor,) + t[i + 1 :]
    top = block_amax * factor
    base = (first & 7) << 20 | 0x3F000000  # bits of n(c0)
    best = tl.full(first.shape, HUGE, tl.int32)
    second = best
    third = best
    for j in tl.static_range(-1, 8):  # c0 - 1 clips less than E2M1's rounding beyond 6 would notice
        key = _key(_near_error(t, base + (j << 20), False, F, NATIVE), j + DOWN, 2 * DOWN)
        if j > 0:
            key = tl.where(first <= 126 - j, key, HUGE)
        best, second, third = _sorted(best, second, third, key)
    j = tl.full((), -2, tl.int32)
    more = good & _may_be_better(best, top, base + (j << 20), F)
    while tl.where(j >= -DOWN, tl.max(more.to(tl.int32)), 0) > 0:
        key = _key(_near_error(t, base + (j << 20), True, F, NATIVE), j + DOWN, 2 * DOWN)
        best, second, third = _sorted(best, second, third, key)
        j -= 1
        more = more & _may_be_better(best, top, base + (j << 20), F)
    close = good & (_apart(best, second.to(tl.float32, bitcast=True), top, F) == 0)
    open_ = close & (_apart(best, third.to(tl.float32, bitcast=True), top, F) == 0)
    open_ = going & (open_ | more | (good == 0))
    return first + (best & (2 * DOWN - 1)) - DOWN, first + (second & (2 * DOWN - 1)) - DOWN, close, open_


@jit
def _key(error, number, COUNT: tl.constexpr):
    """An error's bits, with the candidate's number of COUNT (16 or 32) as the last ones: at most 2^-18 of the error."""
    return (error.to(tl.int32, bitcast=True) & -COUNT) | number


@jit
def _sorted(best, second, third, key):
    """The three smallest of four, the first three being in order."""
    loser = tl.maximum(best, key)
    return tl.minimum(best, key), tl.minimum(second, loser), tl.minimum(third, tl.maximum(second, loser))


@jit
def _apart(best, b, top, F: tl.constexpr):
    """Whether error b is larger than that of key `best` for sure, also in the contract's arithmetic.

    mse: with E = b, √E of either is within ‖δ‖ ≤ 10u·4·top + 16un(c0) ≤ 44u·top of the real one, as top > 5n(c0),
    and within 20u√E by the roundings of the sum. So E − best > 2√E (88u·top + 40u√E) is enough, and 2^-17·E for the
    numbers in keys. mae: they are within Σδ ≤ 176u·top of the real ones, and within 20uE.
    """
    distance = b - best.to(tl.float32, bitcast=True)
    if F.error == "mse":
        distance = distance - b * 1.52587890625e-05  # 2^-16
        apart = (distance > 0) & (distance * distance > b * (top * top) * 1.1641532182693481e-10)  # (181u)²
    else:
        apart = distance > b * 1.52587890625e-05 + top * 2.288818359375e-05  # 384u
    return apart


@jit
def _may_be_better(best, top, bits, F: tl.constexpr):
    """Whether candidates from `bits` down may beat `best`, or come close, for all that clipping the maximum tells.

    Not if it costs E > best + 1 % and, so that 1 % is enough for `_apart`, E > 2^-19 top².
    """
    clip = tl.maximum(top - 6.0 * bits.to(tl.float32, bitcast=True), 0.0)
    if F.error == "mse":
        limit = tl.maximum(1.01 * best.to(tl.float32, bitcast=True), top * top * 1.9073486328125e-06)
        may = clip * clip <= limit
    else:
        may = clip <= tl.maximum(1.01 * best.to(tl.float32, bitcast=True), top * 0.00390625)
    return may


@jit
def _near_error(t, bits, CLIPS: tl.constexpr, F: tl.constexpr, NATIVE: tl.constexpr):
    n = bits.to(tl.float32, bitcast=True)
    up = n * 8.507059173023462e37  # 2^126
    down = reciprocal_near(n, NATIVE) * 1.1754943508222875e-38  # 2^-126
    total = tl.zeros(n.shape, tl.float32)
    for i in tl.static_range(16):
        y = t[i] * down
        if CLIPS:
            y = tl.minimum(y, 7.052966104933725e-38)  # 6 · 2^-126
        q = ((y.to(tl.int32, bitcast=True) + 0x200000) & -0x400000).to(tl.float32, bitcast=True)
        d = tl.fma(q, up, -t[i])
        if F.error == "mse":
            total = tl.fma(d, d, total)
        else:
            total += tl.abs(d)
    return total
