"""What calibration collects of a tensor that flows through a model.

One contract: `collect(x)` any number of times, `compute()` whenever something was collected, `reset()` to begin again.
An observer's `state` is what data-parallel ranks exchange.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import FormatError, ShapeError

BLOCK = 16
Method = Literal["max", "percentile"]


@dataclass(frozen=True)
class ObserverOptions:
    """How the maximum of an input is taken.

    Attributes:
        method: "max" of all elements, or "percentile" of each batch's magnitudes, of which the largest counts.
        percentile: for "percentile": the share of magnitudes, in per cent, that do not exceed the result.
        headroom: the result is multiplied by this.
    """

    method: Method = "max"
    percentile: float = 99.99
    headroom: float = 1.0

    def __post_init__(self) -> None:
        if self.method not in ("max", "percentile"):
            raise FormatError(f"method={self.method!r}: choose 'max' or 'percentile'")
        if not 0 < self.percentile <= 100:
            raise FormatError(f"percentile={self.percentile}: choose above 0 and up to 100")
        if not 0 < self.headroom < float("inf"):
            raise FormatError(f"headroom={self.headroom}: must be positive and finite")


class AmaxObserver:
    """The largest magnitude of a tensor, or nearly; see `ObserverOptions`."""

    def __init__(self, name: str, options: ObserverOptions | None = None) -> None:
        self.name = name
        self.options = options or ObserverOptions()
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.state: Tensor | None = None
        self.elements = 0

    def collect(self, x: Tensor) -> None:
        """Take a tensor of any shape into account.

        Raises:
            ShapeError: it contains NaN or inf.
        """
        if x.numel() == 0:
            return
        magnitude = x.detach().abs().float()
        amax = magnitude.amax()
        if not bool(amax.isfinite()):
            raise ShapeError(_not_finite(self.name))
        if self.options.method == "percentile":
            position = max(1, round(self.options.percentile / 100 * magnitude.numel()))
            amax = magnitude.flatten().kthvalue(position).values
        self.state = amax if self.state is None else torch.maximum(self.state, amax)
        self.elements += x.numel()

    def compute(self) -> Tensor:
        """The maximum, float32 ().

        Raises:
            ShapeError: nothing was collected.
        """
        if self.state is None:
            raise ShapeError(f"{self.name}: nothing was collected; no token reached it")
        return self.state * self.options.headroom


class HessianObserver:
    """The mean of x·xᵀ over tokens, and how many there were.

    Products are summed in float32 within one `collect`, and the sums in float64 in the order in which they come.
    """

    def __init__(self, name: str, columns: int, device: torch.device | str = "cpu") -> None:
        self.name = name
        self.columns = columns
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.state = torch.zeros(self.columns, self.columns, dtype=torch.float64, device=self.device)
        self.tokens = 0

    def collect(self, x: Tensor) -> None:
        """Take tokens (…, K) into account.

        Raises:
            ShapeError: K is another, or there is NaN or inf among them.
        """
        if x.shape[-1] != self.columns:
            raise ShapeError(f"{self.name}: inputs have {x.shape[-1]} columns; expected {self.columns}")
        tokens = x.detach().reshape(-1, self.columns).float()
        product = tokens.T @ tokens
        if not bool(product.diagonal().isfinite().all()):
            raise ShapeError(_not_finite(self.name))
        self.state += product
        self.tokens += len(tokens)

    def compute(self) -> Tensor:
        """(K, K) float32.

        Raises:
            ShapeError: nothing was collected.
        """
        if self.tokens == 0:
            raise ShapeError(f"{self.name}: nothing was collected; no token reached it")
        return (self.state / self.tokens).float()

    def blocks(self) -> Tensor:
        """(K/16, 16, 16): the diagonal blocks of `compute()`, as `quantize(…, hessian=…)` takes them."""
        return diagonal_blocks(self.compute())


def diagonal_blocks(hessian: Tensor) -> Tensor:
    """(K, K) → (K/16, 16, 16)."""
    tiles = hessian.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    blocks: Tensor = tiles.diagonal(dim1=0, dim2=2).movedim(-1, 0).contiguous()
    return blocks


def _not_finite(name: str) -> str:
    return (
        f"{name}: its inputs contain NaN or inf; the model overflows on this data: try float32, or repair the model, "
        "or exclude the layer with --ignore"
    )
