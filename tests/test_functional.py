"""What is made of quantize: both directions at once, lists, decoded values, swizzled scales."""

from typing import Any

import pytest
import torch
from torch import Tensor

import halfbyte
from halfbyte import (
    MXFP8,
    NVFP4,
    FormatError,
    QuantizedTensor,
    ShapeError,
    UnsupportedError,
    fake_quantize,
    fake_quantize_unscaled,
    quantize,
    quantize_many,
    quantize_transpose,
    swizzle,
    unswizzle,
)
from halfbyte.numerics import nvfp4

from .check import equal, same_bits, true

NV, MX, ROW, RHT = NVFP4(), MXFP8(), NVFP4(scaling="row"), NVFP4(hadamard=True)
STOCHASTIC, SQUARE = NVFP4(rounding="stochastic"), NVFP4(block=(16, 16))
IMPLS: list[Any] = ["reference", "cpu", "auto"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def same(actual: QuantizedTensor, expected: QuantizedTensor) -> None:
    for name in ("packed", "block_scale", "tensor_scale", "amax"):
        a, e = getattr(actual, name), getattr(expected, name)
        if e is None:
            equal(a, None, name)
        else:
            (equal if e.dtype == torch.float32 else same_bits)(a, e, name)  # NaN has no one pattern
    equal((actual.format, actual.swizzled), (expected.format, expected.swizzled))


@pytest.fixture
def xs(rng: torch.Generator) -> list[Tensor]:
    shapes = [(3, 32), (64,), (2, 5, 96), (0, 32), (48, 16)]
    return [torch.randn(shape, generator=rng).bfloat16() * 2.0**i for i, shape in enumerate(shapes)]


# --- quantize_transpose ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(64, 96), (3, 32, 64), (0, 32), (32, 0)])
@pytest.mark.parametrize(
    ("fmt", "transposed"), [(NV, None), (NV, RHT), (ROW, SQUARE), (SQUARE, NV), (MX, None), (MX, NV), (NV, MX)]
)
def test_transpose_is_two_calls(rng, impl: Any, shape: tuple[int, ...], fmt: Any, transposed: Any) -> None:
    x = torch.randn(shape, generator=rng)
    rows, columns = quantize_transpose(x, fmt, transposed, impl=impl)
    transposed = transposed or fmt
    same(rows, quantize(x, fmt, impl="reference", per_matrix=fmt != MX))
    same(columns, quantize(x.mT, transposed, impl="reference", per_matrix=transposed != MX))


@pytest.mark.parametrize("impl", IMPLS)
def test_transpose_amaxes_and_words(rng, impl: Any) -> None:
    x = torch.randn(2, 32, 64, generator=rng)
    one, many = torch.tensor(3.0), torch.tensor([2.0, 3.0])
    rows, columns = quantize_transpose(x, NV, RHT, amax=many, transposed_amax=one, impl=impl)
    same(rows, quantize(x, NV, amax=many, per_matrix=True))
    same(columns, quantize(x.mT, RHT, amax=one, per_matrix=True))
    rows, columns = quantize_transpose(x, STOCHASTIC, rng=(1, 2), transposed_rng=(1, 3), impl=impl)
    same(rows, quantize(x, STOCHASTIC, rng=(1, 2), per_matrix=True))
    same(columns, quantize(x.mT, STOCHASTIC, rng=(1, 3), per_matrix=True))


X = torch.linspace(-3, 3, 32 * 64).reshape(32, 64)


@pytest.mark.parametrize(
    ("x", "formats", "options", "error", "message"),
    [
        (X[0], [NV], {}, ShapeError, r"at least 2 dimensions; x has shape \(64,\): use x\[None\]"),
        (X[0], [MX], {}, ShapeError, r"at least 2 dimensions; x has shape \(64,\): use x\[None\]"),
        (X[:20], [NV], {}, ShapeError, r"x.mT has shape \(64, 20\): the last dimension must be divisible by 16"),
        (X[:, :20], [NV], {}, ShapeError, r"x has shape \(32, 20\): the last dimension must be divisible by 16"),
        ([1.0], [NV], {}, ShapeError, "x is list"),
        (X, ["nvfp4"], {}, FormatError, "fmt='nvfp4'"),
        (X, [NV, "nvfp4"], {}, FormatError, "transposed_fmt='nvfp4'"),
        (X, [NV, STOCHASTIC], {}, FormatError, r"transposed_rng=None: rounding='stochastic' needs transposed_rng=\("),
        (X, [NV], {"transposed_rng": (1, 2)}, FormatError, "transposed_rng and first_block are only for"),
        (X, [NV], {"transposed_amax": torch.ones(2)}, ShapeError, r"transposed_amax is torch.float32 of shape \(2,\)"),
        (X, [NV], {"amax": 1.0}, ShapeError, "amax is float"),
        (X, [NV], {"impl": "triton"}, UnsupportedError, "impl='triton'"),
        (X, [MX, NV], {"amax": torch.tensor(1.0)}, FormatError, "MXFP8 has no tensor scale"),
    ],
)
def test_transpose_refusals(x: Any, formats: list, options: dict, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        quantize_transpose(x, *formats, **options)


# --- quantize_many --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("fmt", [NV, ROW, RHT, SQUARE, NVFP4(scale_rule="four_over_six")], ids=str)
def test_many_is_one_by_one(xs: list[Tensor], impl: Any, fmt: NVFP4) -> None:
    for got, x in zip(quantize_many(xs, fmt, impl=impl), xs, strict=True):
        same(got, quantize(x, fmt, impl="reference"))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("fmt", [NV, RHT], ids=str)
def test_many_under_one_maximum(xs: list[Tensor], impl: Any, fmt: NVFP4) -> None:
    amax = torch.stack([quantize(x, fmt).amax for x in xs]).amax()
    for got, x in zip(quantize_many(xs, fmt, impl=impl, shared_amax=True), xs, strict=True):
        same(got, quantize(x, fmt, impl="reference", amax=amax))
    for got, x in zip(quantize_many(xs, fmt, impl=impl, amax=amax), xs, strict=True):
        same(got, quantize(x, fmt, impl="reference", amax=amax))


@pytest.mark.parametrize("impl", IMPLS)
def test_many_with_a_maximum_each(xs: list[Tensor], impl: Any) -> None:
    amax = torch.rand(len(xs)) + 1
    for got, x, a in zip(quantize_many(xs, NV, impl=impl, amax=amax), xs, amax, strict=True):
        same(got, quantize(x, NV, impl="reference", amax=a))


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_wins_in_a_shared_maximum(xs: list[Tensor], impl: Any) -> None:
    xs[2][1, 1, 1] = torch.nan
    for q in quantize_many(xs, NV, impl=impl, shared_amax=True):
        true(q.amax.isnan(), "NaN is the maximum")
        true(bool((q.block_scale.view(torch.uint8) == 0x7F).all()), "under it all scales are NaN")


@pytest.mark.parametrize("impl", IMPLS)
def test_many_of_mxfp8(xs: list[Tensor], impl: Any) -> None:
    for got, x in zip(quantize_many(xs[:4], MX, impl=impl), xs[:4], strict=True):
        same(got, quantize(x, MX, impl="reference"))


def test_nothing_to_quantize() -> None:
    equal(quantize_many([], NV, shared_amax=True), [])
    equal(quantize_many([], MX), [])
    equal(quantize_many((torch.empty(0, 16),), NV, shared_amax=True)[0].amax.item(), 0.0)


@pytest.mark.parametrize(
    ("xs", "fmt", "options", "error", "message"),
    [
        (X, NV, {}, ShapeError, "xs is Tensor; quantize_many takes a list"),
        ([X, X.double()], NV, {}, ShapeError, r"xs\[1\] is torch.float64"),
        ([X, X[:, :20]], NV, {}, ShapeError, r"xs\[1\] has shape \(32, 20\)"),
        ([X, quantize(X, NV)], NV, {}, ShapeError, r"xs\[1\] is QuantizedTensor; quantize takes plain tensors"),
        ([X, X.to("meta")], NV, {}, ShapeError, r"xs\[1\] is on meta, xs\[0\] on cpu"),
        ([X], STOCHASTIC, {}, FormatError, "call quantize, each with its rng"),
        ([X], ROW, {"shared_amax": True}, FormatError, "every row has its own: leave shared_amax out"),
        ([X], NV, {"shared_amax": True, "amax": torch.tensor(1.0)}, FormatError, "amax given: leave shared_amax out"),
        ([X], NV, {"amax": torch.ones(2)}, ShapeError, r"needs torch.float32 of shape \(1,\)"),
        ([X], MX, {"amax": torch.tensor(1.0)}, FormatError, "leave amax and shared_amax out"),
        ([X], MX, {"shared_amax": True}, FormatError, "leave amax and shared_amax out"),
        ([X], "mx", {}, FormatError, "fmt='mx'"),
        ([X], NV, {"impl": "triton"}, UnsupportedError, "impl='triton'"),
    ],
)
def test_many_refusals(xs: Any, fmt: Any, options: dict, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        quantize_many(xs, fmt, **options)


# --- fake_quantize --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("fmt", "options"),
    [
        (NV, {}),
        (NV, {"amax": torch.tensor(1.5)}),
        (NV, {"per_matrix": True}),
        (ROW, {}),
        (RHT, {}),
        (STOCHASTIC, {"rng": (1, 2), "first_block": 7}),
        (NVFP4(scale_rule="four_over_six"), {}),
    ],
    ids=str,
)
def test_fake_quantize(rng, impl: Any, dtype: torch.dtype, fmt: NVFP4, options: dict) -> None:
    x = torch.randn(2, 5, 48, generator=rng).to(dtype)
    q = quantize(x, fmt, impl="reference", **options)
    same_bits(fake_quantize(x, fmt, impl=impl, **options), q.dequantize(dtype, impl="reference"))
    values, tensor_scale = fake_quantize_unscaled(x, fmt, impl=impl, **options)
    same_bits(values, nvfp4.decode_without_tensor_scale(q.packed, q.block_scale).to(dtype))
    same_bits(values, q.dequantize(dtype, unscaled=True, impl=impl))
    same_bits(tensor_scale, q.tensor_scale)


@pytest.mark.parametrize("impl", IMPLS)
def test_fake_quantize_mxfp8(rng, impl: Any) -> None:
    x = torch.randn(5, 64, generator=rng).bfloat16()
    same_bits(fake_quantize(x, MX, impl=impl), quantize(x, MX).dequantize(torch.bfloat16))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 32), (3, 0), (0,)])
def test_fake_quantize_of_nothing(impl: Any, shape: tuple[int, ...]) -> None:
    for fmt in (NV, ROW, MX):
        equal(tuple(fake_quantize(torch.empty(shape), fmt, impl=impl).shape), shape)
    values, scale = fake_quantize_unscaled(torch.empty(shape), NV, impl=impl)
    equal((tuple(values.shape), scale.item()), (shape, 1.0))


def test_unscaled_refusals() -> None:
    with pytest.raises(FormatError, match=r"needs an NVFP4\(...\) value; use fake_quantize for MXFP8"):
        fake_quantize_unscaled(X, MX)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="MXFP8 has no tensor scale to leave out"):
        quantize(X, MX).dequantize(unscaled=True)
    with pytest.raises(FormatError, match="fmt=None"):
        fake_quantize(X, None)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="leave amax"):
        fake_quantize(X, MX, amax=torch.tensor(1.0))


# --- swizzle --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("fmt", [NV, ROW, MX])
@pytest.mark.parametrize("shape", [(64,), (130, 64), (2, 3, 160), (0, 32), (3, 0)])
def test_swizzled_tensors_decode_alike(rng, impl: Any, fmt: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=rng)
    plain, tiled = quantize(x, fmt), quantize(x, fmt, swizzle=True, impl=impl)
    true(tiled.swizzled and tiled.block_scale.dim() == 1, "one matrix, 1-D")
    equal(tiled.block_scale.numel() % 512, 0)
    same_bits(tiled.dequantize(impl=impl), plain.dequantize())
    true(tiled.swizzle() is tiled, "nothing to do")
    if len(shape) > 1:
        each = plain.swizzle(per_matrix=True, impl=impl)
        equal(each.block_scale.shape[:-1], plain.block_scale.shape[:-2])
        same_bits(each.dequantize(impl=impl), plain.dequantize())


@pytest.mark.parametrize("impl", IMPLS)
def test_swizzle_and_back(rng, impl: Any) -> None:
    scale = quantize(torch.randn(3, 40, 96, generator=rng), NV).block_scale
    tiled = swizzle(scale, impl=impl)
    equal(tuple(tiled.shape), (3, 2 * 512))
    same_bits(unswizzle(tiled, 40, 6, impl=impl), scale)
    q = quantize(torch.randn(3, 40, 96, generator=rng), NV, per_matrix=True, swizzle=True, impl=impl)
    equal(tuple(q.block_scale.shape), (3, 2 * 512))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: swizzle(torch.ones(4, 4)), "scale is torch.float32; needs a tensor of one byte per scale"),
        (lambda: swizzle(1), "scale is int"),
        (lambda: swizzle(torch.ones(4, dtype=torch.uint8)), r"shape \(4,\); needs \(…, rows, columns\)"),
        (lambda: unswizzle(torch.ones(512), 4, 4), "swizzled is torch.float32"),
        (lambda: unswizzle(torch.ones(512, dtype=torch.uint8), 4, 5), "4×5 scales take 1024 in the last dimension"),
        (lambda: quantize(X[0], NV).swizzle(per_matrix=True), r"at least 2 dimensions; the tensor has shape \(64,\)"),
    ],
)
def test_swizzle_refusals(call: Any, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        call()


def test_nothing_carries_a_gradient() -> None:
    x = torch.nn.Parameter(X.clone())
    values = [fake_quantize(x, NV), *fake_quantize_unscaled(x, NV), fake_quantize(x, MX)]
    values += [
        q.packed for q in (*quantize_transpose(x, NV), *quantize_many([x], NV), *halfbyte.quantize_transpose(x, MX))
    ]
    true(not any(value.requires_grad for value in values), "constants")
