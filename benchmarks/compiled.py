"""The formulas of the contract for torch.compile: what a user of a GPU without FP4 instructions has, for bf16.

Written for speed, with the contract's bytes: E2M1 by adding 2^23 rather than by comparisons, true divisions only per
block, and x seen as 32-bit words of two elements, so that a word becomes a byte without indexing. On an H200, 8192×8192
with amax given, that last choice makes 87 µs of the 131 µs that strided halves take, and of the 440 µs that packing an
array of codes takes; max-autotune gains 1% more.
"""

from __future__ import annotations

import torch
from torch import Tensor

M = 8388608.0
FLT_MAX = 3.4028234663852886e38


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """bf16 (M, K) → even and odd columns as float32, (M, K/16, 8) each."""
    words = x.view(torch.int32).unflatten(-1, (-1, 8))
    return (words << 16).view(torch.float32), (words & -65536).view(torch.float32)


def _scales(amax: Tensor, e4m3_max: int) -> tuple[Tensor, Tensor]:
    encode = torch.minimum(torch.full_like(amax, 6.0 * e4m3_max) / amax, torch.full_like(amax, FLT_MAX))
    encode = torch.where((amax == 0) | (encode == 0), 1.0, encode)
    return encode, torch.ones_like(encode) / encode


def _block_amax(lo: Tensor, hi: Tensor) -> Tensor:
    return torch.maximum(lo.abs(), hi.abs()).amax(-1, keepdim=True)


def _e4m3(x: Tensor) -> Tensor:
    return x.clamp(max=448.0).to(torch.float8_e4m3fn)


def _element_scale(scale: Tensor, decode: Tensor) -> Tensor:
    product = scale.float() * decode
    return torch.minimum(torch.ones_like(product) / product, torch.full_like(product, FLT_MAX))


def _codes(x: Tensor, element: Tensor) -> Tensor:
    y = x * element
    a = y.abs()
    rounded = torch.minimum(
        torch.minimum(2.0 * a + M, a + (2.0 + M)), torch.minimum(0.5 * a + (4.0 + M), torch.full_like(a, 7.0 + M))
    )
    return (rounded.view(torch.int32) & 7) | ((y < 0).to(torch.int32) << 3)


def _pack(lo: Tensor, hi: Tensor) -> Tensor:
    return (lo | (hi << 4)).to(torch.uint8).flatten(-2)


def given(x: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    """Plain rule, amax known (a scalar, or one per row with shape (M, 1, 1))."""
    lo, hi = _halves(x)
    encode, decode = _scales(amax, 448)
    scale = _e4m3(_block_amax(lo, hi) * (encode * 0.1666666716337204))
    element = _element_scale(scale, decode)
    return _pack(_codes(lo, element), _codes(hi, element)), scale.squeeze(-1)


def computed(x: Tensor) -> tuple[Tensor, Tensor]:
    """Plain rule, amax of the tensor computed."""
    return given(x, x.abs().amax().float())


def row(x: Tensor) -> tuple[Tensor, Tensor]:
    """Plain rule, amax of each row computed."""
    return given(x, x.abs().amax(-1).float()[:, None, None])


def four_over_six(x: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    """four_over_six, mae, exact error, amax known. The sum's order is Inductor's: picks may differ on near ties."""
    lo, hi = _halves(x)
    encode, decode = _scales(amax, 256)
    base = (_block_amax(lo, hi) / 6.0) * encode
    results = []
    for factor in (1.0, 1.5):
        scale = _e4m3(factor * base)
        element = _element_scale(scale, decode)
        error = sum((_decoded(v, element, scale, amax) - v.abs()).abs().sum(-1, keepdim=True) for v in (lo, hi))
        results.append((scale.float(), error))
    (scale6, error6), (scale4, error4) = results
    scale = torch.where(error4 < error6, scale4, scale6).to(torch.float8_e4m3fn)
    element = _element_scale(scale, decode)
    return _pack(_codes(lo, element), _codes(hi, element)), scale.squeeze(-1)


def _decoded(x: Tensor, element: Tensor, scale: Tensor, amax: Tensor) -> Tensor:
    """Magnitude of the decoded value: rounding to E2M1 by adding 2^22 times the binade."""
    a = (x * element).abs().clamp(max=6.0)
    power = (a.view(torch.int32) & 0x7F800000).view(torch.float32).clamp(min=1.0) * 4194304.0
    return ((a + power) - power) * scale.float() * amax / 1536.0
