"""Every torch operator that a QuantizedTensor does gives what it would give on the decoded values; the rest raises."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from halfbyte import (
    MXFP8,
    NVFP4,
    FormatError,
    QuantizedTensor,
    ShapeError,
    UnsupportedError,
    quantize,
    quantize_transpose,
)

from .check import equal, same_bits, true

TENSOR, ROW, SQUARE, MX = NVFP4(), NVFP4(scaling="row"), NVFP4(block=(16, 16)), MXFP8()
MATRIX, SQUARE_MATRIX = "per matrix", "16×16 per matrix"
KINDS = {"tensor": TENSOR, "row": ROW, "16×16": SQUARE, "mxfp8": MX, MATRIX: TENSOR, SQUARE_MATRIX: SQUARE}
SHAPE = (4, 48, 64)


def make(kind: str, rng: torch.Generator, *shape: int) -> QuantizedTensor:
    x = torch.randn(shape or SHAPE, generator=rng)
    x = x * torch.arange(1, x.shape[0] + 1).view(-1, *(1,) * (x.dim() - 1))  # no two matrices or rows share a maximum
    per_matrix = {"per_matrix": True} if kind in (MATRIX, SQUARE_MATRIX) else {}
    return quantize(x, KINDS[kind], **per_matrix)


def bytes_of(q: QuantizedTensor) -> list[Tensor]:
    parts = [q.packed, q.block_scale, q.tensor_scale, q.amax]
    parts += [] if q.transposed is None else bytes_of(q.transposed)
    return [part for part in parts if part is not None]


def same(actual: QuantizedTensor, expected: QuantizedTensor) -> None:
    equal((actual.format, actual.swizzled), (expected.format, expected.swizzled))
    for a, e in zip(bytes_of(actual), bytes_of(expected), strict=True):
        same_bits(a, e)


ALL = set(KINDS)
NO_SQUARE = ALL - {"16×16", SQUARE_MATRIX}
FREE = {"tensor", "mxfp8"}
# name → the call, and the kinds that can do it; the others must refuse it
OPERATIONS: dict[str, tuple[Callable[[Tensor], Tensor], set[str]]] = {
    "clone": (lambda t: t.clone(), ALL),
    "detach": (lambda t: t.detach(), ALL),
    "same view": (lambda t: t.view(4, -1, 64), ALL),
    "flatten": (lambda t: t.flatten(), ALL),
    "flatten matrices": (lambda t: t.flatten(0, 1), ALL - {MATRIX, SQUARE_MATRIX}),
    "regroup matrices": (lambda t: t.view(2, 2, 48, 64), ALL),
    "regroup rows in 16s": (lambda t: t.view(12, 16, 64), ALL - {MATRIX, SQUARE_MATRIX}),
    "regroup rows in 8s": (lambda t: t.view(24, 8, 64), {"tensor", "row", "mxfp8"}),
    "regroup within matrices": (lambda t: t.view(4, 96, 32), {"tensor", "mxfp8", MATRIX}),
    "narrower rows": (lambda t: t.view(-1, 32), FREE),
    "unsqueeze": (lambda t: t.unsqueeze(0), ALL),
    "unsqueeze and squeeze": (lambda t: t[:, None].squeeze(1), ALL),
    "matrices": (lambda t: t[1:3], ALL),
    "every other matrix": (lambda t: t[::2], ALL),
    "one matrix": (lambda t: t[2], ALL),
    "rows in 16s": (lambda t: t[:, 16:32], ALL),
    "last rows": (lambda t: t[:, 32:], ALL),
    "any rows": (lambda t: t[:, 3:11], NO_SQUARE),
    "every third row": (lambda t: t[:, ::3], NO_SQUARE),
    "one row": (lambda t: t[:, 5], {"tensor", "row", "mxfp8"}),
    "columns": (lambda t: t[..., 32:64], ALL),
    "columns, contiguous": (lambda t: t[..., :32].contiguous(), ALL),
    "columns, reshaped": (lambda t: t[..., :32].reshape(2, 2, 48, 32), ALL),
    "nothing": (lambda t: t[2:2], ALL),
    "nothing, flattened": (lambda t: t[2:2].flatten(), ALL),
    "no columns, unsqueezed": (lambda t: t[..., 32:32].unsqueeze(0), ALL),
    "no columns of none": (lambda t: t[..., 32:32][..., :0], ALL),
    "index": (lambda t: t[torch.tensor([3, 0, 3])], ALL),
    "mask": (lambda t: t[torch.tensor([True, False, True, False])], ALL),
    "index_select": (lambda t: t.index_select(1, torch.tensor([7, 0])), {"tensor", "row", "mxfp8"}),
    "split": (lambda t: t.split(3)[1], ALL),
    "split sizes": (lambda t: t.split([16, 32], 1)[1], ALL),
    "chunk": (lambda t: t.chunk(2)[0], ALL),
    "unbind": (lambda t: t.unbind()[3], ALL),
    "narrow": (lambda t: t.narrow(1, 16, 16), ALL),
    "stack": (lambda t: torch.stack([t, t]), ALL - {"tensor", "16×16"}),
    "stack matrices": (lambda t: torch.stack([t[1], t[3]]), ALL),
    "cat matrices": (lambda t: torch.cat([t, t[1:3]]), ALL - {"tensor", "16×16"}),
    "cat rows": (lambda t: torch.cat([t, t], 1), {"row", "mxfp8"}),
    "cat columns": (lambda t: torch.cat([t, t], -1), {"mxfp8"}),
    "transpose twice": (lambda t: t.mT.mT, ALL),
    "permute nothing": (lambda t: t.permute(0, 1, 2), ALL),
    "cpu": (lambda t: t.to("cpu", copy=True), ALL),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(rng: torch.Generator, name: str, kind: str) -> None:
    operation, able = OPERATIONS[name]
    q = make(kind, rng)
    if kind not in able:
        with pytest.raises(UnsupportedError, match=r"^aten\.\w+.* on a QuantizedTensor: .*q\.dequantize\(\)$"):
            operation(q)
        return
    got, expected = operation(q), operation(q.dequantize())
    equal(type(got), QuantizedTensor)
    same_bits(got.dequantize(), expected)
    equal((got.dtype, got.format), (q.dtype, q.format))


@pytest.mark.parametrize("kind", ["tensor", "row", "mxfp8"])
def test_a_row_is_a_vector(rng: torch.Generator, kind: str) -> None:
    q = make(kind, rng, 8, 64)
    same_bits(q[3].dequantize(), q.dequantize()[3])
    same_bits(torch.stack([q[1], q[2]]).dequantize(), q.dequantize()[1:3]) if kind != "tensor" else None
    same_bits(q[1][None].dequantize(), q.dequantize()[1:2])
    same_bits(q[1][16:64].dequantize(), q.dequantize()[1, 16:64]) if kind != "mxfp8" else None
    equal([tuple(row.shape) for row in q], [(64,)] * 8)


@pytest.mark.parametrize("kind", ["tensor", "row", "mxfp8"])
def test_flattened_and_back(rng: torch.Generator, kind: str) -> None:
    q = make(kind, rng, 8, 64)
    same(q.flatten().view(8, 64), q)
    if kind == "row":
        with pytest.raises(UnsupportedError, match="regroups rows"):
            q.flatten().view(16, 32)


REFUSED: dict[str, Callable[[QuantizedTensor], object]] = {
    "aten.add.Tensor": lambda q: q + 1,
    "aten.mm.default": lambda q: torch.nn.functional.linear(torch.ones(2, 64), q[0]),
    "aten.sum.default": lambda q: q.sum(),
    "aten.eq.Tensor": lambda q: q == q,
    "aten.fill_.Scalar": lambda q: q.fill_(1.0),
    "aten.expand.default": lambda q: q.expand(2, *SHAPE),
    "aten.transpose.int": lambda q: q.transpose(0, 1),
    "aten.permute.default": lambda q: q.permute(2, 1, 0),
    "aten.slice.Tensor": lambda q: q[..., :8],
    "aten.select.int": lambda q: q[..., 0],
    "aten.index.Tensor": lambda q: q[:, torch.tensor([0])],
    "aten.split_with_sizes.default": lambda q: q.split([1, 1]),
    "aten.as_strided.default": lambda q: q.as_strided((1, 16), (16, 1)),
    "aten._to_copy.default": lambda q: q.to(torch.int32),
    "aten.new_zeros.default": lambda q: q.new_zeros(3, 17),
    "aten.clone.default": lambda q: q.clone(memory_format=torch.channels_last),
    "aten.equal.default": lambda q: torch.equal(q, q.dequantize()),
    "aten.copy_.default": lambda q: q.copy_(torch.zeros(SHAPE)),
    "aten.copy_.default ": lambda q: torch.zeros(SHAPE).copy_(q),
    "aten.stack.default": lambda q: torch.stack([q[0], q[1]], 1),
    "aten.cat.default": lambda q: torch.cat([q, q.dequantize()]),
    "aten.cat.default ": lambda q: torch.cat([q.dequantize(), q]),
}


@pytest.mark.parametrize("kind", ["tensor", "mxfp8"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(rng: torch.Generator, name: str, kind: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"^{name.strip()} .*(q\.dequantize\(\)|halfbyte\.quantize)"):
        REFUSED[name](make(kind, rng))


def test_what_is_no_operator_is_refused_too(rng: torch.Generator) -> None:
    """Torch's own would change nothing, without a word, and give away memory that is not there."""
    q, other = make("tensor", rng, 16, 64), make("tensor", rng, 16, 64)
    before = q.clone()
    with pytest.raises(UnsupportedError, match=r"^q.data = .*use q.copy_"):
        q.data = other
    with pytest.raises(UnsupportedError, match=r"^__dlpack__ on a QuantizedTensor"):
        torch.from_dlpack(q)
    same(q, before)
    same(torch.nn.Parameter(q).data, before)
    equal(torch.nn.Parameter(q).data.requires_grad, False)


def test_joins_want_the_same_kind(rng: torch.Generator) -> None:
    with pytest.raises(UnsupportedError, match="must be alike"):
        torch.stack([make("tensor", rng, 16, 64), make("row", rng, 16, 64)])
    q = make(SQUARE_MATRIX, rng, 2, 24, 64).replace(tensor_scale=None, amax=None)
    with pytest.raises(UnsupportedError, match="16×16 blocks would cross"):
        torch.cat([q, q], 1)


def test_square_blocks_across_matrices(rng: torch.Generator) -> None:
    """Two matrices of 24 rows have three blocks of 16, unless each matrix has blocks of its own."""
    across, own = (make(kind, rng, 2, 24, 64) for kind in ("16×16", SQUARE_MATRIX))
    same_bits(own[1].dequantize(), own.dequantize()[1])
    same_bits(own[:, 16:].dequantize(), own.dequantize()[:, 16:])
    for part in (lambda q: q[1], lambda q: q[:1], lambda q: q[:, :16], lambda q: q.view(48, 64)):
        with pytest.raises(UnsupportedError, match="cuts its 16×16 blocks"):
            part(across)


def test_slices_are_views(rng: torch.Generator) -> None:
    q = make("row", rng)
    view, copy = q[1:3], q[1:3].clone()
    equal(view.packed.data_ptr(), q.packed[1].data_ptr())
    view.zero_()
    same_bits(q.dequantize()[1:3], torch.zeros(2, *SHAPE[1:]))
    true(copy.dequantize().abs().max() > 0, "a copy is left alone")


@pytest.mark.parametrize("kind", KINDS)
def test_copy(rng: torch.Generator, kind: str) -> None:
    source = make(kind, rng)
    places = []
    for target in (make(kind, rng), torch.zeros_like(source), torch.empty_like(source), source.new_zeros(SHAPE)):
        places = [part.data_ptr() for part in bytes_of(target)]
        same(target.copy_(source), source)
        equal([part.data_ptr() for part in bytes_of(target)], places, "addresses")
    true(len(places) > 1, "nothing was compared")


@pytest.mark.parametrize("kind", KINDS)
def test_new_ones(rng: torch.Generator, kind: str) -> None:
    q = make(kind, rng)
    for zeros in (torch.zeros_like(q), q.new_zeros(2, 32, 128)):
        same_bits(zeros.dequantize(), torch.zeros(zeros.shape))
        equal((zeros.dtype, zeros.format), (q.dtype, q.format))
    if kind in ("row", MATRIX):
        equal(tuple(q.new_zeros(2, 32, 128).tensor_scale.shape), (2, 32) if kind == "row" else (2,))
    true(q.dequantize().abs().max() > 0, "the original is left alone")
    equal(torch.empty_like(q, dtype=torch.bfloat16).dtype, torch.bfloat16)
    equal(torch.empty_like(q, device="meta").packed.device.type, "meta")


def test_copy_refuses_what_would_change_other_values(rng: torch.Generator) -> None:
    """A slice shares its tensor scale with the rest, so only the same scale, or one not filled yet, may be written."""
    q, other = make("tensor", rng, 32, 64), make("tensor", rng, 16, 64)
    before = q.clone()
    with pytest.raises(UnsupportedError, match=r"aten.copy_.default.*tensor scale other elements share"):
        q[:16].copy_(other)
    same(q, before)
    same(q[:16].copy_(q[16:].clone()), q[16:])
    fresh = torch.zeros_like(before)
    for rows in before.split(16):
        fresh.narrow(0, 0, 16).copy_(rows)
    same(fresh[:16], before[16:])
    row = make("row", rng, 32, 64)
    row[:16].copy_(make("row", rng, 16, 64))  # each row has its own
    with pytest.raises(UnsupportedError, match="other elements share"):
        row[:, :32].copy_(make("row", rng, 32, 32))


def test_copy_checks(rng: torch.Generator) -> None:
    q = make("tensor", rng, 32, 64)
    with pytest.raises(FormatError, match="the source is in MXFP8"):
        q.copy_(make("mxfp8", rng, 32, 64))
    with pytest.raises(ShapeError, match=r"shape \(16, 64\)"):
        q.copy_(q[:16])
    with pytest.raises(ShapeError, match="swizzled=True"):
        q.copy_(q.swizzle())
    with pytest.raises(ShapeError, match="tensor_scale has shape"):
        make(MATRIX, rng).copy_(make("tensor", rng))
    with pytest.raises(ShapeError, match=r"transposed has shape \(64, 32\) in the source, None"):
        q.copy_(q.with_transposed(make("tensor", rng, 64, 32)))
    loaded = make("tensor", rng, 32, 64).replace(amax=None)
    equal(q.copy_(loaded).amax, None)
    same(loaded, q)


def test_equal(rng: torch.Generator) -> None:
    q = make("tensor", rng)
    true(torch.equal(q, q.clone()), "a copy")
    true(torch.equal(q, q.replace(amax=None, dtype=torch.bfloat16)), "no value depends on amax and dtype")
    changes = {
        "packed": q.packed + 1, "tensor_scale": q.tensor_scale * 2, "block_scale": -q.block_scale.float(),
        "format": NVFP4(scale_rule="search"),
    }  # fmt: skip
    changes["block_scale"] = changes["block_scale"].to(torch.float8_e4m3fn)
    for name, value in changes.items():
        true(not torch.equal(q, q.replace(**{name: value})), name)
    columns = quantize(q.dequantize().mT, TENSOR)
    true(not torch.equal(q, q.with_transposed(columns)), "transposed data only one has")
    true(torch.equal(q.with_transposed(columns), q.with_transposed(columns.clone())), "transposed")
    equal(torch.equal(q, q[:2]), False)
    poisoned = quantize(torch.full((1, 16), torch.nan), TENSOR)
    true(torch.equal(poisoned, poisoned.clone()), "the same bytes, NaN or not")


@pytest.mark.parametrize("kind", ["tensor", "row", "mxfp8", MATRIX])
def test_swizzled(rng: torch.Generator, kind: str) -> None:
    q = make(kind, rng)
    one, each = q.swizzle(), q.swizzle(per_matrix=True)
    same_bits(each.view(2, 2, 48, 64).dequantize(), q.dequantize().view(2, 2, 48, 64))
    same_bits(one.view(2, 2, 48, 64).clone().dequantize(), q.dequantize().view(2, 2, 48, 64))
    if kind != MATRIX:
        same_bits(one.view(192, 64).dequantize(), q.dequantize().view(192, 64))
        with pytest.raises(UnsupportedError, match="swizzled"):
            each.view(192, 64)
    for part in (lambda t: t[0], lambda t: t[:, :16], lambda t: torch.cat([t, t]), lambda t: t.flatten()):
        with pytest.raises(UnsupportedError, match="swizzled"):
            part(one)


@pytest.fixture
def both(rng: torch.Generator) -> QuantizedTensor:
    rows, columns = quantize_transpose(torch.randn(4, 32, 64, generator=rng), TENSOR, NVFP4(hadamard=True))
    return rows.with_transposed(columns)


def test_transposed_follows(both: QuantizedTensor) -> None:
    """What is done to x is done to x.mT as well, where that is exact."""
    for do, mirrored in {
        "clone": (lambda q: q.clone(), lambda t: t),
        "matrices": (lambda q: q[1:3], lambda t: t[1:3]),
        "one matrix": (lambda q: q[2], lambda t: t[2]),
        "rows": (lambda q: q[:, 16:], lambda t: t[..., 16:]),
        "columns": (lambda q: q[..., :32], lambda t: t[:, :32]),
        "regrouped": (lambda q: q.view(2, 2, 32, 64), lambda t: t.view(2, 2, 64, 32)),
        "regrouped columns": (lambda q: q.mT.view(2, 2, 64, 32).mT, lambda t: t.view(2, 2, 64, 32)),
        "dtype": (lambda q: q.bfloat16(), lambda t: t),
    }.values():
        got = do(both)
        same_bits(got.dequantize(), do(both.with_transposed(None).with_transposed(both.transposed)).dequantize())
        same_bits(got.mT.dequantize(), mirrored(both.transposed.dequantize()))
        equal(tuple(got.mT.shape), (*got.shape[:-2], got.shape[-1], got.shape[-2]))
    for do in (lambda q: q.view(128, 64), lambda q: q[:, 1:17], lambda q: q[:, 3], lambda q: torch.cat([q, q])):
        with pytest.raises(UnsupportedError):
            do(both)


def test_transposed_alone(both: QuantizedTensor) -> None:
    alone = both.transposed.mT
    equal((tuple(alone.shape), alone.packed, alone.tensor_scale), ((4, 32, 64), None, None))
    same(alone.mT, both.transposed)
    same(alone.clone()[1:3].mT, both.transposed[1:3])
    for do in (lambda q: q.dequantize(), lambda q: q.swizzle(), lambda q: q[:, :16], lambda q: q.flatten()):
        with pytest.raises(ShapeError, match=r"transposed data only.*quantize_transpose"):
            do(alone)
