"""Three engines, three rules for what an ignore list excludes; ours select the same modules under all."""

import pytest

from halfbyte import names
from halfbyte.checkpoint.exclusion import (
    RULES,
    Rule,
    disagreements,
    engine_layer,
    excluded_by_compressed_tensors,
    excluded_by_sglang_compressed_tensors,
    excluded_by_sglang_modelopt,
    excluded_by_sglang_mxfp8,
    excluded_by_vllm_modelopt,
    exclusion_list,
)
from halfbyte.checkpoint.schema import LAYOUTS, Layout
from halfbyte.names import Name

from ..check import equal, true

RULE = {
    "vllm": excluded_by_vllm_modelopt,
    "sglang": excluded_by_sglang_modelopt,
    "compressed-tensors": excluded_by_compressed_tensors,
}
QKV = tuple(f"m.layers.1.self_attn.{letter}_proj" for letter in "qkv")


def name(module: str) -> Name:
    return names.parse(f"{module}.weight")


@pytest.mark.parametrize(
    ("pattern", "layer", "hit_by"),
    [
        # Raw substrings: what a pattern hits in vLLM beyond what it means.
        ("layers.1", "m.layers.1.mlp.down_proj", {"vllm", "sglang"}),
        ("layers.1", "m.layers.10.mlp.down_proj", {"vllm"}),
        ("m.layers.0.mlp.gate", "m.layers.0.mlp.gate", {"vllm", "sglang", "compressed-tensors"}),
        ("m.layers.0.mlp.gate", "m.layers.0.mlp.gate_up_proj", {"vllm"}),
        ("mlp", "m.layers.0.mlp.down_proj", {"vllm", "sglang"}),
        ("attn", "m.layers.0.self_attn.o_proj", {"vllm"}),
        # Globs: all of the name in vLLM and SGLang, nothing in compressed-tensors.
        ("*layers.1.*", "m.layers.1.mlp.down_proj", {"vllm", "sglang"}),
        ("m.layers.1.*", "m.layers.10.mlp.down_proj", set()),
        ("*down_proj", "m.layers.1.mlp.down_proj", {"vllm", "sglang"}),
        # re: belongs to compressed-tensors, and is anchored at the start only.
        (r"re:m\.layers\.1", "m.layers.10.mlp.down_proj", {"compressed-tensors"}),
        (r"re:.*down_proj", "m.layers.1.mlp.down_proj", {"compressed-tensors"}),
        (r"re:layers\.1\.", "m.layers.1.mlp.down_proj", set()),
    ],
)
def test_rules(pattern: str, layer: str, hit_by: set[str]) -> None:
    hits = {engine for engine, rule in RULE.items() if rule(layer, (layer,), [pattern])}
    equal(hits, hit_by)


@pytest.mark.parametrize("engine", list(RULE))
def test_a_fused_layer_needs_all_its_members(engine: str) -> None:
    layer = "m.layers.1.self_attn.qkv_proj"
    equal(RULE[engine](layer, QKV, list(QKV)), True)
    equal(RULE[engine](layer, QKV, list(QKV[:2])), False)
    equal(RULE[engine](layer, QKV, []), False)


def test_engine_layer() -> None:
    equal(engine_layer(name(QKV[1])), ("m.layers.1.self_attn.qkv_proj", QKV))
    expert = "m.layers.1.mlp.experts.3.up_proj"
    equal(engine_layer(name(expert)), ("m.layers.1.mlp.experts", (expert,)))
    down = "m.layers.1.mlp.down_proj"
    equal(engine_layer(name(down)), (down, (down,)))


def test_one_entry_for_a_layers_experts() -> None:
    excluded = [name(f"m.layers.1.mlp.experts.{i}.{leaf}") for i in range(3) for leaf in ("up_proj", "down_proj")]
    excluded.append(name("m.layers.1.mlp.gate"))
    equal(exclusion_list("modelopt", [], excluded), ["lm_head", "m.layers.1.mlp.experts", "m.layers.1.mlp.gate"])
    wanted = ["lm_head", r"re:m\.layers\.1\.mlp\.experts\..*", "m.layers.1.mlp.gate"]
    equal(exclusion_list("compressed-tensors", [], excluded), wanted)


def test_lm_head_is_named_unless_quantized() -> None:
    equal(exclusion_list("modelopt", [name("m.layers.1.mlp.down_proj")], []), ["lm_head"])
    equal(exclusion_list("modelopt", [name("lm_head")], []), [])


def model(layers: int = 12) -> list[Name]:
    """Linears of a model that mixes dense and MoE layers, numbered past ten."""
    leaves = [f"self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj", "o_proj")]
    dense = [f"mlp.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")]
    experts = [f"mlp.experts.{i}.{leaf}" for i in range(2) for leaf in ("gate_proj", "up_proj", "down_proj")]
    made = []
    for i in range(layers):
        made += [name(f"m.layers.{i}.{leaf}") for leaf in leaves + (["mlp.gate", *experts] if i % 2 else dense)]
    return made


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "part",
    [
        ".layers.1.",
        ".layers.10.",
        ".mlp.",
        "self_attn",
        ".mlp.gate",
        "experts",
        ".layers.1.mlp.experts",
        "mlp.down_proj",
        "-",
    ],
)
def test_our_lists_mean_the_same_everywhere(layout: Layout, part: str) -> None:
    excluded = [n for n in model() if part in f"{n.module}." and (part != ".mlp.gate" or n.leaf == "gate")]
    quantized = [n for n in model() if n not in excluded]
    patterns = exclusion_list(layout, quantized, excluded)
    equal(disagreements(layout, patterns, quantized, excluded), [])
    # By every rule of the layout, one after the other, independently of `disagreements`.
    for engine, rule in RULES[layout].items():
        for n in model():
            equal(rule(*engine_layer(n), patterns), n in excluded, f"{engine}: {n.module}")


GATED = ("mlp.gate_proj", "mlp.up_proj")


@pytest.mark.parametrize(
    ("patterns", "quantized", "excluded", "layer", "what"),
    [
        (["m.layers.0.mlp.gate"], GATED, ("mlp.gate",), "mlp.gate_up_proj", "is quantized but vLLM excludes"),
        (["layers.0.mlp"], GATED, (), "mlp.gate_up_proj", "is quantized but SGLang excludes"),
        ([], ("mlp.down_proj",), ("mlp.gate",), "mlp.gate", "is not quantized but vLLM does not exclude"),
        (["*gate"], ("mlp.down_proj",), GATED, "mlp.gate_up_proj", "is not quantized but SGLang does not exclude"),
    ],
)
def test_disagreements_are_found(
    patterns: list[str], quantized: tuple[str, ...], excluded: tuple[str, ...], layer: str, what: str
) -> None:
    parts = [[name(f"m.layers.0.{module}") for module in modules] for modules in (quantized, excluded)]
    found = disagreements("modelopt", patterns, *parts)
    true(any(sentence.startswith(f"m.layers.0.{layer} {what}") for sentence in found), str(found))


MLP, MLA = "m.layers.1.mlp", "m.layers.1.self_attn.kv_b_proj"


@pytest.mark.parametrize(
    ("rule", "pattern", "layer", "hit"),
    [
        # vLLM asks whether the module of all experts is part of any pattern.
        (excluded_by_vllm_modelopt, f"{MLP}.experts.3.down_proj", f"{MLP}.experts", True),
        (excluded_by_vllm_modelopt, f"{MLP}.shared_experts.down_proj", f"{MLP}.experts", False),
        # SGLang leaves a module's parts out with it, but not its experts.
        (excluded_by_sglang_modelopt, "m.layers.1", f"{MLP}.down_proj", True),
        (excluded_by_sglang_modelopt, "m.layers.1", f"{MLP}.experts", False),
        (excluded_by_sglang_modelopt, "m.layers.1*", f"{MLP}.experts", True),
        (excluded_by_sglang_modelopt, f"{MLP}.experts.3.down_proj", f"{MLP}.experts", False),
        (excluded_by_sglang_modelopt, "mtp*", "m.mtp_layers.0.mlp.down_proj", True),
        (excluded_by_sglang_modelopt, "m.layers.1.mlp", f"language_model.{MLP}.down_proj", True),
        # An MLA projection that is named in one layer is excluded in all.
        (excluded_by_sglang_modelopt, "m.layers.7.self_attn.kv_b_proj", MLA, True),
        (excluded_by_sglang_modelopt, "m.layers.7.mlp.down_proj", f"{MLP}.down_proj", False),
        # MXFP8 is read by another class: no globs, with or without "model.", and experts as in vLLM.
        (excluded_by_sglang_mxfp8, "m.layers.1*", f"{MLP}.down_proj", False),
        (excluded_by_sglang_mxfp8, "layers.1", "model.layers.1.mlp.down_proj", True),
        (excluded_by_sglang_mxfp8, "model.lm_head", "lm_head", True),
        (excluded_by_sglang_mxfp8, f"{MLP}.experts.3.down_proj", f"{MLP}.experts", True),
        # Its compressed-tensors takes the end of a name for the name.
        (excluded_by_sglang_compressed_tensors, "mlp.down_proj", f"{MLP}.down_proj", True),
        (excluded_by_sglang_compressed_tensors, "m.layers.1", f"{MLP}.down_proj", False),
        (excluded_by_compressed_tensors, "mlp.down_proj", f"{MLP}.down_proj", False),
    ],
)
def test_traps(rule: Rule, pattern: str, layer: str, hit: bool) -> None:
    equal(rule(layer, (layer,), [pattern]), hit)


def test_mla_of_one_layer_is_excluded_by_its_parent() -> None:
    """As of a multi-token prediction layer: each projection by name would be excluded everywhere in SGLang."""
    leaves = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    first, second = ([name(f"m.layers.{layer}.self_attn.{leaf}") for leaf in leaves] for layer in (0, 1))
    patterns = exclusion_list("modelopt", first, second)
    equal(patterns, ["lm_head", "m.layers.1.self_attn", "m.layers.1.self_attn.o_proj"])
    equal(disagreements("modelopt", patterns, first, second), [])
    equal(disagreements("modelopt", ["lm_head", *(n.module for n in second)], first, second) != [], True)
