"""Philox4x32-10, sixteen counters at a time."""

from __future__ import annotations

from typing import Any

from .compile import jit, jit_apart
from .vector import bits, from_bits, halves, int_lanes, item, load, multiply_high, put, store


@jit
def _four_words(low: Any, high: Any, rng: tuple[int, int, int, int], out: Any, start: int) -> None:
    """Word w of counter i goes to out[start + w·16 + i].

    low, high: words of the counter's first half; rng: key (seed) and second half (offset), low word first.
    """
    c0, c1, c2, c3 = low, high, int_lanes(rng[2]), int_lanes(rng[3])
    k0, k1 = rng[0], rng[1]
    for _ in range(10):
        high0, low0 = multiply_high(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = multiply_high(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    store(out, start, from_bits(c0))
    store(out, start + 16, from_bits(c1))
    store(out, start + 32, from_bits(c2))
    store(out, start + 48, from_bits(c3))


@jit_apart
def random_for_blocks(first: int, step: int, rng: tuple[int, int, int, int], out: Any, start: int) -> None:
    """Eight words for each of sixteen blocks, of indices first + i·step in the whole tensor, as bits of float32.

    Word w of block i goes to out[start + w·16 + i]; 32 more floats behind them are used.
    """
    for j in range(2):
        for i in range(16):
            index = 2 * (first + i * step) + j
            put(out, start + 128 + i, from_bits(index))
            put(out, start + 144 + i, from_bits(index >> 32))
        low, high = bits(load(out, start + 128)), bits(load(out, start + 144))
        _four_words(low, high, rng, out, start + j * 64)


@jit
def random_halves(words: Any, start: int) -> Any:
    """The sixteen 16-bit lanes of the block whose first word lies at words[start]."""
    return halves(
        (
            bits(item(words, start)),
            bits(item(words, start + 16)),
            bits(item(words, start + 32)),
            bits(item(words, start + 48)),
            bits(item(words, start + 64)),
            bits(item(words, start + 80)),
            bits(item(words, start + 96)),
            bits(item(words, start + 112)),
        )
    )
