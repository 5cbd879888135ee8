"""`halfbyte.linear` and `grouped_linear` against float64, and what they refuse. On a CPU; GPUs: tests/kernels."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import halfbyte as hb
from halfbyte import ops
from halfbyte.numerics import matmul, nvfp4
from halfbyte.ops import custom

from .check import close, equal, same_bits
from .numerics.test_golden import GEMMS

TENSOR, ROW, TILES = hb.NVFP4(), hb.NVFP4(scaling="row"), hb.NVFP4(block=(16, 16))
SIX_256, SIX_448 = (hb.NVFP4(scale_rule="four_over_six", e4m3_max=e) for e in (256, 448))
ROW_SIX = hb.NVFP4(scaling="row", scale_rule="four_over_six")
RHT, MX = hb.NVFP4(hadamard=True), hb.MXFP8()
PAIRS = {
    "tensor": (TENSOR, TENSOR),
    "row, tensor": (ROW, TENSOR),
    "tensor, row": (TENSOR, ROW),
    "row, row": (ROW, ROW),
    "row, tiles": (ROW, TILES),
    "4over6 at 256, tiles at 448": (SIX_256, hb.NVFP4(block=(16, 16), scale_rule="four_over_six", e4m3_max=448)),
    "4over6 at 448, at 256": (SIX_448, SIX_256),
    "row 4over6 twice": (ROW_SIX, ROW_SIX),
    "Hadamard": (RHT, hb.NVFP4(hadamard=True, scaling="row")),
    "MXFP8": (MX, MX),
    "MXFP8, NVFP4": (MX, ROW),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def sums(q: hb.QuantizedTensor | Tensor) -> Tensor:
    """float64 of what the operand stands for: q·s·S_dec, not rounded."""
    if not isinstance(q, hb.QuantizedTensor):
        return q.double().cpu()
    if isinstance(q.format, hb.MXFP8):
        return q.dequantize(impl="reference").double().cpu()
    value = q.dequantize(torch.float32, unscaled=True, impl="reference").double().cpu()
    scale = q.tensor_scale.double().cpu()
    return value * scale.reshape(*scale.shape, *(1,) * (value.dim() - scale.dim()))


def budget(x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x·wᵀ + bias in float64, how far a float32 matmul may be from it).

    With u = 2^-24 and S = Σ|x·w|, everything relative to it: K exact products are added with at most K - 1 roundings of
    u·S each, whatever their order; α = a·b, Σ·α and adding the bias round once each, the last one the bias too: in all
    (K + 2)·u·S + u·|bias|, and second-order terms below 2^-10 of that. Then out_dtype rounds once: half an ulp of the
    result, or half of its least subnormal.
    """
    exact, magnitude = x @ w.mT, x.abs() @ w.abs().mT
    error = (x.shape[-1] + 2) * magnitude
    if bias is not None:
        exact, error = exact + bias.double().cpu(), error + bias.double().cpu().abs()
    error = error * 2.0**-24 * (1 + 2.0**-10)
    if dtype != torch.float32:
        least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        error = error + (exact.abs() + error) * torch.finfo(dtype).eps / 2 + least / 2
    return exact, error


def check_linear(x: Any, w: Any, bias: Tensor | None, dtype: torch.dtype, impl: str, what: str = "y") -> Tensor:
    y = hb.linear(x, w, bias, out_dtype=dtype, impl=impl)
    exact, error = budget(sums(x), sums(w), bias, dtype)
    equal((y.dtype, y.shape, y.device.type), (dtype, exact.shape, w.device.type), what)
    close(y.cpu(), exact, error, what)
    return y


def operands(rng: torch.Generator, pair: str, m: int, n: int, k: int, device: str = "cpu") -> tuple[Any, Any]:
    # Rows of unlike size, of which no product with another leaves float16.
    x = torch.randn(m, k, generator=rng) * torch.exp(torch.randn(m, 1, generator=rng) / 2)
    w = torch.randn(n, k, generator=rng) * torch.exp(torch.randn(n, 1, generator=rng) / 2)
    x_fmt, w_fmt = PAIRS[pair]
    return hb.quantize(x.to(device), x_fmt), hb.quantize(w.to(device), w_fmt)


@pytest.mark.parametrize("impl", ["auto", "reference", "cpu"])
@pytest.mark.parametrize("pair", PAIRS)
def test_against_float64(rng, pair: str, impl: str) -> None:
    for m, n, k in ((33, 33, 96), (5, 48, 512), (1, 7, 32)):  # 33 = 33: no scale fits by its size alone
        x, w = operands(rng, pair, m, n, k)
        for dtype in DTYPES:
            for bias in (None, torch.randn(n, generator=rng), torch.randn(n, generator=rng).bfloat16()):
                check_linear(x, w, bias, dtype, impl)


@pytest.mark.parametrize("shape", ["16x64x32", "32x256x16", "48x128x64"])
@pytest.mark.parametrize("config", GEMMS)
def test_golden(golden, config: str, shape: str) -> None:
    """The golden sums are float32 too, of K/16 exact block results: as `test_golden.test_gemm` says, K/16 + 6 more."""
    vectors = golden("nvfp4_gemm")
    x, w = (hb.quantize(vectors[f"{n}/{shape}"], fmt) for n, fmt in zip("xw", GEMMS[config], strict=True))
    k = x.shape[-1]
    y = check_linear(x, w, None, torch.float32, "auto")
    total = sums(x).abs() @ sums(w).abs().mT
    close(y, vectors[f"{config}/{shape}/y"], (k + 2 + k // 16 + 6) * 2.0**-24 * (1 + 2.0**-10) * total)


def test_reference_is_the_numerics(rng) -> None:
    x, w = operands(rng, "row, tensor", 9, 20, 64)
    encoded = [nvfp4.Encoded(q.packed, q.block_scale, q.tensor_scale, q.amax) for q in (x, w)]
    close(hb.linear(x, w, out_dtype=torch.float32, impl="reference"), matmul.matmul(*encoded), 0.0)


@pytest.mark.parametrize("impl", ["auto", "reference", "cpu"])
def test_a_row_scale_goes_to_the_axis_of_its_operand(impl: str) -> None:
    """M = N, so that only the operand's role says which axis its scale is for."""
    powers = 2.0 ** torch.arange(-8, 8)
    varied = hb.quantize(torch.ones(16, 32) * powers[:, None], ROW)
    plain = hb.quantize(torch.ones(16, 32), TENSOR)
    down, across = (32 * powers[:, None]).expand(16, 16), (32 * powers).expand(16, 16)
    options = {"out_dtype": torch.float32, "impl": impl}
    close(hb.linear(varied, plain, **options), down, 1e-5 * down)
    close(hb.linear(plain, varied, **options), across, 1e-5 * across)
    close(hb.linear(varied, varied, **options), down * across / 32, 1e-5 * down * across / 32)


def test_leading_dimensions(rng) -> None:
    x, w = torch.randn(2, 3, 16, 64, generator=rng), hb.quantize(torch.randn(24, 64, generator=rng), TENSOR)
    for fmt, per_matrix in ((TENSOR, False), (TENSOR, True), (ROW, False), (MX, None)):
        q = hb.quantize(x, fmt, **({} if per_matrix is None else {"per_matrix": per_matrix}))
        y = check_linear(q, w, None, torch.float32, "auto")
        equal(y.shape, torch.Size((2, 3, 16, 24)))
        same_bits(hb.linear(q.swizzle(), w.swizzle(), out_dtype=torch.float32), y)
        same_bits(hb.linear(q.swizzle(per_matrix=True), w, out_dtype=torch.float32), y)
    vector = hb.quantize(x[0, 0, 0], TENSOR)
    equal(check_linear(vector, w, None, torch.bfloat16, "auto").shape, torch.Size((24,)))


def test_nothing_to_multiply() -> None:
    x, w, bias = torch.randn(4, 32), torch.randn(8, 32), torch.arange(8.0)
    for empty_x, empty_w in ((x[:0], w), (x, w[:0]), (x[:, :0], w[:, :0])):
        y = hb.linear(hb.quantize(empty_x, ROW), hb.quantize(empty_w, TENSOR), bias[: len(empty_w)])
        equal(y, bias[: len(empty_w)].bfloat16().expand(len(empty_x), len(empty_w)).contiguous())


@pytest.mark.parametrize("pair", ["tensor", "row, row", "MXFP8"])
def test_accumulate(rng, pair: str) -> None:
    x, w = operands(rng, pair, 24, 40, 64)
    bias, start = torch.randn(40, generator=rng), torch.randn(24, 40, generator=rng)
    for given in (None, bias):
        y = hb.linear(x, w, given, out_dtype=torch.float32)
        for buffer in (start.clone(), start.mT.contiguous().mT, torch.cat([start, start], 1)[:, :40]):
            got = hb.linear(x, w, given, accumulate_into=buffer)
            equal(got.data_ptr(), buffer.data_ptr())
            same_bits(buffer.contiguous(), start + y)
    cube = torch.zeros(2, 12, 40)
    y = hb.linear(hb.quantize(torch.ones(2, 12, 64), TENSOR), w, accumulate_into=cube)
    equal((y.shape, y.data_ptr()), (cube.shape, cube.data_ptr()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_operand_in_high_precision(rng, dtype: torch.dtype) -> None:
    plain = torch.randn(6, 64, generator=rng).to(dtype)
    for fmt in (TENSOR, ROW, TILES, *([] if dtype == torch.float16 else [MX])):
        q = hb.quantize(torch.randn(6, 64, generator=rng), fmt)
        check_linear(plain, q, None, torch.float32, "auto")
        check_linear(q, plain, None, torch.float32, "auto")
    y = hb.linear(plain.requires_grad_(), hb.quantize(torch.ones(6, 64), TENSOR))
    equal(y.requires_grad, False)


def test_inputs_stay_as_they_were(rng) -> None:
    x, w = operands(rng, "row, row", 8, 8, 32)
    bias = torch.randn(8, generator=rng)
    before = [t.clone() for t in (x.packed, x.tensor_scale, w.packed, w.tensor_scale, bias)]
    hb.linear(x, w, bias)
    for a, b in zip((x.packed, x.tensor_scale, w.packed, w.tensor_scale, bias), before, strict=True):
        same_bits(a, b)


def test_autocast_changes_nothing(rng) -> None:
    x, w = operands(rng, "row, row", 16, 16, 256)
    y = hb.linear(x, w, out_dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        same_bits(hb.linear(x, w, out_dtype=torch.float32), y)


def test_transposed_views(rng) -> None:
    a, b = torch.randint(-8, 9, (48, 32), generator=rng), torch.randint(-8, 9, (48, 16), generator=rng)
    got = ops.scaled_matmul(a.bfloat16().mT, b.bfloat16().mT, None, None, out_dtype=torch.float32)
    same_bits(got, (a.float().mT @ b.float()))


# --- grouped --------------------------------------------------------------------------------------------------------

OFFSETS = {"some": [3, 3, 10, 16], "nobody": [0, 0, 0, 0], "all to the last": [0, 0, 0, 16], "rows left": [2, 4, 6, 9]}


def grouped(x: Any, w: Any, ends: list[int], bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(result in float64, budget), expert by expert."""
    xs, ws = sums(x), sums(w)
    exact, error = torch.zeros(xs.shape[0], ws.shape[1]).double(), torch.zeros(xs.shape[0], ws.shape[1]).double()
    for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        part = slice(start, end)
        exact[part], error[part] = budget(xs[part], ws[e], None if bias is None else bias[e], dtype)
    return exact, error


def expert_operands(rng: torch.Generator, x_fmt: Any, w_fmt: Any, device: str = "cpu") -> tuple[Any, Any]:
    x, w = torch.randn(16, 64, generator=rng), torch.randn(4, 24, 64, generator=rng)
    w = w * torch.arange(1, 5)[:, None, None]
    options = {} if isinstance(w_fmt, hb.MXFP8) else {"per_matrix": True}
    return hb.quantize(x.to(device), x_fmt), hb.quantize(w.to(device), w_fmt, **options)


GROUPED = {"tensor": (TENSOR, TENSOR), "rows": (ROW, ROW), "tiles": (ROW, TILES), "MXFP8": (MX, MX)}


@pytest.mark.parametrize("ends", OFFSETS)
@pytest.mark.parametrize("pair", GROUPED)
def test_grouped(rng, pair: str, ends: str) -> None:
    x, w = expert_operands(rng, *GROUPED[pair])
    offsets = torch.tensor(OFFSETS[ends], dtype=torch.int32)
    for dtype in DTYPES:
        for bias in (None, torch.randn(4, 24, generator=rng)):
            for impl in ("auto", "reference"):
                exact, error = grouped(x, w, OFFSETS[ends], bias, dtype)
                y = hb.grouped_linear(x, w, offsets, bias, out_dtype=dtype, impl=impl)
                equal((y.dtype, y.shape), (dtype, exact.shape))
                close(y, exact, error)


def test_grouped_without_tokens_or_with_one_scale(rng) -> None:
    x, w = expert_operands(rng, TENSOR, TENSOR)
    none = hb.grouped_linear(hb.quantize(torch.empty(0, 64), ROW), w, torch.zeros(4, dtype=torch.int32))
    equal(none, torch.empty(0, 24, dtype=torch.bfloat16))
    w = hb.quantize(torch.randn(4, 24, 64, generator=rng), TENSOR)
    y = hb.grouped_linear(x, w, torch.tensor([4, 8, 12, 16], dtype=torch.int32), out_dtype=torch.float32)
    close(y, *grouped(x, w, [4, 8, 12, 16], None, torch.float32))


# --- refused --------------------------------------------------------------------------------------------------------

X, W = hb.quantize(torch.ones(16, 64), ROW), hb.quantize(torch.ones(16, 64), TENSOR)
F32 = torch.float32
SHAPE_ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "no scale": (lambda: hb.linear(X.replace(tensor_scale=None), W), "x.tensor_scale is NoneType"),
    "scale of another dtype": (lambda: hb.linear(X.replace(tensor_scale=X.tensor_scale.double()), W), "torch.float64"),
    "scale of another size": (lambda: hb.linear(X.replace(tensor_scale=X.tensor_scale[:8]), W), r"\(16,\)"),
    "scale of another side": (lambda: hb.linear(X.replace(tensor_scale=X.tensor_scale[None]), W), r"\(1, 16\)"),
    "column scale": (lambda: hb.linear(X.replace(tensor_scale=X.tensor_scale[:, None]), W), r"\(16, 1\)"),
    "a row format with one scale": (lambda: hb.linear(X.replace(tensor_scale=torch.tensor(1.0)), W), "scaling='row'"),
    "a tensor format with rows": (lambda: hb.linear(X, W.replace(tensor_scale=torch.ones(16))), "w.tensor_scale"),
    "a scale for MXFP8": (
        lambda: hb.linear(hb.quantize(torch.ones(16, 64), MX).replace(tensor_scale=torch.ones(())), W),
        "MXFP8 has none",
    ),
    "block scales of another shape": (lambda: hb.linear(X.replace(block_scale=X.block_scale.mT), W), "block scales"),
    "block scales as bytes": (lambda: hb.linear(X.replace(block_scale=X.block_scale.view(torch.uint8)), W), "uint8"),
    "swizzled, and not said": (lambda: hb.linear(X.swizzle().replace(swizzled=False), W), "swizzled=True"),
    "other columns": (lambda: hb.linear(X, hb.quantize(torch.ones(16, 32), TENSOR)), "last dimensions must be equal"),
    "w of three dimensions": (lambda: hb.linear(X, hb.quantize(torch.ones(2, 16, 64), TENSOR)), r"w is \(N, K\)"),
    "not a tensor": (lambda: hb.linear(None, W), "x is NoneType"),
    "integers": (lambda: hb.linear(torch.ones(2, 64, dtype=torch.int32), W), "torch.int32"),
    "out_dtype": (lambda: hb.linear(X, W, out_dtype=torch.float64), "out_dtype=torch.float64"),
    "bias of another size": (lambda: hb.linear(X, W, torch.ones(15)), r"shape \(16,\)"),
    "bias of another dtype": (lambda: hb.linear(X, W, torch.ones(16, dtype=torch.int32)), "bias is torch.int32"),
    "bias as a row": (lambda: hb.linear(X, W, torch.ones(1, 16)), r"\(1, 16\)"),
    "buffer of another dtype": (lambda: hb.linear(X, W, accumulate_into=torch.ones(16, 16).bfloat16()), "bfloat16"),
    "buffer of another shape": (lambda: hb.linear(X, W, accumulate_into=torch.ones(16)), "accumulate_into is"),
    "buffer that is no matrix": (
        lambda: hb.linear(
            hb.quantize(torch.ones(2, 3, 64), TENSOR), W, accumulate_into=torch.ones(3, 2, 16).transpose(0, 1)
        ), "make it contiguous",
    ),
    "a_scale": (lambda: ops.scaled_matmul(torch.ones(4, 8), torch.ones(4, 8), torch.ones(4, 1), None), r"\(4, 1\)"),
    "b_scale": (lambda: ops.scaled_matmul(torch.ones(4, 8), torch.ones(6, 8), None, torch.ones(4)), r"\(6,\)"),
    "b_scale as a number": (lambda: ops.scaled_matmul(torch.ones(4, 8), torch.ones(6, 8), None, 1.0), "is float"),
    "two dtypes": (lambda: ops.scaled_matmul(torch.ones(4, 8), torch.ones(6, 8).half(), None, None), "one dtype"),
    "a vector": (lambda: ops.scaled_matmul(torch.ones(8), torch.ones(6, 8), None, None), r"\(rows, K\)"),
    "offsets as int64": (lambda: grouped_call(torch.tensor([4, 8])), "torch.int64"),
    "too few offsets": (lambda: grouped_call(torch.tensor([8], dtype=torch.int32)), r"shape \(2,\)"),
    "offsets that decrease": (lambda: grouped_call(torch.tensor([8, 4], dtype=torch.int32)), "not decreasing"),
    "offsets beyond the rows": (lambda: grouped_call(torch.tensor([8, 17], dtype=torch.int32)), "at most 16 rows"),
    "negative offsets": (lambda: grouped_call(torch.tensor([-8, 16], dtype=torch.int32)), "not decreasing"),
    "grouped bias": (lambda: grouped_call(torch.tensor([8, 16], dtype=torch.int32), torch.ones(16)), r"\(2, 16\)"),
    "x of three dimensions": (
        lambda: hb.grouped_linear(hb.quantize(torch.ones(1, 4, 64), TENSOR), EXPERTS, torch.tensor([4])), "reshape",
    ),
    "block scales of another matrix": (
        lambda: ops.block_scaled_matmul(X.packed, X.block_scale, W.packed, W.swizzle().block_scale, None, None),
        "a_block_scale",
    ),
}  # fmt: skip
EXPERTS = hb.quantize(torch.ones(2, 16, 64), TENSOR, per_matrix=True)


def grouped_call(offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    return hb.grouped_linear(X, EXPERTS, offsets, bias)


FORMAT_ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "x transformed": (lambda: hb.linear(hb.quantize(torch.ones(16, 64), RHT), W), "x went through the Hadamard"),
    "w transformed": (lambda: hb.linear(torch.ones(16, 64), hb.quantize(torch.ones(16, 64), RHT)), "w went through"),
    "transformed and MXFP8": (
        lambda: hb.linear(hb.quantize(torch.ones(16, 64), MX), hb.quantize(torch.ones(16, 64), RHT)), "w went through",
    ),
    "neither quantized": (lambda: hb.linear(torch.ones(16, 64), torch.ones(16, 64)), "neither x nor w"),
    "MXFP8 and float16": (lambda: hb.linear(torch.ones(1, 64).half(), hb.quantize(torch.ones(16, 64), MX)), "bfloat16"),
    "implementation": (lambda: hb.linear(X, W, impl="fast"), "impl='fast'"),
    "buffer with a gradient": (
        lambda: hb.linear(X, W, accumulate_into=torch.ones(16, 16, requires_grad=True)), "requires a gradient",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPE_ERRORS)
def test_shape_errors(name: str) -> None:
    call, message = SHAPE_ERRORS[name]
    with pytest.raises(hb.ShapeError, match=message):
        call()


@pytest.mark.parametrize("name", FORMAT_ERRORS)
def test_format_errors(name: str) -> None:
    call, message = FORMAT_ERRORS[name]
    with pytest.raises(hb.FormatError, match=re.escape(message)):
        call()


# --- torch.compile --------------------------------------------------------------------------------------------------

COMPILED: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: hb.linear(hb.quantize(x, ROW), hb.quantize(x.flip(0), TENSOR), x[0, : len(x)]),
    "accumulate": lambda x: hb.linear(
        hb.quantize(x, ROW), hb.quantize(x, ROW), accumulate_into=torch.ones(len(x), len(x), device=x.device)
    ),
    "grouped": lambda x: hb.grouped_linear(
        hb.quantize(x, ROW), hb.quantize(x.view(2, -1, x.shape[1]), TENSOR, per_matrix=True),
        torch.tensor([3, len(x)], dtype=torch.int32, device=x.device),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(rng, name: str) -> None:
    x = torch.randn(32, 64, generator=rng)
    same_bits(torch.compile(COMPILED[name], fullgraph=True, backend="aot_eager")(x), COMPILED[name](x))


INPUTS: dict[str, tuple[Callable[..., Any], Callable[[Tensor], tuple[Any, ...]]]] = {
    "linear": (hb.linear, lambda x: (hb.quantize(x, ROW), hb.quantize(x.flip(0), TENSOR))),
    "linear swizzled": (hb.linear, lambda x: (hb.quantize(x, TENSOR, swizzle=True), hb.quantize(x, ROW))),
    "linear mxfp8": (hb.linear, lambda x: (hb.quantize(x, MX), hb.quantize(x, MX))),
    "weight": (lambda x, w: hb.linear(hb.quantize(x, ROW), w), lambda x: (x, hb.quantize(x, TENSOR))),
    "weight only": (hb.linear, lambda x: (x.bfloat16(), hb.quantize(x, TENSOR))),
    "grouped": (
        hb.grouped_linear,
        lambda x: (
            hb.quantize(x, ROW), hb.quantize(x.view(2, -1, x.shape[1]), TENSOR, per_matrix=True),
            torch.tensor([3, len(x)], dtype=torch.int32),
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INPUTS)
def test_compiled_with_quantized_inputs(rng, name: str) -> None:
    function, make = INPUTS[name]
    inputs = make(torch.randn(32, 64, generator=rng))
    same_bits(torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs), function(*inputs))


def test_compiled_again_for_another_format(rng) -> None:
    compiled = torch.compile(hb.linear, fullgraph=True, backend="aot_eager")
    x = torch.randn(32, 64, generator=rng)
    for fmt in (TENSOR, ROW, MX, RHT):
        q = hb.quantize(x, fmt)
        same_bits(compiled(q, q), hb.linear(q, q))


def test_opcheck() -> None:
    a, b, buffer = torch.randn(4, 16), torch.randn(6, 16), torch.zeros(4, 6)
    scales = torch.ones(4), torch.ones(())
    offsets = torch.tensor([2, 4], dtype=torch.int32)
    torch.library.opcheck(custom.scaled_matmul, (a, b, *scales, None, torch.bfloat16, "cpu"))
    torch.library.opcheck(custom.scaled_matmul_accumulate, (a, b, *scales, torch.ones(6), buffer, "cpu"))
    experts = b.view(2, 3, 16)
    torch.library.opcheck(custom.scaled_grouped_matmul, (a, experts, offsets, *scales, None, torch.float16, "cpu"))
