"""What a Hugging Face tensor name says: which layer, which tower, what kind of weight, fused with which others.

Pure text, no tensors: `policy` decides with it, `checkpoint` groups with it. All spellings live in the tables below.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Tower = Literal["decoder", "mtp", "other"]
Kind = Literal["attention", "mlp", "experts", "router", "embedding", "lm_head", "conv", "norm", "indexer", "other"]

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|mtp_layers)\.(\d+)\.")
_EXPERT = re.compile(r"\b(?P<module>experts)\.(?P<index>\d+)\.")
_OTHER_TOWER = re.compile(
    r"(?:^|\.)(?:[a-z0-9_]*_)?(?:vision|visual|vit|image|audio|speech|siglip|encoder|talker|code2wav|projector|"
    r"token2wav|aligner|merger|resampler|vpm|apm|tts)(?:_[a-z0-9_]*)?(?:\.|$)"  # the last three: MiniCPM-o's
)
_MTP = re.compile(r"(?:^|\.)(?:mtp|mtp_layers|mtp_block|nextn|nextn_predict_layers|eagle)(?:\.|$)")
_ROUTER_LEAVES = frozenset({"gate", "router", "wg", "shared_expert_gate", "shared_experts_gate"})
_EXPERT_PARTS = frozenset(
    {"experts", "block_sparse_moe", "shared_expert", "shared_experts", "shared_mlp", "local_experts"}
)
_MLP_PARTS = frozenset({"mlp", "feed_forward", "ffn", "ff", "feedforward"})
_MLP_LEAVES = frozenset({"gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3", "fc1", "fc2"})

# Layers that engines fuse into one: the members share one tensor scale. Source: packed_modules_mapping of vLLM's and
# SGLang's models. PAIRS: both members must be there, because no engine has a layer for half of a gated MLP.
FUSED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ("qkv_proj", ("query", "key", "value")),
    ("qkv_proj", ("wq", "wk", "wv")),
    ("gate_up_proj", ("gate_proj", "up_proj")),
    ("w13", ("w1", "w3")),
    ("fused_qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa")),
    ("in_proj_qkvz", ("in_proj_qkv", "in_proj_z")),
    ("in_proj_ba", ("in_proj_b", "in_proj_a")),
)
PAIRS = frozenset({"gate_up_proj", "w13"})
_FUSED_OF_LEAF = {leaf: (fused, leaves) for fused, leaves in FUSED for leaf in leaves}


@dataclass(frozen=True)
class Name:
    """A parsed tensor name.

    Attributes:
        module: the name without its last part ("….gate_proj" of "….gate_proj.weight").
        parameter: that last part: "weight", "bias", …
        tower: "decoder", "mtp" (multi-token prediction) or "other" (vision, audio, projectors).
        layer: index of the layer in its tower, or None outside layers.
        kind: what the weight is for.
        expert: index of the routed expert, or None.
    """

    full: str
    module: str
    parameter: str
    tower: Tower
    layer: int | None
    kind: Kind
    expert: int | None

    @property
    def leaf(self) -> str:
        """Last part of the module's path."""
        return self.module.rpartition(".")[2]

    @property
    def parent(self) -> str:
        """Path of the module that contains this one."""
        return self.module.rpartition(".")[0]

    @property
    def fused(self) -> str | None:
        """Full path of the fused layer that engines build from this one and its partners, or None."""
        found = self._fusion
        return None if found is None else f"{self.parent}.{found[0]}"

    @property
    def partners(self) -> tuple[str, ...]:
        """Leaves of all members of the fused layer, in the engine's order."""
        found = self._fusion
        return () if found is None else found[1]

    @property
    def _fusion(self) -> tuple[str, tuple[str, ...]] | None:
        found = _FUSED_OF_LEAF.get(self.leaf)
        if found is not None and found[0] in PAIRS and self.kind == "attention":
            return None  # a gate of the attention's output, as in AFMoE: no half of a gated MLP
        return found

    @property
    def experts_module(self) -> str | None:
        """For a routed expert's weight: path of the module that holds all experts."""
        if self.expert is None:
            return None
        return self.full[: _EXPERT.search(self.full).end("module")]  # type: ignore[union-attr]  # as parse found it


def parse(name: str, decoder_layers: int | None = None) -> Name:
    """Read a tensor name.

    decoder_layers: the config's num_hidden_layers; layers from that index on are multi-token prediction, as DeepSeek
    and GLM write them.
    """
    module, _, parameter = name.rpartition(".")
    found = _LAYER.search(name)
    layer = int(found[1]) if found else None
    prefix = name[: found.start()] if found else name
    if _OTHER_TOWER.search(prefix):
        tower: Tower = "other"
    elif _MTP.search(name):
        tower = "mtp"
    elif layer is not None and decoder_layers is not None and layer >= decoder_layers:
        tower, layer = "mtp", layer - decoder_layers
    else:
        tower = "decoder" if found else "other"
    expert = _EXPERT.search(name)
    return Name(name, module, parameter, tower, layer, _kind(module), int(expert["index"]) if expert else None)


def _kind(module: str) -> Kind:
    parts = module.split(".")
    leaf = parts[-1]
    if leaf in ("lm_head", "embed_out", "output_layer") or module.endswith("shared_head.head"):
        return "lm_head"
    if any("embed" in part or part in ("wte", "wpe") for part in parts):
        return "embedding"
    if leaf in _ROUTER_LEAVES or "router" in parts:
        return "router"
    if "indexer" in parts:
        return "indexer"
    if "conv" in leaf:
        return "conv"
    if "norm" in leaf or leaf.startswith("ln_"):
        return "norm"
    if _EXPERT_PARTS.intersection(parts):
        return "experts"
    if _MLP_PARTS.intersection(parts):
        return "mlp"
    if any("attn" in part or "attention" in part for part in parts):
        return "attention"
    return "mlp" if leaf in _MLP_LEAVES else "other"


_MEGATRON_LEAVES = (
    (("q_proj", "k_proj", "v_proj"), "self_attention.linear_qkv"),
    (("o_proj",), "self_attention.linear_proj"),
    (("q_a_proj",), "self_attention.linear_q_down_proj"),
    (("q_b_proj",), "self_attention.linear_q_up_proj"),
    (("kv_a_proj_with_mqa",), "self_attention.linear_kv_down_proj"),
    (("kv_b_proj",), "self_attention.linear_kv_up_proj"),
)
_MEGATRON_MLP = dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj", "w1", "w3"), "linear_fc1")
_MEGATRON_MLP |= {"down_proj": "linear_fc2", "w2": "linear_fc2"}


def megatron(name: Name) -> str | None:
    """Megatron-Core's name of the parameter that holds this weight, or None where there is no known one."""
    if name.kind == "lm_head":
        return f"output_layer.{name.parameter}"
    if name.kind == "embedding" and name.tower == "other" and name.layer is None:
        return f"embedding.word_embeddings.{name.parameter}"
    if name.layer is None or name.tower == "other":
        return None
    layer = f"mtp.layers.{name.layer}.transformer_layer" if name.tower == "mtp" else f"decoder.layers.{name.layer}"
    if name.leaf in ("shared_expert_gate", "shared_experts_gate"):
        return f"{layer}.mlp.shared_experts.gate_{name.parameter}"
    if name.kind == "router":
        return f"{layer}.mlp.router.{name.parameter}"
    for leaves, target in _MEGATRON_LEAVES:
        if name.leaf in leaves:
            return f"{layer}.{target}.{name.parameter}"
    target = _MEGATRON_MLP.get(name.leaf, "")
    if not target or name.kind == "attention":
        return None
    if name.expert is not None:
        return f"{layer}.mlp.experts.{target}.{name.parameter}{name.expert}"
    if name.kind == "experts":
        return f"{layer}.mlp.shared_experts.{target}.{name.parameter}"
    return f"{layer}.mlp.{target}.{name.parameter}"


def plain_megatron(text: str) -> str:
    """A Megatron-Core name, or part of one, without wrappers' prefixes and with the older name of an MTP layer's block.

    Source: DistributedDataParallel and Float16Module each prepend "module."; megatron.core's
    MultiTokenPredictionLayer called its block transformer_layer before mtp_model_layer.
    """
    while text.startswith("module."):
        text = text.removeprefix("module.")
    return text.replace("mtp_model_layer", "transformer_layer")


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts layers.2 before layers.10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name)]
