"""The table of Megatron-Core's parameters: which Hugging Face tensors each holds, and how tensor parallelism cuts it.

Sources: megatron.core (TransformerLayer, MLASelfAttention, TEGroupedMLP, SequentialMLP, GroupedMLP, SharedExpertMLP,
MultiTokenPredictionLayer); names as the bridges of Megatron-Bridge, miles and slime have them, 2026.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

How = Literal["one", "stack", "halves", "qkv", "swap", "copies", "experts", "grouped_fc1", "grouped_fc2"]
Spec = Literal["te", "local", "both", "read"]


@dataclass(frozen=True)
class Rule:
    """What one Megatron parameter holds.

    Attributes:
        megatron: its name below the layer; {e} is an expert.
        hf: names below the Hugging Face layer; names that begin with "/" are whole.
        how: "one" tensor; a "stack" of several, each cut by itself (gate and up interleave by rank: stride 2);
            "halves": the same, but one tensor on disk; "qkv": by groups of query heads, their keys, their values;
            "swap": columns in halves, exchanged; "copies": each is the parameter; "experts": all of a rank, 3-D, as hf
            of each; "grouped_…": likewise, 2-D and transposed as GroupedMLP has them.
        cut: dimension that tensor parallelism cuts, None: not at all. Vectors are cut along 0 or not.
        spec: which layer specification has it: Transformer Engine's, the local one, both; or "read": known, but never
            chosen when names are made.
        beside: a tensor that the layer must have for the name to be made.
    """

    megatron: str
    hf: tuple[str, ...]
    how: How = "one"
    cut: int | None = None
    spec: Spec = "both"
    beside: str = ""


_INPUT, _POST = ("input_layernorm.weight",), ("post_attention_layernorm.weight",)
_QKV = ("self_attn.q_proj.{p}", "self_attn.k_proj.{p}", "self_attn.v_proj.{p}")
MLA = "self_attn.kv_a_proj_with_mqa.weight"
_MOE = "mlp.experts.0.gate_proj.weight"


def _gated(megatron: str, module: str, spec: Spec = "both", gate: tuple[str, str] = ("gate_proj", "up_proj")) -> Rule:
    """fc1: gate rows, then up rows."""
    return Rule(megatron, tuple(f"{module}.{leaf}.weight" for leaf in gate), "stack", 0, spec)


_ATTENTION = (
    Rule("self_attention.linear_qkv.weight", tuple(name.format(p="weight") for name in _QKV), "qkv", 0),
    Rule("self_attention.linear_qkv.bias", tuple(name.format(p="bias") for name in _QKV), "qkv", 0),
    Rule("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), cut=1),
    Rule("self_attention.linear_proj.bias", ("self_attn.o_proj.bias",)),
    Rule("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",)),
    Rule("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",)),
    Rule("self_attention.linear_q_proj.weight", ("self_attn.q_proj.weight",), cut=0),
    Rule("self_attention.linear_q_down_proj.weight", ("self_attn.q_a_proj.weight",)),
    Rule("self_attention.linear_kv_down_proj.weight", (MLA,)),
    Rule("self_attention.linear_qkv_down_proj.weight", ("self_attn.q_a_proj.weight", MLA), "stack", None, "read"),
    Rule("self_attention.linear_q_up_proj.weight", ("self_attn.q_b_proj.weight",), cut=0),
    Rule("self_attention.linear_kv_up_proj.weight", ("self_attn.kv_b_proj.weight",), cut=0),
    Rule("self_attention.linear_q_up_proj.layer_norm_weight", ("self_attn.q_a_layernorm.weight",), spec="te"),
    Rule("self_attention.linear_kv_up_proj.layer_norm_weight", ("self_attn.kv_a_layernorm.weight",), spec="te"),
    Rule("self_attention.q_layernorm.weight", ("self_attn.q_a_layernorm.weight",), spec="local"),
    Rule("self_attention.kv_layernorm.weight", ("self_attn.kv_a_layernorm.weight",), spec="local"),
)
_NORMS = (  # Transformer Engine fuses a norm into the Linear after it, where that is a TELayerNormColumnParallelLinear
    Rule("input_layernorm.weight", _INPUT, beside=MLA),
    Rule("self_attention.linear_qkv.layer_norm_weight", _INPUT, spec="te"),
    Rule("self_attention.linear_q_proj.layer_norm_weight", _INPUT, spec="read"),
    Rule("input_layernorm.weight", _INPUT, spec="local"),
    Rule("pre_mlp_layernorm.weight", _POST, beside=_MOE),
    Rule("pre_mlp_layernorm.weight", _POST, beside="block_sparse_moe.gate.weight"),
    Rule("mlp.linear_fc1.layer_norm_weight", _POST, spec="te"),
    Rule("pre_mlp_layernorm.weight", _POST, spec="local"),
    Rule("post_self_attn_layernorm.weight", ("post_self_attn_layernorm.weight",)),
    Rule("post_mlp_layernorm.weight", ("post_mlp_layernorm.weight",)),
)
_EXPERTS = tuple(
    rule
    for module, gate, down in (
        ("mlp.experts.{e}", ("gate_proj", "up_proj"), "down_proj"),
        ("block_sparse_moe.experts.{e}", ("w1", "w3"), "w2"),
    )
    for fc2 in ((f"{module}.{down}.weight",),)
    for fc1 in (tuple(f"{module}.{leaf}.weight" for leaf in gate),)
    for rule in (
        Rule("mlp.experts.linear_fc1.weight{e}", fc1, "stack", 0, "te"),
        Rule("mlp.experts.linear_fc2.weight{e}", fc2, "one", 1, "te"),
        Rule("mlp.experts.local_experts.{e}.linear_fc1.weight", fc1, "stack", 0, "local"),
        Rule("mlp.experts.local_experts.{e}.linear_fc2.weight", fc2, "one", 1, "local"),
        Rule("mlp.experts.linear_fc1.weight", fc1, "experts", 0, "read"),
        Rule("mlp.experts.linear_fc2.weight", fc2, "experts", 1, "read"),
        Rule("mlp.experts.weight1", fc1, "grouped_fc1", 0, "read"),
        Rule("mlp.experts.weight2", fc2, "grouped_fc2", 1, "read"),
    )
)
_MLP = (
    _gated("mlp.linear_fc1.weight", "mlp"),
    Rule("mlp.linear_fc1.weight", ("mlp.gate_up_proj.weight",), "halves", 0),
    Rule("mlp.linear_fc1.weight", ("mlp.up_proj.weight",), cut=0),  # without a gate
    Rule("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), cut=1),
    Rule("mlp.router.weight", ("mlp.gate.weight",)),
    Rule("mlp.router.weight", ("block_sparse_moe.gate.weight",)),
    Rule("mlp.router.expert_bias", ("mlp.gate.e_score_correction_bias",)),
    Rule("mlp.router.expert_bias", ("block_sparse_moe.e_score_correction_bias",)),
    *(
        rule
        for module in ("mlp.shared_expert", "mlp.shared_experts")
        for rule in (
            _gated("mlp.shared_experts.linear_fc1.weight", module),
            Rule("mlp.shared_experts.linear_fc2.weight", (f"{module}.down_proj.weight",), cut=1),
            Rule("mlp.shared_experts.gate_weight", (f"{module}_gate.weight",)),
        )
    ),
)
LAYER = (*_ATTENTION, *_NORMS, *_EXPERTS, *_MLP)
MTP = (
    *(
        Rule(f"{ours}.weight", (f"{theirs}.weight",))
        for ours, theirs in (
            *(("enorm", name) for name in ("enorm", "token_layernorm", "/mtp.pre_fc_norm_embedding")),
            *(("hnorm", name) for name in ("hnorm", "hidden_layernorm", "/mtp.pre_fc_norm_hidden")),
            *(("final_layernorm", name) for name in ("shared_head.norm", "final_layernorm", "/mtp.norm")),
        )
    ),
    Rule("eh_proj.weight", ("eh_proj.weight",), cut=0),
    Rule("eh_proj.weight", ("/mtp.fc.weight",), cut=0),
    Rule("eh_proj.weight", ("input_proj.weight",), "swap", 0),  # MiMo joins hidden state and token the other way round
)
