"""One policy, asked at every stage: what is quantized is the same in a conversion, a live export, parameter by
parameter as Megatron trainers hand them over, for a module's name, and in the checkpoint that a rollout reads."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from halfbyte import NVFP4, CheckpointError, Policy, names
from halfbyte.checkpoint.convert import convert
from halfbyte.checkpoint.manifest import read_manifest
from halfbyte.checkpoint.options import Options
from halfbyte.checkpoint.plan import make_plan
from halfbyte.checkpoint.shards import Checkpoint, read_json
from halfbyte.checkpoint.verify import open_quantized
from halfbyte.export import Exporter, Placement, quantize_params
from halfbyte.export.shards import to_megatron
from halfbyte.nn import convert as convert_modules
from halfbyte.recipe import TrainingRecipe

from ..check import equal, true
from ..checkpoint import models
from ..checkpoint.models import Model
from . import ranks

MODELS = {
    "dense": ranks.dense,
    "moe": ranks.moe,
    "deepseek": ranks.deepseek,
    "mixtral": models.mixtral,
    "mtp": lambda: models.with_mtp(models.dense()),
}
EVERYWHERE: list[dict[str, Any]] = [
    {},
    {"extra_high_precision_layers_hf": ["layers.0.self_attn"], "include_mtp": True},
    {"extra_high_precision_layers_hf": ["o_proj"]},
    {"extra_high_precision_layers_megatron": ["decoder.layers.0.self_attention"], "include_mtp": True},
    {"extra_high_precision_layers_megatron": ["module.module.decoder.layers.0.self_attention.linear_proj"]},
    {"only": "mlp"},
]
TWO_LAYERS: list[dict[str, Any]] = [
    {"num_layers_at_start_in_bf16": 1},
    {"num_layers_at_end_in_bf16": 1, "include_mtp": True},
    {"extra_high_precision_layers_megatron": ["decoder.layers.1."]},
]
ONE: list[tuple[str, dict[str, Any]]] = [
    ("moe", {"extra_high_precision_layers_megatron": ["mlp.shared_experts"]}),
    ("moe", {"extra_high_precision_layers_hf": ["shared_expert."]}),
    ("moe", {"only": "routed_experts"}),
    ("dense", {"extra_high_precision_layers_megatron": ["linear_fc2"]}),
    ("deepseek", {"include_mtp": True}),
    ("mtp", {"include_mtp": True}),
    ("deepseek", {"extra_high_precision_layers_megatron": ["shared_experts.linear_fc1"], "include_mtp": True}),
    ("deepseek", {"extra_high_precision_layers_hf": ["shared_experts"], "include_mtp": True}),
    ("deepseek", {"extra_high_precision_layers_megatron": ["mtp.layers.0.mtp_model_layer.mlp"], "include_mtp": True}),
    ("deepseek", {"extra_high_precision_layers_megatron": ["down_proj", "linear_kv_up_proj"]}),
    ("deepseek", {"extra_high_precision_layers_hf": ["layers.2"], "include_mtp": True}),
    ("mtp", {"extra_high_precision_layers_megatron": ["mtp.layers.0.transformer_layer.mlp"], "include_mtp": True}),
    ("mtp", {"extra_high_precision_layers_megatron": ["mtp.layers.0.transformer_layer.self"], "include_mtp": True}),
]
CASES = [
    *((name, policy) for name in MODELS for policy in EVERYWHERE),
    *((name, policy) for name in ("dense", "deepseek", "mtp") for policy in TWO_LAYERS),
    *ONE,
]


def quantized_by_name(model: Model, policy: Policy) -> set[str]:
    """The view of a trainer's `convert`: names of modules with a 2-D weight, and nothing else."""
    layers = model.config["num_hidden_layers"]
    linears = (name for name, t in model.tensors.items() if name.endswith(".weight") and t.dim() == 2)
    parsed = (names.parse(name, layers) for name in linears)
    return {name.module for name in parsed if policy.decide(name, layers).quantize}


def converted(model: Model, policy: Policy) -> set[str]:
    """What a trainer's `convert` makes of modules of these names."""
    root = nn.Module()
    for name, tensor in model.tensors.items():
        *path, leaf, parameter = name.split(".")
        if parameter != "weight" or tensor.dim() != 2 or leaf == "embed_tokens":
            continue
        at = root
        for part in path:
            if not hasattr(at, part):
                at.add_module(part, nn.Module())
            at = getattr(at, part)
        at.add_module(leaf, nn.Linear(*reversed(tensor.shape), bias=False, device="meta", dtype=torch.bfloat16))
    report = convert_modules(
        root, TrainingRecipe(None, NVFP4(), policy=policy), decoder_layers=model.config["num_hidden_layers"]
    )
    return {layer.name for layer in report.converted}


def modules_of(tensors: Any) -> set[str]:
    return {name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")}


@pytest.mark.parametrize(("name", "values"), CASES, ids=[f"{name}-{values}" for name, values in CASES])
def test_all_stages_agree(tmp_path: Path, name: str, values: dict[str, Any]) -> None:
    model, policy = MODELS[name](), Policy.from_json(values)
    source, out = model.save(tmp_path / "model"), tmp_path / "out"
    options = Options(policy=policy)
    by_name = quantized_by_name(model, policy)
    true(by_name, "nothing quantized: the test compares nothing")
    default = Policy(include_mtp="include_mtp" in values and len(values) > 1)
    true(not values or by_name != quantized_by_name(model, default), "as the default: the test compares too little")

    equal(converted(model, policy), by_name, "training, module by module")
    plan = make_plan(Checkpoint(source), options)
    equal({item.name.module for item in plan.quantized}, by_name, "conversion's plan")

    exporter = Exporter.like(source, options)
    parameters = to_megatron(exporter.model, model.tensors, Placement())
    live = exporter.export_all(parameters.items())
    equal(modules_of(live), by_name, "live export, from Megatron's parameters")

    convert(source, out, options)
    equal({parsed.module for parsed in open_quantized(out).quantized}, by_name, "what a rollout loads")
    manifest = read_manifest(out)
    equal(manifest[0].policy if manifest else None, policy, "the policy in the checkpoint")

    config = read_json(out / "config.json")["quantization_config"]
    args = SimpleNamespace(hf_checkpoint=str(out), num_layers=model.config["num_hidden_layers"])
    one_by_one = set()
    for parameter, tensor in parameters.items():
        held = exporter.model.parameter(parameter).hf
        if not {"q_a_proj", "kv_a_proj_with_mqa"}.isdisjoint(part.split(".")[-2] for part in held):
            one_by_one |= {part.removesuffix(".weight") for part in held} & by_name  # fused of two parameters: refused
            continue
        parts = [(part, model.tensors[part]) for part in held]
        one_by_one |= modules_of(dict(quantize_params(args, f"module.module.{parameter}", parts, config)))
        true(tensor.numel(), parameter)
    equal(one_by_one, by_name, "parameter by parameter")


@pytest.mark.parametrize("values", [{"extra_high_precision_layers_megatron": ["linear_fc2"]}, {"ignore": ["q_proj"]}])
def test_what_no_engine_can_load_is_refused_at_both_ends(tmp_path: Path, values: dict[str, Any]) -> None:
    """Half of the experts, or of what is fused."""
    model, options = ranks.moe(), Options(policy=Policy.from_json(values))
    source = model.save(tmp_path / "model")
    with pytest.raises(CheckpointError) as offline:
        make_plan(Checkpoint(source), options)
    with pytest.raises(CheckpointError) as live:
        Exporter.like(source, options)
    equal(str(live.value), str(offline.value))
