import copy
import io
import pickle
from typing import Any

import pytest
import torch

from halfbyte import MXFP8, NVFP4, QuantizedTensor, ShapeError, quantize, quantize_many, quantize_transpose

from .check import close, equal, same_bits, true

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPE = (2, 3, 64)


def example(fmt: NVFP4 | MXFP8, rng: torch.Generator, **options: Any) -> tuple[torch.Tensor, QuantizedTensor]:
    x = torch.randn(SHAPE, generator=rng)
    return x, quantize(x, fmt, **options)


@pytest.mark.parametrize(
    ("fmt", "options", "scale_shape"),
    [
        (NVFP4(), {}, ()),
        (NVFP4(), {"per_matrix": True}, (2,)),
        (NVFP4(scaling="row"), {}, (2, 3)),
        (NVFP4(scaling="row"), {"per_matrix": True}, (2, 3)),
        (NVFP4(block=(16, 16), scale_rule="four_over_six"), {"per_matrix": True}, (2,)),
    ],
)
def test_nvfp4_parts(rng: torch.Generator, fmt: NVFP4, options: dict, scale_shape: tuple[int, ...]) -> None:
    _, q = example(fmt, rng, **options)
    equal((q.packed.dtype, tuple(q.packed.shape)), (torch.uint8, (2, 3, 32)))
    equal((q.block_scale.dtype, tuple(q.block_scale.shape)), (torch.float8_e4m3fn, (2, 3, 4)))
    for part in (q.tensor_scale, q.amax):
        equal((part.dtype, tuple(part.shape)), (torch.float32, scale_shape))
    equal((tuple(q.shape), q.device, q.format), (SHAPE, torch.device("cpu"), fmt))
    equal(q.nbytes, 2 * 3 * 32 + 2 * 3 * 4 + 4 * q.tensor_scale.numel())


def test_mxfp8_parts(rng: torch.Generator) -> None:
    _, q = example(MXFP8(), rng)
    equal((q.packed.dtype, tuple(q.packed.shape)), (torch.float8_e4m3fn, SHAPE))
    equal((q.block_scale.dtype, tuple(q.block_scale.shape)), (torch.uint8, (2, 3, 2)))
    equal((q.tensor_scale, q.amax), (None, None))
    equal((tuple(q.shape), q.nbytes), (SHAPE, 2 * 3 * 64 + 2 * 3 * 2))


@pytest.mark.parametrize("fmt", [NVFP4(), NVFP4(scaling="row", scale_rule="four_over_six")], ids=repr)
def test_nvfp4_values_are_near(rng: torch.Generator, fmt: NVFP4) -> None:
    """Half the widest gap of E2M1 is 1 of 6, or 1 of 4 where the maximum became 4; a scale is off by 1/16 at most."""
    x, q = example(fmt, rng)
    block_amax = x.unflatten(-1, (-1, 16)).abs().amax(-1).repeat_interleave(16, -1)
    close(q.dequantize(), x, block_amax * (1 / 6 + 1 / 16))


def test_mxfp8_values_are_near(rng: torch.Generator) -> None:
    """3 mantissa bits: half an ulp is 2^-4 of the value, or 2^-10 of a scale that is at most 2/448 of the maximum."""
    x, q = example(MXFP8(), rng)
    block_amax = x.unflatten(-1, (-1, 32)).abs().amax(-1).repeat_interleave(32, -1)
    close(q.dequantize(), x, x.abs() * 2.0**-4 + block_amax * 2.0**-10 / 224)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", [NVFP4(), NVFP4(scaling="row"), MXFP8()], ids=repr)
def test_dequantize_rounds_once(rng: torch.Generator, fmt: NVFP4 | MXFP8, dtype: torch.dtype) -> None:
    _, q = example(fmt, rng)
    equal(q.dequantize().dtype, torch.float32)
    same_bits(q.dequantize(dtype), q.dequantize().to(dtype))
    same_bits(q.dequantize(dtype, impl="reference"), q.dequantize(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e4m3fn])
def test_dequantize_refuses_other_dtypes(rng: torch.Generator, dtype: torch.dtype) -> None:
    for fmt in (NVFP4(), MXFP8()):
        with pytest.raises(ShapeError, match="dequantize gives float32, bfloat16 or float16"):
            example(fmt, rng)[1].dequantize(dtype)


def test_dequantize_needs_the_tensor_scale(rng: torch.Generator) -> None:
    _, q = example(NVFP4(), rng)
    with pytest.raises(ShapeError, match="tensor_scale=None; decoding needs S_dec"):
        q.replace(tensor_scale=None).dequantize()


def test_dequantize_does_not_need_amax(rng: torch.Generator) -> None:
    _, q = example(NVFP4(), rng)
    same_bits(q.replace(amax=None).dequantize(), q.dequantize())


def test_hadamard_is_not_undone(rng: torch.Generator) -> None:
    x, q = example(NVFP4(hadamard=True), rng)
    true((q.dequantize() - x).abs().max() > 1, "decoded values should be transformed ones")
    energy = q.dequantize().square().sum() / x.square().sum()
    close(energy, torch.tensor(1.0), 0.05)


def test_columnwise(rng: torch.Generator) -> None:
    x = torch.randn(32, 48, generator=rng)
    q = quantize(x.mT, NVFP4())
    equal(tuple(q.shape), (48, 32))
    same_bits(q.packed, quantize(x.mT.contiguous(), NVFP4()).packed)


@pytest.mark.parametrize("fmt", [NVFP4(), NVFP4(scale_rule="four_over_six"), NVFP4(hadamard=True), MXFP8()])
def test_carries_no_gradient(fmt: NVFP4 | MXFP8) -> None:
    parameter = torch.nn.Parameter(torch.ones(4, 32))
    q = quantize(parameter, fmt)
    tensors = (q.packed, q.block_scale, q.tensor_scale, q.amax, q.dequantize())
    true(not any(t.requires_grad for t in tensors if t is not None), "a quantized tensor is a constant")
    true(parameter.requires_grad, "the input is left alone")


def test_repr(rng: torch.Generator) -> None:
    _, q = example(MXFP8(), rng)
    equal(repr(q), "QuantizedTensor(shape=(2, 3, 64), format=MXFP8(), device=cpu)")


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_is_what_was_quantized(rng: torch.Generator, dtype: torch.dtype) -> None:
    x = torch.randn(32, 64, generator=rng, dtype=dtype)
    rows, columns = quantize_transpose(x, NVFP4())
    made = [rows, columns, rows.with_transposed(columns).mT, quantize(x, MXFP8()), *quantize_many([x], NVFP4())]
    equal([q.dtype for q in made], [dtype] * 5)
    equal([q.is_contiguous() for q in made], [True] * 5)
    equal(QuantizedTensor(rows.packed, rows.block_scale, rows.tensor_scale, None, rows.format).dtype, torch.float32)


def test_dtype_is_a_name_only(rng: torch.Generator) -> None:
    _, q = example(NVFP4(), rng)
    for half in (q.to(torch.bfloat16), q.bfloat16(), q.to("cpu", torch.bfloat16)):
        equal(half.dtype, torch.bfloat16)
        same_bits(half.packed, q.packed)
        same_bits(half.dequantize(), q.dequantize())
        true(half.packed.data_ptr() != q.packed.data_ptr(), "a copy, as of any tensor")


def test_with_transposed(rng: torch.Generator) -> None:
    x = torch.randn(32, 64, generator=rng)
    rows, columns = quantize_transpose(x, NVFP4(), NVFP4(hadamard=True))
    q = rows.with_transposed(columns)
    equal(q.nbytes, rows.nbytes + columns.nbytes)
    for one, other in ((q.mT, columns), (q.t(), columns), (q.transpose(0, 1), columns), (q.mT.mT, rows)):
        same_bits(one.dequantize(), other.dequantize())
        equal((tuple(one.shape), one.format), (tuple(other.shape), other.format))
    equal(q.with_transposed(None).transposed, None)
    equal(rows.transposed, None)


def test_with_transposed_refuses(rng: torch.Generator) -> None:
    x = torch.randn(32, 64, generator=rng)
    rows, columns = quantize_transpose(x, NVFP4())
    for wrong, message in (
        (rows, r"has shape \(32, 64\); a tensor of shape \(32, 64\) needs its transpose"),
        (x.mT, "must be a QuantizedTensor"),
        (columns.with_transposed(rows), "without transposed data"),
        (columns.to("meta"), "is on meta"),
    ):
        with pytest.raises(ShapeError, match=message):
            rows.with_transposed(wrong)
    with pytest.raises(ShapeError, match="with_transposed: this tensor has transposed data only"):
        columns.mT.with_transposed(columns)
    with pytest.raises(ShapeError, match="needs one of them"):
        QuantizedTensor(None, None, None, None, NVFP4())


def test_is_not_quantized_twice(rng: torch.Generator) -> None:
    """A kernel would read memory that the tensor does not have."""
    _, q = example(NVFP4(), rng)
    with pytest.raises(ShapeError, match="x is QuantizedTensor; quantize takes plain tensors"):
        quantize(q, NVFP4())


KINDS: dict[str, tuple[NVFP4 | MXFP8, dict[str, Any]]] = {
    "tensor": (NVFP4(), {}),
    "per matrix": (NVFP4(), {"per_matrix": True}),
    "row": (NVFP4(scaling="row", scale_rule="four_over_six"), {}),
    "16×16": (NVFP4(block=(16, 16)), {}),
    "mxfp8": (MXFP8(), {}),
    "swizzled": (NVFP4(), {"swizzle": True}),
}


def of_kind(kind: str, rng: torch.Generator) -> QuantizedTensor:
    fmt, options = KINDS[kind]
    return example(fmt, rng, **options)[1].to(torch.bfloat16)


def same(actual: QuantizedTensor, expected: QuantizedTensor) -> None:
    equal(type(actual), QuantizedTensor)
    for name in ("shape", "dtype", "device", "format", "swizzled"):
        equal(getattr(actual, name), getattr(expected, name), name)
    for name in ("packed", "block_scale", "tensor_scale", "amax"):
        one, other = getattr(actual, name), getattr(expected, name)
        same_bits(one, other, name) if other is not None else equal(one, None)
    if expected.transposed is not None:
        same(actual.transposed, expected.transposed)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(rng: torch.Generator, kind: str) -> None:
    q = of_kind(kind, rng)
    file = io.BytesIO()
    torch.save({"q": q, "parameter": torch.nn.Parameter(q, requires_grad=False)}, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    same(loaded["q"], q)
    same(loaded["parameter"], q)
    true(isinstance(loaded["parameter"], torch.nn.Parameter), "still a parameter")
    moved = torch.load(io.BytesIO(file.getvalue()), weights_only=True, map_location="meta")["q"]
    equal({moved.device.type, moved.packed.device.type}, {"meta"})
    same(pickle.loads(pickle.dumps(q)), q)
    deep = copy.deepcopy(q)
    same(deep, q)
    true(deep.packed.data_ptr() != q.packed.data_ptr(), "a deep copy has its own bytes")


def test_transposed_is_saved(rng: torch.Generator) -> None:
    rows, columns = quantize_transpose(torch.randn(32, 64, generator=rng), NVFP4())
    for q in (rows.with_transposed(columns), columns.mT):
        file = io.BytesIO()
        torch.save(q, file)
        loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        same(loaded.mT, columns)
        equal(loaded.packed is None, q.packed is None)


class Layer(torch.nn.Module):
    def __init__(self, q: QuantizedTensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(q, requires_grad=False)
        self.register_buffer("again", q.clone())


@pytest.mark.parametrize("kind", KINDS)
def test_in_a_module(rng: torch.Generator, kind: str) -> None:
    q = of_kind(kind, rng)
    layer, other = Layer(q), Layer(torch.zeros_like(q))
    address = other.weight.packed.data_ptr()
    other.load_state_dict(layer.state_dict())
    same(other.weight, q)
    same(other.again, q)
    equal(other.weight.packed.data_ptr(), address)
    equal([name for name, _ in layer.named_parameters()], ["weight"])
    half = copy.deepcopy(layer).to(torch.float16)
    equal((half.weight.dtype, half.again.dtype), (torch.float16, torch.float16))
    same_bits(half.weight.packed, q.packed)
    empty = layer.to("meta")
    equal(empty.weight.packed.device.type, "meta")
    empty.to_empty(device="cpu").load_state_dict(other.state_dict(), assign=True)
    same(empty.weight, q)


def test_parameter_with_gradient(rng: torch.Generator) -> None:
    """Whoever multiplies with it may give it a gradient in high precision."""
    _, q = example(NVFP4(), rng)
    parameter = torch.nn.Parameter(q)
    true(parameter.requires_grad and parameter.is_leaf, "a leaf")
    parameter.grad = torch.ones(SHAPE)
    equal(type(parameter.grad), torch.Tensor)
    true(not parameter.detach().requires_grad, "detached")


def test_shared_memory(rng: torch.Generator) -> None:
    _, q = example(NVFP4(), rng)
    true(not q.is_shared(), "not yet")
    expected = q.clone()
    same(q.share_memory_(), expected)
    true(q.is_shared() and q.packed.is_shared(), "the bytes are")


@pytest.mark.parametrize("fmt", [NVFP4(), MXFP8()], ids=repr)
def test_storages_stay_resizable(rng: torch.Generator, fmt: NVFP4 | MXFP8) -> None:
    """FSDP2 frees what it gathered by resizing it."""
    x, q = example(fmt, rng)
    q = q.clone()
    same_bits(q.dequantize(impl="cpu"), quantize(x, fmt, impl="cpu").dequantize())
    for tensor in (x, q.packed, q.block_scale):
        true(tensor.untyped_storage().resizable(), "its size was fixed")


@pytest.mark.parametrize(
    ("fmt", "facts"),
    [(NVFP4(scaling="row", hadamard=True), ("NVFP4", 16, "row", True)), (MXFP8(), ("MXFP8", 32, None, False))],
)
def test_format_facts(fmt: NVFP4 | MXFP8, facts: tuple[object, ...]) -> None:
    equal(tuple(quantize(torch.ones(32, 64), fmt).format_facts), facts)
