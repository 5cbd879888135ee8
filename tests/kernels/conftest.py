"""Inputs of many kinds, for the kernels."""

import os
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor


@pytest.fixture
def make(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    """make(kind, dtype, shape): an input on the CPU."""
    g = torch.Generator().manual_seed(zlib.crc32(request.node.name.encode()))

    def bits(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        raw = torch.randint(-(2**31), 2**31 - 1, shape, generator=g, dtype=torch.int64).to(torch.int32)
        return raw.view(torch.float32) if dtype == torch.float32 else raw.to(torch.int16).view(dtype)

    def build(kind: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        x = torch.randn(shape, generator=g)
        if kind in ("bits", "finite"):
            x = bits(dtype, shape)
            return torch.where(x.isfinite(), x, -0.0) if kind == "finite" else x
        if kind == "nan":
            x[0, 3], x[-1, -1] = float("nan"), float("inf")
        elif kind == "wide":
            x = x * torch.exp(8 * torch.randn(shape, generator=g))
        elif kind == "tie":
            x = torch.randint(-28, 29, shape, generator=g) * 0.25
        elif kind == "zero":
            x = torch.zeros(shape)
        elif kind == "tiny":
            x = x * 1e-38
        elif kind == "huge":
            x = x * (torch.finfo(dtype).max / 8)
        elif kind == "constant":
            x = torch.full(shape, -1.7)
        return x.to(dtype)

    return build


@pytest.fixture
def far(tmp_path: Path) -> Callable[..., Tensor]:
    """far(shape, strides): random bfloat16 as far apart as the strides say, in a file of holes that takes no room."""

    def build(shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        file = tmp_path / "holes"
        file.touch()
        os.truncate(file, 2 * span)
        x = torch.from_file(str(file), shared=True, size=span, dtype=torch.bfloat16).as_strided(shape, strides)
        return x.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))))

    return build
