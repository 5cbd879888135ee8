"""What a conversion did, by weight and in all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..formats import NVFP4, Format
from ..tensor import QuantizedTensor
from .manifest import format_from_json, format_to_json
from .options import Options
from .plan import Planned

COMPARED = 1 << 24, 1 << 20  # elements at once, on a GPU and on a CPU


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


def report_weight(item: Planned, weight: Tensor, q: QuantizedTensor) -> WeightReport:
    """How a weight fared; both are on one device."""
    error = norm = 0.0
    rows = max(1, COMPARED[weight.device.type == "cpu"] // weight.shape[1])
    buffer = torch.empty((min(rows, len(weight)), weight.shape[1]), device=weight.device)  # new memory is slow memory
    for start in range(0, weight.shape[0], rows):  # float32 copies of all of it would be most of the memory
        part = slice(start, start + rows)
        original = buffer[: len(weight[part])].copy_(weight[part])
        decoded = QuantizedTensor(q.packed[part], q.block_scale[part], q.tensor_scale, q.amax, q.format).dequantize()
        error += _squared_norm(decoded.sub_(original))
        norm += _squared_norm(original)
    return WeightReport(
        name=item.name.full,
        format=q.format,
        tensor_scale=None if q.tensor_scale is None else float(q.tensor_scale),
        kind=item.name.kind,
        leaf=item.name.leaf,
        elements=weight.numel(),
        bytes=q.nbytes,
        squared_error=error,
        squared_norm=norm,
    )


def _squared_norm(matrix: Tensor) -> float:
    """Sum of squares, of float32 values from the least to the largest."""
    norms = torch.linalg.vector_norm(matrix, dim=-1).double()
    if not 1e-12 < float(norms.amax()) < 1e18:  # the squares may have left float32's range
        norms = torch.linalg.vector_norm(matrix, dim=-1, dtype=torch.float64)
    return float(norms.square().sum())
