"""The CPU path where elements lie further apart than 32 bits count."""

from collections.abc import Callable

import pytest
from torch import Tensor

from halfbyte import NVFP4
from halfbyte.kernels.cpu import mxfp8 as cpu_mxfp8
from halfbyte.kernels.cpu import nvfp4 as cpu
from halfbyte.numerics import mxfp8, nvfp4

from ..check import same_bits

FORMATS = [NVFP4(), NVFP4(block=(16, 16)), NVFP4(scaling="row"), NVFP4(scale_rule="search", error="mae")]


@pytest.mark.parametrize("strides", [((1 << 31) + 32, 1), (1, (1 << 28) + 8), ((1 << 31) + 8, 1 << 26)], ids=str)
def test_elements_far_apart(strides: tuple[int, int], far: Callable[..., Tensor]) -> None:
    x = far((17, 32) if strides[0] == 1 else (3, 32), strides)
    for fmt in FORMATS:
        for actual, expected in zip(cpu.quantize(x, fmt), nvfp4.quantize(x, fmt), strict=True):
            same_bits(actual, expected, str(fmt))
    for actual, expected in zip(cpu_mxfp8.quantize(x), mxfp8.quantize(x), strict=True):
        same_bits(actual, expected, "MXFP8")
