"""Values of transposed views, and values beside the codes, equal the reference's."""

import pytest
import torch

pytest.importorskip("triton")

import halfbyte as hb
from halfbyte import ops

from ..check import equal, same_bits, true
from .test_triton_kernels import DEVICE, RNG, poisoned_memory, pytestmark  # noqa: F401

FORMATS = [
    hb.NVFP4(),
    hb.NVFP4(scaling="row"),
    hb.NVFP4(block=(16, 16)),
    hb.NVFP4(block=(16, 16), scale_rule="four_over_six"),
    hb.NVFP4(scaling="row", scale_rule="four_over_six"),
    hb.NVFP4(rounding="stochastic"),
    hb.NVFP4(hadamard=True, rounding="stochastic"),
    hb.NVFP4(scaling="row", rounding="stochastic"),
]
IDS = [f"{f.block[0]} {f.scaling} {f.scale_rule} {f.hadamard:d} {f.rounding}" for f in FORMATS]


@pytest.mark.parametrize("fmt", FORMATS, ids=IDS)
def test_values_beside_the_codes(rng, fmt: hb.NVFP4) -> None:
    for dtype, shape, per_matrix, amax in (
        (torch.bfloat16, (21, 48), False, None),
        (torch.float32, (5, 32), False, torch.tensor(2.5)),
        (torch.float16, (2, 16, 32), True, None),
    ):
        x = torch.randn(shape, generator=rng).to(dtype)
        if per_matrix:
            x[0, 0, 3], x[-1, -1, -1] = float("nan"), float("inf")
        options = {"rng": RNG if fmt.rounding == "stochastic" else None, "per_matrix": per_matrix}
        wanted, values = ops.quantize_with_values(x, fmt, amax=amax, impl="reference", **options)
        given = None if amax is None else amax.to(DEVICE)
        got, got_values = ops.quantize_with_values(x.to(DEVICE), fmt, amax=given, impl="triton", **options)
        for a, e in zip(got, wanted, strict=True):
            (same_bits if a.element_size() == 1 else equal)(a.cpu(), e, str(shape))
        equal(got_values.cpu(), values, str(shape))
        true(got_values.is_contiguous(), "values are contiguous")


TENSOR_FORMATS = [f for f in FORMATS if f.scaling == "tensor"]


@pytest.mark.parametrize(
    "fmt", TENSOR_FORMATS, ids=lambda f: f"{f.block[0]} {f.scale_rule} {f.hadamard:d} {f.rounding}"
)
def test_values_of_a_transposed_view(rng, fmt: hb.NVFP4) -> None:
    for dtype, shape, per_matrix, unscaled, amax in (
        (torch.bfloat16, (48, 80), False, True, None),
        (torch.float32, (16, 48), True, True, torch.tensor(2.5)),
        (torch.float16, (2, 32, 16), True, False, None),
        (torch.bfloat16, (2, 16, 16), False, True, None),
    ):
        x = torch.randn(shape, generator=rng).to(dtype)
        words = RNG if fmt.rounding == "stochastic" else None
        options = {"rng": words, "first_block": 5 if words else 0, "per_matrix": per_matrix, "unscaled": unscaled}
        wanted = ops.fake_quantize(x.mT, fmt, amax=amax, impl="reference", **options)
        given = None if amax is None else amax.to(DEVICE)
        got = ops.fake_quantize(x.to(DEVICE).mT, fmt, amax=given, impl="triton", **options)
        for a, e in zip(got, wanted, strict=True):
            equal(a.cpu(), e, f"{dtype} {shape} {unscaled}")
        true(got[0].is_contiguous(), "values are contiguous")


@pytest.mark.parametrize("shape", [(0, 32), (3, 0)], ids=str)
def test_values_of_nothing(shape: tuple[int, ...]) -> None:
    for fmt in FORMATS[:2]:
        got, values = ops.quantize_with_values(torch.empty(shape, device=DEVICE), fmt, impl="triton")
        wanted, _ = ops.quantize_with_values(torch.empty(shape), fmt, impl="reference")
        for a, e in zip(got, wanted, strict=True):
            (same_bits if a.element_size() == 1 else equal)(a.cpu(), e)
        equal(values.cpu(), torch.empty(shape))
