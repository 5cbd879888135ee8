"""Weights that others quantized: FP8 and FP4 elements under scales of their blocks, decoded to float32."""

import torch
from torch import Tensor

from . import e2m1, e8m0


def decode(elements: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """q · s, rounded once to float32.

    elements: (N, K) float8_e4m3fn, or (N, K/2) uint8 with two E2M1 codes per byte.
    scale: (⌈N/m⌉, ⌈K/n⌉) float32 of blocks of m×n elements; those at the lower and the right edge may be partial.
    """
    values = e2m1.decode(e2m1.unpack(elements)) if elements.dtype == torch.uint8 else elements.float()
    for rows, height in _spans(values.shape[0], block[0]):
        for columns, width in _spans(values.shape[1], block[1]):
            part = values[rows, columns].unflatten(1, (-1, width)).unflatten(0, (-1, height))  # [R, m, C, n], a view
            of = scale[_blocks(rows, block[0]), _blocks(columns, block[1])]
            part.mul_(of[:, None, :, None])
    return values


def decode_scale(scale: Tensor) -> Tensor:
    """Stored scales as float32: uint8 and float8_e8m0fnu are biased exponents, 255 is NaN; others are values."""
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return e8m0.decode(scale.view(torch.uint8))
    return scale.float()


def _spans(length: int, size: int) -> list[tuple[slice, int]]:
    """The whole blocks of a dimension, and the rest, each with the size of its blocks."""
    whole = length // size * size
    spans = [(slice(0, whole), size), (slice(whole, length), length - whole)]
    return [(span, width) for span, width in spans if span.stop > span.start]


def _blocks(span: slice, size: int) -> slice:
    return slice(span.start // size, -(-span.stop // size))
