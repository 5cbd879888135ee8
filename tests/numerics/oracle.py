"""NVFP4 and MXFP8 once more, from docs/numerics.md alone, to judge `halfbyte.numerics`.

Python loops over numpy float32 scalars: each written operation is one IEEE rounding, and no code is shared.
"""

import bisect
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from halfbyte import NVFP4

f32 = np.float32
FLT_MAX = np.finfo(f32).max
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E4M3 = [m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:127]
SIGNS = [1 if c == "+" else -1 for c in "+++-+------+-+--"]


class Encoded(NamedTuple):
    packed: np.ndarray  # (M, K/2) uint8
    block_scale: np.ndarray  # (M, K/16) uint8
    tensor_scale: np.ndarray  # (M,) float32
    amax: np.ndarray  # (M,) float32


def nearest(table: Sequence[float], x: float) -> int:
    """Index of the value nearest to x ≥ 0; a tie goes to the even index; beyond the end saturates."""
    i = bisect.bisect_left(table, x)
    if i in (0, len(table)):
        return max(i - 1, 0)
    middle = (table[i - 1] + table[i]) / 2
    return i if x > middle or (x == middle and i % 2 == 0) else i - 1


def e2m1(y: float) -> int:
    return 0 if math.isnan(y) else nearest(E2M1, abs(float(y))) | (8 if y < 0 else 0)


def e4m3(x: float) -> int:
    return 0x7F if math.isnan(x) else nearest(E4M3, abs(float(x))) | (0x80 if math.copysign(1, x) < 0 else 0)


def e8m0_up(v: float) -> int:
    """The smallest code c with 2^(c-127) ≥ v."""
    if math.isnan(v):
        return 255
    return next((c for c in range(255) if 2.0 ** (c - 127) >= v), 254)


def largest(values: Iterable[f32]) -> f32:
    best = f32(0)
    for v in values:
        if np.isnan(v):
            return f32(np.nan)
        best = abs(v) if abs(v) > best else best
    return best


def cap(v: f32, bound: float = FLT_MAX) -> f32:
    return f32(bound) if v > bound else v  # NaN stays


def round_to(v: f32, dtype: torch.dtype) -> f32:
    if dtype == torch.float16:
        return f32(np.float16(v))
    if dtype == torch.bfloat16 and np.isfinite(v):
        bits = int(v.view(np.uint32))
        return np.uint32((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(f32)
    return v


def hadamard(x: Sequence[f32], dtype: torch.dtype) -> list[f32]:
    y = [v * f32(s) for v, s in zip(x, SIGNS, strict=True)]
    for stride in (1, 2, 4, 8):
        y = [y[i - stride] - y[i] if i & stride else y[i] + y[i + stride] for i in range(16)]
    return [round_to(v * f32(0.25), dtype) for v in y]


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    (a, b, c, d), (k0, k1) = counter, key
    for _ in range(10):
        (h0, l0), (h1, l1) = divmod(0xD2511F53 * a, 1 << 32), divmod(0xCD9E8D57 * c, 1 << 32)
        a, b, c, d = h1 ^ b ^ k0, l1, h0 ^ d ^ k1, l0
        k0, k1 = (k0 + 0x9E3779B9) % (1 << 32), (k1 + 0xBB67AE85) % (1 << 32)
    return [a, b, c, d]


def uniform(seed: int, offset: int, block: int) -> list[f32]:
    halves = []
    for index in (2 * block, 2 * block + 1):
        for word in philox([index % 2**32, index >> 32, offset % 2**32, offset >> 32], [seed % 2**32, seed >> 32]):
            halves += [word & 0xFFFF, word >> 16]
    return [f32((h + 0.5) / 65536) for h in halves]


def element(x: f32, e: f32, u: f32 | None) -> int:
    y = x * e
    y = y if np.isnan(y) else min(max(y, f32(-6)), f32(6))
    if u is None or np.isnan(y):
        return e2m1(y)
    a = abs(y)
    position = min(f32(2) * a, a + f32(2), a / f32(2) + f32(4))
    return min(int(np.floor(position + u)), 7) | (8 if y < 0 else 0)


def tree(sums: list[f32]) -> f32:
    while len(sums) > 1:
        half = len(sums) // 2
        sums = [sums[i] + sums[i + half] for i in range(half)]
    return sums[0]


def block_error(tile: np.ndarray, codes: list[list[int]], scale: int, a: f32, s_enc: f32, fmt: NVFP4) -> f32:
    sums = []
    for x_row, code_row in zip(tile, codes, strict=True):
        total = f32(0)
        for x, code in zip(x_row, code_row, strict=True):
            product = f32(E2M1[code & 7] * (-1 if code & 8 else 1)) * decode_e4m3(scale)
            if fmt.error_arithmetic == "fp16":
                d = f32(np.float16(product)) - x * s_enc
            else:
                d = product * a / f32(6 * fmt.e4m3_max) - x
            total = total + (abs(d) if fmt.error == "mae" else d * d)
        sums.append(total)
    return sums[0] if fmt.block == (1, 16) else tree(sums + [f32(0)] * (16 - len(sums)))


def decode_e4m3(byte: int) -> f32:
    return f32(np.nan) if byte & 0x7F == 0x7F else f32(E4M3[byte & 0x7F] * (-1 if byte & 0x80 else 1))


@np.errstate(all="ignore")
def nvfp4(
    x: torch.Tensor,
    fmt: NVFP4,
    *,
    amax: torch.Tensor | None = None,
    rng: tuple[int, int] | None = None,
    first_block: int = 0,
) -> Encoded:
    """One matrix (M, K)."""
    m, k = x.shape
    data = x.float().numpy()
    if fmt.hadamard:
        blocks = [hadamard(block, x.dtype) for block in data.reshape(-1, 16)]
        data = np.array(blocks, dtype=f32).reshape(m, k)
    if amax is not None:
        a = np.broadcast_to(amax.numpy(), m)
    else:
        a = np.array([largest(row if fmt.scaling == "row" else data.flat) for row in data], dtype=f32)
    s_enc = np.array([cap(f32(6 * fmt.e4m3_max) / v) for v in a], dtype=f32)
    s_enc[(a == 0) | (s_enc == 0)] = 1
    s_dec = f32(1) / s_enc
    codes, scales = np.zeros((m, k), np.uint8), np.zeros((m, k // 16), np.uint8)

    for top in range(0, m, fmt.block[0]):
        rows = slice(top, top + fmt.block[0])
        for column in range(k // 16):
            tile = data[rows, 16 * column : 16 * column + 16]
            b = largest(tile.flat)
            if fmt.scale_rule == "amax":
                wanted = [cap(b * (s_enc[top] * (f32(1) / f32(6))))]
            else:
                base = b / f32(6) * s_enc[top]
                wanted = [cap(base, 448), cap(f32(1.5) * base, 448)]
            choices = []
            for scale in map(e4m3, wanted):
                e = cap(f32(1) / (decode_e4m3(scale) * s_dec[top]))
                tile_codes = []
                for i, row in enumerate(tile):
                    u = uniform(*rng, first_block + (top + i) * (k // 16) + column) if rng else [None] * 16
                    tile_codes.append([element(v, e, w) for v, w in zip(row, u, strict=True)])
                choices.append((scale, tile_codes))
            if len(choices) == 2:
                error6, error4 = (block_error(tile, c, s, a[top], s_enc[top], fmt) for s, c in choices)
                choices = [choices[1 if error4 < error6 else 0]]
            scales[rows, column], codes[rows, 16 * column : 16 * column + 16] = choices[0]
    return Encoded(codes[:, 0::2] | codes[:, 1::2] << 4, scales, s_dec, a)


@np.errstate(all="ignore")
def mxfp8(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """One matrix (M, K): elements and scales, as bytes."""
    data = x.float().numpy()
    elements, scales = np.zeros(data.shape, np.uint8), np.zeros((len(data), data.shape[1] // 32), np.uint8)
    for row, column in np.ndindex(scales.shape):
        block = data[row, 32 * column : 32 * column + 32]
        code = e8m0_up(float(largest(block) * (f32(1) / f32(448))))
        scales[row, column] = code
        if code != 255:
            elements[row, 32 * column : 32 * column + 32] = [e4m3(v * f32(2.0 ** (127 - code))) for v in block]
    return elements, scales
