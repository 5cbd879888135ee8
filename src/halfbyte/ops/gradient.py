"""A gradient and its transpose, quantized with random words that are counted where the gradient is computed.

The words are a tensor that every use advances, as a generator's state on a GPU is: where it is on the gradient's device
nothing waits for its values, a compiled graph holds none of them, and a CUDA graph advances it with each replay, so
that a replay rounds by the words that an eager step would have had.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..formats import NVFP4
from ..numerics.nvfp4 import Encoded
from . import custom
from .backends import backend, pick
from .checks import check_input

Words = tuple[int, int]
Eight = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def new_state(seed: int, device: torch.device | str = "cpu") -> Tensor:
    """A state, int64 (2, 2): (seed, offset) of the next gradient, and of its transpose; 64 bits each."""
    signed = seed - 2**64 if seed >= 2**63 else seed
    return torch.tensor([[signed, 0], [signed, 1]], dtype=torch.int64, device=device)


def words(state: Tensor) -> tuple[Words, Words]:
    """The state's numbers."""
    (seed, offset), (_, transposed) = state.tolist()
    return (seed % 2**64, offset % 2**64), (seed % 2**64, transposed % 2**64)


def current(state: Tensor, x: Tensor) -> tuple[Tensor | Words, Tensor | Words]:
    """`rng` for x and for its transpose: parts of the state, or numbers where it is on another device than x.

    Raises:
        UnsupportedError: numbers would be captured in a CUDA graph.
    """
    if state.device == x.device:
        rng, transposed_rng = state.unbind(0)
        return rng, transposed_rng
    if x.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise UnsupportedError(
            f"the random words' state is on {state.device}, the gradient on {x.device}: a CUDA graph would replay the "
            "words that it was captured with. Run the step once before capturing it, which moves the state; a compiled "
            "model: call convert when it is on the GPU already"
        )
    return words(state)


def advance(state: Tensor) -> None:
    """To the next two words' offsets, in the order of the device's work."""
    state.select(1, 1).add_(2)


def quantize_gradient(
    x: Tensor,
    fmt: NVFP4,
    transposed_fmt: NVFP4,
    state: Tensor,
    *,
    amax: Tensor | None = None,
    transposed_amax: Tensor | None = None,
) -> tuple[Encoded, Encoded]:
    """x (M, N) and x.mT, both sides multiples of 16, rounded stochastically; then the state advances.

    The same as `halfbyte.quantize_transpose` with the two of `words(state)`.
    """
    check_input(x, fmt)
    check_input(x.mT, transposed_fmt, "x.mT")
    x, name = x.detach(), pick("auto", x.device)
    options = x, amax, transposed_amax, custom.spell(fmt), custom.spell(transposed_fmt), state, name
    parts = _operator(*options) if custom.wanted() else _run(*options)
    return Encoded(*parts[:4]), Encoded(*parts[4:])


def _run(
    x: Tensor,
    amax: Tensor | None,
    transposed_amax: Tensor | None,
    fmt: str,
    transposed_fmt: str,
    state: Tensor,
    impl: str,
) -> Eight:
    rng, transposed_rng = current(state, x)
    rows, columns = backend(impl).quantize_transpose(
        x, custom.read(fmt), custom.read(transposed_fmt), amax=amax, transposed_amax=transposed_amax,
        rng=rng, transposed_rng=transposed_rng,
    )  # fmt: skip
    advance(state)
    return *rows, *columns


@torch.library.custom_op("halfbyte::quantize_gradient", mutates_args=("state",))
def _operator(
    x: Tensor,
    amax: Tensor | None,
    transposed_amax: Tensor | None,
    fmt: str,
    transposed_fmt: str,
    state: Tensor,
    impl: str,
) -> Eight:
    """`quantize_gradient`, its eight tensors in a row: a list may not come from what mutates."""
    parts = _run(x, amax, transposed_amax, fmt, transposed_fmt, state, impl)
    return tuple(custom.apart(parts))  # type: ignore[return-value]


@_operator.register_fake
def _(x: Tensor, amax: Any, transposed_amax: Any, fmt: str, transposed_fmt: str, state: Any, impl: str) -> Eight:
    rows, columns = custom.empty(x, custom.read(fmt), True), custom.empty(x.mT, custom.read(transposed_fmt), True)
    return *rows, *columns
