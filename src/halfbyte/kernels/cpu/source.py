"""How compiled code sees a torch tensor: as it lies in memory, never copied."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .compile import jit, jit_apart
from .elements import BFLOAT16, FLOAT16, FLOAT32, gather_floats, hadamard, load_floats
from .vector import load, store, transpose

KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
_ARRAYS = {
    torch.float32: np.float32,
    torch.bfloat16: np.uint16,
    torch.float16: np.uint16,
    torch.float8_e4m3fn: np.uint8,
    torch.uint8: np.uint8,
}


class Source(NamedTuple):
    """A tensor (…, K) of any strides as rows of K elements.

    Attributes:
        data: the memory it spans, (span,) float32, or uint16 holding 16-bit floats.
        sizes: leading dimensions, those that lie one after the other merged, (D,) int64.
        strides: their strides in elements, (D,) int64.
        step: stride of the last dimension; 1 is fast.
        kind: FLOAT32, BFLOAT16 or FLOAT16.
        rotate: apply the Hadamard transform to each 16 elements read.
    """

    data: Any
    sizes: Any
    strides: Any
    step: int
    kind: int
    rotate: bool


def source(x: Tensor, *, rotate: bool = False) -> Source:
    """The rows of a tensor that has elements."""
    if x.is_contiguous():
        k = x.shape[-1]
        return Source(memory(x), np.array((x.numel() // k,)), np.array((k,)), 1, KINDS[x.dtype], rotate)
    dims: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == stride * size:
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    sizes, strides = np.array(dims, dtype=np.int64).reshape(-1, 2).T.copy()
    return Source(memory(x), sizes, strides, x.stride(-1), KINDS[x.dtype], rotate)


def memory(x: Tensor) -> Any:
    """Everything between a tensor's first and last element, 1-D; 16-bit floats as uint16, float8 as uint8."""
    if x.requires_grad:
        x = x.detach()
    if not x.is_contiguous():
        span = (
            1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
        )
        x = x.as_strided((span,), (1,))
    return np.asarray(_Memory(x))


class _Memory:
    """A contiguous tensor as numpy takes it. Tensor.numpy() would fix its storage's size, which FSDP2 has to change."""

    def __init__(self, x: Tensor) -> None:
        self.owner = x  # lives as long as the array
        kind = np.dtype(_ARRAYS[x.dtype]).str
        self.__array_interface__ = {"version": 3, "shape": (x.numel(),), "typestr": kind, "data": (x.data_ptr(), False)}


_allocate = np.empty  # by a name that tests replace, to see what is not written


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Any]:
    """A new tensor, and its memory as `memory` gives it.

    numpy allocates: it asks the system for huge pages, and a large output costs fewer page faults than `torch.empty`.
    """
    array = _allocate(shape, _ARRAYS[dtype])
    tensor = torch.from_numpy(array)
    return tensor if dtype == tensor.dtype else tensor.view(dtype), array.reshape(-1)


def rows_of(shape: torch.Size) -> int:
    """Rows of a tensor (…, K)."""
    return math.prod(shape[:-1])


@jit
def row_start(source: Any, row: int) -> int:
    """Index in source.data of a row's first element."""
    start = 0
    for d in range(len(source.sizes) - 1, 0, -1):
        start += row % source.sizes[d] * source.strides[d]
        row //= source.sizes[d]
    return start + row * source.strides[0] if len(source.sizes) else start


@jit
def read_across(x: Source, row: int, column: int, columns: int, count: int, held: Any) -> None:
    """held[i·16 …] = the sixteen elements from (row, column + i·columns) on, of a source with step 1."""
    start = row_start(x, row) + column
    for i in range(count):
        values = load_floats(x.data, start + i * columns, x.kind)
        store(held, i * 16, hadamard(values, x.kind) if x.rotate else values)


@jit_apart
def read_down(x: Source, row: int, column: int, count: int, held: Any) -> None:
    """held[i·16 …] = the sixteen elements from (row + i, column) on; count ≤ 16."""
    start = row_start(x, row)
    # In a transposed matrix the columns are what lies together.
    transposed = x.step != 1 and count == 16 and x.strides[-1] == 1 and row % x.sizes[-1] + 16 <= x.sizes[-1]
    if transposed or x.step == 1:
        for i in range(count):
            at = start + (column + i) * x.step if transposed else row_start(x, row + i) + column
            store(held, i * 16, load_floats(x.data, at, x.kind))
        if transposed:
            transpose(held, 0)
    else:
        for i in range(count):
            store(held, i * 16, gather_floats(x.data, row_start(x, row + i) + column * x.step, x.step, x.kind))
    if x.rotate:
        for i in range(count):
            store(held, i * 16, hadamard(load(held, i * 16), x.kind))
