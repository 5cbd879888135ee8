"""How a model is calibrated."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .gptq import GPTQ
from .observers import ObserverOptions

if TYPE_CHECKING:
    from ..recipe import Recipe


@dataclass(frozen=True)
class Calibration:
    """How to calibrate.

    Attributes:
        gptq: None rounds weights to nearest by their format's rule.
        observer: of the inputs' maxima.
        every_expert: show every token to every expert of a mixture, though only the chosen ones count in the output.
        layers_path: the decoder layers' place in transformers' model, where it is not clear.
        dtype: what the model computes in.
        spill: keep activations on disk once they take more than this many bytes.
    """

    gptq: GPTQ | None = field(default_factory=GPTQ)
    observer: ObserverOptions = field(default_factory=ObserverOptions)
    every_expert: bool = False
    layers_path: str | None = None
    dtype: torch.dtype = torch.float32
    spill: int = 16_000_000_000

    @classmethod
    def of(cls, recipe: Recipe, **rest: Any) -> Calibration:
        """What a recipe asks for; rest: the other attributes."""
        algorithm, observer = recipe.algorithm, recipe.observer
        gptq = None
        if algorithm.method == "gptq":
            gptq = GPTQ(algorithm.damping, algorithm.activation_order, algorithm.headroom)
        return cls(gptq, ObserverOptions(observer.method, observer.percentile, observer.headroom), **rest)

    def to_json(self) -> dict[str, Any]:
        """What the result depends on, as plain values."""
        return {
            "gptq": None if self.gptq is None else asdict(self.gptq),
            "observer": asdict(self.observer),
            "every_expert": self.every_expert,
            "dtype": str(self.dtype).removeprefix("torch."),
        }
