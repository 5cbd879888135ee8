"""Copy the same tensors again and again, each to its place, in two launches however many there are.

Fewest bytes: each byte read and written once, so that the floor is that of a copy. `torch._foreach_copy_` reaches it
too, but looks at every tensor again each time: 6.4 ms for 12,000 tensors that an H200 copies in 1.7 ms, and a large
model in 4 bits has 56,000. Here addresses are collected once, in tables in device memory.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, launch
from ._primitives import jit

CHUNK = 16384  # words of 4 bytes that one program copies
WORDS = 128  # single words, each with addresses of its own, that one program copies
FEW = 256  # bytes up to which all words of a tensor may be single ones


@jit
def _copy_chunks(work_ptr, table_ptr, CHUNK: tl.constexpr):
    # work: [programs], tensor · 2³² + chunk; table: [tensors, 3], source, target, words
    work = tl.load(work_ptr + tl.program_id(0))
    row_ptr = table_ptr + (work >> 32) * 3
    source_ptr = tl.multiple_of(tl.load(row_ptr).to(tl.pointer_type(tl.int32)), 16)
    target_ptr = tl.multiple_of(tl.load(row_ptr + 1).to(tl.pointer_type(tl.int32)), 16)
    left = tl.multiple_of(tl.load(row_ptr + 2) - (work & 0xFFFFFFFF) * CHUNK, 4)
    start = (work & 0xFFFFFFFF) * CHUNK
    within = tl.arange(0, CHUNK)
    mask = within < left
    words = tl.load(source_ptr + start + within, mask=mask)
    tl.store(target_ptr + start + within, words, mask=mask)


@jit
def _copy_words(table_ptr, count, WORDS: tl.constexpr):
    # table: [2, count], sources, targets
    i = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    mask = i < count
    source_ptr = tl.load(table_ptr + i, mask=mask, other=0).to(tl.pointer_type(tl.int32))
    target_ptr = tl.load(table_ptr + count + i, mask=mask, other=0).to(tl.pointer_type(tl.int32))
    tl.store(target_ptr, tl.load(source_ptr, mask=mask), mask=mask)


def supports(target: Tensor, source: Tensor) -> bool:
    """Whether `Copies` takes the pair: contiguous, as many bytes, a multiple of 4, aligned to 16, or to 4 if few."""
    size, address = source.nbytes, target.data_ptr() | source.data_ptr()
    return (
        target.is_contiguous()
        and source.is_contiguous()
        and target.nbytes == size
        and size % 4 == 0
        and (address % 16 == 0 or (address % 4 == 0 and size <= FEW))
    )


class Copies:
    """What is copied where; see `halfbyte.ops.copies.prepare_copies`. All pairs must satisfy `supports`."""

    def __init__(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        self._kept = list(targets), list(sources)  # their memory must stay
        device = sources[0].device
        size = np.array([source.nbytes for source in sources], np.int64)
        address = np.array([[x.data_ptr() for x in xs] for xs in (sources, targets)], np.int64)  # [2, tensors]
        body = np.where((address[0] | address[1]) % 16 == 0, size // 16 * 4, 0)  # words
        chunks = -(-body // CHUNK)
        tensor = np.repeat(np.arange(len(size)), chunks)
        chunk = np.arange(len(tensor)) - np.repeat(np.cumsum(chunks) - chunks, chunks)
        self._work = torch.from_numpy(tensor << 32 | chunk).to(device)
        self._table = torch.from_numpy(np.stack((*address, body), 1)).to(device)
        rest = size // 4 - body
        number = np.arange(rest.sum()) - np.repeat(np.cumsum(rest) - rest, rest)
        words = np.repeat(address + 4 * body, rest, 1) + 4 * number
        self._words = torch.from_numpy(words).to(device)

    def __call__(self) -> None:
        """Copy; nothing synchronises."""
        if len(self._work):
            launch(_copy_chunks, len(self._work), (self._work, self._table), (), CHUNK=CHUNK)
        if count := self._words.shape[1]:
            launch(_copy_words, cdiv(count, WORDS), (self._words,), (count,), WORDS=WORDS)
