"""Philox4x32-10: counter-based random bits that do not depend on who computes them.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ROUNDS = 10


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int | Tensor, int | Tensor]
) -> tuple[Tensor, ...]:
    """Four 32-bit words (as int64 in 0..2^32-1) for each counter; counter words, and the key's, likewise."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # A product of two 32-bit words fills 64 bits: int64 wraps, but every bit of it is right.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniform_blocks(
    blocks: int, *, seed: int | Tensor, offset: int | Tensor, first_block: int, device: torch.device
) -> Tensor:
    """Random float32 in (0, 1) for consecutive blocks of 16 elements: (blocks, 16).

    seed, offset: 64 bits, as integers or as int64 tensors () on the device, whose values are not looked at.

    Key = seed; counter = (2B + j, offset) with B = first_block + the block's index, j = 0 for elements 0..7 and 1 for
    8..15; element i takes word (i mod 8)//2, its low half when i is even; u = (half + 0.5) / 65536.
    """
    index = 2 * (first_block + torch.arange(blocks, dtype=torch.int64, device=device))[:, None]
    index = index + torch.arange(2, device=device)  # [blocks, 2]
    counter = (
        index & _MASK,
        (index >> 32) & _MASK,
        torch.zeros_like(index) + (offset & _MASK),
        torch.zeros_like(index) + ((offset >> 32) & _MASK),
    )
    words = torch.stack(philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK)), dim=-1)  # [blocks, 2, 4]
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1)  # [blocks, 2, 4, 2]
    return ((halves.flatten(1).float() + 0.5) / 65536.0).float()  # exact: 17 significant bits
