"""Where a tile's elements lie: loading pairs, storing bytes, and the strides that the kernels take."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ._primitives import as_float32, jit, unpack_words

KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


class Matrices(NamedTuple):
    """An input seen as P matrices of M rows and K columns, by strides in elements; 0 where dense."""

    x: Tensor  # what the strides belong to; its own shape may be another
    matrices: int  # P
    rows: int  # M
    columns: int  # K
    stride_p: int
    stride_m: int
    stride_k: int
    dense: bool  # rows are contiguous, aligned to a word, and follow one another in each matrix and across matrices
    kind: int


def as_matrices(x: Tensor, per_matrix: bool) -> Matrices:
    """View x (…, K) as [P, M, K]; copies only what no strides can describe."""
    count, rows, strides, contiguous = _geometry(x.shape, x.stride(), per_matrix)
    if not strides:
        x = x.contiguous()
        count, rows, strides, contiguous = _geometry(x.shape, x.stride(), per_matrix)
    kind = KINDS[x.dtype]
    dense = contiguous and x.data_ptr() % (8 if kind == 2 else 4) == 0
    stride_p, stride_m, stride_k = (0, 0, 0) if dense else strides  # not read where dense, and then all alike
    return Matrices(x, count, rows, x.shape[-1], stride_p, stride_m, stride_k, dense, kind)


@functools.lru_cache(maxsize=4096)
def _geometry(shape: torch.Size, stride: tuple[int, ...], per_matrix: bool) -> tuple[int, int, tuple[int, ...], bool]:
    """P, M, the strides of [P, M, K], () where there are none, and whether they are contiguous."""
    count = math.prod(shape[:-2]) if per_matrix else 1
    rows = shape[-2] if per_matrix else math.prod(shape[:-1])
    try:
        view = torch.empty_strided(shape, stride, device="meta").view(count, rows, shape[-1])
    except RuntimeError:
        return count, rows, (), False
    return count, rows, view.stride(), view.is_contiguous()


@jit
def load_blocks(
    x_ptr, base, offsets, mask, stride_k, DENSE: tl.constexpr, KIND: tl.constexpr, LAST: tl.constexpr = False
):  # fmt: skip
    """(words, lo, hi): words as they lie where DENSE, and the float32 pairs; absent elements are 0.

    base: scalar, in elements. offsets: int32 or int64; of the pairs where DENSE, else of the even elements.
    LAST: nothing will read the words again, so that they need not stay in the L2 cache.
    """
    if DENSE:
        word: tl.constexpr = tl.int64 if KIND == 2 else tl.int32
        x_ptr = (x_ptr + base).to(tl.pointer_type(word))
        words = tl.load(x_ptr + offsets, mask=mask, other=0, eviction_policy="evict_first" if LAST else "")
        lo, hi = unpack_words(words, KIND)
    else:
        lo = tl.load(x_ptr + base + offsets, mask=mask, other=0.0)
        hi = tl.load(x_ptr + base + offsets + stride_k, mask=mask, other=0.0)
        lo, hi = as_float32(lo, KIND), as_float32(hi, KIND)
        words = lo
    return words, lo, hi
