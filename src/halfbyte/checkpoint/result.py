"""What a conversion did, by weight and in all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..formats import NVFP4, Format
from .manifest import format_from_json, format_to_json
from .options import Options


@dataclass(frozen=True)
class WeightReport:
    """How one weight fared; `bytes` counts its elements and scales, `format` and `tensor_scale` are those written."""

    name: str
    format: Format
    tensor_scale: float | None
    kind: str
    leaf: str
    elements: int
    bytes: int
    squared_error: float
    squared_norm: float

    @property
    def relative_error(self) -> float:
        """‖decoded − original‖ / ‖original‖; 0 for an all-zero weight."""
        return _ratio(self.squared_error, self.squared_norm)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self), "format": format_to_json(self.format)}

    @staticmethod
    def from_json(data: dict[str, Any]) -> WeightReport:
        """The inverse of `to_json`."""
        return WeightReport(**{**data, "format": format_from_json(data["format"])})


@dataclass(frozen=True)
class Encoded:
    """A source that was quantized already.

    Attributes:
        what: how, in words.
        decoded: number of weights that were decoded.
        kept: modules among them that stay unquantized, as bfloat16.
        mxfp8, exact: how many were quantized to MXFP8, and how many of those have the very values that they had.
        left_out: number of tensors that mean nothing any more, by what they are.
    """

    what: str
    decoded: int
    kept: tuple[str, ...]
    mxfp8: int
    exact: int
    left_out: dict[str, int]


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    Attributes:
        source_bytes: as stored.
        encoded: what the source was, if it was quantized already.
        model_type: the model's family, by its config.
        impl: the implementation that quantized: "cpu", "triton" or "reference".
        resumed_shards: how many of the `shards` an interrupted run had finished; `seconds` does not count those.
    """

    output: Path
    options: Options
    impl: str
    weights: tuple[WeightReport, ...]
    source_bytes: int
    output_bytes: int
    fused_groups: int
    unequal_fused_scales: int
    to_search: int
    kept: int
    shards: int
    resumed_shards: int
    seconds: float
    encoded: Encoded | None = None
    model_type: str = ""

    @property
    def bits_per_weight(self) -> float:
        """Bits per quantized weight, scales included."""
        return 8 * sum(w.bytes for w in self.weights) / sum(w.elements for w in self.weights)

    @property
    def searched(self) -> int:
        """Weights whose scales the search chose; `to_search` were planned."""
        return sum(is_search(weight.format) for weight in self.weights)

    def relative_error(self, weights: Iterable[WeightReport] | None = None) -> float:
        """Of several weights taken as one long vector; of all by default."""
        chosen = self.weights if weights is None else tuple(weights)
        return _ratio(sum(w.squared_error for w in chosen), sum(w.squared_norm for w in chosen))

    def by_kind(self) -> dict[str, list[WeightReport]]:
        """Weights by kind and leaf, such as "experts down_proj"."""
        found: defaultdict[str, list[WeightReport]] = defaultdict(list)
        for weight in self.weights:
            found[f"{weight.kind} {weight.leaf}"].append(weight)
        return dict(found)


def is_search(fmt: Format | None) -> bool:
    """Whether the scale rule is the search."""
    return isinstance(fmt, NVFP4) and fmt.scale_rule == "search"


def _ratio(squared_error: float, squared_norm: float) -> float:
    return float((squared_error / squared_norm) ** 0.5) if squared_norm else 0.0
