"""The golden vectors through the Triton kernels: all on a GPU, a few in Triton's interpreter.

All that a format has of a dtype go together, filled up with zeros to one shape, which changes no maximum and no other
block: each shape would be a kernel more to compile. That ragged shapes and views give the same is tested elsewhere.
"""

import pytest
import torch
from torch import Tensor

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
    vectors, fmt = golden(f"nvfp4_{dtype}"), format_of(config)
    keys = [key for key in vectors if key.startswith(f"{config}/") and "/packed" in key]
    equal(len(keys), count)
    if INTERPRETING:
        keys = [key for key in keys if key.split("/")[1] == NVFP4_INPUT][:1]
        true(keys, "none compared")
    monkeypatch.setattr(quantize, "SMALL", 0)  # others test what takes small matrices at once
    inputs: list[Tensor] = []
    for key in keys:
        x = vectors[f"input/{key.split('/')[1]}"]
        inputs.append(x.mT if key.endswith("_t") else x)
    stack = torch.zeros(len(inputs), *(max(x.shape[i] for x in inputs) for i in (0, 1)), dtype=inputs[0].dtype)
    for whole, x in zip(stack, inputs, strict=True):
        whole[: x.shape[0], : x.shape[1]] = x
    results = [t.cpu() for t in quantize.quantize(stack.to(DEVICE), fmt, per_matrix=True)]
    for key, x, packed, block_scale, _, amax in zip(keys, inputs, *results, strict=True):
        (rows, columns), name, t = x.shape, key.split("/")[1], "_t" if key.endswith("_t") else ""
        same_bits(packed[:rows, : columns // 2], vectors[key], key)
        scales = block_scale[:rows, : columns // 16].view(torch.uint8)
        same_bits(scales, vectors[f"{config}/{name}/block_scale{t}"], key)
        same_bits(amax.reshape(-1)[: rows if amax.dim() else 1], vectors[f"{config}/{name}/amax{t}"], key)


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
