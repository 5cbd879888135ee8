"""One checkpoint seen by one engine: the config that it reads, and which layers it then takes for quantized."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..names import Name
from .exclusion import Rule as ExclusionRule
from .exclusion import (
    contains_path,
    engine_layer,
    excluded_by_compressed_tensors,
    excluded_by_sglang_compressed_tensors,
    excluded_by_sglang_modelopt,
    excluded_by_sglang_mxfp8,
    excluded_by_tensorrt_llm,
    excluded_by_transformers,
    excluded_by_vllm_modelopt,
)
from .survey import SIDECAR, Survey, Weight

Engine = Literal["vllm", "sglang", "tensorrt-llm", "transformers"]
ENGINES: tuple[Engine, ...] = get_args(Engine)

_EXCLUSION: dict[tuple[Engine, str], ExclusionRule] = {
    ("vllm", "modelopt"): excluded_by_vllm_modelopt,
    ("sglang", "modelopt"): excluded_by_sglang_modelopt,
    ("sglang", "mxfp8"): excluded_by_sglang_mxfp8,
    ("sglang", "compressed-tensors"): excluded_by_sglang_compressed_tensors,
    ("tensorrt-llm", "modelopt"): excluded_by_tensorrt_llm,
    ("tensorrt-llm", "compressed-tensors"): excluded_by_tensorrt_llm,
    ("tensorrt-llm", "mxfp8"): excluded_by_tensorrt_llm,
    ("transformers", "mxfp8"): excluded_by_transformers,
}
_VLLM_NEVER = ("vision_tower", "vision_model", "vit_large_projector")  # ModelOptQuantConfigBase.get_quant_method


@dataclass(frozen=True)
class Declared:
    """What an engine makes of the config that it reads."""

    file: str
    method: str
    scheme: str
    ignore: tuple[str, ...]
    raw: dict[str, Any]  # as far as it is about quantization
    targets: tuple[str, ...] | None = None  # None: everything


@dataclass(frozen=True)
class Case:
    """One checkpoint before one engine.

    Attributes:
        histograms: weight → how often each of the 256 block-scale bytes occurs, int64 [256].
    """

    survey: Survey
    engine: Engine
    declared: Declared
    tensor_parallel: int
    histograms: Mapping[str, Tensor]

    @cached_property
    def modules(self) -> set[str]:
        """All matrices on disk."""
        return {name.module for name in (*(weight.name for weight in self.survey.weights), *self.survey.kept)}

    @cached_property
    def fused(self) -> dict[str, list[Weight]]:
        """Fused layer → its members."""
        groups: defaultdict[str, list[Weight]] = defaultdict(list)
        for weight in self.survey.weights:
            if weight.name.fused is not None:
                groups[weight.name.fused].append(weight)
        return {layer: members for layer, members in groups.items() if len(members) > 1}

    @property
    def reader(self) -> str:
        """Which of the engine's readers takes the config; SGLang reads ModelOpt's MXFP8 as quant_method "mxfp8"."""
        if self.engine == "sglang" and self.declared.scheme == "modelopt MXFP8":
            return "mxfp8"
        return self.declared.method

    @property
    def mixed(self) -> bool:
        """Whether the config declares several formats."""
        return "MIXED" in self.declared.scheme.upper()

    @property
    def expects_mxfp8(self) -> bool:
        """Whether the config declares MXFP8 alone."""
        return "MXFP8" in self.declared.scheme.upper()

    @property
    def architectures(self) -> frozenset[str]:
        """The classes that the model's config names."""
        found = self.survey.checkpoint.config.get("architectures")
        return frozenset(name for name in found if isinstance(name, str)) if isinstance(found, list) else frozenset()

    def layer(self, name: Name) -> tuple[str, tuple[str, ...]]:
        """The engine's layer, and what it is made of; transformers fuses nothing but experts.

        Of ModelOpt's experts engines ask once for all, of compressed-tensors' with the names of expert 0.
        """
        if self.engine == "transformers":
            return name.module, (name.module,)
        experts = name.experts_module
        if experts is not None and self.declared.method != "compressed-tensors":
            return experts, (experts,)
        if experts is not None and self.engine != "tensorrt-llm":
            first = f"{experts}.0.{name.leaf}"
            return first, (first,)
        return engine_layer(name, self.modules)

    def quantized_by_config(self, layer: str, members: tuple[str, ...]) -> bool:
        """Whether the engine expects this layer quantized."""
        declared = self.declared
        never = _VLLM_NEVER if (self.engine, declared.method) == ("vllm", "modelopt") else ()
        if self._rule(layer, members, declared.ignore) or any(part in layer for part in never):
            return False
        if layer.rpartition(".")[2] == "lm_head" and self._lm_head_by_name:
            return any(excluded_by_compressed_tensors(layer, members, [t]) for t in declared.targets or ())
        if declared.targets is None or "Linear" in declared.targets:
            return True
        inside = any(target.startswith(f"{layer}.") for target in declared.targets)
        return inside or excluded_by_compressed_tensors(layer, members, declared.targets)

    @property
    def _lm_head_by_name(self) -> bool:
        """vLLM's and SGLang's lm_head is no "Linear": a target must name it. SGLang's Fp8Config never quantizes it."""
        named = self.declared.method == "compressed-tensors" and self.engine in ("vllm", "sglang")
        return named or (self.engine == "sglang" and self.reader == "mxfp8")

    def named_parts(self, members: tuple[str, ...]) -> tuple[str, ...]:
        """Members of a fused layer that the ignore list names, as engines find out whether it names all or none."""
        ignore = self.declared.ignore
        if self.engine == "sglang" and self.declared.method != "compressed-tensors":
            return tuple(m for m in members if any(contains_path(m, pattern) for pattern in ignore))
        if self.declared.method == "compressed-tensors":
            return tuple(m for m in members if self._rule(m, (m,), ignore))
        return tuple(m for m in members if m in ignore)

    def culprit(self, layer: str, members: tuple[str, ...]) -> str:
        """Why a layer is not quantized for the engine."""
        rule = self._rule
        for pattern in self.declared.ignore:
            if rule(layer, members, [pattern]):
                exact = pattern in (layer, *members)
                return f"{pattern!r} in the ignore list {'names' if exact else 'also matches'} it"
        if rule(layer, members, self.declared.ignore):
            return "the ignore list names all its parts"
        return "no target of the config selects it"

    @property
    def _rule(self) -> ExclusionRule:
        return _EXCLUSION.get((self.engine, self.reader), excluded_by_compressed_tensors)


def declared_for(survey: Survey, engine: Engine) -> Declared | None:
    """What the engine reads: TensorRT-LLM trusts hf_quant_config.json, the others config.json where both are there."""
    if survey.sidecar is not None and (engine == "tensorrt-llm" or survey.declared is None):
        return _declared(survey.sidecar, SIDECAR)
    return None if survey.declared is None else _declared(survey.declared, "config.json")


def _declared(raw: dict[str, Any], file: str) -> Declared:
    inner = raw.get("quantization")
    method = str(raw.get("quant_method") or "modelopt").lower()
    if isinstance(inner, dict) or method.startswith("modelopt"):
        raw = inner if isinstance(inner, dict) else raw
        algorithm = str(raw.get("quant_algo")).upper()
        layers = raw.get("quantized_layers") if algorithm == "MIXED_PRECISION" else None
        targets = tuple(map(str, layers)) if isinstance(layers, dict) else None
        return Declared(
            file, "modelopt", f"modelopt {algorithm}", _strings(raw, "exclude_modules", "ignore"), raw, targets
        )
    if method == "compressed-tensors":
        groups = raw.get("config_groups")
        groups = [g for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
        schemes = {_compressed_tensors_scheme(group, raw) for group in groups}
        scheme = schemes.pop() if len(schemes) == 1 else "mixed-precision" if schemes else "without config_groups"
        targets = tuple(t for group in groups for t in _strings(group, "targets"))
        return Declared(file, method, f"{method} {scheme}", _strings(raw, "ignore"), raw, targets)
    return Declared(file, method, method, _strings(raw, "modules_to_not_convert", "ignored_layers"), raw)


def _compressed_tensors_scheme(group: dict[str, Any], raw: dict[str, Any]) -> str:
    name = str(group.get("format") or raw.get("format"))
    if name == "nvfp4-pack-quantized":
        return "NVFP4 W4A16" if group.get("input_activations") is None else "NVFP4 W4A4"
    return {"mxfp8-quantized": "MXFP8"}.get(name, name)


def _strings(raw: dict[str, Any], *keys: str) -> tuple[str, ...]:
    found: list[Any] = next((raw[key] for key in keys if isinstance(raw.get(key), list)), [])
    return tuple(value for value in found if isinstance(value, str))


def scale_histograms(survey: Survey, progress: Callable[[int], None] = lambda done: None) -> dict[str, Tensor]:
    """Weight → counts of its block-scale bytes, int64 [256]."""
    found: dict[str, Tensor] = {}
    for weight in survey.weights:
        data = survey.checkpoint.read(weight.tensor(weight.spelling.block_scale))
        found[weight.name.full] = torch.bincount(data.reshape(-1).view(torch.uint8), minlength=256)
        progress(data.nbytes)
    return found
