"""Tensors quantized again and again into the same memory: what a weight sync does at every step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import FormatError, ShapeError
from ..formats import MXFP8, NVFP4, Format
from .backends import Backend, _largest, backend, pick
from .checks import check_error_weights, check_inputs

QuantizeInto = Callable[[Tensor, Tensor, Tensor], None]
PLACE_BLOCKS = 16  # each tensor begins at a multiple of so many blocks: 128 bytes of codes, 16 of scales


class Into(NamedTuple):
    """Flat memory that results are written to, all on one device.

    Attributes:
        elements: NVFP4: uint8, 8 for each block of 16; MXFP8: float8_e4m3fn, 32 for each block.
        block_scale: NVFP4: float8_e4m3fn, MXFP8: uint8; one for each block.
        tensor_scale, amax: float32, one for each tensor; of no use for MXFP8.
    """

    elements: Tensor
    block_scale: Tensor
    tensor_scale: Tensor
    amax: Tensor


class Prepared(Protocol):
    """What can be repeated."""

    def maxima(self) -> Tensor:
        """Of each group, float32 (groups,); NaN wins, 0 where it has no elements."""

    def run(self, maxima: Tensor | None = None) -> None:
        """Quantize all: each group under its own maximum, or under the given ones, float32 (groups,)."""


def places(xs: Sequence[Tensor], fmt: Format) -> tuple[list[int], int]:
    """The first block of each tensor in `Into`'s memory, and how many blocks that takes in all."""
    found, end = [], 0
    for x in xs:
        found.append(end)
        end += -(-x.numel() // (fmt.block_columns * PLACE_BLOCKS)) * PLACE_BLOCKS
    return found, end


def prepare_many(
    xs: Sequence[Tensor], groups: Sequence[int], fmt: Format, into: Into, *, impl: str = "auto"
) -> Prepared:
    """Everything that does not change from one time to the next, done once.

    The results are those of `quantize_many` for each group with one maximum; those of tensor i begin at `places`.
    On a GPU all of it is one launch and a fill, where `kernels.many` takes such tensors.

    Args:
        xs: (…, K) each, of any shapes, on one device; their addresses are remembered.
        groups: of each; 0, 1, …: the tensors of one group have one maximum. Of no effect for MXFP8.
        fmt: rounds to nearest.
        into: where results go.
        impl: as in `halfbyte.quantize`.

    Raises:
        ShapeError, FormatError, UnsupportedError: as `quantize_many`.
    """
    if not xs or len(groups) != len(xs):
        raise ShapeError(f"{len(xs)} tensors, {len(groups)} groups: give at least one tensor, and a group for each")
    if isinstance(fmt, NVFP4):
        check_error_weights(xs[0], fmt, None, None)
        if fmt.scaling == "row" or fmt.rounding == "stochastic":
            raise FormatError(f"{fmt}: what is prepared has one scale for each tensor and rounds to nearest")
    check_inputs(xs, fmt)
    xs = [x.detach() for x in xs]
    firsts, end = places(xs, fmt)
    if len(into.block_scale) < end:
        raise ShapeError(f"into.block_scale has {len(into.block_scale)} of {end} places: see places(xs, fmt)")
    name = pick(impl, xs[0].device)
    if name == "triton" and isinstance(fmt, NVFP4):
        from ..kernels import planned

        if planned.supports(xs, fmt):
            return planned.Prepared(xs, groups, firsts, fmt, into)
    if isinstance(fmt, MXFP8):
        if name == "triton":
            from ..kernels import mxfp8

            return _PreparedMXFP8(xs, firsts, into, mxfp8.quantize_into)
        return _PreparedMXFP8(xs, firsts, into, functools.partial(_quantize_and_copy, backend(name)))
    return _PreparedNVFP4(xs, groups, firsts, fmt, into, backend(name))


class _PreparedNVFP4:
    """Group by group, each result copied to its place."""

    def __init__(
        self, xs: Sequence[Tensor], groups: Sequence[int], firsts: list[int], fmt: NVFP4, into: Into, run: Backend
    ) -> None:
        self.fmt, self.backend, self.amax = fmt, run, into.amax
        self.members: list[list[int]] = [[] for _ in range(max(groups) + 1)]
        for i, group in enumerate(groups):
            self.members[group].append(i)
        self.xs = xs
        self.targets = [
            (
                into.elements[8 * first : 8 * first + x.numel() // 2].view(*x.shape[:-1], x.shape[-1] // 2),
                into.block_scale[first : first + x.numel() // 16].view(*x.shape[:-1], x.shape[-1] // 16),
                into.tensor_scale[i],
                into.amax[i],
            )
            for i, (x, first) in enumerate(zip(xs, firsts, strict=True))
        ]

    def maxima(self) -> Tensor:
        """See `Prepared`."""
        return torch.stack([_largest([self.xs[i] for i in members], self.fmt) for members in self.members])

    def run(self, maxima: Tensor | None = None) -> None:
        """See `Prepared`."""
        for group, members in enumerate(self.members):
            xs = [self.xs[i] for i in members]
            amax = None if maxima is None else maxima[group]
            done = self.backend.quantize_many(xs, self.fmt, amax=amax, shared_amax=amax is None and len(xs) > 1)
            for i, parts in zip(members, done, strict=True):
                for target, part in zip(self.targets[i], parts, strict=True):
                    target.view(torch.uint8).copy_(part.view(torch.uint8)) if target.dim() else target.copy_(part)


class _PreparedMXFP8:
    """Tensors that lie one behind the other in memory, such as stacked experts, as one."""

    def __init__(self, xs: Sequence[Tensor], firsts: list[int], into: Into, quantize_into: QuantizeInto) -> None:
        self.quantize_into = quantize_into
        self.runs: list[tuple[Tensor, Tensor, Tensor]] = []
        start = 0
        for i in range(1, len(xs) + 1):
            if i < len(xs) and _follows(xs[i - 1], xs[i]):
                continue
            x = xs[start] if i == start + 1 else _joined(xs[start:i])
            if x.numel():
                first, shape = firsts[start], x.shape
                elements = into.elements[32 * first : 32 * first + x.numel()].view(shape)
                scale = into.block_scale[first : first + x.numel() // 32].view(*shape[:-1], shape[-1] // 32)
                self.runs.append((x, elements, scale))
            start = i

    def maxima(self) -> Tensor:
        """It has none."""
        raise ShapeError("MXFP8 has no tensor scale, and so no maxima")

    def run(self, maxima: Tensor | None = None) -> None:
        """See `Prepared`."""
        for x, elements, scale in self.runs:
            self.quantize_into(x, elements, scale)


def _quantize_and_copy(run: Backend, x: Tensor, elements: Tensor, scale: Tensor) -> None:
    made = run.quantize_mxfp8(x)
    elements.view(torch.uint8).copy_(made[0].view(torch.uint8))
    scale.copy_(made[1])


def _follows(a: Tensor, b: Tensor) -> bool:
    """Whether b begins where a ends, and the same holds for their places."""
    if a.dtype != b.dtype or a.shape[-1] != b.shape[-1] or not (a.is_contiguous() and b.is_contiguous()):
        return False
    same = a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    return same and a.data_ptr() + a.nbytes == b.data_ptr() and a.numel() % (32 * PLACE_BLOCKS) == 0


def _joined(xs: Sequence[Tensor]) -> Tensor:
    columns = xs[0].shape[-1]
    return xs[0].as_strided((sum(x.numel() for x in xs) // columns, columns), (columns, 1))
