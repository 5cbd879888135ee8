import numpy as np
import torch

from halfbyte.numerics import e4m3

from ..check import equal, same_bits
from . import oracle
from .test_e2m1 import all_bfloat16

ALL_BYTES = torch.arange(256, dtype=torch.uint8)


def check_encode(values: torch.Tensor) -> None:
    expected = torch.tensor([oracle.e4m3(v) for v in values.tolist()], dtype=torch.uint8)
    equal(e4m3.encode(values).view(torch.uint8), expected)


def test_all_bytes_decode_by_the_definition() -> None:
    expected = torch.tensor([float(oracle.decode_e4m3(byte)) for byte in range(256)])
    equal(ALL_BYTES.view(torch.float8_e4m3fn).float(), expected)


def test_all_bytes_survive_a_round_trip() -> None:
    encoded = e4m3.encode(ALL_BYTES.view(torch.float8_e4m3fn).float()).view(torch.uint8)
    same_bits(encoded, torch.where(ALL_BYTES == 0xFF, 0x7F, ALL_BYTES).to(torch.uint8))  # one NaN, without a sign


def test_encode_all_bfloat16() -> None:
    check_encode(all_bfloat16())


def test_encode_around_every_value_and_midpoint() -> None:
    table = np.array(oracle.E4M3)
    points = np.concatenate((table, (table[1:] + table[:-1]) / 2, [464.0])).astype(np.float32)  # 464: where 480 begins
    points = np.concatenate([points, *(np.nextafter(points, np.float32(end)) for end in (-np.inf, np.inf))])
    check_encode(torch.from_numpy(np.concatenate((points, -points))))


def test_saturation_nan_and_zeros() -> None:
    inf, nan = float("inf"), float("nan")
    values = torch.tensor([448.0, 449.0, 1e38, inf, -inf, nan, -nan, 0.0, -0.0, 2.0**-10, 1.5 * 2.0**-10])
    expected = [0x7E, 0x7E, 0x7E, 0x7E, 0xFE, 0x7F, 0x7F, 0x00, 0x80, 0x00, 0x01]
    equal(e4m3.encode(values).view(torch.uint8), torch.tensor(expected, dtype=torch.uint8))
