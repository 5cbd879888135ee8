"""Megatron's names and Hugging Face's, both ways, on whole models; and which layers and experts a rank has."""

import pytest
import torch

from halfbyte import CheckpointError, FormatError, names
from halfbyte.export import Model, Placement, global_name
from halfbyte.export.shards import to_megatron, to_pieces

from ..check import equal, same_bits, true
from ..checkpoint import models
from . import ranks

NORMS_OF_EXPERTS = {"pre_mlp_layernorm.weight": ["post_attention_layernorm.weight"]}
NORMS_OF_MLP = {"mlp.linear_fc1.layer_norm_weight": ["post_attention_layernorm.weight"]}
GQA = {
    "self_attention.linear_qkv.layer_norm_weight": ["input_layernorm.weight"],
    "self_attention.linear_qkv.weight": [f"self_attn.{part}_proj.weight" for part in "qkv"],
    "self_attention.linear_proj.weight": ["self_attn.o_proj.weight"],
    "self_attention.q_layernorm.weight": ["self_attn.q_norm.weight"],
    "self_attention.k_layernorm.weight": ["self_attn.k_norm.weight"],
}
BIASES = {"self_attention.linear_qkv.bias": [f"self_attn.{part}_proj.bias" for part in "qkv"]}
MLA = {
    "input_layernorm.weight": ["input_layernorm.weight"],
    "self_attention.linear_q_down_proj.weight": ["self_attn.q_a_proj.weight"],
    "self_attention.linear_q_up_proj.layer_norm_weight": ["self_attn.q_a_layernorm.weight"],
    "self_attention.linear_q_up_proj.weight": ["self_attn.q_b_proj.weight"],
    "self_attention.linear_kv_down_proj.weight": ["self_attn.kv_a_proj_with_mqa.weight"],
    "self_attention.linear_kv_up_proj.layer_norm_weight": ["self_attn.kv_a_layernorm.weight"],
    "self_attention.linear_kv_up_proj.weight": ["self_attn.kv_b_proj.weight"],
    "self_attention.linear_proj.weight": ["self_attn.o_proj.weight"],
}
MLP = {
    "mlp.linear_fc1.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "mlp.linear_fc2.weight": ["mlp.down_proj.weight"],
}
ROUTER = {"mlp.router.weight": ["mlp.gate.weight"]}
CORRECTION = {"mlp.router.expert_bias": ["mlp.gate.e_score_correction_bias"]}
TOP = {
    "embedding.word_embeddings.weight": ["model.embed_tokens.weight"],
    "decoder.final_layernorm.weight": ["model.norm.weight"],
}
OUTPUT = {"output_layer.weight": ["lm_head.weight"]}
Table = dict[str, list[str]]


def experts(
    module: str = "mlp.experts", gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> Table:
    found: Table = {}
    for e in range(4):
        found[f"mlp.experts.linear_fc1.weight{e}"] = [f"{module}.{e}.{leaf}.weight" for leaf in (gate, up)]
        found[f"mlp.experts.linear_fc2.weight{e}"] = [f"{module}.{e}.{down}.weight"]
    return found


def shared(name: str) -> Table:
    return {
        "mlp.shared_experts.linear_fc1.weight": [f"mlp.{name}.gate_proj.weight", f"mlp.{name}.up_proj.weight"],
        "mlp.shared_experts.linear_fc2.weight": [f"mlp.{name}.down_proj.weight"],
    }


def layer(ours: str, theirs: str, *tables: Table) -> Table:
    together = {name: hf for table in tables for name, hf in table.items()}
    return {f"{ours}.{name}": [f"{theirs}.{part}" for part in hf] for name, hf in together.items()}


def dense() -> Table:
    table = TOP | {}
    for i in range(2):
        table |= layer(f"decoder.layers.{i}", f"model.layers.{i}", GQA, BIASES, MLP, NORMS_OF_MLP)
    return table


def moe() -> Table:
    gate = {"mlp.shared_experts.gate_weight": ["mlp.shared_expert_gate.weight"]}
    block = (GQA, ROUTER, experts(), shared("shared_expert"), gate, NORMS_OF_EXPERTS)
    return TOP | OUTPUT | layer("decoder.layers.0", "model.layers.0", *block)


def deepseek() -> Table:
    block = (MLA, ROUTER, CORRECTION, experts(), shared("shared_experts"), NORMS_OF_EXPERTS)
    joins = {f"{name}.weight": [f"{name}.weight"] for name in ("enorm", "hnorm", "eh_proj")}
    return {
        **TOP,
        "embedding.word_embeddings.weight": ["model.embed_tokens.weight", "model.layers.2.embed_tokens.weight"],
        "output_layer.weight": ["lm_head.weight", "model.layers.2.shared_head.head.weight"],
        **layer("decoder.layers.0", "model.layers.0", MLA, MLP, NORMS_OF_MLP),
        **layer("decoder.layers.1", "model.layers.1", *block),
        **layer("mtp.layers.0.transformer_layer", "model.layers.2", *block),
        **layer("mtp.layers.0", "model.layers.2", joins, {"final_layernorm.weight": ["shared_head.norm.weight"]}),
    }


def mixtral() -> Table:
    table = TOP | OUTPUT
    gqa = {name: hf for name, hf in GQA.items() if "q_layer" not in name and "k_layer" not in name}
    router = {"mlp.router.weight": ["block_sparse_moe.gate.weight"]}
    block = (gqa, router, experts("block_sparse_moe.experts", "w1", "w3", "w2"), NORMS_OF_EXPERTS)
    return table | layer("decoder.layers.0", "model.layers.0", *block)


def qwen_mtp() -> Table:
    """An MTP layer of its own tower, as Qwen3-Next writes it."""
    table = TOP | OUTPUT
    gqa = {name: hf for name, hf in GQA.items() if "q_layer" not in name and "k_layer" not in name}
    for i in range(2):
        table |= layer(f"decoder.layers.{i}", f"model.layers.{i}", gqa, BIASES, MLP, NORMS_OF_MLP)
    table |= layer("mtp.layers.0.transformer_layer", "mtp.layers.0", gqa, MLP, NORMS_OF_MLP)
    return table | {
        "mtp.layers.0.eh_proj.weight": ["mtp.fc.weight"],
        "mtp.layers.0.final_layernorm.weight": ["mtp.norm.weight"],
    }


ARCHITECTURES = {
    "dense": (ranks.dense, dense),
    "moe": (ranks.moe, moe),
    "deepseek": (ranks.deepseek, deepseek),
    "mixtral": (models.mixtral, mixtral),
    "qwen_mtp": (lambda: models.with_mtp(models.dense()), qwen_mtp),
}


def model_of(model: models.Model) -> Model:
    return Model.of(model.config, {name: tuple(tensor.shape) for name, tensor in model.tensors.items()})


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_whole_tables_both_ways(name: str) -> None:
    make, table = ARCHITECTURES[name]
    source = make()
    model = model_of(source)
    found = {parameter: list(entry.hf) for parameter, entry in model.parameters().items()}
    equal(found, table())
    equal(sorted(model.megatron_names()), sorted(source.tensors), "every tensor has a parameter")
    for parameter, hf in table().items():
        equal(list(model.parameter(f"module.module.{parameter}").hf), hf, parameter)
        equal({model.megatron_names()[part] for part in hf}, {parameter})


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_policy_knows_the_same_names(name: str) -> None:
    """`extra_high_precision_layers_megatron` asks `names.megatron`; so of each weight, it is the name."""
    source = ARCHITECTURES[name][0]()
    model, checked = model_of(source), 0
    for hf, parameter in model.megatron_names().items():
        parsed = names.parse(hf, model.layers)
        if source.tensors[hf].dim() == 2 and parsed.kind in ("attention", "mlp", "experts", "router"):
            equal(names.megatron(parsed), parameter, hf)
            checked += 1
    true(checked >= 10, f"{checked} names")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_local_layers_have_other_names(name: str) -> None:
    model = model_of(ARCHITECTURES[name][0]())
    found = model.megatron_names("local")
    equal(sorted(found), sorted(model.megatron_names("te")))
    true(not any("layer_norm_weight" in parameter for parameter in found.values()), "norms stand by themselves")
    for hf, parameter in found.items():
        true(hf in model.parameter(parameter).hf, f"{parameter} and {hf}")


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_query_groups_lie_as_megatron_reads_them(tp: int) -> None:
    """[q0 q1 k0 v0 q2 q3 k1 v1 …]; with more ranks than groups, half a group on each."""
    source = ranks.dense()
    model, name = model_of(source), "decoder.layers.0.self_attention.linear_qkv.weight"
    rows = {part: source.tensors[f"model.layers.0.self_attn.{part}_proj.weight"].split(16) for part in "qkv"}
    heads = [h for g in range(4) for h in (rows["q"][2 * g], rows["q"][2 * g + 1], rows["k"][g], rows["v"][g])]
    for rank in range(tp):
        placement = Placement(rank, tp)
        shard = to_megatron(model, source.tensors, placement)[name] if tp < 8 else None
        expected = torch.cat(heads).chunk(tp)[rank]
        if shard is not None:
            same_bits(shard, expected)
        for piece in to_pieces(model, name, expected, placement):
            whole = source.tensors[piece.name]
            same_bits(
                piece.tensor, whole[piece.start : piece.start + len(piece.tensor)], f"{piece.name} of rank {rank}"
            )


def test_gate_and_up_interleave_by_rank() -> None:
    """Stride 2: rank 0 has the first half of gate above the first half of up."""
    source = ranks.dense()
    shard = to_megatron(model_of(source), source.tensors, Placement(1, 2))["decoder.layers.1.mlp.linear_fc1.weight"]
    gate, up = (source.tensors[f"model.layers.1.mlp.{leaf}_proj.weight"] for leaf in ("gate", "up"))
    same_bits(shard, torch.cat((gate[64:], up[64:])))
    pieces = to_pieces(model_of(source), "decoder.layers.1.mlp.linear_fc1.weight", shard, Placement(1, 2))
    equal(
        [(p.name.split(".")[-2], p.dim, p.start, len(p.tensor)) for p in pieces],
        [("gate_proj", 0, 64, 64), ("up_proj", 0, 64, 64)],
    )


def test_a_fused_gate_up_on_disk() -> None:
    """GLM-4's MLPs: one tensor of two halves."""
    source = ranks.dense()
    path = "model.layers.0.mlp"
    halves = [source.tensors[f"{path}.{leaf}_proj.weight"] for leaf in ("gate", "up")]
    both = torch.cat(halves)
    source = source.without(*(f"{path}.{leaf}_proj.weight" for leaf in ("gate", "up"))).plus(
        {f"{path}.gate_up_proj.weight": both}
    )
    model, name = model_of(source), "decoder.layers.0.mlp.linear_fc1.weight"
    for rank in range(2):
        shard = to_megatron(model, source.tensors, Placement(rank, 2))[name]
        same_bits(shard, torch.cat([half.chunk(2)[rank] for half in halves]))
        equal(
            [(p.start, len(p.tensor)) for p in to_pieces(model, name, shard, Placement(rank, 2))],
            [(64 * rank, 64), (128 + 64 * rank, 64)],
        )
    equal([p.dim for p in to_pieces(model, name, both, Placement())], [None])


def test_fused_down_projections() -> None:
    """MLA's two as one parameter."""
    source = ranks.deepseek()
    parts = [source.tensors[f"model.layers.0.self_attn.{leaf}.weight"] for leaf in ("q_a_proj", "kv_a_proj_with_mqa")]
    name = "decoder.layers.0.self_attention.linear_qkv_down_proj.weight"
    pieces = to_pieces(model_of(source), name, torch.cat(parts), Placement(1, 2))
    for piece, part in zip(pieces, parts, strict=True):
        same_bits(piece.tensor, part)
        equal(piece.dim, None)


def test_a_down_projection_cut_by_rows() -> None:
    """Other layer specifications than Transformer Engine's cut it; the shape tells."""
    source = ranks.deepseek()
    whole = source.tensors["model.layers.0.self_attn.q_a_proj.weight"]
    (piece,) = to_pieces(
        model_of(source), "decoder.layers.0.self_attention.linear_q_down_proj.weight", whole[16:], Placement(1, 2)
    )
    equal((piece.dim, piece.start), (0, 16))


def test_padded_vocabulary() -> None:
    """90 rows, padded to 256 for two ranks: the second has padding alone, and a part of no rows."""
    source = ranks.moe()
    model = model_of(source)
    for rank, rows in ((0, 90), (1, 0)):
        shard = to_megatron(model, source.tensors, Placement(rank, 2))["output_layer.weight"]
        equal(tuple(shard.shape), (128, ranks.HIDDEN))
        (piece,) = to_pieces(model, "output_layer.weight", shard, Placement(rank, 2))
        equal((piece.dim, len(piece.tensor)), (0, rows))


def test_a_mimo_mtp_layer() -> None:
    """Named model.mtp_layers; its projection joins the hidden state and the token the other way round."""
    source = ranks.dense()
    projection = torch.arange(128.0 * 256).reshape(128, 256).bfloat16()
    extra = {f"model.mtp_layers.0.{name}_layernorm.weight": torch.ones(128) for name in ("token", "hidden", "final")}
    mlp = {f"model.mtp_layers.0.mlp.{leaf}_proj.weight": torch.ones(128, 128) for leaf in ("gate", "up", "down")}
    source = source.plus({**extra, **mlp, "model.mtp_layers.0.input_proj.weight": projection})
    model = model_of(source)
    ours = to_megatron(model, source.tensors, Placement(1, 2))["mtp.layers.0.eh_proj.weight"]
    same_bits(ours, torch.cat((projection[64:, 128:], projection[64:, :128]), 1))
    (piece,) = to_pieces(model, "mtp.layers.0.eh_proj.weight", ours, Placement(1, 2))
    same_bits(piece.tensor, projection[64:])
    equal((piece.name, piece.start), ("model.mtp_layers.0.input_proj.weight", 64))
    equal(
        model.parameter("mtp.layers.0.mtp_model_layer.mlp.linear_fc2.weight").hf,
        ("model.mtp_layers.0.mlp.down_proj.weight",),
    )


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("decoder.layers.0.self_attention.in_proj.weight", (1, 1), "does not know this Megatron parameter"),
        ("decoder.layers.9.mlp.linear_fc1.weight", (1, 1), "which the model does not have; is it another model's"),
        ("decoder.layers.0.mlp.linear_fc2.weight", (128, 128), None),
        ("decoder.layers.0.mlp.linear_fc2.weight", (64, 128), r"has shape \[64, 128\]; whole it is \[128, 128\]"),
        ("embedding.word_embeddings.weight", (32, 128), r"\[90, 128\]: check the placement"),
    ],
)
def test_parameters_that_do_not_fit(name: str, shape: tuple[int, int], message: str | None) -> None:
    model = model_of(ranks.dense())
    if message is None:
        equal([p.dim for p in to_pieces(model, name, torch.ones(shape), Placement(0, 2))], [None])  # gathered already
        return
    with pytest.raises(CheckpointError, match=message):
        to_pieces(model, name, torch.ones(shape), Placement(0, 2))


def test_attention_with_an_output_gate_is_refused() -> None:
    source = ranks.dense().configured(attn_output_gate=True)
    with pytest.raises(CheckpointError, match="output gate"):
        model_of(source)


FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
ENDS_COUNT = {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}


@pytest.mark.parametrize(
    ("layers", "sizes", "chunks"),
    [
        (8, {"pp_size": 4}, {(0, 0): range(2), (1, 0): range(2, 4), (3, 0): range(6, 8)}),
        (8, {"pp_size": 2, "vp_size": 2}, {(0, 0): range(2), (1, 0): range(2, 4), (0, 1): range(4, 6)}),
        # DeepSeek-V3 on 16 stages: 4 layers in each but the last, which has 1
        (61, {"pp_size": 16, LAST: 1}, {(0, 0): range(4), (14, 0): range(56, 60), (15, 0): range(60, 61)}),
        (10, {"pp_size": 3, FIRST: 2}, {(0, 0): range(2), (1, 0): range(2, 6), (2, 0): range(6, 10)}),
        (
            16,
            {"pp_size": 3, "vp_size": 2, FIRST: 4, LAST: 4},
            {(0, 0): range(2), (1, 0): range(2, 6), (2, 0): range(6, 8), (0, 1): range(8, 10), (2, 1): range(14, 16)},
        ),
        (
            14,
            {"pp_size": 4, "vp_size": 2, **ENDS_COUNT},
            {(0, 0): range(1), (1, 0): range(1, 3), (0, 1): range(7, 9), (3, 1): range(13, 14)},
        ),
    ],
)  # fmt: skip
def test_layers_of_a_rank(layers: int, sizes: dict[str, int], chunks: dict[tuple[int, int], range]) -> None:
    for (rank, stage), expected in chunks.items():
        equal(Placement(pp_rank=rank, **sizes).local_layers(layers, stage), expected)
    everything = [
        i
        for stage in range(sizes.get("vp_size", 1))
        for rank in range(sizes["pp_size"])
        for i in Placement(pp_rank=rank, **sizes).local_layers(layers, stage)
    ]
    equal(everything, list(range(layers)), "all layers, once, in order")


def test_layers_that_cannot_be_dealt_out() -> None:
    with pytest.raises(FormatError, match="61 layers cannot be dealt out evenly to 16 pipeline stages"):
        Placement(pp_size=16).local_layers(61)
    with pytest.raises(FormatError, match="ep_size=3: does not divide the 4 experts"):
        Placement(ep_size=3).local_experts(4)
    with pytest.raises(FormatError, match="tp_rank=2, tp_size=2"):
        Placement(2, 2)


@pytest.mark.parametrize(
    ("local", "stage", "name"),
    [
        ("module.module.decoder.layers.1.mlp.linear_fc2.weight", 1, "decoder.layers.7.mlp.linear_fc2.weight"),
        ("decoder.layers.0.mlp.experts.linear_fc1.weight1", 0, "decoder.layers.2.mlp.experts.linear_fc1.weight3"),
        (
            "decoder.layers.0.mlp.experts.local_experts.0.linear_fc2.weight",
            0,
            "decoder.layers.2.mlp.experts.local_experts.2.linear_fc2.weight",
        ),
        (
            "mtp.layers.0.mtp_model_layer.mlp.experts.linear_fc2.weight0",
            1,
            "mtp.layers.0.transformer_layer.mlp.experts.linear_fc2.weight2",
        ),
        ("module.output_layer.weight", 1, "output_layer.weight"),
    ],
)
def test_global_names(local: str, stage: int, name: str) -> None:
    """The second of two pipeline ranks with two chunks of two layers, the second of two expert-parallel ranks."""
    model = Model({}, layers=8, experts=4, query_groups=1, heads=1, head_dim=16, tied=False)
    equal(global_name(local, model, Placement(ep_rank=1, ep_size=2, pp_rank=1, pp_size=2, vp_size=2), stage), name)
