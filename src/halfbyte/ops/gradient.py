"""A gradient and its transpose, quantized with random words that are counted where the gradient is computed.

The state is a tensor, so that a compiled graph neither holds the count's value nor is compiled again when it changes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import NVFP4
from ..numerics.nvfp4 import Encoded
from . import custom
from .backends import backend, pick
from .checks import check_input

Words = tuple[int, int]


def new_state(seed: int) -> Tensor:
    """A state: int64 (2,) on the CPU, the seed's 64 bits and how often it was used."""
    return torch.tensor([seed - 2**64 if seed >= 2**63 else seed, 0], dtype=torch.int64, device="cpu")


def words(state: Tensor) -> tuple[Words, Words]:
    """(seed, offset) for the gradient and for its transpose, at the state's count."""
    seed, count = state.tolist()
    return (seed % 2**64, 2 * count), (seed % 2**64, 2 * count + 1)


def quantize_gradient(
    x: Tensor,
    fmt: NVFP4,
    transposed_fmt: NVFP4,
    state: Tensor,
    *,
    amax: Tensor | None = None,
    transposed_amax: Tensor | None = None,
) -> tuple[Encoded, Encoded]:
    """x (M, N) and x.mT, both sides multiples of 16, rounded stochastically; then the state's count grows by one.

    The same as `halfbyte.quantize_transpose` with the two of `words(state)`.
    """
    check_input(x, fmt)
    check_input(x.mT, transposed_fmt, "x.mT")
    x, name = x.detach(), pick("auto", x.device)
    if custom.wanted():
        spelled = custom.spell(fmt), custom.spell(transposed_fmt)
        parts = custom.quantize_gradient(x, amax, transposed_amax, *spelled, state, name)
    else:
        parts = run(x, fmt, transposed_fmt, state, amax=amax, transposed_amax=transposed_amax, impl=name)
    return Encoded(*parts[:4]), Encoded(*parts[4:])


def run(
    x: Tensor,
    fmt: NVFP4,
    transposed_fmt: NVFP4,
    state: Tensor,
    *,
    amax: Tensor | None,
    transposed_amax: Tensor | None,
    impl: str,
) -> list[Tensor]:
    """`quantize_gradient` without its checks: eight tensors."""
    rng, transposed_rng = words(state)
    rows, columns = backend(impl).quantize_transpose(
        x, fmt, transposed_fmt, amax=amax, transposed_amax=transposed_amax, rng=rng, transposed_rng=transposed_rng
    )
    state[1] += 1
    return [*rows, *columns]
