"""Under torch.compile(fullgraph=True) every operation is one operator, and gives the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode

import halfbyte as hb
from halfbyte import ops
from halfbyte.formats import E4M3_MAX_CHOICES
from halfbyte.numerics import nvfp4
from halfbyte.ops import backends, custom

from .check import equal, same_bits

NV, MX = hb.NVFP4(), hb.MXFP8()
STOCHASTIC, RHT = hb.NVFP4(rounding="stochastic"), hb.NVFP4(hadamard=True)
WORDS = (2**64 - 1, 2**63)


def amax(x: Tensor) -> Tensor:
    return torch.tensor(2.0, device=x.device)


def parts(result: Any) -> list[Tensor]:
    """All tensors in what a call returned."""
    if isinstance(result, Tensor) and not isinstance(result, hb.QuantizedTensor):
        return [result]
    if isinstance(result, hb.QuantizedTensor):
        result = [getattr(result, name) for name in ("packed", "block_scale", "tensor_scale", "amax")]
    return [tensor for part in result if part is not None for tensor in parts(part)]


CALLS: dict[str, Callable[[Tensor], Any]] = {
    "quantize": lambda x: hb.quantize(x, NV),
    "quantize amax": lambda x: hb.quantize(x, NV, amax=amax(x), per_matrix=True),
    "quantize stochastic": lambda x: hb.quantize(x, STOCHASTIC, rng=WORDS, first_block=3),
    "quantize swizzled": lambda x: hb.quantize(x, hb.NVFP4(scaling="row"), swizzle=True),
    "quantize mxfp8": lambda x: hb.quantize(x, MX),
    "dequantize": lambda x: hb.quantize(x, NV).dequantize(torch.bfloat16),
    "dequantize unscaled": lambda x: hb.quantize(x, NV).dequantize(unscaled=True),
    "dequantize swizzled": lambda x: hb.quantize(x, NV, swizzle=True).dequantize(),
    "dequantize mxfp8": lambda x: hb.quantize(x, MX).dequantize(),
    "fake_quantize": lambda x: hb.fake_quantize(x, NV, amax=amax(x)),
    "fake_quantize mxfp8": lambda x: hb.fake_quantize(x, MX),
    "quantize by words of a tensor": lambda x: hb.quantize(x, STOCHASTIC, rng=torch.tensor([3, -4], device=x.device)),
    "fake_quantize_unscaled": lambda x: hb.fake_quantize_unscaled(x, STOCHASTIC, rng=WORDS),
    "quantize_with_values": lambda x: ops.quantize_with_values(x, STOCHASTIC, rng=WORDS, per_matrix=True),
    "quantize_transpose": lambda x: hb.quantize_transpose(x, NV, RHT, transposed_amax=amax(x)),
    "quantize_transpose stochastic": lambda x: hb.quantize_transpose(x, STOCHASTIC, rng=(1, 2), transposed_rng=WORDS),
    "quantize_many": lambda x: hb.quantize_many([x, x[0], 2 * x], NV),
    "quantize_many shared": lambda x: hb.quantize_many([x, x[0], 2 * x], NV, shared_amax=True),
    "quantize_many mxfp8": lambda x: hb.quantize_many([x, x[0]], MX),
    "swizzle": lambda x: hb.unswizzle(hb.swizzle(x.abs().to(torch.uint8)), 32, 64),
}


@pytest.mark.parametrize("name", CALLS)
def test_fullgraph(rng, name: str) -> None:
    x = torch.randn(2, 32, 64, generator=rng)
    compiled = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")
    got, wanted = parts(compiled(x)), parts(CALLS[name](x))
    equal(len(got), len(wanted))
    for a, e in zip(got, wanted, strict=True):
        same_bits(a, e, name)


F, S = custom.spell(NV), custom.spell(STOCHASTIC)
SEARCH = custom.spell(hb.NVFP4(scale_rule="search"))
X = torch.linspace(-3, 3, 2 * 32 * 64).reshape(2, 32, 64)
Q = nvfp4.quantize(X, NV)
OPCHECKS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "quantize_nvfp4": (custom.quantize_nvfp4, (X, None, F, False, None, 0, None, None)),
    "quantize_nvfp4 importance": (
        custom.quantize_nvfp4,
        (X, None, SEARCH, False, None, 0, torch.rand(X.shape[-1]), None),
    ),
    "quantize_nvfp4 per matrix": (custom.quantize_nvfp4, (X, amax(X), S, True, torch.tensor([1, -1]), 5, None, None)),
    "quantize_nvfp4 transposed": (custom.quantize_nvfp4, (X.mT, None, F, False, None, 0, None, None)),
    "quantize_mxfp8": (custom.quantize_mxfp8, (X,)),
    "quantize_mxfp8 transposed": (custom.quantize_mxfp8, (X.mT,)),
    "dequantize_nvfp4": (custom.dequantize_nvfp4, (*Q[:3], torch.float16)),
    "dequantize_nvfp4 unscaled": (
        custom.dequantize_nvfp4,
        (*Q[:2], None, torch.float32),
    ),
    "dequantize_nvfp4 strided": (
        custom.dequantize_nvfp4,
        (*(t.mT.contiguous().mT for t in Q[:2]), Q[2], torch.float32),
    ),
    "dequantize_mxfp8": (custom.dequantize_mxfp8, (*custom.quantize_mxfp8(X, "cpu"), torch.bfloat16)),
    "fake_quantize": (custom.fake_quantize, (X, None, F, False, True, None, 0)),
    "fake_quantize transposed": (custom.fake_quantize, (X.mT, None, F, True, True, None, 0)),
    "fake_quantize unscaled": (custom.fake_quantize, (X, amax(X), S, True, False, torch.tensor([1, 2]), 0)),
    "quantize_with_values": (custom.quantize_with_values, (X, amax(X), S, True, torch.tensor([1, 2]), 0)),
    "quantize_transpose": (custom.quantize_transpose, (X, None, amax(X), F, S, None, torch.tensor([1, 2]))),
    "quantize_many": (custom.quantize_many, ([X, X[0].half()], None, F, True)),
    "swizzle": (custom.swizzle, (X[:, :3, :5].to(torch.uint8),)),
    "unswizzle": (custom.unswizzle, (torch.zeros(2, 1024, dtype=torch.uint8), 3, 5)),
}


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("name", OPCHECKS)
def test_opcheck(name: str, impl: str) -> None:
    operator, arguments = OPCHECKS[name]
    checks = [
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_static",
        "test_aot_dispatch_dynamic",
    ]
    if not name.startswith("dequantize"):  # torch's own check of the schema cannot compare two float8 tensors
        checks.append("test_schema")
    torch.library.opcheck(operator, (*arguments, impl), test_utils=checks)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_opcheck_of_nothing(impl: str) -> None:
    torch.library.opcheck(custom.quantize_nvfp4, (torch.empty(0, 32), None, F, False, None, 0, None, None, impl))
    torch.library.opcheck(custom.fake_quantize, (torch.empty(0, 32), None, F, False, False, None, 0, impl))
    torch.library.opcheck(custom.quantize_transpose, (torch.empty(0, 32), None, None, F, F, None, None, impl))
    torch.library.opcheck(custom.quantize_many, ([torch.empty(0, 32)], None, F, False, impl))


def test_every_format_can_be_spelled() -> None:
    formats = [hb.NVFP4(e4m3_max=e) for e in E4M3_MAX_CHOICES]
    formats += [hb.NVFP4(scaling="row", hadamard=True), hb.NVFP4(block=(16, 16), rounding="stochastic")]
    formats += [hb.NVFP4(scale_rule="four_over_six", error="mse", error_arithmetic="fp16")]
    for fmt in formats:
        equal(custom.read(custom.spell(fmt)), fmt)


def test_results_that_share_memory_are_copied() -> None:
    whole = torch.arange(4.0)
    first, second = custom.apart([whole[:2], whole[2:]])
    same_bits(second, torch.tensor([2.0, 3.0]))
    equal(first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr(), False)


def halves(q: hb.QuantizedTensor) -> tuple[hb.QuantizedTensor, Tensor]:
    return q[16:].clone(), q.view(2, 16, 64).dequantize(torch.bfloat16)


def facts(q: Any) -> Tensor:
    made = hb.quantize(q.dequantize(), NV).format_facts
    return q.packed + (1 if (q.format, q.format_facts) == (NV, made) else 2)


QUANTIZED: dict[str, Callable[[Any], Any]] = {
    "input": lambda q: q.dequantize(torch.float16),
    "output": lambda q: q.detach(),
    "views": lambda q: q[16:].dequantize() + q.view(32, 64).dequantize()[:16],
    "both": halves,
    "dtype": lambda q: q.to(torch.bfloat16),
    "format": facts,
    "attributes": lambda q: q.amax * q.tensor_scale + q.packed.sum() + q.shape[0],
}


@pytest.mark.parametrize("fmt", [NV, hb.NVFP4(scaling="row"), hb.NVFP4(block=(16, 16))], ids=["tensor", "row", "16×16"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_tensor_goes_in_and_out(rng, name: str, fmt: hb.NVFP4) -> None:
    q = hb.quantize(torch.randn(32, 64, generator=rng).bfloat16(), fmt)
    got = torch.compile(QUANTIZED[name], fullgraph=True, backend="aot_eager")(q)
    wanted = QUANTIZED[name](q)
    for a, e in zip(parts(got), parts(wanted), strict=True):
        same_bits(a, e, name)
    if isinstance(got, hb.QuantizedTensor):
        equal((got.format, got.dtype, got.shape), (wanted.format, wanted.dtype, wanted.shape))


def test_transposed_goes_in_and_out(rng) -> None:
    x = torch.randn(32, 64, generator=rng)

    def join(x: Tensor) -> hb.QuantizedTensor:
        rows, columns = hb.quantize_transpose(x, NV, RHT)
        return rows.with_transposed(columns)

    def swap(q: hb.QuantizedTensor) -> tuple[hb.QuantizedTensor, Tensor]:
        return q.mT, q.mT.dequantize()

    q = torch.compile(join, fullgraph=True, backend="aot_eager")(x)
    swapped, decoded = torch.compile(swap, fullgraph=True, backend="aot_eager")(q)
    for a, e in ((q.packed, swapped.transposed.packed), (q.transposed.packed, swapped.packed)):
        same_bits(a, e)
    same_bits(decoded, join(x).transposed.dequantize())


def test_what_a_device_can_do_is_asked_without_a_warning() -> None:
    """Of a cached function Dynamo warns; a warning is an error here."""

    def find(x: Tensor) -> Tensor:
        return x + (1 if backends._triton_runs_on(x.device) else 2)

    torch._dynamo.reset()
    same_bits(torch.compile(find, fullgraph=True, backend="eager")(torch.zeros(2)), torch.full((2,), 2.0))


def test_quantize_is_one_operator() -> None:
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    backend = aot_autograd(fw_compiler=keep)
    torch.compile(CALLS["quantize"], fullgraph=True, dynamic=False, backend=backend)(torch.ones(4, 32))
    equal(
        [[name for name in graph if "getitem" not in name] for graph in graphs], [["halfbyte.quantize_nvfp4.default"]]
    )


@pytest.mark.parametrize("name", CALLS)
def test_fake_tensors(name: str) -> None:
    """Without torch.compile, tensors that have no memory give the shapes and dtypes that others give."""
    wanted = parts(CALLS[name](torch.ones(2, 32, 64)))
    with FakeTensorMode():
        got = parts(CALLS[name](torch.empty(2, 32, 64)))
    equal([(type(part), part.shape, part.dtype) for part in got], [(FakeTensor, e.shape, e.dtype) for e in wanted])


def test_cache_key(rng) -> None:
    """Of compiled code: the same for other bytes, another for another format, shape, dtype or transposed data."""
    x = torch.randn(32, 64, generator=rng)
    q = hb.quantize(x, NV)
    key = q._stable_hash_for_caching()
    equal(hb.quantize(2 * x, NV)._stable_hash_for_caching(), key)
    columns = hb.quantize(x.mT, NV)
    others = [hb.quantize(x, RHT), hb.quantize(x.bfloat16(), NV), q[16:], q.with_transposed(columns), columns.mT]
    others += [q.with_transposed(columns.replace(format=RHT)), q.clone().requires_grad_(), q.swizzle()]
    equal(len({key, *(other._stable_hash_for_caching() for other in others)}), 1 + len(others))
