"""What a recipe says. Every section is frozen and refuses what it does not know."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from ..checkpoint.config import Activations, KVCache
from ..checkpoint.options import Options
from ..checkpoint.schema import Layout
from ..errors import FormatError
from ..formats import MXFP8, NVFP4, ErrorArithmetic, ErrorMeasure, Format, ScaleRule
from ..names import Kind
from ..policy import FormatOverride, Policy

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    """What all sections have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Weights(Section):
    """The format of weights; the keys beside `format` are those of `halfbyte.NVFP4`, for nvfp4 only."""

    format: Literal["nvfp4", "mxfp8"]
    scale_rule: ScaleRule | None = None
    error: ErrorMeasure | None = None
    e4m3_max: Literal[256, 288, 320, 448] | None = None
    error_arithmetic: ErrorArithmetic | None = None
    block: tuple[Literal[1, 16], Literal[16]] | None = None

    def build(self) -> Format:
        """The format itself.

        Raises:
            FormatError: the combination has no meaning.
        """
        chosen = self.model_dump(exclude={"format"}, exclude_none=True)
        if self.format == "nvfp4":
            return NVFP4(**chosen)
        if chosen:
            raise FormatError(f"{', '.join(chosen)}: MXFP8 has one rule and nothing to choose; leave it out")
        return MXFP8()

    @model_validator(mode="after")
    def _has_meaning(self) -> Self:
        self.build()
        return self


class WeightOverride(Section):
    """Another format for some weights: those that a pattern (as in `policy`) or their kind selects."""

    weights: Weights
    match: tuple[str, ...] = ()
    kinds: tuple[Kind, ...] = ()

    @model_validator(mode="after")
    def _selects_something(self) -> Self:
        if not self.match and not self.kinds:
            raise FormatError("selects nothing; give match (patterns) or kinds (attention, mlp, experts, …)")
        return self


class Observer(Section):
    """How calibrated input and KV-cache scales follow from what was seen.

    Attributes:
        method: the "max" of all absolute values, or their "percentile".
        percentile: which.
        headroom: what the result is multiplied by.
    """

    method: Literal["max", "percentile"] = "max"
    percentile: Annotated[float, Field(gt=0, le=100)] = 99.9
    headroom: Positive = 1.0

    @model_validator(mode="after")
    def _has_meaning(self) -> Self:
        if self.method == "max" and "percentile" in self.model_fields_set:
            raise FormatError("percentile has no meaning for method max; leave it out or use method: percentile")
        return self


class Algorithm(Section):
    """How codes are chosen under the block scales.

    Attributes:
        method: "nearest", or "gptq", which needs data.
        damping: share of the Hessian's mean diagonal that is added to it.
        activation_order: blocks of 16 columns in the order of their Hessian's diagonal, largest first.
        headroom: factor on the maximum that the tensor scale is taken from, so that compensated weights fit.
    """

    method: Literal["nearest", "gptq"] = "nearest"
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    activation_order: bool = False
    headroom: Annotated[float, Field(ge=1, le=16)] = 1.0

    @model_validator(mode="after")
    def _has_meaning(self) -> Self:
        if self.method == "nearest" and (extra := sorted(self.model_fields_set - {"method"})):
            raise FormatError(f"{', '.join(extra)}: for method gptq only; leave it out")
        return self


class Recipe(Section):
    """A whole recipe.

    Attributes:
        description: one sentence.
        weights: format of all that `policy` selects, but for
        overrides: of which the first that selects a weight holds.
        activations: "none", "constant" (input scale 1.0) or "calibrated", for NVFP4 weights; MXFP8 always scales as
            it goes.
        observer: how calibrated scales are found.
        kv_cache: "none", "fp8" (a cast, scales 1.0) or "fp8_calibrated".
        algorithm: how codes are chosen.
        policy: which weights.
    """

    description: str
    weights: Weights
    overrides: tuple[WeightOverride, ...] = ()
    activations: Activations = "none"
    observer: Observer = Observer()
    kv_cache: KVCache = "none"
    algorithm: Algorithm = Algorithm()
    policy: Policy = Policy()

    _name: str = PrivateAttr("")

    @property
    def name(self) -> str:
        """Of a built-in recipe, else the path that it was read from."""
        return self._name

    @property
    def reasons_for_data(self) -> list[str]:
        """What in it needs calibration data, as key: value."""
        sections = (self.weights, *(override.weights for override in self.overrides))
        wants = {
            "activations: calibrated": self.activations == "calibrated",
            "kv_cache: fp8_calibrated": self.kv_cache == "fp8_calibrated",
            "algorithm.method: gptq": self.algorithm.method == "gptq",
            "weights.error: hessian": any(weights.error == "hessian" for weights in sections),
        }
        return [reason for reason, wanted in wants.items() if wanted]

    @property
    def needs_data(self) -> bool:
        """Whether it cannot be carried out from the weights alone."""
        return bool(self.reasons_for_data)

    @model_validator(mode="after")
    def _has_meaning(self) -> Self:
        self.options("modelopt")
        return self

    def options(self, layout: Layout = "modelopt") -> Options:
        """What to convert to, in a layout.

        Raises:
            CheckpointError: what no checkpoint can hold.
        """
        return Options(
            format=self.weights.build(),
            layout=layout,
            policy=self.policy,
            kv_cache=self.kv_cache,
            activations=self.activations,
            overrides=tuple(FormatOverride(o.weights.build(), o.match, o.kinds) for o in self.overrides),
            recipe=self.to_json(),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, as recorded in a checkpoint: what differs from the defaults, and the name."""
        return {"name": self.name, **self.model_dump(mode="json", exclude_defaults=True)}
