"""What is read off a tensor's name, for the spellings of many model families."""

import pytest

from halfbyte import names

from .check import equal

LAYERS = 61  # decoder layers of the model in question
PARSED = [
    # name, tower, layer, kind, expert
    ("model.layers.10.self_attn.q_proj.weight", "decoder", 10, "attention", None),
    ("transformer.h.3.attn.c_attn.weight", "decoder", 3, "attention", None),
    ("layers.3.attention.wq.weight", "decoder", 3, "attention", None),
    ("model.layers.0.linear_attn.in_proj_qkvz.weight", "decoder", 0, "attention", None),
    ("model.layers.0.linear_attn.conv1d.weight", "decoder", 0, "conv", None),
    ("model.layers.0.self_attn.indexer.wk.weight", "decoder", 0, "indexer", None),
    ("model.layers.0.self_attn.q_norm.weight", "decoder", 0, "norm", None),
    ("model.layers.0.input_layernorm.weight", "decoder", 0, "norm", None),
    ("transformer.h.0.ln_1.weight", "decoder", 0, "norm", None),
    ("model.layers.0.self_attn.gate_proj.weight", "decoder", 0, "attention", None),
    ("model.layers.0.mlp.gate_proj.weight", "decoder", 0, "mlp", None),
    ("model.layers.0.feed_forward.w1.weight", "decoder", 0, "mlp", None),
    ("model.layers.0.mlp.experts.7.gate_proj.weight", "decoder", 0, "experts", 7),
    ("model.layers.0.block_sparse_moe.experts.11.w3.weight", "decoder", 0, "experts", 11),
    ("model.layers.0.block_sparse_moe.gate.weight", "decoder", 0, "router", None),
    ("model.layers.0.mlp.gate.weight", "decoder", 0, "router", None),
    ("model.layers.0.mlp.router.classifier.weight", "decoder", 0, "router", None),
    ("model.layers.0.mlp.shared_expert.up_proj.weight", "decoder", 0, "experts", None),
    ("model.layers.0.mlp.shared_experts.up_proj.weight", "decoder", 0, "experts", None),
    ("model.layers.0.mlp.shared_expert_gate.weight", "decoder", 0, "router", None),
    ("model.language_model.layers.60.self_attn.o_proj.weight", "decoder", 60, "attention", None),
    ("language_model.model.layers.5.mlp.down_proj.weight", "decoder", 5, "mlp", None),
    ("model.decoder.layers.5.self_attn.k_proj.weight", "decoder", 5, "attention", None),
    ("model.layers.61.self_attn.q_a_proj.weight", "mtp", 0, "attention", None),
    ("model.layers.62.mlp.experts.0.up_proj.weight", "mtp", 1, "experts", 0),
    ("model.layers.61.shared_head.head.weight", "mtp", 0, "lm_head", None),
    ("mtp.layers.0.mlp.up_proj.weight", "mtp", 0, "mlp", None),
    ("mtp.fc.weight", "mtp", None, "other", None),
    ("model.mtp_layers.1.self_attn.o_proj.weight", "mtp", 1, "attention", None),
    ("lm_head.weight", "other", None, "lm_head", None),
    ("model.embed_tokens.weight", "other", None, "embedding", None),
    ("transformer.wte.weight", "other", None, "embedding", None),
    ("model.layers.61.embed_tokens.weight", "mtp", 0, "embedding", None),
    ("vision_model.encoder.layers.70.self_attn.q_proj.weight", "other", 70, "attention", None),
    ("model.visual.blocks.3.mlp.fc1.weight", "other", 3, "mlp", None),
    ("model.vision_tower.blocks.3.mlp.fc2.weight", "other", 3, "mlp", None),
    ("audio_tower.layers.2.fc1.weight", "other", 2, "mlp", None),
    ("model.connector.perceiver_resampler.layers.0.mlp.up_proj.weight", "other", 0, "mlp", None),
    ("vpm.blocks.0.attn.qkv.weight", "other", 0, "attention", None),
    ("apm.layers.0.self_attn.q_proj.weight", "other", 0, "attention", None),
    ("tts.model.layers.0.mlp.up_proj.weight", "other", 0, "mlp", None),
    ("model.multi_modal_projector.linear_1.weight", "other", None, "other", None),
]


@pytest.mark.parametrize(("name", "tower", "layer", "kind", "expert"), PARSED, ids=[row[0] for row in PARSED])
def test_parse(name: str, tower: str, layer: int | None, kind: str, expert: int | None) -> None:
    found = names.parse(name, LAYERS)
    equal((found.tower, found.layer, found.kind, found.expert), (tower, layer, kind, expert))
    equal((found.full, f"{found.module}.{found.parameter}"), (name, name))


def test_without_a_config_no_layer_is_mtp() -> None:
    found = names.parse("model.layers.61.self_attn.q_proj.weight")
    equal((found.tower, found.layer), ("decoder", 61))


@pytest.mark.parametrize(
    ("module", "fused", "partners"),
    [
        ("a.q_proj", "a.qkv_proj", ("q_proj", "k_proj", "v_proj")),
        ("a.v_proj", "a.qkv_proj", ("q_proj", "k_proj", "v_proj")),
        ("a.up_proj", "a.gate_up_proj", ("gate_proj", "up_proj")),
        ("a.experts.1.w3", "a.experts.1.w13", ("w1", "w3")),
        ("a.kv_a_proj_with_mqa", "a.fused_qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa")),
        ("a.self_attn.gate_proj", None, ()),
        ("a.o_proj", None, ()),
        ("a.down_proj", None, ()),
        ("a.w2", None, ()),
        ("a.q_b_proj", None, ()),
    ],
)
def test_fused(module: str, fused: str | None, partners: tuple[str, ...]) -> None:
    name = names.parse(f"{module}.weight")
    equal((name.fused, name.partners), (fused, partners))


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("model.layers.3.mlp.experts.3.up_proj.weight", "model.layers.3.mlp.experts"),
        ("layers.1.block_sparse_moe.experts.1.w1.weight", "layers.1.block_sparse_moe.experts"),
        ("model.layers.3.mlp.shared_experts.up_proj.weight", None),
        ("model.layers.3.mlp.up_proj.weight", None),
    ],
)
def test_experts_module(name: str, module: str | None) -> None:
    equal(names.parse(name).experts_module, module)


@pytest.mark.parametrize(
    ("name", "megatron"),
    [
        ("model.layers.4.self_attn.k_proj.weight", "decoder.layers.4.self_attention.linear_qkv.weight"),
        ("model.layers.4.self_attn.q_proj.bias", "decoder.layers.4.self_attention.linear_qkv.bias"),
        ("model.layers.4.self_attn.o_proj.weight", "decoder.layers.4.self_attention.linear_proj.weight"),
        (
            "model.layers.4.self_attn.kv_a_proj_with_mqa.weight",
            "decoder.layers.4.self_attention.linear_kv_down_proj.weight",
        ),
        ("model.layers.4.mlp.gate_proj.weight", "decoder.layers.4.mlp.linear_fc1.weight"),
        ("model.layers.4.mlp.down_proj.weight", "decoder.layers.4.mlp.linear_fc2.weight"),
        ("model.layers.4.mlp.experts.7.up_proj.weight", "decoder.layers.4.mlp.experts.linear_fc1.weight7"),
        ("model.layers.4.mlp.shared_expert.up_proj.weight", "decoder.layers.4.mlp.shared_experts.linear_fc1.weight"),
        ("model.layers.4.mlp.gate.weight", "decoder.layers.4.mlp.router.weight"),
        ("model.layers.62.mlp.down_proj.weight", "mtp.layers.1.transformer_layer.mlp.linear_fc2.weight"),
        ("model.mtp_layers.1.mlp.up_proj.weight", "mtp.layers.1.transformer_layer.mlp.linear_fc1.weight"),
        ("model.layers.4.mlp.shared_expert_gate.weight", "decoder.layers.4.mlp.shared_experts.gate_weight"),
        ("model.layers.4.mlp.gate_up_proj.weight", "decoder.layers.4.mlp.linear_fc1.weight"),
        ("lm_head.weight", "output_layer.weight"),
        ("model.embed_tokens.weight", "embedding.word_embeddings.weight"),
        ("model.visual.blocks.4.mlp.up_proj.weight", None),
        ("model.layers.4.linear_attn.out_proj.weight", None),
        ("model.layers.4.self_attn.gate_proj.weight", None),
    ],
)
def test_megatron(name: str, megatron: str | None) -> None:
    equal(names.megatron(names.parse(name, LAYERS)), megatron)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("module.module.decoder.layers.3.", "decoder.layers.3."),
        ("mtp.layers.0.mtp_model_layer.mlp", "mtp.layers.0.transformer_layer.mlp"),
        ("linear_qkv", "linear_qkv"),
    ],
)
def test_plain_megatron(text: str, plain: str) -> None:
    equal(names.plain_megatron(text), plain)


def test_natural_order() -> None:
    ordered = ["lm_head.weight", "model.layers.2.a", "model.layers.10.a", "model.layers.10.b", "model.norm"]
    equal(sorted(set(ordered), key=names.natural_key), ordered)
    equal(sorted(["layers.1", "0"], key=names.natural_key), ["0", "layers.1"])  # a number against a word
