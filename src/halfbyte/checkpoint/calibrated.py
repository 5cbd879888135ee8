"""What calibration gives to conversion."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from ..tensor import QuantizedTensor


class Calibrated(Protocol):
    """Results by the names that tensors have in the output. What is given is written; nothing is recomputed."""

    def weight(self, name: str) -> QuantizedTensor | None:
        """A quantized weight ("….q_proj.weight"); None: round it by the format's rule."""

    def input_scale(self, module: str) -> Tensor | None:
        """The static scale of a module's input, float32 (), the same for all members of a fused group."""

    def kv_scales(self, attention: str) -> tuple[Tensor, Tensor] | None:
        """(k_scale, v_scale) of an attention module's FP8 cache, float32 (); None: a plain cast."""

    def to_json(self) -> dict[str, Any]:
        """What the calibration was, as recorded in halfbyte.json."""
