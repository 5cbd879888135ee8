import itertools
from typing import Any

import pytest
import torch

from halfbyte import MXFP8, NVFP4, FormatError, HalfbyteError, ShapeError, UnsupportedError, ops, quantize
from halfbyte.numerics import mxfp8, nvfp4
from halfbyte.ops.copies import prepare_copies

from .check import equal, same_bits, true

X = torch.linspace(-3, 3, 3 * 32).reshape(3, 32)
NV, MX, ROW = NVFP4(), MXFP8(), NVFP4(scaling="row")
STOCHASTIC = NVFP4(rounding="stochastic")
F32 = torch.float32


@pytest.mark.parametrize(
    ("x", "fmt", "options", "error", "message"),
    [
        (
            X.double(),
            NV,
            {},
            ShapeError,
            "torch.float64; quantize takes float32, bfloat16 or float16: convert it first",
        ),
        (X.int(), NV, {}, ShapeError, "convert it first"),
        (X.double(), MX, {}, ShapeError, "convert it first"),
        (torch.tensor(1.0), NV, {}, ShapeError, "at least one dimension"),
        (torch.tensor(1.0), MX, {}, ShapeError, "at least one dimension"),
        (X[:, :20], NV, {}, ShapeError, r"\(3, 20\).* divisible by 16 for NVFP4; pad it, or leave"),
        (X[:, :16], MX, {}, ShapeError, r"\(3, 16\).* divisible by 32 for MXFP8; pad it, or leave"),
        (X.T, NV, {}, ShapeError, "divisible by 16"),
        (X[0], NV, {"per_matrix": True}, ShapeError, r"needs at least 2 dimensions; x has shape \(32,\)"),
        (X, STOCHASTIC, {}, FormatError, r"needs rng=\(seed, offset\)"),
        (X, NV, {"rng": (1, 2)}, FormatError, "only for rounding='stochastic'"),
        (X, STOCHASTIC, {"rng": (1, 2), "first_block": -1}, FormatError, "first_block=-1: must be an integer"),
        (X, STOCHASTIC, {"rng": (1,)}, FormatError, "two integers of 64 bits"),
        (X, STOCHASTIC, {"rng": 1}, FormatError, "two integers of 64 bits"),
        (
            X,
            STOCHASTIC,
            {"rng": torch.zeros(2)},
            FormatError,
            r"torch.float32 of shape \(2,\) on cpu; needs torch.int64",
        ),
        (X, STOCHASTIC, {"rng": torch.zeros(3, dtype=torch.int64)}, FormatError, r"needs torch.int64 \(2,\)"),
        (X, NV, {"rng": torch.zeros(2, dtype=torch.int64)}, FormatError, "only for rounding='stochastic'"),
        (X, NV, {"first_block": 3}, FormatError, "only for rounding='stochastic'"),
        (X, NVFP4, {}, FormatError, r"needs an NVFP4\(...\) or MXFP8"),
        (X, "nvfp4", {}, FormatError, r"fmt='nvfp4'"),
        ([1.0] * 16, NV, {}, ShapeError, "x is list"),
        (X, NV, {"amax": 3.0}, ShapeError, r"torch.tensor\(3.0\)"),
        (X, NV, {"amax": torch.tensor(1.0).double()}, ShapeError, r"needs torch.float32 of shape \(\)"),
        (X, NV, {"amax": torch.ones(3)}, ShapeError, r"shape \(3,\); needs torch.float32 of shape \(\)"),
        (X, ROW, {"amax": torch.ones(3, 1)}, ShapeError, r"needs torch.float32 of shape \(3,\), or one value of shape"),
        (X[None], NV, {"amax": torch.ones(3), "per_matrix": True}, ShapeError, r"of shape \(1,\)"),
        (X, NV, {"amax": torch.empty((), device="meta")}, ShapeError, r"amax is on meta, x on cpu; move one"),
        (X, NV, {"impl": "fast"}, FormatError, "impl='fast': choose one of 'auto', 'reference'"),
        (X, MX, {"impl": "fast"}, FormatError, "impl='fast': choose one of"),
        (X, NV, {"impl": "triton"}, UnsupportedError, "impl='triton'"),
        (X, MX, {"impl": "triton"}, UnsupportedError, "impl='triton'"),
        (X, MX, {"amax": torch.tensor(1.0)}, FormatError, "leave amax, per_matrix and rng out"),
        (X, MX, {"per_matrix": True}, FormatError, "leave amax, per_matrix and rng out"),
        (X, MX, {"rng": (1, 2)}, FormatError, "leave amax, per_matrix and rng out"),
        (X, MX, {"first_block": 1}, FormatError, "no tensor scale and rounds to nearest"),
    ],
)
def test_refusals_name_the_remedy(x: torch.Tensor, fmt: Any, options: dict, error: Any, message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        quantize(x, fmt, **options)
    true(isinstance(caught.value, HalfbyteError), "one base for all")
    builtin = RuntimeError if isinstance(caught.value, UnsupportedError) else ValueError
    true(isinstance(caught.value, builtin), f"also a {builtin.__name__}")


@pytest.mark.parametrize("impl", ["fast", "triton"])
def test_decoding_refuses_an_impl_that_cannot_run(impl: Any) -> None:
    error = FormatError if impl == "fast" else UnsupportedError
    for fmt in (NV, MX):
        with pytest.raises(error, match=f"impl='{impl}'"):
            quantize(X, fmt).dequantize(impl=impl)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize(
    ("fmt", "options"),
    [
        (NV, {}),
        (NV, {"per_matrix": True}),
        (ROW, {}),
        (STOCHASTIC, {"rng": (3, 4), "first_block": 5}),
        (STOCHASTIC, {"rng": torch.tensor([-3, 4])}),
    ],
    ids=["tensor", "per_matrix", "row", "stochastic", "words of a tensor"],
)
def test_nvfp4_equals_numerics(impl: Any, fmt: NVFP4, options: dict) -> None:
    x = torch.stack((X, 2 * X))
    for got, want in zip(
        ops.quantize_nvfp4(x, fmt, impl=impl, **options), nvfp4.quantize(x, fmt, **options), strict=True
    ):
        same_bits(got, want)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_mxfp8_equals_numerics(impl: Any) -> None:
    for got, want in zip(ops.quantize_mxfp8(X, MX, impl=impl), mxfp8.quantize(X), strict=True):
        same_bits(got, want)


@pytest.mark.parametrize(
    ("fmt", "per_matrix", "amax"),
    [
        (NV, False, torch.tensor(2.0)),
        (NV, True, torch.tensor([2.0, 5.0])),
        (NV, True, torch.tensor(2.0)),
        (ROW, False, torch.linspace(1, 2, 6).reshape(2, 3)),
        (ROW, False, torch.tensor(2.0)),
    ],
)
def test_amax_from_outside(fmt: NVFP4, per_matrix: bool, amax: torch.Tensor) -> None:
    x = torch.stack((X, 2 * X))
    q = ops.quantize_nvfp4(x, fmt, amax=amax, per_matrix=per_matrix)
    equal(q.amax, amax.expand(q.amax.shape))
    equal(q.tensor_scale, 1 / (torch.tensor(2688.0) / amax).expand(q.amax.shape))  # 2688 / amax would round twice


def test_own_amax_from_outside_changes_nothing() -> None:
    for fmt, per_matrix in itertools.product((NV, ROW, NVFP4(hadamard=True)), (False, True)):
        x = torch.stack((X, 2 * X))
        own = ops.quantize_nvfp4(x, fmt, per_matrix=per_matrix)
        again = ops.quantize_nvfp4(x, fmt, per_matrix=per_matrix, amax=own.amax)
        for got, want in zip(again, own, strict=True):
            same_bits(got, want)


@pytest.mark.parametrize("fmt", [NV, ROW, STOCHASTIC, NVFP4(block=(16, 16), hadamard=True), MX], ids=repr)
def test_the_input_is_never_changed(fmt: Any) -> None:
    x, amax = X.clone(), torch.tensor(1.0)
    options = {} if fmt == MX else {"amax": amax, "rng": (1, 2) if fmt == STOCHASTIC else None}
    q = quantize(x, fmt, **options)
    before = [t.clone() for t in (q.packed.view(torch.uint8), q.block_scale.view(torch.uint8))]
    q.dequantize()
    same_bits(x, X)
    same_bits(amax, torch.tensor(1.0))
    for got, want in zip((q.packed, q.block_scale), before, strict=True):
        same_bits(got.view(torch.uint8), want)


@pytest.mark.parametrize("impl", ["auto", "reference", "cpu"])
def test_quantize_with_values(impl: str) -> None:
    for fmt, options in ((ROW, {}), (STOCHASTIC, {"rng": (1, 2), "first_block": 3}), (NV, {"amax": torch.tensor(2.0)})):
        q, values = ops.quantize_with_values(X.bfloat16(), fmt, impl=impl, **options)
        wanted = nvfp4.quantize(X.bfloat16(), fmt, **options)
        for actual, expected in zip(q, wanted, strict=True):
            same_bits(actual, expected)
        same_bits(values, nvfp4.decode_without_tensor_scale(wanted.packed, wanted.block_scale).bfloat16())
    with pytest.raises(FormatError, match="needs rng"):
        ops.quantize_with_values(X, STOCHASTIC, impl=impl)


def test_words_of_a_tensor_are_the_numbers_with_their_bits() -> None:
    words = torch.tensor([-3, 2**40 + 7])
    wanted = nvfp4.quantize(X, STOCHASTIC, rng=(2**64 - 3, 2**40 + 7))
    for impl in ("reference", "cpu"):
        for got, want in zip(ops.quantize_nvfp4(X, STOCHASTIC, impl=impl, rng=words), wanted, strict=True):
            same_bits(got, want)


def test_prepared_copies(rng: torch.Generator) -> None:
    """Whatever the alignment, the strides and the dtype, and again when the sources have changed."""
    flat = torch.zeros(4096, dtype=torch.uint8)
    sources = [
        torch.randn(6, 10, generator=rng), torch.randn(5, generator=rng).bfloat16(), torch.randn((), generator=rng),
        torch.randint(255, (7,), generator=rng, dtype=torch.uint8), torch.randn(4, 6, generator=rng).T, torch.empty(0),
    ]  # fmt: skip
    targets = [torch.zeros(6, 20)[:, ::2], flat[2:12].view(torch.bfloat16), torch.ones(()), flat[101:108],
               torch.zeros(4, 6).T, torch.empty(0)]  # fmt: skip
    copy = prepare_copies(zip(targets, sources, strict=True))
    for _ in range(2):
        copy()
        for target, source in zip(targets, sources, strict=True):
            same_bits(target, source)
        for source in sources:
            source += 1
