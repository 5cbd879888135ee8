import math

import numpy as np
import pytest
import torch

from halfbyte.numerics import e8m0

from ..check import equal, same_bits
from . import oracle


def test_all_bytes_decode() -> None:
    expected = torch.tensor([2.0 ** (c - 127) for c in range(255)] + [math.nan])
    equal(e8m0.decode(torch.arange(256, dtype=torch.uint8)), expected)


def test_all_powers_of_two() -> None:
    exponents = torch.arange(-149, 128)
    same_bits(e8m0.power_of_two(exponents), torch.tensor([2.0**e for e in range(-149, 128)]))


def test_encode_up_around_every_power_of_two() -> None:
    powers = np.array([2.0**e for e in range(-149, 128)], dtype=np.float32)
    values = np.concatenate((powers, np.nextafter(powers, np.float32(0)), np.nextafter(powers, np.float32(np.inf))))
    expected = torch.tensor([oracle.e8m0_up(float(v)) for v in values], dtype=torch.uint8)
    equal(e8m0.encode_up(torch.from_numpy(values)), expected)


@pytest.mark.parametrize(
    ("bits", "code"),
    [
        (0x00000000, 0),
        (0x00000001, 0),
        (0x003FFFFF, 0),
        (0x00400000, 0),  # 2^-127, subnormal: what code 0 stands for
        (0x00400001, 1),
        (0x007FFFFF, 1),
        (0x00800000, 1),  # 2^-126
        (0x00800001, 2),
        (0x3F800000, 127),
        (0x3F800001, 128),
        (0x7F000000, 254),  # 2^127
        (0x7F000001, 254),
        (0x7F7FFFFF, 254),
        (0x7F800000, 254),  # inf
        (0x7FC00000, 255),  # NaN
        (0x7F800001, 255),
    ],
)
def test_encode_up_by_hand(bits: int, code: int) -> None:
    equal(e8m0.encode_up(torch.tensor([bits], dtype=torch.int32).view(torch.float32)).item(), code)


def test_encode_up_inverts_decode() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    equal(e8m0.encode_up(e8m0.decode(codes)), codes)
