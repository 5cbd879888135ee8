"""`scale_rule="search"` as users reach it: what is refused, and the weights of its error."""

from typing import Any

import pytest
import torch

from halfbyte import MXFP8, NVFP4, FormatError, ShapeError, fake_quantize, quantize, quantize_many
from halfbyte.numerics import nvfp4

from .check import same_bits

SEARCH, HESSIAN = NVFP4(scale_rule="search"), NVFP4(scale_rule="search", error="hessian")
X = torch.linspace(-3, 3, 4 * 32).reshape(4, 32)
W, H = torch.rand(32), torch.eye(16).expand(2, 16, 16).contiguous()


@pytest.mark.parametrize(("fmt", "weights"), [(SEARCH, {}), (SEARCH, {"importance": W}), (HESSIAN, {"hessian": H})])
def test_is_the_contract(fmt: NVFP4, weights: dict[str, Any]) -> None:
    wanted = nvfp4.quantize(X, fmt, **weights)
    for compiled in (False, True):
        function = torch.compile(quantize, fullgraph=True, backend="eager") if compiled else quantize
        made = function(X, fmt, **weights)
        same_bits(made.packed, wanted.packed)
        same_bits(made.block_scale, wanted.block_scale)


@pytest.mark.parametrize(
    ("fmt", "weights", "error", "message"),
    [
        (HESSIAN, {}, FormatError, "error='hessian' needs hessian="),
        (SEARCH, {"hessian": H}, FormatError, "hessian is for scale_rule='search' with error='hessian'"),
        (NVFP4(), {"importance": W}, FormatError, "importance is for scale_rule='search'"),
        (HESSIAN, {"hessian": H, "importance": W}, FormatError, "importance is for"),
        (MXFP8(), {"importance": W}, FormatError, "leave importance and hessian out"),
        (SEARCH, {"importance": W[:16]}, ShapeError, r"importance is torch.float32 of shape \(16,\); needs .*\(32,\)"),
        (SEARCH, {"importance": W.double()}, ShapeError, "importance is torch.float64"),
        (SEARCH, {"importance": 1.0}, ShapeError, "importance is float; needs torch.float32"),
        (SEARCH, {"importance": -W}, FormatError, "importance has a negative, infinite or NaN weight"),
        (HESSIAN, {"hessian": H / 0}, FormatError, "hessian has an infinite or NaN entry"),
        (HESSIAN, {"hessian": H[:1]}, ShapeError, r"needs torch.float32 of shape \(2, 16, 16\)"),
        (SEARCH, {"importance": W.to("meta")}, ShapeError, "importance is on meta, x on cpu"),
    ],
)
def test_refusals(fmt: Any, weights: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quantize(X, fmt, **weights)


def test_hessian_is_for_quantize_only() -> None:
    for function in (lambda: quantize_many([X], HESSIAN), lambda: fake_quantize(X, HESSIAN)):
        with pytest.raises(FormatError, match=r"which halfbyte\.quantize takes"):
            function()
