"""The golden vectors through the Triton kernels: all on a GPU, a few in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")

from halfbyte.kernels import mxfp8, quantize

from ..check import equal, same_bits, true
from ..numerics.test_golden import ALL, format_of
from .test_triton_kernels import DEVICE, INTERPRETING, poisoned_memory, pytestmark  # noqa: F401

# What the interpreter, which takes about a second for an input, gets of them.
FEW = ALL[::5]
NVFP4_INPUT, MXFP8_INPUT = "midpoint_16x64", "boundary_1x64"


@pytest.mark.parametrize(("dtype", "config", "count"), FEW if INTERPRETING else ALL)
def test_nvfp4(golden, dtype: str, config: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not INTERPRETING:  # whatever the size, one kernel to compile; others test what takes small matrices at once
        monkeypatch.setattr(quantize, "SMALL", 0)
    vectors, fmt, seen = golden(f"nvfp4_{dtype}"), format_of(config), 0
    for key in vectors:
        if not key.startswith(f"{config}/") or "/packed" not in key:
            continue
        _, name, _ = key.split("/")
        x, t = vectors[f"input/{name}"], "_t" if key.endswith("_t") else ""
        seen += 1
        if INTERPRETING and name != NVFP4_INPUT:
            continue
        on_device = x.to(DEVICE)
        packed, block_scale, _, amax = quantize.quantize(on_device.mT if t else on_device, fmt)
        same_bits(packed.cpu(), vectors[key], key)
        same_bits(block_scale.cpu().view(torch.uint8), vectors[f"{config}/{name}/block_scale{t}"], key)
        same_bits(amax.cpu().reshape(-1), vectors[f"{config}/{name}/amax{t}"], key)
    equal(seen, count)
    true(f"{config}/{NVFP4_INPUT}/packed" in vectors or f"{config}/{NVFP4_INPUT}/packed_t" in vectors, "none compared")


def test_mxfp8(golden) -> None:
    vectors = golden("mxfp8")
    names = [key.removesuffix("/x") for key in vectors if key.endswith("/x")]
    equal(len(names), 117)
    if INTERPRETING:
        names = [name for name in names if name.endswith(f"/{MXFP8_INPUT}")]
        equal(len(names), 3)
    for name in names:
        elements, scale = mxfp8.quantize(vectors[f"{name}/x"].to(DEVICE))
        same_bits(elements.cpu().view(torch.uint8), vectors[f"{name}/elements"].view(torch.uint8), name)
        same_bits(scale.cpu(), vectors[f"{name}/block_scale"].view(torch.uint8), name)
