"""TransformerEngine's NVFP4 recipe, in its own terms and with its defaults; and its environment variables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from ..errors import FormatError
from ..formats import NVFP4, ErrorArithmetic
from ..policy import Policy
from .training import Backward, TrainingRecipe

Scope = Literal["none", "weights", "activations", "all"]
_PREFIX = "NVTE_NVFP4_"
_SWITCHES = {
    "NVTE_NVFP4_DISABLE_RHT": "disable_rht",
    "NVTE_NVFP4_DISABLE_STOCHASTIC_ROUNDING": "disable_stochastic_rounding",
    "NVTE_NVFP4_DISABLE_2D_QUANTIZATION": "disable_2d_quantization",
    "NVTE_NVFP4_ROW_SCALED_ACTIVATION": "row_scaled_activation",
}
_SCOPES = {"NVTE_NVFP4_4OVER6": "four_over_six", "NVTE_NVFP4_4OVER6_E4M3_USE_256": "four_over_six_e4m3_use_256"}
_ERROR_MODE, _ERROR_FAST = "NVTE_NVFP4_4OVER6_ERR_MODE", "NVTE_NVFP4_4OVER6_ERR_USE_FAST_MATH"
_BACKWARD, _FAST_MATH = "NVTE_BACKWARD_OVERRIDE", "NVTE_USE_FAST_MATH"


@dataclass(frozen=True)
class TransformerEngine:
    """What TransformerEngine's NVFP4BlockScaling says; `recipe()` is the same for halfbyte.

    Attributes:
        disable_rht: no Hadamard transform of wgrad's operands.
        disable_stochastic_rounding: gradients round to nearest.
        disable_2d_quantization: weights in 1×16 instead of 16×16 blocks.
        row_scaled_activation: one scale per token instead of one per tensor.
        four_over_six: what chooses scales by that rule: "all" is weights and forward activations, never gradients.
        four_over_six_e4m3_use_256: what of it has E = 256 instead of 448.
        four_over_six_error: "mae" or "mse".
        four_over_six_error_arithmetic: "exact", or "fp16", which TransformerEngine calls fast math.
        backward_override: None for a quantized backward, or "high_precision" or "dequantized". Under an override
            nothing but the two forward operands is quantized, and the first two options have no effect.

    Raises:
        FormatError: a value is unknown.
    """

    disable_rht: bool = False
    disable_stochastic_rounding: bool = False
    disable_2d_quantization: bool = False
    row_scaled_activation: bool = False
    four_over_six: Scope = "none"
    four_over_six_e4m3_use_256: Scope = "all"
    four_over_six_error: Literal["mae", "mse"] = "mae"
    four_over_six_error_arithmetic: ErrorArithmetic = "exact"
    backward_override: Literal["high_precision", "dequantized"] | None = None

    def __post_init__(self) -> None:
        choices: dict[str, tuple[object, ...]] = dict.fromkeys(_SWITCHES.values(), (False, True))
        choices |= dict.fromkeys(_SCOPES.values(), get_args(Scope))
        choices["four_over_six_error"] = ("mae", "mse")
        choices["four_over_six_error_arithmetic"] = get_args(ErrorArithmetic)
        choices["backward_override"] = (None, "high_precision", "dequantized")
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise FormatError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(map(repr, allowed))}")

    def recipe(self, policy: Policy | None = None) -> TrainingRecipe:
        """The recipe; by default for all of the decoder's Linear layers."""
        backward: Backward = self.backward_override or "quantized"
        quantized = backward == "quantized"
        rounding: Literal["nearest", "stochastic"] = "nearest" if self.disable_stochastic_rounding else "stochastic"
        return TrainingRecipe(
            activations=self._format("activations"),
            weights=self._format("weights"),
            gradients=NVFP4(rounding=rounding) if quantized else None,
            hadamard=quantized and not self.disable_rht,
            backward=backward,
            policy=policy or Policy(),
        )

    def _format(self, operand: Literal["weights", "activations"]) -> NVFP4:
        square = operand == "weights" and not self.disable_2d_quantization
        block = (16, 16) if square else (1, 16)
        scaling: Literal["row", "tensor"] = (
            "row" if operand == "activations" and self.row_scaled_activation else "tensor"
        )
        if self.four_over_six not in (operand, "all"):
            return NVFP4(block, scaling)
        return NVFP4(
            block,
            scaling,
            "four_over_six",
            error=self.four_over_six_error,
            e4m3_max=256 if self.four_over_six_e4m3_use_256 in (operand, "all") else 448,
            error_arithmetic=self.four_over_six_error_arithmetic,
        )

    @classmethod
    def from_env(cls, environ: Mapping[str, str], policy: Policy | None = None) -> TrainingRecipe:
        """The recipe that TransformerEngine would build under these environment variables.

        Args:
            environ: `os.environ`, or a dict like it; nothing else is read.
            policy: which layers.

        Raises:
            FormatError: an unknown NVTE_NVFP4_* name, an unknown value, or NVTE_USE_FAST_MATH=1, whose inexact
                arithmetic no other implementation reproduces.

        Source: TransformerEngine's NVFP4BlockScaling. A switch is on for "1" there and off for anything else; here
        anything but "0" and "1" raises.
        """
        known = {*_SWITCHES, *_SCOPES, _ERROR_MODE, _ERROR_FAST}
        if unknown := sorted(name for name in environ if name.startswith(_PREFIX) and name not in known):
            raise FormatError(f"{', '.join(unknown)}: unknown; known are {', '.join(sorted(known))}")
        if _switch(environ, _FAST_MATH):
            raise FormatError(
                f"{_FAST_MATH}=1: its arithmetic is inexact and differs from every other implementation; unset it. For "
                f"the fp16 error of 4over6 alone set {_ERROR_FAST}=1"
            )
        values: dict[str, object] = {field: _switch(environ, name) for name, field in _SWITCHES.items()}
        for name, field in _SCOPES.items():
            if name in environ:
                values[field] = _one_of(environ, name, get_args(Scope))
        if _ERROR_MODE in environ:
            mode = _one_of({_ERROR_MODE: environ[_ERROR_MODE].upper()}, _ERROR_MODE, ("MAE", "MSE"))
            values["four_over_six_error"] = mode.lower()
        if _switch(environ, _ERROR_FAST):
            values["four_over_six_error_arithmetic"] = "fp16"
        if _BACKWARD in environ:
            values["backward_override"] = _one_of(environ, _BACKWARD, ("high_precision", "dequantized"))
        return cls(**values).recipe(policy)  # type: ignore[arg-type]


def _one_of(environ: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str:
    if environ[name] not in choices:
        raise FormatError(f"{name}={environ[name]!r}: choose one of {', '.join(choices)}, or unset it")
    return environ[name]


def _switch(environ: Mapping[str, str], name: str) -> bool:
    return name in environ and _one_of(environ, name, ("0", "1")) == "1"
