"""Fused groups of weights, quantized: what a conversion and a live export have in common.

A conversion takes one group at a time, a live export many; the bytes are the same, since a weight's depend on its
group's maximum and on nothing else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..formats import MXFP8, NVFP4, Format
from ..functional import quantize_many
from ..tensor import QuantizedTensor

CONSTANT_INPUT_SCALE = 1.0  # amax 2688 = 6 · 448
Reduce = Callable[[Tensor], Tensor]  # maxima (n,) float32 of parts → those of the whole


@dataclass(frozen=True, eq=False)
class WeightGroup:
    """Weights that share one tensor scale, or the parts of them that are here.

    Attributes:
        format: of all.
        weights: (N, K) each.
        names: their tensors' names, for errors.
        where: what such an error begins with, for each.
        reduce: for parts: their maximum over all who hold others; None where the group is whole.
    """

    format: Format
    weights: Sequence[Tensor]
    names: Sequence[str]
    where: Sequence[str] = ()
    reduce: Reduce | None = None


def quantize_groups(groups: Sequence[WeightGroup]) -> list[list[QuantizedTensor]]:
    """Quantize groups, each under one maximum; on a GPU in few launches, however many there are.

    Groups with the same `reduce` have their maxima reduced in one call, in the order given.

    Raises:
        CheckpointError: a weight contains NaN or inf.
    """
    units = [_Unit(group, adjacent(group)) for group in groups]
    _quantize([unit for unit in units if unit.has_own_maximum], None)
    if shared := [unit for unit in units if not unit.has_own_maximum]:
        _quantize(shared, _maxima(shared))
    _check_finite(units)
    return [unit.split() for unit in units]


def amaxes(weights: Sequence[Tensor]) -> Tensor:
    """max |w| of each weight, (n,) float32, NaN winning; 0 for one without elements."""
    found = torch.zeros(len(weights), device=weights[0].device)
    by_dtype: defaultdict[torch.dtype, list[int]] = defaultdict(list)
    for i, weight in enumerate(weights):
        if weight.numel():
            by_dtype[weight.dtype].append(i)
    for places in by_dtype.values():
        norms = torch._foreach_norm([weights[i] for i in places], float("inf"))  # one launch for many
        found[places] = torch.stack(norms).float()
    return found


class _Unit:
    """A group on its way: the matrices that it is quantized as, and what became of them."""

    def __init__(self, group: WeightGroup, joined: Tensor | None) -> None:
        self.group = group
        self.joined = joined is not None
        self.matrices = list(group.weights) if joined is None else [joined]
        self.quantized: list[QuantizedTensor] = []

    @property
    def has_own_maximum(self) -> bool:
        if isinstance(self.group.format, MXFP8):  # it has no use for one
            return True
        return len(self.matrices) == 1 and self.group.reduce is None and bool(self.matrices[0].numel())

    def split(self) -> list[QuantizedTensor]:
        """As many tensors as weights."""
        if not self.joined:
            return self.quantized
        (q,) = self.quantized
        rows = [len(weight) for weight in self.group.weights]
        parts = zip(q.packed.split(rows), q.block_scale.split(rows), strict=True)
        return [QuantizedTensor(packed, scale, q.tensor_scale, q.amax, q.format) for packed, scale in parts]


def adjacent(group: WeightGroup) -> Tensor | None:
    """The weights as one matrix, where they lie one behind the other in memory, as gate and up of a trainer do.

    It then has the group's maximum for its own, and is read once instead of twice.
    """
    first = group.weights[0]
    block_rows = group.format.block[0] if isinstance(group.format, NVFP4) else 1
    offset = first.storage_offset()
    for weight in group.weights:
        same = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        fits = weight.shape[1] == first.shape[1] and weight.dtype == first.dtype and len(weight) % block_rows == 0
        if not (same and fits and weight.is_contiguous() and weight.storage_offset() == offset and weight.numel()):
            return None
        offset += weight.numel()
    rows = sum(len(weight) for weight in group.weights)
    return first.as_strided((rows, first.shape[1]), (first.shape[1], 1))


def _maxima(units: Sequence[_Unit]) -> Tensor:
    """Of each unit's group, float32 (n,), over all ranks that hold a part of it."""
    matrices = [matrix for unit in units for matrix in unit.matrices]
    most = max(len(unit.matrices) for unit in units)
    members: list[list[int]] = []  # of each unit, the first again where it has fewer than others
    for unit in units:
        first = members[-1][-1] + 1 if members else 0
        members.append([first] * (most - len(unit.matrices)) + list(range(first, first + len(unit.matrices))))
    maxima = amaxes(matrices)[torch.tensor(members)].amax(1)
    by_reduce: defaultdict[Reduce, list[int]] = defaultdict(list)
    for i, unit in enumerate(units):
        if unit.group.reduce is not None:
            by_reduce[unit.group.reduce].append(i)
    for reduce, places in by_reduce.items():
        maxima[places] = reduce(maxima[places])
    return maxima


def _quantize(units: Sequence[_Unit], maxima: Tensor | None) -> None:
    """Fill in each unit's result; weights without elements have none to compute."""
    by_format: defaultdict[Format, list[int]] = defaultdict(list)
    for i, unit in enumerate(units):
        by_format[unit.group.format].append(i)
    for fmt, places in by_format.items():
        xs = [matrix for i in places for matrix in units[i].matrices]
        if maxima is None or isinstance(fmt, MXFP8):
            done = quantize_many(xs, fmt)
        else:
            done = quantize_many(xs, fmt, amax=maxima[[i for i in places for _ in units[i].matrices]])
        results = iter(done)
        for i in places:
            units[i].quantized = [next(results) for _ in units[i].matrices]


def _check_finite(units: Sequence[_Unit]) -> None:
    """By what was computed anyway, with one wait for the device however many there are."""
    nvfp4 = [q.amax for unit in units for q in unit.quantized if q.amax is not None]
    wrong = [(~torch.stack(nvfp4).isfinite()).any()] if nvfp4 else []
    mxfp8 = [q.block_scale.flatten() for unit in units for q in unit.quantized if isinstance(q.format, MXFP8)]
    wrong += [(torch.cat(mxfp8) >= 254).any()] if mxfp8 else []  # 255 is NaN, 254 inf: no finite float reaches it
    if not wrong or not bool(torch.stack(wrong).any()):
        return
    for group in (unit.group for unit in units):
        for weight, name, where in zip(group.weights, group.names, group.where or [""] * len(group.names), strict=True):
            if not bool(weight.isfinite().all()):
                raise CheckpointError(
                    f"{where}tensor {name}: contains NaN or inf; repair the model, or exclude it with "
                    f"--ignore {name.removesuffix('.weight')}"
                )
    names = ", ".join(unit.group.names[0] for unit in units)
    raise CheckpointError(f"{names}: another rank's part of one of these contains NaN or inf; repair the model")
