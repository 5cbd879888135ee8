"""The public functions with impl="triton", on a GPU or in Triton's interpreter: the bytes of the specification."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import halfbyte as hb

from ..check import equal, same_bits
from ..test_compile import CALLS, parts
from .test_triton_kernels import DEVICE, INTERPRETING, poisoned_memory, pytestmark  # noqa: F401

NV, MX, ROW, RHT = hb.NVFP4(), hb.MXFP8(), hb.NVFP4(scaling="row"), hb.NVFP4(hadamard=True)


def compare(got: Any, wanted: Any, what: object) -> None:
    got, wanted = parts(got), parts(wanted)
    equal(len(got), len(wanted))
    for a, e in zip(got, wanted, strict=True):
        same_bits(a.cpu(), e, str(what))


@pytest.mark.parametrize("shape", [(32, 48), (2, 32, 16), (5, 32), (0, 32), (3, 0)], ids=str)
def test_every_function(rng, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=rng).bfloat16()
    y = x.to(DEVICE)
    for fmt in (NV, ROW):
        compare(hb.fake_quantize(y, fmt, impl="triton"), hb.fake_quantize(x, fmt, impl="reference"), fmt)
        got = hb.fake_quantize_unscaled(y, fmt, per_matrix=True, impl="triton")
        compare(got, hb.fake_quantize_unscaled(x, fmt, per_matrix=True, impl="reference"), fmt)
        q = hb.quantize(y, fmt, swizzle=True, impl="triton")
        wanted = hb.quantize(x, fmt, swizzle=True, impl="reference")
        compare(q, wanted, fmt)
        compare(q.dequantize(impl="triton"), wanted.dequantize(impl="reference"), fmt)
        compare(q.dequantize(unscaled=True, impl="triton"), wanted.dequantize(unscaled=True, impl="reference"), fmt)
    if x.shape[-2] % 16 == 0:
        for formats in ((NV,), (ROW, RHT), (RHT, ROW)):
            got = hb.quantize_transpose(y, *formats, impl="triton")
            compare(got, hb.quantize_transpose(x, *formats, impl="reference"), formats)


def test_lists_of_many_shapes(rng) -> None:
    shapes = ((32, 96), (7, 48), (0, 32), (2, 3, 16), (512,))
    xs = [torch.randn(shape, generator=rng).bfloat16() * 2.0**i for i, shape in enumerate(shapes)]
    ys = [x.to(DEVICE) for x in xs]
    amax = torch.linspace(1, 3, len(xs))
    given: list[dict[str, Any]] = [{}, {"amax": amax[0]}, {"amax": amax}]
    for fmt, options in [(f, o) for f in (NV, RHT) for o in [*given, {"shared_amax": True}]] + [(ROW, {})]:
        on_device = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in options.items()}
        wanted = hb.quantize_many(xs, fmt, impl="reference", **options)
        compare(hb.quantize_many(ys, fmt, impl="triton", **on_device), wanted, (fmt, options))
    compare(hb.quantize_many(ys[:1], MX, impl="triton"), hb.quantize_many(xs[:1], MX, impl="reference"), MX)


@pytest.mark.skipif(INTERPRETING, reason="a GPU's default is Triton, a CPU's is not")
@pytest.mark.parametrize("name", CALLS)
def test_by_default_and_compiled(rng, name: str) -> None:
    x = torch.randn(2, 32, 64, generator=rng)
    wanted = CALLS[name](x)
    compare(CALLS[name](x.to(DEVICE)), wanted, name)
    compiled = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")
    compare(compiled(x.to(DEVICE)), wanted, f"{name}, compiled")


@pytest.mark.skipif(INTERPRETING, reason="needs a GPU")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_inductor(rng) -> None:
    def step(x: Tensor) -> Tensor:
        rows, columns = hb.quantize_transpose(x * 2, NV)
        return rows.dequantize() + columns.dequantize().mT + hb.fake_quantize(x, NV)

    x = torch.randn(32, 64, generator=rng).to(DEVICE)
    same_bits(torch.compile(step, fullgraph=True)(x), step(x))
