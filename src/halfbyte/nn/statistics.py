"""What quantization does to a layer's operands, counted in its forward pass, and logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import yaml
from torch import Tensor, nn

from .. import names
from ..errors import FormatError
from ..formats import MXFP8, Format
from ..policy import matches
from ..recipe.training import LayerRecipe
from .operands import decode, encode

Operand = Literal["activations", "weights"]


@dataclass(frozen=True)
class Rule:
    """Which layers are counted: one item of the YAML.

    Attributes:
        match: patterns over module names, as in `Policy`.
        operands: of each.
        every: steps between two that are counted.
    """

    match: tuple[str, ...] = ("*",)
    operands: tuple[Operand, ...] = ("activations", "weights")
    every: int = 1

    def __post_init__(self) -> None:
        for name in ("match", "operands"):
            value = getattr(self, name)
            if isinstance(value, str) or not value or not all(isinstance(v, str) for v in value):
                raise FormatError(f"{name}={value!r}: needs a list of strings, at least one")
            object.__setattr__(self, name, tuple(value))
        if unknown := set(self.operands) - set(get_args(Operand)):
            raise FormatError(f"operands: unknown {', '.join(sorted(unknown))}; known are activations, weights")
        if type(self.every) is not int or self.every < 1:
            raise FormatError(f"every={self.every!r}: needs an integer of at least 1")


def read_rules(path: str | Path) -> tuple[Rule, ...]:
    """Rules from YAML: a list under `statistics`, of `match`, `operands` and `every`.

    Raises:
        FormatError: it is something else.
    """
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise FormatError(f"{path}: cannot be read ({error})") from error
    items = data.get("statistics") if isinstance(data, dict) and set(data) == {"statistics"} else None
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise FormatError(f"{path}: needs one key, statistics, with a list of rules")
    rules = []
    for i, item in enumerate(items):
        if unknown := set(item) - {"match", "operands", "every"}:
            raise FormatError(
                f"{path}: statistics.{i}: unknown {', '.join(sorted(unknown))}; known are every, match, operands"
            )
        rules.append(Rule(**item))
    return tuple(rules)


class Statistics:
    """Sums of one layer, as tensors where its data is; filled by its forward pass, also in a compiled graph."""

    def __init__(self, operands: Sequence[Operand], every: int, device: torch.device) -> None:
        self.every, self.enabled = every, True
        self.sums = {name: torch.zeros(6, dtype=torch.float64, device=device) for name in operands}

    @torch.no_grad()
    def count(self, x: Tensor, weight: Tensor, layer: LayerRecipe, weight_amax: Tensor | None) -> None:
        """Add one forward pass."""
        if layer.activations is not None and "activations" in self.sums:
            self.sums["activations"] += sums(x.detach().reshape(-1, x.shape[-1]), layer.activations)
        if layer.weights is not None and "weights" in self.sums:
            self.sums["weights"] += sums(weight.detach(), layer.weights, weight_amax)

    def results(self) -> dict[str, dict[str, float]]:
        """Operand → underflow, saturation and snr_db; of what nothing was counted, nothing."""
        out: dict[str, dict[str, float]] = {}
        for name, tensor in self.sums.items():
            count, nonzero, under, over, signal, noise = tensor.tolist()
            if count:
                ratio = signal / noise if noise else float("inf")
                out[name] = {
                    "underflow": under / max(nonzero, 1.0),
                    "saturation": over / count,
                    "snr_db": 10 * float(torch.tensor(ratio, dtype=torch.float64).log10()) if signal else float("nan"),
                }
        return out


def sums(x: Tensor, fmt: Format, amax: Tensor | None = None) -> Tensor:
    """float64 (6,): elements, those not zero, those of them that decode to zero, those that the largest code cuts off,
    Σx², Σ(x − x̂)².
    """
    encoded = encode(x, fmt, amax)
    exact, decoded = x.float(), decode(encoded, fmt, torch.float32)
    if isinstance(fmt, MXFP8):
        largest = encoded.packed.float().abs() == 448.0
    else:
        codes = torch.stack((encoded.packed & 7, (encoded.packed >> 4) & 7), -1).flatten(-2)
        largest = codes == 7
    nonzero = exact != 0
    saturated = largest & (exact.abs() > decoded.abs())
    return torch.stack(
        (
            torch.full((), x.numel(), dtype=torch.float64, device=x.device),
            nonzero.sum(dtype=torch.float64),
            (nonzero & (decoded == 0)).sum(dtype=torch.float64),
            saturated.sum(dtype=torch.float64),
            (exact * exact).sum(dtype=torch.float64),
            (exact - decoded).square().sum(dtype=torch.float64),
        )
    )


class Watcher:
    """Counts in the layers that rules select, and logs.

    `step(writer)` goes after each optimizer step. A layer that was counted is logged and starts again.
    """

    def __init__(self, model: nn.Module, rules: Sequence[Rule] = (Rule(),)) -> None:
        self.layers: dict[str, nn.Module] = {}
        self.steps = 0
        for full, module in model.named_modules():
            quantization = getattr(module, "quantization", None)
            if quantization is None or not isinstance(module, nn.Linear):
                continue
            name = names.parse(f"{full}.weight")
            rule = next((r for r in rules if any(matches(pattern, name) for pattern in r.match)), None)
            if rule is not None:
                quantization.statistics = Statistics(rule.operands, rule.every, module.weight.device)
                self.layers[full] = module
        if not self.layers:
            raise FormatError("no rule selects a quantized Linear: convert the model first, and look at the patterns")

    def results(self) -> dict[str, dict[str, dict[str, float]]]:
        """Layer → operand → value, of what was counted since the last step."""
        return {name: s.results() for name, s in self._statistics().items() if s.enabled}

    def step(self, writer: Any = None) -> Mapping[str, dict[str, dict[str, float]]]:
        """Log to a TensorBoard SummaryWriter, or anything with add_scalar(tag, value, step); return what was logged."""
        results = self.results()
        for layer, operands in results.items():
            for operand, values in operands.items():
                for name, value in values.items():
                    if writer is not None:
                        writer.add_scalar(f"halfbyte/{name}/{layer}/{operand}", value, self.steps)
        self.steps += 1
        for statistics in self._statistics().values():
            statistics.enabled = self.steps % statistics.every == 0
            for tensor in statistics.sums.values():
                tensor.zero_()
        return results

    def remove(self) -> None:
        """Count no more."""
        for module in self.layers.values():
            module.quantization.statistics = None  # type: ignore[union-attr]

    def _statistics(self) -> dict[str, Statistics]:
        return {name: module.quantization.statistics for name, module in self.layers.items()}  # type: ignore[union-attr,misc]
