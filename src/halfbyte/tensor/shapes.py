"""Views, slices and joins of QuantizedTensors: where blocks stay whole and every element keeps its tensor scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..formats import NVFP4
from .table import aten, lacks_rows, operators, per_byte, refuse, rows_only, scale_kind, with_scales

if TYPE_CHECKING:
    from . import QuantizedTensor


def _square(q: QuantizedTensor) -> bool:
    return isinstance(q.format, NVFP4) and q.format.block == (16, 16)


def _matrices(q: QuantizedTensor, do: Callable[[QuantizedTensor], QuantizedTensor]) -> QuantizedTensor:
    """What leaves each matrix as it is, done to the rows and to the transposed data."""
    columns = None if q.transposed is None else do(q.transposed)
    if lacks_rows(q):
        return q.replace(transposed=columns)
    return do(q.replace(transposed=None)).replace(transposed=columns)


def _alias(q: QuantizedTensor) -> QuantizedTensor:
    return q.map_parts(aten.alias.default)


# ---- transposes ----


@operators(aten.transpose.int)
def _transpose(func: Any, q: QuantizedTensor, dim0: int, dim1: int) -> QuantizedTensor:
    n = q.dim()
    dims = {dim0 % n, dim1 % n}
    if len(dims) == 1:
        return _alias(q)
    if dims != {n - 2, n - 1}:
        refuse(func, f"dimensions {dim0} and {dim1}; only the last two can be swapped, as q.mT does")
    rows = None if lacks_rows(q) else _alias(q.replace(transposed=None))
    if q.transposed is not None:
        return _alias(q.transposed).replace(transposed=rows, dtype=q.dtype)
    return type(q)(None, None, None, None, q.format, transposed=rows, dtype=q.dtype)


@operators(aten.t.default)
def _t(func: Any, q: QuantizedTensor) -> QuantizedTensor:
    return _transpose(func, q, 0, 1) if q.dim() == 2 else _alias(q)


@operators(aten.permute.default)
def _permute(func: Any, q: QuantizedTensor, dims: Sequence[int]) -> QuantizedTensor:
    n = q.dim()
    order = [dim % n for dim in dims]
    if order == list(range(n)):
        return _alias(q)
    if order != [*range(n - 2), n - 1, n - 2]:
        refuse(func, f"dims={tuple(dims)}; only the last two can be swapped, as q.mT does")
    return _transpose(func, q, -2, -1)


# ---- views ----


@operators(aten.view.default, aten._unsafe_view.default)
def _view(func: Any, q: QuantizedTensor, size: Sequence[int]) -> QuantizedTensor:
    """Any shape whose last dimension keeps blocks whole, and whose rows or matrices keep their own tensor scale."""
    shape = list(size)
    if -1 in shape:
        known = math.prod(side for side in shape if side != -1)
        shape[shape.index(-1)] = q.numel() // known if known else 0
    block = q.format.block_columns
    if shape == list(q.shape):
        return _alias(q)
    if math.prod(shape) != q.numel() or not shape or shape[-1] % block:
        refuse(
            func,
            f"from {tuple(q.shape)} to {tuple(shape)}; it needs as many elements, and a last dimension that is "
            f"divisible by {block}",
        )
    if len(shape) > 1 and shape[-2:] == list(q.shape[-2:]):
        return _matrices(q, lambda part: _view_rows(func, part, [*shape[:-2], *part.shape[-2:]]))
    if not (q.swizzled and q.block_scale.dim() == 1 and len(shape) > 1 and shape[-1] == q.shape[-1]):
        rows_only(func, q)
    if _square(q) and len(shape) > 1:
        rows = q.shape[-2] if q.dim() > 1 else 1
        if shape[-1] != q.shape[-1] or rows % 16 or shape[-2] % 16:
            refuse(
                func,
                f"from {tuple(q.shape)} to {tuple(shape)} cuts its 16×16 blocks; keep the last dimension, and rows in "
                "16s",
            )
    return _view_rows(func, q, shape)


def _view_rows(func: Any, q: QuantizedTensor, shape: list[int]) -> QuantizedTensor:
    kind = scale_kind(q)
    scales: list[int] = []
    if kind not in ("none", "tensor"):
        assert q.tensor_scale is not None
        count = q.tensor_scale.numel()
        row = isinstance(q.format, NVFP4) and q.format.scaling == "row"
        scales = [count] if len(shape) == 1 else shape[:-1] if row else shape[:-2]
        if math.prod(scales) != count:  # else each scale has as many elements as before, and they are the same ones
            what = "rows" if row else "matrices"
            refuse(func, f"from {tuple(q.shape)} to {tuple(shape)} regroups {what}, each of which has a tensor scale")
    if q.swizzled:
        block_scale = q.block_scale.view(q.block_scale.shape if q.block_scale.dim() == 1 else [*shape[:-2], -1])
    else:
        block_scale = q.block_scale.view([*shape[:-1], shape[-1] // q.format.block_columns])
    packed = q.packed.view([*shape[:-1], shape[-1] // per_byte(q)])
    return with_scales(q, lambda part: part.view(scales), packed=packed, block_scale=block_scale)


@operators(aten.unsqueeze.default)
def _unsqueeze(func: Any, q: QuantizedTensor, dim: int) -> QuantizedTensor:
    dim %= q.dim() + 1
    return _view(func, q, [*q.shape[:dim], 1, *q.shape[dim:]])


@operators(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def _squeeze(func: Any, q: QuantizedTensor, dims: int | Sequence[int] | None = None) -> QuantizedTensor:
    chosen = range(q.dim()) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {dim % q.dim() for dim in chosen}
    return _view(func, q, [side for dim, side in enumerate(q.shape) if side != 1 or dim not in gone])


@operators(aten.as_strided.default)
def _as_strided(
    func: Any, q: QuantizedTensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> QuantizedTensor:
    if list(size) != list(q.shape) or list(stride) != list(q.stride()) or storage_offset:
        refuse(func, "any strides but its own; use view or slices")
    return _alias(q)


# ---- slices ----


@operators(aten.slice.Tensor)
def _slice(
    func: Any, q: QuantizedTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> QuantizedTensor:
    dim %= q.dim()
    start, end, step = slice(start, end, step).indices(q.shape[dim])
    end = max(start, end)
    if (start, end, step) == (0, q.shape[dim], 1):
        return _alias(q)
    if dim < q.dim() - 2 and q.transposed is not None:
        return _matrices(q, lambda part: _slice_rows(func, part, dim, start, end, step))
    if not lacks_rows(q) and q.transposed is not None:  # its rows are columns there
        other = {q.dim() - 1: q.dim() - 2, q.dim() - 2: q.dim() - 1}[dim]
        columns = _slice_rows(func, q.transposed, other, start, end, step)
        return _slice_rows(func, q.replace(transposed=None), dim, start, end, step).replace(transposed=columns)
    return _slice_rows(func, q, dim, start, end, step)


def _slice_rows(func: Any, q: QuantizedTensor, dim: int, start: int, end: int, step: int) -> QuantizedTensor:
    rows_only(func, q)
    kind, n = scale_kind(q), q.dim()
    if dim == n - 1:
        block = q.format.block_columns
        if step != 1 or start % block or end % block or kind == "flat":
            refuse(func, f"columns {start}:{end}:{step} of {tuple(q.shape)}; blocks of {block} columns stay whole")
        packed = q.packed[..., start // per_byte(q) : end // per_byte(q)]
        block_scale = q.block_scale[..., start // block : end // block]
        return q.replace(packed=packed, block_scale=block_scale, shares_scale=kind != "none")
    _check_square(func, q, dim, f"{start}:{end}:{step}", start, end, step)
    own = kind == "row" or (kind == "matrix" and dim < n - 2)

    def cut(part: Tensor) -> Tensor:
        return aten.slice.Tensor(part, dim, start, end, step)  # type: ignore[no-any-return]

    q = q.replace(packed=cut(q.packed), block_scale=cut(q.block_scale), shares_scale=q.shares_scale or not own)
    return with_scales(q, cut) if own else q


def _check_square(func: Any, q: QuantizedTensor, dim: int, what: str, start: int, end: int, step: int) -> None:
    """Refuse what cuts a block of 16 rows."""
    if not _square(q):
        return
    rows = q.shape[-2]
    within = rows % 16 == 0 or q.dim() == 2 or scale_kind(q) == "matrix"  # no block has rows of two matrices
    whole = dim < q.dim() - 2 or (step == 1 and start % 16 == 0 and (end % 16 == 0 or end == rows))
    if not (within and whole):
        refuse(func, f"{what} along dimension {dim} of {tuple(q.shape)} cuts its 16×16 blocks; take rows in 16s")


@operators(aten.select.int)
def _select(func: Any, q: QuantizedTensor, dim: int, index: int) -> QuantizedTensor:
    dim %= q.dim()
    if dim < q.dim() - 2 and q.transposed is not None:
        return _matrices(q, lambda part: _pick(func, part, dim, lambda tensor: tensor.select(dim, index)))
    return _pick(func, q, dim, lambda tensor: tensor.select(dim, index))


def _pick(func: Any, q: QuantizedTensor, dim: int, take: Callable[[Tensor], Tensor]) -> QuantizedTensor:
    """Rows or matrices, chosen by take along dimension dim."""
    rows_only(func, q)
    kind, n = scale_kind(q), q.dim()
    if dim == n - 1:
        refuse(func, f"single columns of {tuple(q.shape)}; blocks of {q.format.block_columns} columns stay whole")
    if dim == n - 2 and kind == "matrix":
        refuse(func, f"rows along dimension {dim} of {tuple(q.shape)}, whose matrices have a tensor scale each; slice")
    _check_square(func, q, dim, "single rows", 1, 1, 1)
    own = kind in ("row", "matrix")
    q = q.replace(packed=take(q.packed), block_scale=take(q.block_scale), shares_scale=q.shares_scale or not own)
    return with_scales(q, take) if own else q


@operators(aten.unbind.int)
def _unbind(func: Any, q: QuantizedTensor, dim: int = 0) -> list[QuantizedTensor]:
    return [_select(func, q, dim, index) for index in range(q.shape[dim])]


@operators(aten.split.Tensor)
def _split(func: Any, q: QuantizedTensor, split_size: int, dim: int = 0) -> list[QuantizedTensor]:
    size = q.shape[dim]
    starts = range(0, size, split_size) if size else [0]
    return [_slice(func, q, dim, start, min(start + split_size, size)) for start in starts]


@operators(aten.split_with_sizes.default)
def _split_with_sizes(func: Any, q: QuantizedTensor, sizes: Sequence[int], dim: int = 0) -> list[QuantizedTensor]:
    if sum(sizes) != q.shape[dim]:
        refuse(func, f"split sizes {list(sizes)} of dimension {dim} of {tuple(q.shape)}; they must add up to it")
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [_slice(func, q, dim, end - size, end) for size, end in zip(sizes, ends, strict=True)]


@operators(aten.index.Tensor)
def _index(func: Any, q: QuantizedTensor, indices: Sequence[Tensor | None]) -> QuantizedTensor:
    if len(indices) != 1 or indices[0] is None or (indices[0].dtype == torch.bool and indices[0].dim() != 1):
        refuse(func, "an index of anything but dimension 0; index one dimension at a time")
    return _copied(_pick(func, q, 0, lambda part: func(_raw(part), list(indices)).view(part.dtype)))


@operators(aten.index_select.default)
def _index_select(func: Any, q: QuantizedTensor, dim: int, index: Tensor) -> QuantizedTensor:
    return _copied(_pick(func, q, dim % q.dim(), lambda part: func(_raw(part), dim, index).view(part.dtype)))


def _copied(q: QuantizedTensor) -> QuantizedTensor:
    """Of picked rows: with a tensor scale of its own, as all the rest is a copy."""
    return with_scales(q, torch.clone, shares_scale=False) if q.shares_scale else q


# ---- joins ----


@operators(aten.cat.default)
def _cat(func: Any, tensors: Sequence[QuantizedTensor], dim: int = 0) -> QuantizedTensor:
    """Along rows that have their own tensor scales, along matrices that have, and MXFP8 along anything."""
    kind = _check_alike(func, tensors)
    first = tensors[0]
    n = first.dim()
    dim %= n
    if kind == "flat" or (kind != "none" and dim == n - 1) or kind == "tensor" or (kind == "matrix" and dim == n - 2):
        refuse(
            func,
            f"along dimension {dim}, where each tensor has its own tensor scale; quantize the joined tensor, or use "
            "scaling='row', or torch.stack for one scale per matrix",
        )
    if _square(first) and any(q.shape[-2] % 16 for q in tensors[:-1]):
        refuse(func, "a tensor whose rows are no multiple of 16 before another; its 16×16 blocks would cross")
    return _joined(tensors, lambda parts: torch.cat(parts, dim), kind != "none")


@operators(aten.stack.default)
def _stack(func: Any, tensors: Sequence[QuantizedTensor], dim: int = 0) -> QuantizedTensor:
    """Along dimension 0: matrices with a tensor scale each, rows with one each, and MXFP8."""
    kind = _check_alike(func, tensors)
    first = tensors[0]
    if dim % (first.dim() + 1) != 0:
        refuse(func, f"along dimension {dim}; only a new dimension 0 keeps blocks and scales")
    if kind == "flat" or (kind == "tensor" and first.dim() != 2):
        refuse(func, f"of {first.dim()}-D tensors that have one tensor scale each; a matrix or a row has one")
    if _square(first) and first.dim() != 2 and kind != "matrix":
        refuse(func, "of matrices that are no multiple of 16 rows")
    return _joined(tensors, torch.stack, kind != "none")


def _check_alike(func: Any, tensors: Sequence[QuantizedTensor]) -> str:
    first = tensors[0]
    if any(not hasattr(q, "packed") for q in tensors):
        refuse(func, "of plain and quantized tensors together")
    for q in tensors:
        rows_only(func, q)
        if q.format != first.format or scale_kind(q) != scale_kind(first):
            refuse(func, f"of {q.format} and {first.format}, or of other kinds of tensor scales; they must be alike")
    return scale_kind(first)


def _joined(
    tensors: Sequence[QuantizedTensor], join: Callable[[list[Tensor]], Tensor], scales: bool
) -> QuantizedTensor:
    def part(name: str) -> Tensor | None:
        parts = [getattr(q, name) for q in tensors]
        if any(part is None for part in parts):
            return None
        joined = join([_raw(part) for part in parts])
        return joined.view(parts[0].dtype)

    names = ("packed", "block_scale", *(("tensor_scale", "amax") if scales else ()))
    return tensors[0].replace(**{name: part(name) for name in names}, shares_scale=False)


def _raw(part: Tensor) -> Tensor:
    """The bytes: not every operator knows float8."""
    return part.view(torch.uint8) if part.element_size() == 1 else part
