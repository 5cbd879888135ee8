"""Where a tile's elements lie: loading pairs, storing bytes, and the strides that the kernels take."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ._primitives import as_float32, jit, unpack_words

KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


class Matrices(NamedTuple):
    """An input seen as P matrices of M rows and K columns, by strides in elements."""

    x: Tensor
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
    k = x.shape[-1]
    count = math.prod(x.shape[:-2]) if per_matrix else 1
    rows = x.shape[-2] if per_matrix else math.prod(x.shape[:-1])
    view = x.reshape(count, rows, k)
    kind = KINDS[x.dtype]
    word = 8 if kind == 2 else 4
    dense = view.is_contiguous() and view.data_ptr() % word == 0
    stride_p, stride_m, stride_k = view.stride()
    return Matrices(view, count, rows, k, stride_p, stride_m, stride_k, dense, kind)


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
