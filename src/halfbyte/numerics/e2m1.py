"""E2M1, the 4-bit element: rounding, decoding and packing two to a byte."""

import torch
from torch import Tensor

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitude of codes 0..7; bit 3 of a code is the sign."""

# Upper end of each code's interval. A tie belongs to the even code, so 1, 3 and 5 do not own their ends.
_BOUNDARIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_TIE_GOES_DOWN = (True, False, True, False, True, False, True)


def encode(y: Tensor) -> Tensor:
    """Round float32 values to the nearest E2M1 code, ties to the even code, saturating at ±6.

    Returns uint8 codes of y's shape. NaN → 0. The sign bit is set where y < 0, so -0.0 → 0 and a negative that
    underflows → 8.
    """
    a = y.abs()
    code = torch.zeros_like(y, dtype=torch.uint8)
    for boundary, tie_goes_down in zip(_BOUNDARIES, _TIE_GOES_DOWN, strict=True):
        code += (a > boundary) if tie_goes_down else (a >= boundary)
    return with_sign(code, y)


def encode_stochastic(y: Tensor, u: Tensor) -> Tensor:
    """Round float32 |y| ≤ 6 to one of the two neighbouring codes, up with the probability of the distance.

    u: float32 in (0, 1), of y's shape. Returns uint8 codes. NaN → 0.
    """
    a = y.abs().clamp(max=6.0)
    position = torch.minimum(torch.minimum(2.0 * a, a + 2.0), a / 2.0 + 4.0)  # code as a continuous function of |y|
    code = torch.floor(position + u).clamp(max=7.0)
    return with_sign(code.nan_to_num(nan=0.0).to(torch.uint8), y)


def with_sign(magnitude_code: Tensor, y: Tensor) -> Tensor:
    """Set bit 3 of uint8 codes where y < 0."""
    return magnitude_code | ((y < 0).to(torch.uint8) << 3)


def decode(codes: Tensor) -> Tensor:
    """Values of uint8 codes as float32; code 8 decodes to -0.0."""
    table = torch.tensor([*VALUES, *(-v for v in VALUES)], dtype=torch.float32, device=codes.device)
    return table[codes.long()]


def pack(codes: Tensor) -> Tensor:
    """(…, K) codes → (…, K/2) bytes; the even column is the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """(…, K/2) bytes → (…, K) codes."""
    return torch.stack((packed & 0x0F, packed >> 4), dim=-1).flatten(-2)
