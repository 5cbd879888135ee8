"""Lists and stacks of tensors in one launch, against the contract; run as `test_triton_kernels.py` is."""

import itertools

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from halfbyte.errors import UnsupportedError
from halfbyte.formats import NVFP4
from halfbyte.kernels import many, quantize, stacked
from halfbyte.numerics import nvfp4

from ..check import equal, true
from .test_triton_kernels import DEVICE, DTYPES, INTERPRETING, check, poisoned_memory, pytestmark  # noqa: F401

FORMATS = [NVFP4(), NVFP4(hadamard=True), NVFP4(scale_rule="four_over_six")]
SHAPES = [(40, 32), (16, 48), (16, 48), (3, 5, 16), (16,), (33, 64)]
if not INTERPRETING:
    SHAPES += [(700, 1040), (2048, 1024), (2048, 1024), (1, 65536)]


def tensors(rng: torch.Generator, dtype: torch.dtype) -> list[Tensor]:
    """One of each shape, each of another magnitude."""
    return [torch.randn(shape, generator=rng).mul(2.0 ** (7 - i)).to(dtype) for i, shape in enumerate(SHAPES)]


def together(xs: list[Tensor], fmt: NVFP4) -> Tensor:
    """The maximum of all; NaN wins."""
    return torch.stack([nvfp4.quantize(x, fmt).amax for x in xs]).amax()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_each_as_the_contract(fmt: NVFP4, rng: torch.Generator) -> None:
    dtypes = DTYPES if fmt == NVFP4() and not INTERPRETING else (DTYPES[FORMATS.index(fmt)],)
    for dtype, nan in itertools.product(dtypes, (False, True)):
        if fmt.hadamard and nan:
            continue  # what the transform makes of NaN is outside the contract
        xs = tensors(rng, dtype)
        if nan:
            xs[2][3, 5] = float("nan")
        on_device = [x.to(DEVICE) for x in xs]
        for x, q in zip(xs, many.quantize_many(on_device, fmt), strict=True):
            check(q, nvfp4.quantize(x, fmt), f"own {dtype} {tuple(x.shape)}")
        amax = together(xs, fmt)
        for x, q in zip(xs, many.quantize_many(on_device, fmt, shared_amax=True), strict=True):
            check(q, nvfp4.quantize(x, fmt, amax=amax), f"shared {dtype} {tuple(x.shape)}")
        for x, q in zip(xs, many.quantize_many(on_device, fmt, amax=amax.to(DEVICE)), strict=True):
            check(q, nvfp4.quantize(x, fmt, amax=amax), f"one given {dtype} {tuple(x.shape)}")
        given = torch.linspace(0.1, 7, len(xs))
        for x, a, q in zip(xs, given, many.quantize_many(on_device, fmt, amax=given.to(DEVICE)), strict=True):
            check(q, nvfp4.quantize(x, fmt, amax=a), f"given {dtype} {tuple(x.shape)}")


def test_more_than_a_table_holds(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many, "SIZES", (4,))
    xs = [torch.randn(17, 16 * (1 + i % 3), generator=rng).bfloat16() for i in range(9)]
    on_device = [x.to(DEVICE) for x in xs]
    amax = together(xs, NVFP4())
    results = many.quantize_many(on_device, NVFP4()), many.quantize_many(on_device, NVFP4(), shared_amax=True)
    for x, own, shared in zip(xs, *results, strict=True):
        check(own, nvfp4.quantize(x, NVFP4()), "own")
        check(shared, nvfp4.quantize(x, NVFP4(), amax=amax), "shared")


def test_refuses_what_it_cannot_take() -> None:
    x = torch.zeros(32, 32, device=DEVICE)
    true(many.supports([x, x], NVFP4()), "two equal tensors")
    for xs in ([], [x, x.half()], [x.mT[:, :16]], [x[:0]], [x[:, :8].contiguous()], [x.view(-1)[1:17]]):
        true(not many.supports(xs, NVFP4()), f"{[tuple(t.shape) for t in xs]}")
        with pytest.raises(UnsupportedError, match="one by one"):
            many.quantize_many(xs, NVFP4())
    for fmt in (NVFP4(block=(16, 16)), NVFP4(scaling="row"), NVFP4(rounding="stochastic")):
        true(not many.supports([x], fmt), str(fmt))


@pytest.mark.skipif(INTERPRETING, reason="CUDA only")
def test_graph_capture(rng: torch.Generator) -> None:
    xs = [x.to(DEVICE) for x in tensors(rng, torch.bfloat16)]
    many.quantize_many(xs, NVFP4())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = many.quantize_many(xs, NVFP4())
    for _ in range(2):
        for x in xs:
            x.normal_()
        graph.replay()
        for x, q in zip(xs, results, strict=True):
            check(q, nvfp4.quantize(x.cpu(), NVFP4()), f"{tuple(x.shape)}")


@pytest.mark.parametrize("shape", [(7, 64, 48), (300, 16, 16)], ids=str)
def test_stacks_however_far_ahead(
    shape: tuple[int, ...], rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn((5, *shape[1:]) if INTERPRETING else shape, generator=rng).bfloat16()
    wanted = nvfp4.quantize(x, NVFP4(), per_matrix=True)
    monkeypatch.setattr(quantize, "SMALL", 0)  # these would fit one program each
    for ahead in (1, 3 * 64 * 48 * 2, 12 << 20):  # one matrix ahead, a few, all
        monkeypatch.setattr(stacked, "AHEAD", ahead)
        check(quantize.quantize(x.to(DEVICE), NVFP4(), per_matrix=True), wanted, f"{ahead}")


@pytest.mark.skipif(INTERPRETING, reason="it is slow")
def test_a_maximum_of_too_many_tiles_for_a_word_each(rng: torch.Generator) -> None:
    x = torch.randn(2, 2049, 8192, generator=rng).bfloat16()
    wanted = nvfp4.quantize(x, NVFP4(), per_matrix=True)
    check(quantize.quantize(x.to(DEVICE), NVFP4(), per_matrix=True), wanted, "513 tiles")


@pytest.mark.parametrize("shape", [(33, 16), (24, 2064)], ids=str)
def test_one_matrix_in_one_launch(
    shape: tuple[int, int], rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(shape, generator=rng).bfloat16()
    wanted = nvfp4.quantize(x, NVFP4())
    monkeypatch.setattr(quantize, "SMALL", 0)
    launched: list[object] = []
    into = stacked.quantize_into
    monkeypatch.setattr(stacked, "quantize_into", lambda *args: (launched.append(args), into(*args)))
    check(quantize.quantize(x.to(DEVICE), NVFP4()), wanted, "as a stack of one")
    monkeypatch.setattr(quantize, "CACHED", 0)
    check(quantize.quantize(x.to(DEVICE), NVFP4()), wanted, "by the maximum first")
    equal(len(launched), 1)
