"""Grouped matmuls that accumulate, and the gradients of many experts' weights, against float64. GPUs: tests/kernels."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import halfbyte as hb
from halfbyte import ops
from halfbyte.errors import FormatError, ShapeError
from halfbyte.ops import wgrad

from .check import close, equal, same_bits, true

E, N, K, T = 4, 24, 40, 96
ENDS = {
    "ragged": [5, 5, 26, 96],
    "blocks": [16, 32, 48, 80],
    "one expert": [0, 96, 96, 96],
    "nobody": [0, 0, 0, 0],
}


def operands(rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """g and x with few significant bits, as q·s, and a scale for each expert."""
    g, x = (torch.randint(-48, 49, (rows, T), generator=rng).float() / 8 for rows in (N, K))
    return g, x, torch.rand(E, generator=rng) + 0.5, torch.rand(E, generator=rng) + 0.5


def exact(g: Tensor, x: Tensor, ends: list[int], g_scale: Tensor | None, x_scale: Tensor | None) -> tuple[Tensor, Any]:
    """float64 (E, N, K), and the same of magnitudes."""
    results = []
    for a, b in ((g.double(), x.double()), (g.double().abs(), x.double().abs())):
        parts = [a[:, start:end] @ b[:, start:end].mT for start, end in zip([0, *ends], ends, strict=False)]
        total = torch.stack(parts)
        for scale in (g_scale, x_scale):
            if scale is not None:
                total = total * scale.double().reshape(-1, 1, 1)
        results.append(total)
    return results[0], results[1]


def budget(wanted: Tensor, size: Tensor, dtype: torch.dtype) -> Tensor:
    return ((T + 2) * size + 1) * 2.0**-24 * 1.01 + wanted.abs() * torch.finfo(dtype).eps / 2 * 1.01


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("ends", ENDS)
def test_wgrad(rng, ends: str, impl: str) -> None:
    g, x, g_scale, x_scale = operands(rng)
    offsets = torch.tensor(ENDS[ends], dtype=torch.int32)
    for scales in ((g_scale, x_scale), (None, x_scale), (g_scale[0], None), (None, None)):
        wanted, size = exact(g, x, ENDS[ends], *scales)
        for dtype in (torch.float32, torch.bfloat16):
            dw = ops.scaled_grouped_wgrad(g, x, offsets, *scales, out_dtype=dtype, impl=impl)
            equal((dw.dtype, tuple(dw.shape)), (dtype, (E, N, K)))
            close(dw, wanted, budget(wanted, size, dtype), f"{dtype}")
        buffer = torch.ones(E, N, K)
        out = ops.scaled_grouped_wgrad(g.bfloat16(), x.bfloat16(), offsets, *scales, accumulate_into=buffer, impl=impl)
        true(out is buffer, "the buffer itself")
        close(buffer, wanted + 1, budget(wanted + 1, size + 1, torch.float32), "added")


def test_wgrad_of_token_major_operands_is_the_same(rng) -> None:
    g, x, *scales = operands(rng)
    offsets = torch.tensor(ENDS["ragged"], dtype=torch.int32)
    moved = [t.mT.contiguous().mT for t in (g, x)]
    same_bits(ops.scaled_grouped_wgrad(*moved, offsets, *scales), ops.scaled_grouped_wgrad(g, x, offsets, *scales))


def test_wgrad_compiled(rng) -> None:
    g, x, *scales = operands(rng)
    offsets, buffer = torch.tensor(ENDS["ragged"], dtype=torch.int32), torch.ones(E, N, K)
    for operator, last in ((wgrad._wgrad, (torch.float32,)), (wgrad._wgrad_accumulate, (buffer,))):
        torch.library.opcheck(operator, (g, x, offsets, *scales, *last, "cpu"))
    compiled = torch.compile(ops.scaled_grouped_wgrad, fullgraph=True, backend="aot_eager")
    wanted = ops.scaled_grouped_wgrad(g, x, offsets, *scales)
    same_bits(compiled(g, x, offsets, *scales), wanted)
    twin = buffer.clone()
    compiled(g, x, offsets, *scales, accumulate_into=buffer)
    same_bits(buffer, ops.scaled_grouped_wgrad(g, x, offsets, *scales, accumulate_into=twin))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_grouped_linear_accumulates(rng, impl: Any) -> None:
    """Into rows of experts; those of nobody stay as they were."""
    x = hb.quantize(torch.randn(40, 64, generator=rng), hb.NVFP4(scaling="row"))
    w = hb.quantize(torch.randn(E, 32, 64, generator=rng), hb.NVFP4(), per_matrix=True)
    bias = torch.randn(E, 32, generator=rng)
    offsets = torch.tensor([5, 5, 26, 37], dtype=torch.int32)
    plain = hb.grouped_linear(x, w, offsets, bias, out_dtype=torch.float32, impl=impl)
    buffer = torch.randn(40, 32, generator=rng)
    before = buffer.clone()
    true(hb.grouped_linear(x, w, offsets, bias, accumulate_into=buffer, impl=impl) is buffer, "the buffer itself")
    same_bits(buffer, before + plain)
    same_bits(buffer[37:], before[37:])
    traced = before.clone()
    compiled = torch.compile(hb.grouped_linear, fullgraph=True, backend="aot_eager")
    compiled(x, w, offsets, bias, accumulate_into=traced, impl=impl)
    same_bits(traced, buffer)


G, X = torch.ones(N, T), torch.ones(K, T)
OFFSETS = torch.tensor([16, 96], dtype=torch.int32)
CALLS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "tokens": (
        lambda: ops.scaled_grouped_wgrad(G, X[:, 1:], OFFSETS, None, None),
        ShapeError,
        r"\(N, T\) and \(K, T\)",
    ),
    "dtype": (lambda: ops.scaled_grouped_wgrad(G, X.half(), OFFSETS, None, None), ShapeError, "of one dtype"),
    "offsets": (
        lambda: ops.scaled_grouped_wgrad(G, X, OFFSETS + 1, None, None),
        ShapeError,
        "not decreasing, at most 96 rows",
    ),
    "no offsets": (lambda: ops.scaled_grouped_wgrad(G, X, [16, 96], None, None), ShapeError, "offsets is list"),  # type: ignore[arg-type]
    "a scale": (lambda: ops.scaled_grouped_wgrad(G, X, OFFSETS, torch.ones(3), None), ShapeError, r"\(\) or \(E,\)"),
    "buffer": (
        lambda: ops.scaled_grouped_wgrad(G, X, OFFSETS, None, None, accumulate_into=torch.ones(2, K, N)),
        ShapeError,
        r"shape \(2, 24, 40\)",
    ),
    "leaf": (
        lambda: ops.scaled_grouped_wgrad(
            G, X, OFFSETS, None, None, accumulate_into=torch.ones(2, N, K, requires_grad=True)
        ),
        FormatError,
        "requires a gradient",
    ),
    "out_dtype": (
        lambda: ops.scaled_grouped_wgrad(G, X, OFFSETS, None, None, out_dtype=torch.float64),
        ShapeError,
        "out_dtype",
    ),
    "grouped buffer": (
        lambda: hb.grouped_linear(
            hb.quantize(torch.ones(16, 64), hb.NVFP4()),
            hb.quantize(torch.ones(2, 32, 64), hb.NVFP4()),
            torch.tensor([8, 16], dtype=torch.int32),
            accumulate_into=torch.ones(16, 32).half(),
        ),
        ShapeError,
        r"accumulate_into is torch.float16 .* \(16, 32\)",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_refusals(name: str) -> None:
    call, error, message = CALLS[name]
    with pytest.raises(error, match=message):
        call()
