"""Waiting, inside a kernel, for what earlier programs of the same launch publish.

A program may wait for programs of a lower id only, and those never wait themselves. Every NVIDIA GPU starts programs in
the order of their ids, so that what is waited for runs, or has run, whatever the number of programs at a time; CUB's
decoupled look-back rests on the same order.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton.language as tl

from ._primitives import jit


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
    else:  # the interpreter runs programs one after the other
        tl.device_assert(tl.load(counter_ptr) >= wanted)


@jit
def _acquire(ptr):
    return tl.inline_asm_elementwise(
        "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [ptr], dtype=tl.int32, is_pure=False, pack=1
    )
