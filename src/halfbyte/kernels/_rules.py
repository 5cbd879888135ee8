"""From the pairs of a tile to its bytes and scales, for every NVFP4 format; shared by all quantizing kernels.

`F` is the format itself, as a compile-time constant. Tiles are pairs `lo`, `hi` of [..., 8] (1×16 blocks), or of
[N, 16, 8] where F.block is (16, 16); S below is [...], or [N, 1]. `encode_scale`, `decode_scale` and `amax` are
scalars or broadcast against S.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton.language as tl

from ._e2m1 import e2m1_pair, e2m1_stochastic_pair, e2m1_values
from ._four_over_six import four_over_six
from ._fp8 import e4m3_round
from ._maxima import reduce_max
from ._philox import philox_pairs
from ._primitives import (
    FLT_MAX,
    SIXTH,
    element_scale,
    jit,
    join8,
    minimum,
    round_to_kind,
    split8,
    unpack_words,
    words_of,
)
from ._search import code_value
from ._search import codes as search_codes

# e is at least S_enc/448, a non-zero 16-bit element at least 2^-133: above this S_enc, x·e/2 stays above 2^-149.
SAFE_ABOVE = tl.constexpr(0.015625)


@jit
def block_scales(
    lo, hi, block_amax, valid, encode_scale, decode_scale, amax, F: tl.constexpr, NATIVE: tl.constexpr
):  # fmt: skip
    """→ the block scales as float32 E4M3 values, and the element scales e; both S.

    block_amax: of each 1×16 block. valid: which rows exist, of lo's shape without the last dimension or broadcasting
    against it; their elements are zero otherwise.
    """
    if F.block[0] == 16:
        block_amax = reduce_max(block_amax, 1, NATIVE).expand_dims(1)  # [N, 1]
    if F.scale_rule == "amax":
        scale = e4m3_round(minimum(block_amax * (encode_scale * SIXTH), FLT_MAX))  # S
        element = element_scale(scale, decode_scale, NATIVE)  # S
    elif F.scale_rule == "search":  # with weights or Hessians: `search.py`
        code = search_codes(lo, hi, block_amax, encode_scale, decode_scale, lo, hi, None, None, False, F, NATIVE)
        scale = tl.where(code == 0x7F, float("nan"), code_value(code))
        element = element_scale(scale, decode_scale, NATIVE)
    else:
        scale, element = four_over_six(lo, hi, valid, block_amax, encode_scale, decode_scale, amax, F, NATIVE)
    return scale, element


@jit
def encode(
    lo, hi, element, number, seed, offset, F: tl.constexpr, NATIVE: tl.constexpr, SAFE: tl.constexpr = False
):  # fmt: skip
    """Packed bytes (uint8, lo's shape) of pairs; number: of each 1×16 block, int64, for stochastic rounding only.

    SAFE: see `e2m1_pair`, for rounding to nearest only.
    """
    if F.rounding == "stochastic":
        u_lo, u_hi = philox_pairs(number, seed, offset)
        packed = e2m1_stochastic_pair(lo, hi, element.expand_dims(-1), u_lo, u_hi)
    else:
        packed = e2m1_pair(lo, hi, element.expand_dims(-1), SAFE, NATIVE)
    return packed


@jit
def store_values(
    out_ptr, block, offsets, mask, packed, scale, decode_scale,
    OUT: tl.constexpr, KIND: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Store what the packed pairs decode to, in the dtype of KIND; the rest as in `store_elements`."""
    lo, hi = e2m1_values(packed)
    if OUT == "decoded":
        scale = scale * decode_scale
    words = words_of(lo * scale.expand_dims(-1), hi * scale.expand_dims(-1), KIND, NATIVE)
    if KIND == 2:
        tl.store((out_ptr + block * 16).to(tl.pointer_type(tl.int64)) + offsets, words, mask=mask)
    else:
        tl.store((out_ptr + block * 16).to(tl.pointer_type(tl.int32)) + offsets, words, mask=mask)


@jit
def store_elements(
    out_ptr, block, offsets, mask, lo, hi, scale, element, encode_scale, decode_scale, number, seed, offset,
    OUT: tl.constexpr, F: tl.constexpr, KIND: tl.constexpr, NATIVE: tl.constexpr, values_ptr=None,
):  # fmt: skip
    """Round the pairs and store them from 1×16 block `block` (scalar) of the output on, at the pairs' offsets.

    number: of each 1×16 block, int64, for stochastic rounding only. OUT: "packed" bytes, or elements of the input's
    dtype: the "decoded" value, or "exact", q·s without the tensor scale; or "both", bytes and exact values at
    values_ptr.
    """
    if OUT == "decoded" or OUT == "exact":
        packed = encode(lo, hi, element, number, seed, offset, F, NATIVE)
        store_values(out_ptr, block, offsets, mask, packed, scale, decode_scale, OUT, KIND, NATIVE)
    elif OUT == "packed" and NATIVE and KIND != 2 and F.rounding == "nearest" and len(encode_scale.shape) == 0:
        # Each branch stores: bytes that leave a branch would leave it in a register each.
        if encode_scale > SAFE_ABOVE:
            packed = e2m1_pair(lo, hi, element.expand_dims(-1), True, NATIVE)
            tl.store(out_ptr + block * 8 + offsets, packed, mask=mask)
        else:
            packed = e2m1_pair(lo, hi, element.expand_dims(-1), False, NATIVE)
            tl.store(out_ptr + block * 8 + offsets, packed, mask=mask)
    else:
        packed = encode(lo, hi, element, number, seed, offset, F, NATIVE)
        tl.store(out_ptr + block * 8 + offsets, packed, mask=mask)
        if OUT == "both":
            store_values(values_ptr, block, offsets, mask, packed, scale, decode_scale, OUT, KIND, NATIVE)


@jit
def _butterfly(a, b):
    return a + b, a - b


@jit
def _hadamard8(x0, x1, x2, x3, x4, x5, x6, x7):
    """Three butterflies, strides 1, 2, 4."""
    x0, x1 = _butterfly(x0, x1)
    x2, x3 = _butterfly(x2, x3)
    x4, x5 = _butterfly(x4, x5)
    x6, x7 = _butterfly(x6, x7)
    x0, x2 = _butterfly(x0, x2)
    x1, x3 = _butterfly(x1, x3)
    x4, x6 = _butterfly(x4, x6)
    x5, x7 = _butterfly(x5, x7)
    x0, x4 = _butterfly(x0, x4)
    x1, x5 = _butterfly(x1, x5)
    x2, x6 = _butterfly(x2, x6)
    x3, x7 = _butterfly(x3, x7)
    return x0, x1, x2, x3, x4, x5, x6, x7


@jit
def _transform(lo, hi):
    """The random Hadamard transform of [..., 8] pairs, before it is rounded."""
    l0, l1, l2, l3, l4, l5, l6, l7 = split8(lo)
    h0, h1, h2, h3, h4, h5, h6, h7 = split8(hi)
    # diag(SIGNS) = + + | + - | + - | - - | - - | - + | - + | - -
    l3, l4, l5, l6, l7 = -l3, -l4, -l5, -l6, -l7
    h1, h2, h3, h4, h7 = -h1, -h2, -h3, -h4, -h7
    l0, h0 = _butterfly(l0, h0)
    l1, h1 = _butterfly(l1, h1)
    l2, h2 = _butterfly(l2, h2)
    l3, h3 = _butterfly(l3, h3)
    l4, h4 = _butterfly(l4, h4)
    l5, h5 = _butterfly(l5, h5)
    l6, h6 = _butterfly(l6, h6)
    l7, h7 = _butterfly(l7, h7)
    l0, l1, l2, l3, l4, l5, l6, l7 = _hadamard8(l0, l1, l2, l3, l4, l5, l6, l7)
    h0, h1, h2, h3, h4, h5, h6, h7 = _hadamard8(h0, h1, h2, h3, h4, h5, h6, h7)
    lo = join8(l0, l1, l2, l3, l4, l5, l6, l7) * 0.25
    hi = join8(h0, h1, h2, h3, h4, h5, h6, h7) * 0.25
    return lo, hi


@jit
def hadamard(lo, hi, KIND: tl.constexpr):
    """The random Hadamard transform of [..., 8] pairs, rounded to the input's dtype."""
    lo, hi = _transform(lo, hi)
    return round_to_kind(lo, KIND), round_to_kind(hi, KIND)


@jit
def hadamard_words(lo, hi, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """As `hadamard`, by way of machine words: (words, lo, hi). The words make the blocks' maxima cheaper too."""
    lo, hi = _transform(lo, hi)
    words = words_of(lo, hi, KIND, NATIVE)
    lo, hi = unpack_words(words, KIND)
    return words, lo, hi
