"""E8M0, the power-of-two block scale of MXFP8: a biased exponent in one byte, 255 is NaN."""

import torch
from torch import Tensor

NAN_BYTE = 255
BIAS = 127


def encode_up(v: Tensor) -> Tensor:
    """Round non-negative float32 up to a power of two; returns uint8 exponents biased by 127.

    0 → 0, anything up to 2^-127 → 0, inf → 254, NaN → 255.
    """
    bits = v.view(torch.int32)
    exponent = (bits >> 23) & 0xFF
    mantissa = bits & 0x7FFFFF
    # 2^-127 is the subnormal with mantissa 0x400000; code 0 stands for it and for all below.
    round_up = (mantissa > 0) & ~((exponent == 0) & (mantissa <= 0x400000))
    code = (exponent + round_up.int()).clamp(max=254)
    return torch.where(v.isnan(), NAN_BYTE, code).to(torch.uint8)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent as float32 for integer exponents -149..127, subnormals included."""
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent).float()


def decode(code: Tensor) -> Tensor:
    """uint8 codes → float32 scales 2^(code-127); 255 → NaN."""
    scale = power_of_two(code.int() - BIAS)
    return torch.where(code == NAN_BYTE, torch.nan, scale)
