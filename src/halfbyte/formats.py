"""The number formats, as frozen values: what a tensor is quantized to, and by which rule.

A format is checked when it is built. A combination that has no meaning raises there, never at first use.
`docs/numerics.md` is the normative text for every rule named here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import FormatError

CONTRACT_VERSION = 1
"""Version of `docs/numerics.md` that this package implements; recorded in every checkpoint it writes."""

E2M1_MAX = 6.0
E4M3_MAX = 448.0
FLT_MAX = 3.4028234663852886e38

E4M3_MAX_CHOICES = (256, 288, 320, 448)
HADAMARD_SIZE = 16

ScaleRule = Literal["amax", "four_over_six", "search"]
Scaling = Literal["tensor", "row"]
ErrorMeasure = Literal["mae", "mse", "hessian"]
ErrorArithmetic = Literal["exact", "fp16"]
Rounding = Literal["nearest", "stochastic"]


def _choose(name: str, value: object, choices: tuple[object, ...]) -> None:
    if type(value) is not type(choices[0]) or value not in choices:
        raise FormatError(f"{name}={value!r}: choose one of {', '.join(map(repr, choices))}")


@dataclass(frozen=True)
class NVFP4:
    """4-bit E2M1 elements, an E4M3 scale per block of 16 (or 16×16), a float32 scale per tensor (or row).

    Attributes:
        block: elements that share one block scale: (1, 16) along the last dimension, or (16, 16).
        scaling: what shares one float32 scale: the whole "tensor", or each "row".
        scale_rule: how a block's scale is chosen: "amax" (the standard), "four_over_six" (the better of mapping the
            block's maximum to 6 or to 4), or "search" (the best of all E4M3 scales).
        hadamard: apply the 16-point random Hadamard transform before quantizing; it is not undone on decode.
        rounding: of elements: "nearest" (ties to even) or "stochastic" (needs `rng=` when quantizing).
        error: what the rule minimises: "mae" (default of "four_over_six"), "mse" (default of "search") or, for "search"
            only, "hessian", the error of the layer's output (needs `hessian=` when quantizing). None for "amax".
        e4m3_max: E, the E4M3 value that the largest block maps to: 256, 288, 320 or 448.
            Default: 448, and 256 for "four_over_six".
        error_arithmetic: arithmetic of the "four_over_six" error: "exact" float32, or "fp16" products.

    Raises:
        FormatError: a value is unknown, or the combination has no meaning: row scaling with 16×16 blocks,
            stochastic rounding with any rule but "amax", an error measure for a rule that has none.
    """

    block: tuple[int, int] = (1, 16)
    scaling: Scaling = "tensor"
    scale_rule: ScaleRule = "amax"
    hadamard: bool = False
    rounding: Rounding = "nearest"
    error: ErrorMeasure | None = None
    e4m3_max: int | None = None
    error_arithmetic: ErrorArithmetic = "exact"

    def __post_init__(self) -> None:
        _choose("block", self.block, ((1, 16), (16, 16)))
        if any(type(side) is not int for side in self.block):
            raise FormatError(f"block={self.block!r}: its sides are integers")
        _choose("scaling", self.scaling, ("tensor", "row"))
        _choose("scale_rule", self.scale_rule, ("amax", "four_over_six", "search"))
        _choose("hadamard", self.hadamard, (False, True))
        _choose("rounding", self.rounding, ("nearest", "stochastic"))
        _choose("error_arithmetic", self.error_arithmetic, ("exact", "fp16"))
        if self.scale_rule == "amax":
            if self.error is not None or self.error_arithmetic != "exact":
                raise FormatError("scale_rule='amax' measures no error: leave error and error_arithmetic out")
        elif self.scale_rule == "four_over_six":
            if self.error is None:
                object.__setattr__(self, "error", "mae")
            _choose("error", self.error, ("mae", "mse"))
        else:
            if self.error is None:
                object.__setattr__(self, "error", "mse")
            _choose("error", self.error, ("mae", "mse", "hessian"))
            if self.error_arithmetic != "exact":
                raise FormatError("scale_rule='search' has one arithmetic of errors: leave error_arithmetic out")
        if self.e4m3_max is None:
            object.__setattr__(self, "e4m3_max", 256 if self.scale_rule == "four_over_six" else 448)
        _choose("e4m3_max", self.e4m3_max, E4M3_MAX_CHOICES)
        if self.scaling == "row" and self.block == (16, 16):
            raise FormatError("scaling='row' with block=(16, 16): one block would need 16 scales; use block=(1, 16)")
        if self.rounding == "stochastic" and self.scale_rule != "amax":
            raise FormatError(
                f"rounding='stochastic' with scale_rule={self.scale_rule!r}: the rule compares nearest roundings; "
                "use scale_rule='amax'"
            )

    @property
    def block_columns(self) -> int:
        """Elements along the last dimension that share a block scale."""
        return self.block[1]


@dataclass(frozen=True)
class MXFP8:
    """8-bit E4M3 elements with a power-of-two (E8M0) scale per 32 consecutive elements; no tensor scale."""

    @property
    def block_columns(self) -> int:
        """Elements along the last dimension that share a block scale."""
        return 32


Format = NVFP4 | MXFP8
