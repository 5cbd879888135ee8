import math

import pytest
import torch

from halfbyte.numerics import e2m1, philox

from ..check import close, equal, true
from . import oracle

CPU = torch.device("cpu")

# Random123's kat_vectors for philox4x32-10: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter: str, key: str, result: str) -> None:
    k0, k1 = words(key)
    c0, c1, c2, c3 = (torch.tensor([c]) for c in words(counter))
    equal([int(w) for w in philox.philox4x32((c0, c1, c2, c3), (k0, k1))], words(result))
    equal(oracle.philox(words(counter), words(key)), words(result))


@pytest.mark.parametrize(
    ("seed", "offset", "first_block"),
    [(0, 0, 0), (1, 2, 3), (0xFEDCBA9876543210, 0xF00000000000000F, 0), (2**64 - 1, 2**64 - 1, 2**33 + 5)],
)
def test_uniform_equals_the_oracle(seed: int, offset: int, first_block: int) -> None:
    u = philox.uniform_blocks(4, seed=seed, offset=offset, first_block=first_block, device=CPU)
    equal(u, torch.tensor([[float(v) for v in oracle.uniform(seed, offset, first_block + b)] for b in range(4)]))


def test_parts_equal_the_whole() -> None:
    whole = philox.uniform_blocks(10, seed=7, offset=9, first_block=100, device=CPU)
    part = philox.uniform_blocks(4, seed=7, offset=9, first_block=103, device=CPU)
    equal(part, whole[3:7])


def test_every_argument_matters() -> None:
    draws = [
        philox.uniform_blocks(4, seed=seed, offset=offset, first_block=first_block, device=CPU)
        for seed in (0, 1, 2**32)
        for offset in (0, 1, 2**32)
        for first_block in (0, 4, 2**32)
    ]
    for i, a in enumerate(draws):
        for b in draws[:i]:
            true((a == b).float().mean() < 0.1, "two streams coincide")


def test_uniform_stays_inside_and_fills_the_interval() -> None:
    u = philox.uniform_blocks(65536, seed=3, offset=0, first_block=0, device=CPU)
    true(u.min() > 0 and u.max() < 1, "u must lie in (0, 1)")
    equal(u * 65536 - 0.5, torch.floor(u * 65536), "u is (half + 0.5) / 65536")
    # Σ of 2^20 uniforms: standard deviation of the mean 1/sqrt(12 n); of a bucket's share sqrt(p (1-p) / n).
    n = u.numel()
    close(u.double().mean(), torch.tensor(0.5), 5 / math.sqrt(12 * n))
    shares = torch.histc(u, bins=16, min=0, max=1).double() / n
    close(shares, torch.full((16,), 1 / 16), 5 * math.sqrt(15 / 256 / n))


@pytest.mark.parametrize("value", [0.05, 0.3, 0.75, 1.1, 1.6, 2.2, 3.7, 4.4, 5.9, -0.3, -5.0])
def test_stochastic_rounding_is_unbiased(value: float) -> None:
    """The mean of n decoded values is the value, within five standard deviations and the step of u.

    One draw is `low` or `low + gap`, up with p = the distance in gaps: its deviation is gap · sqrt(p (1-p)), that of
    the mean of n of them sqrt(n) smaller. u has steps of 2^-16, so p is off by at most half of one; see
    test_e2m1.test_stochastic_rounding_over_every_possible_u.
    """
    u = philox.uniform_blocks(2**14, seed=11, offset=5, first_block=0, device=CPU)
    y = torch.full_like(u, value)
    mean = e2m1.decode(e2m1.encode_stochastic(y, u)).double().mean()
    low = max(v for v in oracle.E2M1 if v <= abs(value))
    gap = oracle.E2M1[oracle.E2M1.index(low) + 1] - low
    p = (abs(value) - low) / gap
    close(mean, torch.tensor(value), gap * (5 * math.sqrt(p * (1 - p) / u.numel()) + 2.0**-17 + 2.0**-21))
