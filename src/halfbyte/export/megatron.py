"""Megatron-Core parameter names ↔ Hugging Face names, for one model.

By the table in `rules`; where that leaves a choice, the model's own tensors decide. Nothing is read off parameters'
own marks (`tensor_model_parallel`, `partition_dim`): those of TEGroupedLinear have none, or wrong ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from .. import names
from ..checkpoint.plan import text_config
from ..errors import CheckpointError
from .placement import Placement
from .rules import LAYER, MLA, MTP, Rule

Shapes = Mapping[str, tuple[int, ...]]


_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
_LAYER_NAME = re.compile(r"(decoder|mtp)\.layers\.(\d+)\.(?:transformer_layer\.)?(.+)")
_EXPERT_NAME = re.compile(r"(mlp\.experts\.(?:linear_fc[12]\.weight|local_experts\.))(\d+)(.*)")


@dataclass(frozen=True)
class Parameter:
    """A Megatron parameter of a model: the rule for it and whole Hugging Face names."""

    name: str
    rule: Rule
    hf: tuple[str, ...]

    @property
    def is_expert(self) -> bool:
        """Whether expert tensor parallelism cuts it, instead of tensor parallelism."""
        return ".mlp.experts." in self.name


@dataclass(frozen=True)
class Model:
    """What of a model decides how Megatron holds it.

    Attributes:
        shapes: of all Hugging Face tensors, with experts one by one.
        layers: decoder layers.
        experts: routed experts of a layer, 0 for a dense model.
        query_groups: key-value heads of an attention.
        head_dim: of a query head.
        heads: query heads.
        tied: whether the output layer is the embedding.
    """

    shapes: Shapes = field(repr=False)
    layers: int
    experts: int
    query_groups: int
    heads: int
    head_dim: int
    tied: bool

    @classmethod
    def of(cls, config: Mapping[str, Any], shapes: Shapes) -> Model:
        """From config.json and the tensors' shapes.

        Raises:
            CheckpointError: a key is missing, or the attention has what no rule covers.
        """
        text = text_config(dict(config))
        layers, heads = text.get("num_hidden_layers"), text.get("num_attention_heads")
        if not isinstance(layers, int) or not isinstance(heads, int):
            raise CheckpointError("config: num_hidden_layers or num_attention_heads is missing; add it")
        if text.get("attn_output_gate") or str(text.get("model_type")).startswith(("qwen3_next", "qwen3_5")):
            raise CheckpointError(
                "config: an attention with an output gate lies in linear_qkv in an order that halfbyte does not know; "
                "pass Hugging Face names and tensors instead"
            )
        experts = [parsed.expert for name in shapes if (parsed := names.parse(name, layers)).expert is not None]
        tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        groups = int(text.get("num_key_value_heads") or heads)
        head_dim = int(text.get("head_dim") or text.get("hidden_size", 0) // heads)
        return cls(shapes, layers, max(experts, default=-1) + 1, groups, heads, head_dim, bool(tied))

    @cached_property
    def prefix(self) -> str:
        """What stands before "layers.0": "model.", "language_model.model.", …"""
        for name in self.shapes:
            parsed = names.parse(name, self.layers)
            if parsed.tower == "decoder" and (at := name.find("layers.")) >= 0:
                return name[:at]
        raise CheckpointError(
            "no tensor of a decoder layer (…layers.0.…) among the model's; give its Hugging Face names"
        )

    @cached_property
    def mtp_layers(self) -> tuple[str, ...]:
        """Paths of the multi-token-prediction layers, in order."""
        templates = (f"{self.prefix}layers.{{}}.", "mtp.layers.{}.", f"{self.prefix}mtp_layers.{{}}.")
        for template, first in zip(templates, (self.layers, 0, 0), strict=True):
            found: list[str] = []
            while any(name.startswith(template.format(first + len(found))) for name in self.shapes):
                found.append(template.format(first + len(found)))
            if found:
                return tuple(found)
        return ()

    @cached_property
    def _found(self) -> dict[str, Parameter]:
        return {}  # what was asked for: a trainer asks the same at every sync

    def parameter(self, name: str) -> Parameter:
        """What a parameter holds, by its global name: layers and experts counted over all ranks.

        Raises:
            CheckpointError: no rule knows it, or the model lacks the tensors that it should hold.
        """
        if name not in self._found:
            self._found[name] = self._find(name)
        return self._found[name]

    def _find(self, name: str) -> Parameter:
        plain = names.plain_megatron(name).removeprefix("language_model.")
        rules = list(self._rules(plain))
        for found in rules:
            if all(hf.replace("{e}", "0") in self.shapes for hf in found.hf):
                return found
        if not rules:
            raise CheckpointError(f"{name}: halfbyte does not know this Megatron parameter; pass it by its HF name")
        wanted = " or ".join(", ".join(found.hf[:3]) for found in rules)
        raise CheckpointError(f"{name}: holds {wanted}, which the model does not have; is it another model's?")

    def parameters(self, spec: Literal["te", "local"] = "te") -> dict[str, Parameter]:
        """Every parameter of the model as Megatron has it with Transformer Engine's layers or the local ones."""
        found = {name: self.parameter(name) for name in self._top()}
        for i, path in enumerate((*(f"{self.prefix}layers.{i}." for i in range(self.layers)), *self.mtp_layers)):
            is_mtp = i >= self.layers
            layer = f"mtp.layers.{i - self.layers}." if is_mtp else f"decoder.layers.{i}."
            block = f"{layer}transformer_layer." if is_mtp else layer
            taken: set[str] = set()
            for rule in LAYER:
                for parameter in self._made(rule, block, path, spec):
                    if taken.isdisjoint(parameter.hf):
                        found[parameter.name] = parameter
                        taken |= set(parameter.hf)
            for rule in MTP if is_mtp else ():
                for parameter in self._made(rule, layer, path, spec):
                    found.setdefault(parameter.name, parameter)
        return found

    def megatron_names(self, spec: Literal["te", "local"] = "te") -> dict[str, str]:
        """Hugging Face name → global Megatron name of the parameter that holds it."""
        return {hf: name for name, parameter in self.parameters(spec).items() for hf in parameter.hf}

    def _top(self) -> Iterator[str]:
        yield _EMBEDDING
        if f"{self.prefix}norm.weight" in self.shapes:
            yield "decoder.final_layernorm.weight"
        if not self.tied:
            yield _OUTPUT

    def _copies(self, first: tuple[str, ...], leaf: str) -> tuple[str, ...]:
        """A tensor and what MTP layers on disk repeat of it."""
        names_ = (*first, *(f"{path}{leaf}" for path in self.mtp_layers))
        return tuple(name for name in names_ if name in self.shapes)

    def _rules(self, name: str) -> Iterator[Parameter]:
        if name == _EMBEDDING:
            found = self._copies((f"{self.prefix}embed_tokens.weight",), "embed_tokens.weight")
            yield Parameter(name, Rule(name, found, "copies", 0), found)
        elif name == _OUTPUT:
            outer = self.prefix.removesuffix("model.")
            found = self._copies((f"{outer}lm_head.weight", "lm_head.weight"), "shared_head.head.weight")
            found = tuple(dict.fromkeys(found)) or (() if self.tied else ("lm_head.weight",))
            yield Parameter(name, Rule(name, found, "copies", 0), found)
        elif name == "decoder.final_layernorm.weight":
            yield Parameter(name, Rule(name, ()), (f"{self.prefix}norm.weight",))
        elif layer := _LAYER_NAME.fullmatch(name):
            tower, index, rest = layer[1], int(layer[2]), layer[3]
            if tower == "mtp" and index >= len(self.mtp_layers):
                return
            path = self.mtp_layers[index] if tower == "mtp" else f"{self.prefix}layers.{index}."
            expert = _EXPERT_NAME.fullmatch(rest)
            rest = f"{expert[1]}{{e}}{expert[3]}" if expert else rest
            for rule in (*LAYER, *(MTP if tower == "mtp" else ())):
                if rule.megatron == rest:
                    yield Parameter(name, rule, _whole(rule, path, expert[2] if expert else "{e}"))

    def _made(self, rule: Rule, block: str, path: str, spec: str) -> Iterator[Parameter]:
        if rule.spec not in (spec, "both") or (rule.beside and f"{path}{rule.beside}" not in self.shapes):
            return
        if rule.megatron == "self_attention.linear_q_proj.weight" and f"{path}{MLA}" not in self.shapes:
            return
        for expert in range(self.experts) if "{e}" in rule.megatron else (0,):
            hf = _whole(rule, path, str(expert))
            if all(name in self.shapes for name in hf):
                yield Parameter(block + rule.megatron.format(e=expert), rule, hf)


def _whole(rule: Rule, path: str, expert: str) -> tuple[str, ...]:
    return tuple(name[1:] if name.startswith("/") else (path + name).replace("{e}", expert) for name in rule.hf)


def global_name(name: str, model: Model, placement: Placement, vp_stage: int = 0) -> str:
    """A parameter's name with layers and experts counted over all ranks, from what `named_parameters()` calls it.

    vp_stage: which of the rank's model chunks it was found in. MTP layers are not counted by pipeline rank.
    """
    plain = names.plain_megatron(name)
    layer = re.match(r"((?:language_model\.)?decoder\.layers\.)(\d+)(\..+)", plain)
    if layer:
        plain = f"{layer[1]}{placement.local_layers(model.layers, vp_stage).start + int(layer[2])}{layer[3]}"
    expert = re.search(r"(\.mlp\.experts\.(?:linear_fc[12]\.weight|local_experts\.))(\d+)", plain)
    if expert:
        index = placement.local_experts(model.experts).start + int(expert[2])
        plain = f"{plain[: expert.start()]}{expert[1]}{index}{plain[expert.end() :]}"
    return plain
