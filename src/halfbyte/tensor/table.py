"""The torch operators that a QuantizedTensor does: on its bytes, exactly, or not at all.

An operator's function takes the operator itself, to name it where it refuses, then the operator's arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, cast

import torch
from torch import Tensor

from ..errors import FormatError, ShapeError, UnsupportedError
from ..formats import NVFP4

if TYPE_CHECKING:
    from . import QuantizedTensor

aten = torch.ops.aten
Operator = TypeVar("Operator", bound=Callable[..., Any])
TABLE: dict[Any, Callable[..., Any]] = {}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
KEEP = (None, torch.preserve_format, torch.contiguous_format)


def operators(*functions: Any) -> Callable[[Operator], Operator]:
    """Put a function into the table."""

    def add(implementation: Operator) -> Operator:
        TABLE.update(dict.fromkeys(functions, implementation))
        return implementation

    return add


def refuse(func: Any, why: str) -> NoReturn:
    """Raise for an operator that cannot be done exactly."""
    raise UnsupportedError(f"{func} on a QuantizedTensor: {why}; or use q.dequantize()")


def scale_kind(q: QuantizedTensor) -> Literal["none", "tensor", "row", "matrix", "flat"]:
    """What shares one tensor scale; "flat" is a 1-D tensor of equal runs, each with its own."""
    scale = q.tensor_scale
    if scale is None:
        return "none"
    if getattr(q.format, "scaling", "") == "row" and scale.shape == q.shape[:-1]:
        return "row"
    if scale.dim() == 0:
        return "tensor"
    if scale.shape == q.shape[:-2]:
        return "matrix"
    if scale.dim() == q.dim() == 1:
        return "flat"
    raise ShapeError(
        f"tensor_scale has shape {tuple(scale.shape)}; a tensor of shape {tuple(q.shape)} in {q.format} has (), "
        "one scale per matrix, or one per row"
    )


def with_scales(q: QuantizedTensor, function: Callable[[Tensor], Tensor], **changes: Any) -> QuantizedTensor:
    """q with function applied to the tensor scale and to the maximum that it came from."""
    for name in ("tensor_scale", "amax"):
        part = getattr(q, name)
        changes[name] = None if part is None else function(part)
    return q.replace(**changes)


def lacks_rows(q: QuantizedTensor) -> bool:
    """Whether there is transposed data only."""
    return cast(Any, q.packed) is None


def per_byte(q: QuantizedTensor) -> int:
    """Elements in each of packed's."""
    return 2 if isinstance(q.format, NVFP4) else 1


def rows_only(func: Any, q: QuantizedTensor) -> None:
    """Refuse what rearranges rows where something else depends on their order."""
    q._check_rows(str(func))
    if q.swizzled:
        refuse(func, "block_scale is swizzled, as one matrix; do this first and swizzle() afterwards")
    if q.transposed is not None:
        refuse(func, "its transposed data cannot follow; do this on q.with_transposed(None)")


# ---- what is done to each part ----


@operators(aten.detach.default, aten.alias.default, aten.lift_fresh.default)
def _each(func: Any, q: QuantizedTensor) -> QuantizedTensor:
    return q.map_parts(func)


@operators(aten.clone.default)
def _clone(func: Any, q: QuantizedTensor, *, memory_format: torch.memory_format | None = None) -> QuantizedTensor:
    _check_memory_format(func, memory_format)
    return q.map_parts(lambda part: part.clone(memory_format=torch.contiguous_format), shares_scale=False)


@operators(aten._to_copy.default)
def _to_copy(
    func: Any, q: QuantizedTensor, *, dtype: torch.dtype | None = None, layout: torch.layout | None = None,
    device: torch.device | None = None, pin_memory: bool | None = None, non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
) -> QuantizedTensor:  # fmt: skip
    dtype = q.dtype if dtype is None else dtype
    if dtype not in FLOATS:
        refuse(func, f"it cannot stand for {dtype}, only for float32, bfloat16 or float16")
    if layout not in (None, torch.strided):
        refuse(func, f"layout={layout}; it is strided")
    _check_memory_format(func, memory_format)

    def copy(part: Tensor) -> Tensor:
        part = part.to(device, non_blocking=non_blocking, copy=True, memory_format=torch.contiguous_format)
        return part.pin_memory() if pin_memory else part

    return q.map_parts(copy, dtype=dtype, shares_scale=False)


def _check_memory_format(func: Any, memory_format: torch.memory_format | None) -> None:
    if memory_format not in KEEP:
        refuse(func, f"memory_format={memory_format}; blocks lie along the last dimension")


@operators(aten._pin_memory.default)
def _pin_memory(func: Any, q: QuantizedTensor, device: torch.device | None = None) -> QuantizedTensor:
    return q.map_parts(func, shares_scale=False)


@operators(aten.is_pinned.default)
def _is_pinned(func: Any, q: QuantizedTensor, device: torch.device | None = None) -> bool:
    return all(part.is_pinned() for part in _plain_parts(q))


@operators(aten.record_stream.default)
def _record_stream(func: Any, q: QuantizedTensor, stream: Any) -> None:
    for part in _plain_parts(q):
        func(part, stream)


@operators(aten.zero_.default)
def _zero_(func: Any, q: QuantizedTensor) -> QuantizedTensor:
    for part in _plain_parts(q):
        func(part)
    return q


def _plain_parts(q: QuantizedTensor) -> list[Tensor]:
    parts = [part for part in (q.packed, q.block_scale, q.tensor_scale, q.amax) if part is not None]
    return parts + ([] if q.transposed is None else _plain_parts(q.transposed))


def _bits(part: Tensor) -> Tensor:
    return part.view(torch.int32 if part.dtype == torch.float32 else torch.uint8)


@operators(aten.equal.default)
def _equal(func: Any, a: QuantizedTensor, b: QuantizedTensor) -> bool:
    """The same format and the same bytes; amax and dtype, on which no value depends, do not count."""
    if type(a) is not type(b):
        refuse(func, "the other is a plain tensor; compare q.dequantize() with it")
    if (a.format, a.swizzled, a.shape) != (b.format, b.swizzled, b.shape):
        return False
    pairs = [(getattr(a, name), getattr(b, name)) for name in ("packed", "block_scale", "tensor_scale", "transposed")]
    for one, other in pairs:
        if (one is None) != (other is None):
            return False
        same = one is None or (
            torch.equal(one, other) if type(one) is type(a) else torch.equal(_bits(one), _bits(other))
        )
        if not same:
            return False
    return True


@operators(aten.copy_.default)
def _copy_(func: Any, q: QuantizedTensor, source: Any, non_blocking: bool = False) -> QuantizedTensor:
    """Copy bytes in place. A plain tensor is refused: how q was quantized (amax, rng, …) is more than its format."""
    if type(q) is not type(source):
        refuse(func, "one of the two is a plain tensor; use q.copy_(halfbyte.quantize(x, q.format, …))")
    if q.format != source.format:
        raise FormatError(f"{func}: the source is in {source.format}, the destination in {q.format}; quantize it so")
    if q.shape != source.shape or q.swizzled != source.swizzled:
        raise ShapeError(
            f"{func}: the source has shape {tuple(source.shape)}, swizzled={source.swizzled}; the destination "
            f"{tuple(q.shape)}, swizzled={q.swizzled}; they must be the same"
        )
    for name in ("packed", "tensor_scale", "transposed"):
        one, other = getattr(q, name), getattr(source, name)
        shapes = [None if part is None else tuple(part.shape) for part in (one, other)]
        if shapes[0] != shapes[1]:
            raise ShapeError(f"{func}: {name} has shape {shapes[1]} in the source, {shapes[0]} in the destination")
    if q.shares_scale and not _fits(q.tensor_scale, source.tensor_scale):
        refuse(
            func,
            "the destination is a slice whose tensor scale other elements share, and the source has another; "
            "quantize both with one amax=, or zero_() the whole destination first and then fill all of it",
        )
    if source.amax is None or q.amax is None or q.amax.shape != source.amax.shape:
        q.amax = None  # not known of the new bytes
    for name in ("packed", "block_scale", "tensor_scale", "amax", "transposed"):
        if getattr(q, name) is not None:
            getattr(q, name).copy_(getattr(source, name), non_blocking=non_blocking)
    return q


def _fits(scale: Tensor | None, source: Tensor | None) -> bool:
    """Whether scale is the source's already; or 0, which zeros_like and empty_like give: not filled yet."""
    if scale is None or source is None:
        return True
    return torch.equal(_bits(scale), _bits(source.to(scale.device))) or not bool(scale.any())


# ---- new ones of the same kind ----


@operators(aten.empty_like.default, aten.zeros_like.default)
def _like(
    func: Any, q: QuantizedTensor, *, dtype: torch.dtype | None = None, layout: Any = None,
    device: torch.device | None = None, pin_memory: bool | None = None,
    memory_format: torch.memory_format | None = None,
) -> QuantizedTensor:  # fmt: skip
    _check_memory_format(func, memory_format)
    return _new(func, q, q.shape, dtype=dtype, device=device, pin_memory=pin_memory)


@operators(aten.new_empty.default, aten.new_zeros.default)
def _new(
    func: Any, q: QuantizedTensor, size: Any, *, dtype: torch.dtype | None = None, layout: Any = None,
    device: torch.device | None = None, pin_memory: bool | None = None,
) -> QuantizedTensor:  # fmt: skip
    dtype = q.dtype if dtype is None else dtype
    if dtype not in FLOATS:
        refuse(func, f"it cannot stand for {dtype}, only for float32, bfloat16 or float16")
    size = tuple(size)
    options: Any = {"device": device, "pin_memory": pin_memory}
    if size == tuple(q.shape):
        return q.map_parts(
            lambda part: part.new_zeros(part.shape, **options), dtype=dtype, shares_scale=False
        )  # fmt: skip
    rows_only(func, q)
    block = q.format.block_columns
    if not size or size[-1] % block:
        refuse(func, f"size {size}: the last dimension must be divisible by {block}")
    scales = {"none": (), "tensor": (), "row": size[:-1], "matrix": size[:-2]}.get(scale_kind(q))
    if scales is None:
        refuse(func, "it was flattened; use its (…, K) shape")
    return with_scales(
        q,
        lambda part: part.new_zeros(scales, **options),
        packed=q.packed.new_zeros((*size[:-1], size[-1] // per_byte(q)), **options),
        block_scale=q.block_scale.new_zeros((*size[:-1], size[-1] // block), **options),
        dtype=dtype,
        shares_scale=False,
    )
