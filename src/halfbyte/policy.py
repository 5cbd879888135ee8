"""The one matcher for "which weights are quantized", asked by conversion and by everything that must agree with it."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from . import names
from .errors import FormatError
from .formats import Format
from .names import Kind, Name

Only = Literal["all", "mlp", "experts", "routed_experts"]
_ONLY_KINDS = {"mlp": ("experts", "mlp"), "experts": ("experts",), "routed_experts": ("experts",)}
_NEVER = {
    "router": "router",
    "embedding": "embedding",
    "lm_head": "lm_head",
    "norm": "norm",
    "conv": "convolution",
    "indexer": "attention indexer",
}
_NOT_LINEAR = ("embedding", "norm", "conv")
_MTP_KINDS = ("attention", "experts", "mlp")  # engines keep eh_proj and fc, which join two inputs, in high precision


@dataclass(frozen=True)
class Decision:
    """Whether a weight is quantized, and why (not)."""

    quantize: bool
    reason: str


@dataclass(frozen=True)
class Policy:
    """Which Linear weights are quantized. The default is all of the decoder's.

    Attributes:
        only: restrict to "routed_experts", "experts" (those and shared ones) or "mlp" (those and dense MLPs).
        ignore: patterns to leave in high precision: a glob over the module's or tensor's whole name, or a dotted part
            of it ("self_attn", "layers.0", "lm_head").
        include: patterns, likewise, to quantize although the default leaves them (lm_head, a vision tower, a router);
            embeddings, norms and convolutions cannot be.
        num_layers_at_start_in_bf16, num_layers_at_end_in_bf16: decoder layers left alone at either end.
        extra_high_precision_layers_hf: substrings of the Hugging Face tensor name to leave in high precision.
        extra_high_precision_layers_megatron: substrings of the Megatron-Core name to leave in high precision.
        include_mtp: quantize the attention, experts and MLPs of multi-token-prediction layers too.
        ignore_if_present: as ignore, but may match nothing; for recipes that suit many models.
    """

    only: Only = "all"
    ignore: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    num_layers_at_start_in_bf16: int = 0
    num_layers_at_end_in_bf16: int = 0
    extra_high_precision_layers_hf: tuple[str, ...] = ()
    extra_high_precision_layers_megatron: tuple[str, ...] = ()
    include_mtp: bool = False
    ignore_if_present: tuple[str, ...] = ()

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}  # where a recipe holds one

    def __post_init__(self) -> None:
        if self.only not in ("all", *_ONLY_KINDS):
            raise FormatError(f"only={self.only!r}: choose one of 'all', 'mlp', 'experts', 'routed_experts'")
        for field in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
            count = getattr(self, field)
            if type(count) is not int:
                raise FormatError(f"{field}={count!r}: must be an integer")
            if count < 0:
                raise FormatError(f"{field}={count}: must not be negative")
        for field in self._patterns():
            patterns = getattr(self, field)
            if isinstance(patterns, str):  # whose letters would be patterns
                raise FormatError(f"{field}={patterns!r}: takes several patterns: use ({patterns!r},)")
            object.__setattr__(self, field, tuple(patterns))

    @classmethod
    def _patterns(cls) -> tuple[str, ...]:
        return (
            "ignore",
            "ignore_if_present",
            "include",
            "extra_high_precision_layers_hf",
            "extra_high_precision_layers_megatron",
        )

    def decide(self, name: Name, decoder_layers: int) -> Decision:
        """Decide on a Linear-shaped weight (2-D, called `….weight`).

        decoder_layers: number of decoder layers, which MTP layers never count among.
        """
        for pattern in self.ignore:
            if matches(pattern, name):
                return Decision(False, f"--ignore {pattern}")
        for pattern in self.ignore_if_present:
            if matches(pattern, name):
                return Decision(False, f"ignored: {pattern}")
        for text in self.extra_high_precision_layers_hf:
            if text in name.full:
                return Decision(False, f"--extra-high-precision-layers-hf {text}")
        for text in self.extra_high_precision_layers_megatron:
            if _in_megatron(text, name):
                return Decision(False, f"--extra-high-precision-layers-megatron {text}")
        if name.kind in _NOT_LINEAR:
            return Decision(False, _NEVER[name.kind])
        for pattern in self.include:
            if matches(pattern, name):
                return Decision(True, f"--include {pattern}")
        if name.kind in _NEVER:
            return Decision(False, _NEVER[name.kind])
        if name.tower == "other":
            return Decision(False, "outside the decoder's layers")
        if name.tower == "mtp":
            if not self.include_mtp:
                return Decision(False, "multi-token prediction layer")
            if name.kind not in _MTP_KINDS:
                return Decision(False, "joins the inputs of a multi-token prediction layer")
        elif name.layer is not None:
            if name.layer < self.num_layers_at_start_in_bf16:
                return Decision(False, f"among the first {self.num_layers_at_start_in_bf16} layers")
            if name.layer >= decoder_layers - self.num_layers_at_end_in_bf16:
                return Decision(False, f"among the last {self.num_layers_at_end_in_bf16} layers")
        shared = self.only == "routed_experts" and name.expert is None
        if self.only != "all" and (name.kind not in _ONLY_KINDS[self.only] or shared):
            return Decision(False, f"--only {self.only}")
        return Decision(True, f"decoder {name.kind}" if name.tower == "decoder" else f"MTP {name.kind}")

    def unmatched(self, candidates: Iterable[Name]) -> list[str]:
        """Patterns, as command-line options, that select none of the candidates: most likely misspelt."""
        seen = list(candidates)
        tests: tuple[tuple[str, Callable[[str, Name], bool]], ...] = (
            ("ignore", matches),
            ("include", lambda text, name: name.kind not in _NOT_LINEAR and matches(text, name)),
            ("extra_high_precision_layers_hf", lambda text, name: text in name.full),
            ("extra_high_precision_layers_megatron", _in_megatron),
        )
        return [
            f"--{field.replace('_', '-')} {pattern}"
            for field, test in tests
            for pattern in getattr(self, field)
            if not any(test(pattern, name) for name in seen)
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain values, as recorded in a checkpoint."""
        return {f.name: list(v) if isinstance(v := getattr(self, f.name), tuple) else v for f in fields(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Policy:
        """The inverse of `to_json`.

        Raises:
            FormatError: an unknown key or a value of the wrong kind.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise FormatError(f"policy: unknown {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        for key, value in data.items():
            default = getattr(cls(), key)
            if isinstance(default, tuple):
                if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
                    raise FormatError(f"policy: {key} must be a list of strings; got {value!r}")
            elif type(value) is not type(default):
                raise FormatError(f"policy: {key} must be {type(default).__name__}; got {value!r}")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**values)


@dataclass(frozen=True)
class FormatOverride:
    """Another format for some of the weights that are quantized.

    Attributes:
        format: theirs.
        match: patterns, as in `Policy`.
        kinds: what the weights are for; either selects.
    """

    format: Format
    match: tuple[str, ...] = ()
    kinds: tuple[Kind, ...] = ()

    def selects(self, name: Name) -> bool:
        """Whether a weight gets this format, unless an earlier override selects it."""
        return name.kind in self.kinds or any(matches(pattern, name) for pattern in self.match)


def matches(pattern: str, name: Name) -> bool:
    """Whether an ignore or include pattern selects a name: a glob over all of it, or a dotted part of it."""
    if any(c in pattern for c in "*?["):
        return fnmatch.fnmatchcase(name.full, pattern) or fnmatch.fnmatchcase(name.module, pattern)
    return f".{pattern}." in f".{name.full}."


def _in_megatron(text: str, name: Name) -> bool:
    return names.plain_megatron(text) in (names.megatron(name) or "")
