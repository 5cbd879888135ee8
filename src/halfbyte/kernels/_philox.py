"""The random words of stochastic rounding, as numbers between 0 and 1."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton.language as tl

from ._primitives import jit


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
def _uniform(words):
    """The halves of a 32-bit random word as float32 in (0, 1), low half first; exact."""
    low = ((words & 0xFFFF).to(tl.float32) + 0.5) * 1.52587890625e-05
    high = ((words >> 16).to(tl.float32) + 0.5) * 1.52587890625e-05
    return low, high


@jit
def _low(x):
    return (x & 0xFFFFFFFF).to(tl.uint32)
