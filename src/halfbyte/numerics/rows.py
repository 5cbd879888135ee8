"""Sums along one dimension in an order of additions that is written down, whatever the other dimensions hold."""

import torch
from torch import Tensor

SPAN = 4096


def row_sum(x: Tensor) -> Tensor:
    """x (…, n) float32 or float64 → (…): one rounding for each addition, in this order.

    x is filled up with zeros: to the next power of two, P, where n ≤ 4096, else to a multiple of P = 4096. Elements i,
    i + P, i + 2·P, … are added in this order; then elements i and i + P/2, of those i and i + P/4, and so on.
    """
    n = x.shape[-1]
    if n == 0:
        return x.new_zeros(x.shape[:-1])
    width = min(SPAN, 1 << (n - 1).bit_length())
    if n % width:
        x = torch.nn.functional.pad(x, (0, -n % width))
    parts: tuple[Tensor, ...] = x.unflatten(-1, (-1, width)).unbind(-2)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    while width > 1:
        width //= 2
        total = total[..., :width] + total[..., width:]
    return total[..., 0]
