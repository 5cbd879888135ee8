import math

import numpy as np
import pytest
import torch

from halfbyte import NVFP4
from halfbyte.numerics import nvfp4

from ..check import close, equal, same_bits, true

E4M3_MAX = (256, 288, 320, 448)


def random_amax(rng: torch.Generator) -> torch.Tensor:
    return (1 + torch.rand(100_000, generator=rng)) * torch.exp2(torch.randint(-90, 90, (100_000,), generator=rng))


@pytest.mark.parametrize("fmt", [NVFP4(e4m3_max=e) for e in E4M3_MAX], ids=lambda f: str(f.e4m3_max))
def test_decode_scale_is_the_reciprocal_that_checkpoints_hold(rng: torch.Generator, fmt: NVFP4) -> None:
    amax = random_amax(rng)
    encode, decode = nvfp4.tensor_scales(amax, fmt)
    same_bits(encode, torch.tensor(6.0 * fmt.e4m3_max) / amax)
    same_bits(decode, 1 / encode, "S_enc read back gives S_dec")
    # Even S_dec alone is enough. Rounding a reciprocal moves it by half an ulp, which 1/x stretches by x² (mantissas
    # x in [1, 2)): below √2 that is less than half an ulp of x, so x comes back. Of S_enc and S_dec one is below √2,
    # as a pair of reciprocals is; and either way S_dec comes back.
    same_bits(1 / (1 / decode), decode, "S_dec is a fixed point of reading back")


def test_decode_scale_is_not_amax_over_2688(rng: torch.Generator) -> None:
    amax = random_amax(rng)
    differs = (nvfp4.tensor_scales(amax, NVFP4())[1] != amax / torch.tensor(2688.0)).double().mean()
    true(0.2 < differs < 0.3, f"A / 2688 differs from S_dec for {differs:.0%} of A, not about a quarter")


def test_tensor_scales_at_the_ends() -> None:
    amax = torch.tensor([0.0, math.inf, 1e-45, 1e-38, 3.4e38, math.nan])
    encode, decode = nvfp4.tensor_scales(amax, NVFP4())
    largest = torch.finfo(torch.float32).max
    equal(encode, torch.tensor([1.0, 1.0, largest, largest, float(np.float32(2688) / np.float32(3.4e38)), math.nan]))
    equal(decode[:2], torch.ones(2))
    true(bool((decode[2:5] > 0).all()), "S_dec never underflows to zero")


def error_of(x: torch.Tensor, q: nvfp4.Encoded, fmt: NVFP4) -> torch.Tensor:
    """Each block's own measure, in float64."""
    value = nvfp4.decode_without_tensor_scale(q.packed, q.block_scale).double() * q.amax.double() / (6 * fmt.e4m3_max)
    d = (value - x.double()).unflatten(-1, (-1, 16))
    return (d.abs() if fmt.error == "mae" else d * d).sum(-1)


@pytest.mark.parametrize("error", ["mae", "mse"])
@pytest.mark.parametrize("e4m3_max", E4M3_MAX)
def test_four_over_six_is_never_worse_than_six(rng: torch.Generator, e4m3_max: int, error: str) -> None:
    x = torch.randn(64, 256, generator=rng)
    fmt = NVFP4(scale_rule="four_over_six", e4m3_max=e4m3_max, error=error)
    best, six = nvfp4.quantize(x, fmt), nvfp4.quantize(x, NVFP4(e4m3_max=e4m3_max))
    # Its candidate "6" is the block of the rule `amax`, wherever both round the scale alike: b/6·S_enc or b·(S_enc/6).
    block_amax = x.unflatten(-1, (-1, 16)).abs().amax(-1)
    base = block_amax / 6 * nvfp4.tensor_scales(best.amax, fmt)[0]
    same = base.to(torch.float8_e4m3fn).float() == six.block_scale.float()
    true(same.double().mean() > 0.99, "the rules should agree on nearly every scale")
    # Its float32 sums may err: each |d| by 3·2^-24 of at most 1.2·b, each sum by 16·2^-24 of at most 16·|d|max, where
    # |d| ≤ b/4 (a clipped or widest-gap element is off by no more).
    slack = 16 * 2.0**-24 * (4 * block_amax + 16 * block_amax / 4)
    slack = slack if error == "mae" else slack * block_amax
    worse = error_of(x, best, fmt) - error_of(x, six, fmt)
    true(bool((worse <= 2 * slack)[same].all()), "four_over_six has a larger error than its own candidate")
    true((worse < -2 * slack).double().mean() > 0.2, "four_over_six should gain on many blocks")


def test_four_over_six_by_hand() -> None:
    """A = 6, E = 256: S_enc = 256; scale 256 stands for 1, scale 384 for 1.5."""
    fmt = NVFP4(scale_rule="four_over_six")
    x = torch.zeros(2, 16)
    x[0, :2] = torch.tensor([6.0, 3.0])  # exact both ways: the tie picks 6
    x[1, :2] = torch.tensor([6.0, 4.5])  # 4.5 is exact only as 3 · 1.5: picks 4
    q = nvfp4.quantize(x, fmt)
    equal(q.block_scale.float(), torch.tensor([[256.0], [384.0]]))
    equal(q.packed[:, 0].tolist(), [7 | 5 << 4, 6 | 5 << 4])
    close(nvfp4.dequantize(*q[:3]), x, 0.0)
