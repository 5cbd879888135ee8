"""MXFP8: E4M3 elements under a power-of-two scale per 32."""

import torch
from torch import Tensor

from . import e4m3, e8m0

COLUMNS = 32


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (…, K), K % 32 == 0 → elements (…, K) float8_e4m3fn, block_scale (…, K/32) uint8 E8M0.

    NaN anywhere in a block → scale 255 and elements 0.
    """
    blocks = x.float().unflatten(-1, (-1, COLUMNS))  # [..., B, 32]
    if blocks.numel() == 0:
        amax = blocks.new_zeros(*blocks.shape[:-1], 1)
    else:
        amax = blocks.abs().amax(-1, keepdim=True)
    code = e8m0.encode_up(amax * torch.tensor(1 / 448, dtype=torch.float32, device=x.device))
    # 2^(127-code) is at most 2^127 and at least 2^-127, a subnormal: both exact.
    encode_scale = e8m0.power_of_two(e8m0.BIAS - code.int())
    elements = e4m3.encode(blocks * encode_scale).view(torch.uint8)
    elements = torch.where(code == e8m0.NAN_BYTE, 0, elements).to(torch.uint8).view(torch.float8_e4m3fn)
    return elements.flatten(-2).contiguous(), code.squeeze(-1).contiguous()


def dequantize(elements: Tensor, block_scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """value · 2^(code-127) in float32, rounded once to dtype, (…, K); scale 255 → NaN."""
    return (elements.float() * e8m0.decode(block_scale).repeat_interleave(COLUMNS, -1)).to(dtype).contiguous()
