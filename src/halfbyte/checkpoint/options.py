"""What to convert to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

from ..errors import CheckpointError
from ..formats import NVFP4, Format
from ..names import Name
from ..policy import FormatOverride, Policy
from .config import Activations, KVCache
from .schema import LAYOUTS, Layout


@dataclass(frozen=True)
class Options:
    """What to convert to.

    Attributes:
        format: NVFP4 with tensor scaling, nearest rounding and no Hadamard transform (no engine undoes one), or MXFP8.
        layout: whose tensor names and config: "modelopt" or "compressed-tensors".
        policy: which weights.
        kv_cache: "fp8" declares an FP8 KV cache with all scales 1.0; "fp8_calibrated" one with measured scales.
        activations: "none" for weights only (W4A16); "constant" for W4A4 with every input scale 1.0; "calibrated" for
            W4A4 with measured ones. MXFP8 weights always have MXFP8 activations, scaled as they go.
        overrides: other formats for some weights; the first that selects a weight holds.
        recipe: where all this came from, for the record.
    """

    format: Format = field(default_factory=NVFP4)
    layout: Layout = "modelopt"
    policy: Policy = field(default_factory=Policy)
    kv_cache: KVCache = "none"
    activations: Activations = "none"
    overrides: tuple[FormatOverride, ...] = ()
    recipe: dict[str, Any] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name, choices in (
            ("layout", LAYOUTS),
            ("kv_cache", get_args(KVCache)),
            ("activations", get_args(Activations)),
        ):
            if getattr(self, name) not in choices:
                raise CheckpointError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(choices)}")
        for fmt in self.formats:
            if isinstance(fmt, NVFP4) and (fmt.scaling != "tensor" or fmt.hadamard or fmt.rounding != "nearest"):
                raise CheckpointError(
                    f"{fmt}: a checkpoint has one scale per tensor, nearest rounding and no Hadamard transform"
                )
        if self.activations != "none" and not any(isinstance(fmt, NVFP4) for fmt in self.formats):
            raise CheckpointError("MXFP8 always scales activations per block as it goes: leave activations out")

    @property
    def formats(self) -> tuple[Format, ...]:
        """Every format that a weight may get."""
        return (self.format, *(override.format for override in self.overrides))

    def format_of(self, name: Name) -> Format:
        """The format of a weight that is quantized."""
        return next((override.format for override in self.overrides if override.selects(name)), self.format)

    @property
    def needs_data(self) -> str | None:
        """What cannot be had from the weights alone, or None."""
        if self.activations == "calibrated":
            return "activations='calibrated'"
        if self.kv_cache == "fp8_calibrated":
            return "kv_cache='fp8_calibrated'"
        hessian = any(isinstance(fmt, NVFP4) and fmt.error == "hessian" for fmt in self.formats)
        return "error='hessian'" if hessian else None
