"""Weights that others quantized, decoded by whichever implementation is fastest where they are."""

from __future__ import annotations

from torch import Tensor

from ..numerics import blocks as reference
from ..numerics.blocks import decode_scale as decode_scale
from .backends import Impl, pick


def decode(elements: Tensor, scale: Tensor, block: tuple[int, int], *, impl: Impl = "auto") -> Tensor:
    """q · s, rounded once to float32; see `halfbyte.numerics.blocks.decode`. On a GPU, torch's own operators do it."""
    if pick(impl, elements.device) == "cpu":
        from ..kernels.cpu import blocks

        return blocks.decode(elements, scale, block)
    return reference.decode(elements, scale, block)
