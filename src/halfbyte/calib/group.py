"""One decoder layer's statistics, and its weights quantized by them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..formats import NVFP4
from ..functional import quantize
from ..tensor import QuantizedTensor
from .gptq import GPTQ, Factor, factorize, gptq, tensor_amax, unstack
from .observers import AmaxObserver, HessianObserver, ObserverOptions, diagonal_blocks
from .ranks import Ranks

STARVING = 0.25  # of the tokens that an expert gets on average


@dataclass(frozen=True)
class Member:
    """One weight of a fused group: its name in the output, in its layer, and its format."""

    name: str
    local: str
    format: NVFP4


class Site:
    """What is observed where tokens enter a fused group's weights."""

    def __init__(self, name: str, columns: int, options: ObserverOptions, hessian: bool, device: Any) -> None:
        self.name = name
        self.amax = AmaxObserver(name, options)
        self.hessian = HessianObserver(name, columns, device) if hessian else None
        self.columns = columns
        self.tokens = 0
        self.device = device
        self._spans: dict[int, Tensor] = {}

    def __call__(self, x: Tensor) -> None:
        """Take tokens (…, K) into account."""
        self.amax.collect(x)
        self.tokens += x.numel() // self.columns
        if self.hessian is not None:
            self.hessian.collect(x)

    def end_span(self, span: int) -> None:
        """Keep the sum of a span, for adding spans up in one order whoever ran them."""
        if self.hessian is not None:
            self._spans[span] = self.hessian.state
            self.hessian.reset()

    def reduce(self, ranks: Ranks) -> Statistics:
        """Over all ranks; the site is empty after."""
        own = self.amax.state if self.amax.state is not None else torch.zeros((), device=self.device)
        maximum = ranks.maximum(own.clone()) * self.amax.options.headroom
        tokens = int(ranks.total(torch.tensor(self.tokens, device=self.device)))
        hessian = None
        if self.hessian is not None:
            total = ranks.sum_spans(self._spans, self.hessian.state)
            hessian = (total / max(tokens, 1)).float() if tokens else None
        self._spans = {}
        return Statistics(maximum, tokens, hessian)


@dataclass(frozen=True, eq=False)
class Statistics:
    """Of one site: the largest magnitude, how many tokens, and the mean of their outer products."""

    amax: Tensor
    tokens: int
    hessian: Tensor | None


@dataclass(frozen=True)
class GroupReport:
    """How a fused group fared.

    Attributes:
        method: "gptq", or "nearest": asked for, or where no token came or the Hessian was of no use (`why`).
        error: E‖(W − Q)x‖² / E‖Wx‖² over all members, or None without a Hessian.
    """

    names: tuple[str, ...]
    method: str
    why: str
    tokens: int
    damping: float
    saturated: int
    error: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**self.__dict__, "names": list(self.names)}


class Quantizer:
    """Quantizes the groups of one layer; factors of a Hessian that several groups share are made once."""

    def __init__(self, options: GPTQ | None) -> None:
        self.options = options
        self._factors: dict[int, tuple[Tensor, Factor | None]] = {}

    def __call__(
        self, members: list[Member], weights: list[Tensor], statistics: Statistics | None
    ) -> tuple[list[QuantizedTensor], GroupReport]:
        """Quantize a fused group's weights under one tensor scale.

        Raises:
            CheckpointError: a weight contains NaN or inf.
        """
        fmt = members[0].format
        rows = [len(weight) for weight in weights]
        stacked = torch.cat([weight.float() for weight in weights])
        maximum = stacked.abs().amax()
        if not bool(maximum.isfinite()):
            raise CheckpointError(
                f"{members[0].name}: contains NaN or inf; repair the model, or exclude it with --ignore"
            )
        hessian = statistics.hessian if statistics else None
        tokens = statistics.tokens if statistics else 0
        method, why, factor = "nearest", "", None
        if self.options is not None:
            if hessian is None:
                why = "no token reached it"
            elif (factor := self._factor(hessian)) is None:
                why = "the Hessian is not positive definite, whatever the damping"
            else:
                method = "gptq"
        saturated = 0
        if self.options is not None and factor is not None:
            rounded = gptq(stacked, factor, fmt, tensor_amax(maximum, self.options))
            quantized, saturated = unstack(rounded.quantized, rows), rounded.saturated
        else:
            quantized = unstack(nearest(stacked, fmt, maximum, hessian), rows)
        error = None
        if hessian is not None:
            decoded = torch.cat([q.dequantize() for q in quantized])
            error = output_error(stacked, decoded, hessian)
        names = tuple(member.name for member in members)
        damping = factor.damping if factor is not None else 0.0
        return quantized, GroupReport(names, method, why, tokens, damping, saturated, error)

    def _factor(self, hessian: Tensor) -> Factor | None:
        assert self.options is not None
        key = id(hessian)
        if key not in self._factors:
            self._factors[key] = (hessian, factorize(hessian, self.options))  # kept, so that no other gets its id
        return self._factors[key][1]


def nearest(weight: Tensor, fmt: NVFP4, amax: Tensor, hessian: Tensor | None) -> QuantizedTensor:
    """Round to nearest by the format's rule; a rule that wants a Hessian takes plain squares where there is none."""
    if fmt.error != "hessian":
        return quantize(weight, fmt, amax=amax)
    if hessian is None:
        return quantize(weight, replace(fmt, error="mse"), amax=amax).replace(format=fmt)
    return quantize(weight, fmt, amax=amax, hessian=diagonal_blocks(hessian))


def output_error(weight: Tensor, decoded: Tensor, hessian: Tensor) -> float:
    """E‖(W − Q)x‖² / E‖Wx‖²; 0 for a weight without output."""

    def power(w: Tensor) -> float:
        return float(((w @ hessian) * w).sum(dtype=torch.float64))

    total = power(weight)
    return power(weight - decoded) / total if total > 0 else 0.0
