"""Quantize many matrices, each with its own maximum, or a small one, in one launch that reads device memory about once.

Fewest bytes, for bf16: 2 read and 0.5625 written per element; the second read comes from the L2 cache, since a matrix
is quantized soon after its maximum is known. The floor is those bytes over the copy bandwidth.

Programs go by slots: slot s takes the maximum of matrix s, then quantizes matrix s - ahead, waiting for its maximum.
With one matrix ahead the programs that run at a time span several slots, and most of them wait; far ahead the matrix
has left the L2 cache. AHEAD bytes is what hundreds of tiles hold; the second read is the last one, and says so.
A tile's elements are on their way while it waits.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ..formats import NVFP4
from . import _target, amax, quantize
from ._launch import cdiv, launch
from ._philox import random_words
from ._primitives import jit, jit_varying
from ._tiles import Matrices
from ._waiting import maximum_words, publish_maximum

BLOCKS, AMAX_BLOCKS, AMAX_STEPS = 1024, 256, 8
AHEAD = 12 << 20


@jit
def amax_tile(
    x_ptr, p, tile, blocks, blocks_per_row,
    BB: tl.constexpr, STEPS: tl.constexpr, KIND: tl.constexpr, HADAMARD: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """The maximum over one tile of dense matrix p (int64), as a bit pattern."""
    start = tile * (BB * STEPS)
    if HADAMARD:
        bits = amax.block_amax_tiles(
            x_ptr, p, start, blocks, blocks_per_row, 0, 0, 1, BB, STEPS, True, KIND, True, NATIVE
        )
    else:
        bits = amax.flat_amax(x_ptr, p, start, blocks, BB, STEPS, KIND, NATIVE)
    return bits


@jit_varying("seed", "offset", "first_block")
def _quantize(
    x_ptr, out_ptr, scale_ptr, state_ptr, tensor_scale_ptr, amax_out_ptr, words_ptr, count, blocks, blocks_per_row,
    amax_tiles, tiles, ahead, amax_words, seed: tl.int64, offset: tl.int64, first_block: tl.int64,
    BB: tl.constexpr, EVEN: tl.constexpr, AMAX_BB: tl.constexpr, AMAX_STEPS: tl.constexpr, KIND: tl.constexpr,
    F: tl.constexpr, WORDS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    # state: [count, amax_words], see `publish_maximum`; all zero at first
    slot = tl.program_id(0) // (amax_tiles + tiles)
    tile = tl.program_id(0) % (amax_tiles + tiles)
    if tile < amax_tiles:
        if slot < count:
            bits = amax_tile(
                x_ptr, slot.to(tl.int64), tile, blocks, blocks_per_row,
                AMAX_BB, AMAX_STEPS, KIND, F.hadamard, NATIVE,
            )  # fmt: skip
            publish_maximum(state_ptr + slot * amax_words, bits, tile, amax_tiles)
    elif slot >= ahead:
        p = slot - ahead
        seed, offset = random_words(words_ptr, seed, offset, WORDS)
        quantize.quantize_tile(
            x_ptr, out_ptr, scale_ptr, state_ptr + p * amax_words, tensor_scale_ptr, amax_out_ptr,
            None, None, None, p.to(tl.int64), (tile - amax_tiles) * BB, blocks, blocks_per_row, 1, 0, 0, 0, 1,
            seed, offset, first_block, BB, EVEN, True, KIND, "packed", F, NATIVE, True, amax_tiles=amax_tiles,
        )  # fmt: skip


def tile_blocks(fmt: NVFP4) -> int:
    """Blocks of a quantization tile: many where they are cheap, so that few programs wait."""
    return BLOCKS if not fmt.hadamard and fmt.rounding == "nearest" else 128


def quantize_into(
    m: Matrices,
    fmt: NVFP4,
    out: tuple[Tensor, Tensor, Tensor, Tensor],
    rng: tuple[int, int] | Tensor | None,
    first_block: int,
) -> None:
    """A fill and one launch; see `quantize.quantize`. m is dense and not empty."""
    packed, scale, tensor_scale, amax_out = out
    bb = tile_blocks(fmt)
    blocks = m.rows * m.columns // 16
    amax_tiles, tiles = cdiv(blocks, AMAX_BLOCKS * AMAX_STEPS), cdiv(blocks, bb)
    amax_words = maximum_words(amax_tiles)
    state = torch.zeros(m.matrices * amax_words, dtype=torch.int32, device=m.x.device)
    ahead = min(m.matrices, cdiv(AHEAD, blocks * 16 * m.x.element_size()))
    words, seed, offset = quantize.random_arguments(rng, state)
    launch(
        _quantize, (m.matrices + ahead) * (amax_tiles + tiles),
        (m.x, packed, scale, state, tensor_scale, amax_out, words),
        (m.matrices, blocks, m.columns // 16, amax_tiles, tiles, ahead, amax_words), (seed, offset, first_block),
        BB=bb, EVEN=blocks % bb == 0, AMAX_BB=AMAX_BLOCKS, AMAX_STEPS=AMAX_STEPS, KIND=m.kind, F=fmt,
        WORDS=words is rng, NATIVE=_target.native_level(m.x.device),
    )  # fmt: skip
