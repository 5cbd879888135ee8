"""Every tensor, what becomes of it and why; and the requests that no engine could load, refused before any reading."""

import importlib.util
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte import CheckpointError, Policy
from halfbyte.checkpoint.plan import Options, Plan, make_plan
from halfbyte.checkpoint.schema import LAYOUTS, STACKED_EXPERTS, Layout
from halfbyte.checkpoint.shards import Checkpoint

from ..check import equal, true
from . import models
from .models import Draw, Model

L0 = "model.layers.0"


def plan(model: Model, directory: Path, **policy: Any) -> Plan:
    return make_plan(Checkpoint(model.save(directory / "m", 3)), Options(policy=Policy(**policy)))


def refuses(model: Model, directory: Path, message: str, **policy: Any) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)):
        plan(model, directory, **policy)


def kept(made: Plan) -> Counter[str]:
    return Counter(item.decision.reason for item in made if not item.decision.quantize)


def quantized(made: Plan) -> set[str]:
    return {item.name.module for item in made.quantized}


@pytest.mark.parametrize(
    ("model", "count", "reasons"),
    [
        (models.dense(), 14, {"bias": 6, "norm": 5, "embedding": 1, "lm_head": 1}),
        (models.dense(tied=True), 14, {"bias": 6, "norm": 5, "embedding": 1}),
        (models.moe(), 32, {"norm": 9, "router": 2, "embedding": 1, "lm_head": 1}),
        (models.moe(shared="shared_expert"), 38, {"norm": 9, "router": 4, "embedding": 1, "lm_head": 1}),
        (models.moe(shared="shared_experts"), 38, {"norm": 9, "router": 4, "embedding": 1, "lm_head": 1}),
        (models.stack(models.moe()), 32, {"norm": 9, "router": 2, "embedding": 1, "lm_head": 1}),
        (models.mixtral(), 16, {"norm": 3, "router": 1, "embedding": 1, "lm_head": 1}),
        (models.mla(), 16, {"norm": 9, "embedding": 1, "lm_head": 1}),
        (models.multimodal(), 14, {"norm": 5, "embedding": 2, "outside the decoder's layers": 16}),
    ],
    ids=["dense", "tied", "moe", "shared_expert", "shared_experts", "stacked", "mixtral", "mla", "multimodal"],
)
def test_every_tensor_has_a_reason(tmp_path: Path, model: Model, count: int, reasons: dict[str, int]) -> None:
    made = plan(model, tmp_path)
    equal((len(made.quantized), kept(made)), (count, Counter(reasons)))
    equal({item.source for item in made}, set(model.tensors))


def test_fused_groups(tmp_path: Path) -> None:
    """The members come together, in the natural order of the first; whatever file each of them is in."""
    model = models.dense(layers=11).plus(models.under("model.layers.3.self_attn", Draw().mla()))
    made = plan(model.without("model.layers.3.self_attn.q_proj.weight"), tmp_path)
    groups = {tuple(item.name.module.removeprefix("model.") for item in group) for group in made.groups}
    true(("layers.10.self_attn.k_proj", "layers.10.self_attn.q_proj", "layers.10.self_attn.v_proj") in groups, "qkv")
    true(("layers.10.mlp.gate_proj", "layers.10.mlp.up_proj") in groups, "gate and up")
    true(("layers.3.self_attn.kv_a_proj_with_mqa", "layers.3.self_attn.q_a_proj") in groups, "q_a and kv_a")
    true(("layers.10.mlp.down_proj",) in groups, "down alone")
    layers = [group[0].name.layer for group in made.groups if group[0].name.layer is not None]
    equal(layers, sorted(layers))


def test_bf16_tensors_are_alone(tmp_path: Path) -> None:
    made = plan(models.dense(), tmp_path, ignore=("layers.0",))
    equal({len(group) for group in made.groups if not group[0].decision.quantize}, {1})


def test_stacked_experts_are_taken_apart(tmp_path: Path) -> None:
    made = {item.name.full: item for item in plan(models.stack(models.moe()), tmp_path)}
    up = made[f"{L0}.mlp.experts.3.up_proj.weight"]
    equal((up.source, up.index, up.shape), (f"{L0}.mlp.experts.gate_up_proj", (3, slice(32, 64)), (32, 64)))
    gate = made[f"{L0}.mlp.experts.3.gate_proj.weight"]
    equal((gate.source, gate.index), (f"{L0}.mlp.experts.gate_up_proj", (3, slice(0, 32))))
    equal(set(made), set(models.moe().tensors))


@pytest.mark.parametrize("model", [models.mla(mtp_layers=1), models.with_mtp(models.dense())], ids=["index", "mtp."])
def test_mtp(tmp_path: Path, model: Model) -> None:
    default = plan(model, tmp_path / "a", num_layers_at_end_in_bf16=1)
    true(kept(default)["multi-token prediction layer"] >= 7, str(kept(default)))
    true(all(item.name.tower == "decoder" for item in default.quantized), "an MTP layer is quantized")
    equal({item.name.layer for item in default.quantized}, {0})  # MTP layers do not count as the last ones
    asked = plan(model, tmp_path / "b", include_mtp=True)
    true("MTP mlp" in {item.decision.reason for item in asked.quantized}, "--include-mtp has no effect")
    left = ("shared_head", "eh_proj", "mtp.fc")
    true(not any(name in module for module in quantized(asked) for name in left), "more than attention and MLP")
    glue = "mtp.fc" if "mtp.fc.weight" in model.tensors else "eh_proj"
    by_name = plan(model, tmp_path / "c", include_mtp=True, include=(glue,))
    equal(len(by_name.quantized), len(asked.quantized) + 1)


def test_policies_reach_the_plan(tmp_path: Path) -> None:
    moe = models.moe(layers=12, shared="shared_expert")
    only = plan(moe, tmp_path / "a", only="experts")
    equal({item.name.kind for item in only.quantized}, {"experts"})
    equal(kept(only)["--only experts"], 4 * 12)
    ignored = plan(moe, tmp_path / "b", ignore=("layers.1",))
    equal({item.name.layer for item in ignored.quantized}, {0, *range(2, 12)})
    true("model.layers.1.mlp.experts" in ignored.ignore, str(ignored.ignore))
    equal([pattern for pattern in ignored.ignore if ".layers.10.self_attn" in pattern], [])
    ends = plan(moe, tmp_path / "c", num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=2)
    equal({item.name.layer for item in ends.quantized}, set(range(1, 10)))


def test_asked_for_by_name(tmp_path: Path) -> None:
    head = plan(models.dense(), tmp_path / "a", include=("lm_head",))
    true("lm_head" in quantized(head) and "lm_head" not in head.ignore, str(head.ignore))
    tower = plan(models.multimodal(), tmp_path / "b", include=("vision_tower",))
    true("model.vision_tower.blocks.2.attn.qkv" in quantized(tower), "the vision tower was asked for")
    refuses(models.dense(tied=True).plus({"lm_head.weight": Draw()(64, 64)}), tmp_path, "tie", include=("lm_head",))


@pytest.mark.parametrize(
    ("model", "policy", "message"),
    [
        (models.dense(), {"ignore": ("k_proj",)}, "k_proj would stay in high precision (--ignore k_proj) but"),
        (models.dense(), {"ignore": ("*.0.mlp.gate_proj",)}, f"{L0}.mlp.gate_proj would stay in high precision"),
        (models.mla(), {"ignore": ("q_a_proj",)}, f"{L0}.self_attn.q_a_proj would stay in high precision"),
        (models.moe(), {"ignore": ("experts.2",)}, f"some experts of {L0}.mlp.experts would be quantized and some not"),
        (models.moe(), {"ignore": ("experts.*.down_proj", "*.down_proj")}, "matches no tensor"),
        (models.moe(), {"ignore": ("down_proj",)}, f"some experts of {L0}.mlp.experts would be quantized"),
        (models.dense(), {"ignore": ("layers.2",)}, "--ignore layers.2 matches no tensor; `--dry-run` without it"),
        (models.dense(), {"extra_high_precision_layers_hf": ("qproj",)}, "--extra-high-precision-layers-hf qproj"),
        (models.dense(), {"include": ("embed_tokens",)}, "embeddings, norms and convolutions cannot be included"),
        (models.dense(), {"include": ("*norm",)}, "--include *norm matches no tensor"),
        (models.dense(), {"only": "experts"}, "under these options: --only experts (14), lm_head (1)"),
        (models.dense(), {"num_layers_at_end_in_bf16": 2}, "under these options: among the last 2 layers (14), lm_h"),
    ],
    ids=lambda value: str(value)[:40] if not isinstance(value, Model) else "",
)  # fmt: skip
def test_refuses_what_no_engine_loads(tmp_path: Path, model: Model, policy: dict[str, Any], message: str) -> None:
    refuses(model, tmp_path, message, **policy)


@pytest.mark.parametrize("gone", [".3.", ".1.", ".2.down_proj"])
def test_every_expert_must_be_there(tmp_path: Path, gone: str) -> None:
    """Whole experts, the last one too, and single weights of one."""
    model = models.moe()
    lost = [name for name in model.tensors if f"{L0}.mlp.experts{gone}" in name]
    missing = lost[-1] if len(lost) == 1 else f"{L0}.mlp.experts{gone}down_proj.weight"
    refuses(model.without(*lost), tmp_path, f"{missing} is missing, though other experts of the layer have it")


def test_fused_parts_must_fit(tmp_path: Path) -> None:
    narrow = models.dense().plus({f"{L0}.mlp.up_proj.weight": Draw()(96, 32)})
    refuses(narrow, tmp_path / "a", "gate_up_proj: its parts do not fit together: gate_proj [96, 64], up_proj [96, 32]")
    both = models.dense().plus({f"{L0}.mlp.gate_up_proj.weight": Draw()(192, 64)})
    refuses(both, tmp_path / "b", f"{L0}.mlp.gate_up_proj.weight is there both fused and in parts; remove one")


def test_a_whole_fused_weight_on_disk_is_one_weight(tmp_path: Path) -> None:
    """Phi writes qkv_proj and gate_up_proj; there is nothing to share."""
    leaves = [f"{L0}.mlp.gate_proj.weight", f"{L0}.mlp.up_proj.weight"]
    model = models.dense(layers=1).without(*leaves).plus({f"{L0}.mlp.gate_up_proj.weight": Draw()(192, 64)})
    true(f"{L0}.mlp.gate_up_proj" in quantized(plan(model, tmp_path)), "left out")


def test_num_hidden_layers_of_the_language_model(tmp_path: Path) -> None:
    """A nested config's layers count, the vision tower's do not."""
    made = plan(models.multimodal(), tmp_path, num_layers_at_end_in_bf16=1)
    equal({item.name.layer for item in made.quantized}, {0})


def test_sources_in_other_floats(tmp_path: Path) -> None:
    for dtype, name in ((torch.float32, "F32"), (torch.float16, "F16")):
        made = plan(models.dense(dtype=dtype), tmp_path / name)
        equal({item.dtype for item in made.quantized}, {name})


LONE = [
    # A part of a fused layer whose partners the model does not have, left alone: engines ask by its own name then.
    (models.dense().without(*(f"model.layers.{i}.mlp.gate_proj.weight" for i in range(2))), "mlp"),  # a plain MLP
    (models.dense().without(*(f"{L0}.self_attn.{x}_proj.{p}" for x in "kv" for p in ("weight", "bias"))), "self_attn"),
    (models.mla().without(*(f"model.layers.{i}.self_attn.q_a_proj.weight" for i in range(2))), "self_attn"),
    (models.dense().plus({f"{L0}.self_attn.indexer.wk.weight": Draw()(32, 64)}), "self_attn"),
]


@pytest.mark.parametrize(("model", "ignored"), LONE, ids=["up_proj", "q_proj", "kv_a_proj", "indexer"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_lone_part_can_be_left_alone(tmp_path: Path, model: Model, ignored: str, layout: Layout) -> None:
    options = Options(layout=layout, policy=Policy(ignore=(ignored,)))
    made = make_plan(Checkpoint(model.save(tmp_path / "m")), options)
    true(not any(ignored in module for module in quantized(made)), str(quantized(made)))


TOWERS = {
    "EVA's gate, up and down": {"w1": (96, 64), "w2": (96, 64), "w3": (64, 96)},
    "w1 alone": {"w1": (96, 64), "w2": (64, 96)},
}


@pytest.mark.parametrize("tower", TOWERS)
def test_other_towers_may_use_names_their_own_way(tmp_path: Path, tower: str) -> None:
    """Nobody quantizes or fuses them."""
    extra = models.under("model.vision_tower.blocks.0.ffn", Draw().linears(**TOWERS[tower]))
    equal(len(plan(models.multimodal().plus(extra), tmp_path).quantized), 14)


def test_an_attention_may_have_a_gate_of_its_own(tmp_path: Path) -> None:
    """AFMoE's self_attn.gate_proj is no half of a gated MLP: it is quantized by itself, and is no MLP for --only."""
    gates = {f"model.layers.{i}.self_attn.gate_proj.weight": Draw()(64, 64) for i in range(2)}
    model = models.dense().plus(gates)
    made = plan(model, tmp_path / "a")
    true({(name,) for name in gates} <= {tuple(i.name.full for i in group) for group in made.groups}, "fused")
    equal(len(made.quantized), 16)
    true(not any("self_attn" in module for module in quantized(plan(model, tmp_path / "b", only="mlp"))), "an MLP")


@pytest.mark.parametrize("family", ["gpt2", "openai-gpt"])
def test_transposed_weights_are_refused(tmp_path: Path, family: str) -> None:
    """Conv1D's weights look like a Linear's, but are [K, N]."""
    attention = models.under("transformer.h.0.attn", Draw().linears(c_attn=(64, 192), c_proj=(64, 64)))
    model = Model(attention, {"model_type": family, "n_layer": 1})
    refuses(model, tmp_path, f"config.json: weights of {family} are transposed; convert")


def test_vectors_and_constants_of_many_dimensions_stay(tmp_path: Path) -> None:
    """They are no stacks of matrices."""
    shapes = {"A_log": (1, 1, 4, 1), "slope_rate": (4, 1, 1), "key_decay": (4, 16, 1), "diagonal_decay": (1, 4, 16, 16)}
    shapes["bias"] = (1, 1, 8, 8)  # a causal mask
    extra = {f"{L0}.self_attn.{leaf}": Draw()(*shape) for leaf, shape in shapes.items()}
    made = plan(models.dense().plus(extra), tmp_path)
    true(set(extra) <= {item.name.full for item in made}, "they are in the output")


def test_experts_in_one_matrix_are_refused(tmp_path: Path) -> None:
    """DBRX has all experts' rows in one 2-D parameter: left as it is, an engine would take it for quantized."""
    model = models.dense().plus({f"{L0}.ffn.experts.mlp.w1": Draw()(4 * 96, 64)})
    refuses(model, tmp_path, f"{L0}.ffn.experts.mlp.w1: unknown stacked weights of shape [384, 64]; split them into")


def test_families_whose_stacks_are_known() -> None:
    """By transformers' own code: gate rows first, not transposed, under the model_type of the language model."""
    found = importlib.util.find_spec("transformers")
    if found is None or found.origin is None:
        pytest.skip("needs transformers")
    root = Path(found.origin).parent / "models"
    for family in sorted(STACKED_EXPERTS):
        folder = root / family.removesuffix("_text")
        code = (folder / f"modeling_{folder.name}.py").read_text()
        for part in (
            "gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))",
            "down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))",
            "gate, up = nn.functional.linear(current_state, self.gate_up_proj[expert_idx]).chunk(2, dim=-1)",
        ):
            true(part in code, f"{family}: no {part}")
        config = (folder / f"configuration_{folder.name}.py").read_text()
        if f'model_type = "{folder.name}_text"' in config:
            true(f"{folder.name}_text" in STACKED_EXPERTS, f"{folder.name}_text is what its text config says")
