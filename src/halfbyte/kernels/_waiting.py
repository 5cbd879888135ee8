"""Waiting, inside a kernel, for what earlier programs of the same launch publish.

A program may wait for programs of a lower id only, and those never wait themselves. Every NVIDIA GPU starts programs in
the order of their ids, so that what is waited for runs, or has run, whatever the number of programs at a time; CUB's
decoupled look-back rests on the same order.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton.language as tl

from ._primitives import jit

SLOTS = tl.constexpr(512)  # tiles of a maximum up to which each has a word of its own
_READY = tl.constexpr(-(1 << 31))  # the sign bit of a word that holds the bit pattern of a maximum


def maximum_words(tiles: int) -> int:
    """Words of zeros that `publish_maximum` and `wait_maximum` need for a maximum."""
    return tiles if tiles <= SLOTS.value else 2


@jit
def publish_maximum(words_ptr, bits, tile, tiles):
    """Tile's part of a maximum over tiles: the bit pattern of a float32 that is not negative, or NaN.

    Of few tiles each has a word, which is value and flag at once: one trip to memory for who writes it, one for who
    waits. Of many, whose words would be more to read than the elements, there are a maximum and a count.
    """
    if tiles <= SLOTS:
        tl.atomic_xchg(words_ptr + tile, bits | _READY, sem="relaxed")
    else:
        tl.atomic_max(words_ptr, bits, sem="relaxed")
        publish(words_ptr + 1)


@jit
def wait_maximum(words_ptr, tiles, NATIVE: tl.constexpr):
    """The maximum, float32, once all tiles are published; NaN wins."""
    if tiles <= SLOTS:
        bits = tl.full((), _READY, tl.int32)
        first = tl.zeros((), tl.int32)
        while first < tiles:
            part = _largest(words_ptr, first, tiles)
            if NATIVE:
                while part >= 0:
                    part = _largest(words_ptr, first, tiles)
            else:  # the interpreter runs programs one after the other
                tl.device_assert(part < 0)
            bits = tl.maximum(bits, part)
            first += 128
        bits = bits & 0x7FFFFFFF
    else:
        wait(words_ptr + 1, tiles, NATIVE)
        bits = tl.load(words_ptr)
    return bits.to(tl.float32, bitcast=True)


@jit
def _largest(words_ptr, first, tiles):
    """Of 128 words: not negative as long as one is 0, else the largest of their values, with the flag."""
    i = first + tl.arange(0, 128)
    return tl.max(tl.load(words_ptr + i, mask=i < tiles, other=_READY, volatile=True), 0)


@jit
def publish(counter_ptr):
    """Count one more finished program; its earlier writes become visible to whoever sees the count."""
    tl.atomic_add(counter_ptr, 1, sem="release")


@jit
def wait(counter_ptr, wanted, NATIVE: tl.constexpr):
    """Wait until `wanted` programs have published.

    Each thread acquires for itself: an atomic would do it for one thread, and take a barrier to tell the others.
    """
    if NATIVE:
        while _acquire(counter_ptr) < wanted:
            pass
    else:
        tl.device_assert(tl.load(counter_ptr) >= wanted)


@jit
def _acquire(ptr):
    return tl.inline_asm_elementwise(
        "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [ptr], dtype=tl.int32, is_pure=False, pack=1
    )
