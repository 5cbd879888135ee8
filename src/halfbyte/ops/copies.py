"""Tensors copied again and again to the same places: what takes a version of the weights over."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .backends import pick

Pair = tuple[Tensor, Tensor]


def prepare_copies(pairs: Iterable[Pair]) -> Callable[[], None]:
    """What copies each source to its target, whenever it is called; nothing synchronises.

    On a GPU: two launches for all that lies as `kernels.copies` wants it, whose addresses are remembered, and whose
    versions stay. Elsewhere, and for the rest, `torch._foreach_copy_` over the widest words that fit.

    Args:
        pairs: (target, source), of one shape and dtype each, both contiguous or neither.
    """
    planned: defaultdict[torch.device, list[Pair]] = defaultdict(list)
    others: defaultdict[Any, list[Pair]] = defaultdict(list)
    for target, source in pairs:
        if not source.numel():
            continue
        if target.device == source.device and pick("auto", source.device) == "triton":
            from ..kernels import copies

            if copies.supports(target, source):
                planned[source.device].append((target, source))
                continue
        target, source = _as_words(target, source)
        others[target.dtype, target.device, source.device].append((target, source))
    runs: list[Callable[[], None]] = []
    for some in planned.values():
        from ..kernels import copies

        runs.append(copies.Copies(*zip(*some, strict=True)))
    each = [tuple(map(list, zip(*some, strict=True))) for some in others.values()]

    def run() -> None:
        for copy in runs:
            copy()
        for targets, sources in each:
            torch._foreach_copy_(targets, sources)

    return run


def _as_words(target: Tensor, source: Tensor) -> Pair:
    """Both as runs of the widest words that fit, or as they are."""
    if target.is_contiguous() and source.is_contiguous():
        for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8):
            if all(part % dtype.itemsize == 0 for part in (target.nbytes, target.data_ptr(), source.data_ptr())):
                try:
                    return target.view(-1).view(dtype), source.view(-1).view(dtype)
                except RuntimeError:  # its offset in its storage does not divide
                    continue
    return target, source
