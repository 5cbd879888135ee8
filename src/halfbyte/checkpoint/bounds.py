"""A calibrated checkpoint against its source: bytes that depend on data cannot be recomputed, but they can be bounded.

Digests and shared scales are for `verify`; here, what was not calibrated is compared byte by byte, and every weight
that was is decoded and held against the original.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..errors import HalfbyteError
from ..formats import NVFP4
from .convert import kept_tensor, weight_group
from .dequantize import decode
from .plan import Plan, Planned
from .shards import Checkpoint
from .verify import Contents, Finding, Progress
from .weights import quantize_groups

SLACK = 4.0
"""A calibrated weight may be this many times as far from the original as rounding to nearest by `amax` puts it. GPTQ
trades distance for a better output: about 1.2 to 2 times; a wrong scale, or another layer's codes, is far beyond."""


def calibrated_weights(
    contents: Contents, source: Checkpoint, plan: Plan, device: str, progress: Progress
) -> Iterator[Finding]:
    """Findings about weights: too far from the source, or, where they stay in high precision, different from it."""
    for group in plan.groups:
        try:
            yield from _group(contents, source, group, device)
        except HalfbyteError as error:
            yield Finding(group[0].name.full, str(error))
        for item in group:
            progress(item.nbytes)


def _group(contents: Contents, source: Checkpoint, group: tuple[Planned, ...], device: str) -> Iterator[Finding]:
    found = contents.checkpoint
    if group[0].format is None:
        (item,) = group
        name = item.name.full
        if name not in found.tensors:
            yield Finding(name, "is missing")
        elif not _same_bytes(found.read(name), kept_tensor(item, source.fetch(item.source, item.index))):
            yield Finding(name, "is in high precision, but not what the source has")
        return
    weights = [source.fetch(item.source, item.index)(device) for item in group]
    fmt = group[0].format
    fmt = NVFP4() if isinstance(fmt, NVFP4) else fmt
    (rounded,) = quantize_groups([weight_group(source, group, weights, fmt)])
    for item, weight, nearest in zip(group, weights, rounded, strict=True):
        decoded = decode(contents, item.name.module, torch.float32, device)
        if decoded.shape != weight.shape:
            yield Finding(
                item.name.full, f"decodes to shape {list(decoded.shape)}; the source has {list(weight.shape)}"
            )
            continue
        bound = float(torch.linalg.vector_norm(nearest.dequantize() - weight.float()))
        error = float(torch.linalg.vector_norm(decoded - weight.float()))
        if not error <= SLACK * bound:
            norm = max(float(torch.linalg.vector_norm(weight.float())), 1e-30)
            yield Finding(
                item.name.full,
                f"is {error / norm:.1%} away from the source; rounding to nearest is {bound / norm:.1%} away, and "
                f"calibration at most {SLACK:g} times that",
            )


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    same_kind = (a.dtype, a.shape) == (b.dtype, b.shape)
    return same_kind and bool((a.reshape(-1).view(torch.uint8) == b.reshape(-1).view(torch.uint8)).all())
