"""Others' signatures: quantize_params as miles and slime call it, metadata, flattened buckets."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from halfbyte import CheckpointError, Policy, SyncError
from halfbyte.checkpoint.convert import convert
from halfbyte.checkpoint.options import Options
from halfbyte.checkpoint.schema import LAYOUTS
from halfbyte.checkpoint.shards import read_json
from halfbyte.export import Exporter, Model, broadcast, flatten, headers, metadata, quantize_params, unflatten
from halfbyte.formats import MXFP8
from halfbyte.recipe.load import load_recipe

from ..check import equal, same_bits
from ..checkpoint.models import Tensors, read_all
from . import ranks
from .links import links, together

FC1 = "module.module.decoder.layers.0.mlp.linear_fc1.weight"
GATE, UP = (f"model.layers.0.mlp.{leaf}_proj.weight" for leaf in ("gate", "up"))


def converted(tmp_path: Path, options: Options, model: Any = None) -> tuple[Path, dict[str, Any]]:
    source = (model or ranks.dense()).save(tmp_path / "model")
    convert(source, tmp_path / "out", options)
    return tmp_path / "out", read_json(tmp_path / "out" / "config.json")["quantization_config"]


def arguments(out: Path | None, layers: int = 2, **more: Any) -> SimpleNamespace:
    return SimpleNamespace(hf_checkpoint=str(out) if out else None, num_layers=layers, **more)


def parameters(tensors: Tensors, config: dict[str, Any]) -> Iterator[tuple[str, list[tuple[str, torch.Tensor]]]]:
    model = Model.of(config, {name: tuple(t.shape) for name, t in tensors.items()})
    for name, parameter in model.parameters().items():
        yield f"module.module.{name}", [(hf, tensors[hf]) for hf in parameter.hf]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("recipe", ["nvfp4-w4a16", "nvfp4-4over6", "mxfp8", "mixed-mxfp8-attention-nvfp4-experts"])
def test_parameter_by_parameter_equals_the_checkpoint(tmp_path: Path, recipe: str, layout: Any) -> None:
    model = ranks.moe()
    out, config = converted(tmp_path, load_recipe(recipe).options(layout), model)
    found: Tensors = {}
    for name, parts in parameters(model.tensors, model.config):
        found |= dict(quantize_params(arguments(out, 1), name, parts, config))
    wanted = read_all(out)
    equal(sorted(found), sorted(wanted))
    for name, tensor in wanted.items():
        same_bits(found[name], tensor, name)


def test_input_scales_of_ones(tmp_path: Path) -> None:
    out, config = converted(tmp_path, Options(activations="constant"))
    tensors = ranks.dense().tensors
    found = quantize_params(arguments(out), FC1, [(GATE, tensors[GATE]), (UP, tensors[UP])], config)
    parameters_ = ("weight", "weight_scale", "weight_scale_2", "input_scale")
    equal([name for name, _ in found], [f"{n[:-7]}.{part}" for n in (GATE, UP) for part in parameters_])
    wanted = read_all(out)
    for name, tensor in found:
        same_bits(tensor, wanted[name], name)


def test_without_a_config_nothing_happens() -> None:
    parts = [(UP, torch.ones(2, 2))]
    equal(quantize_params(arguments(None), FC1, parts, None)[0][0], UP)


def test_without_halfbyte_json_the_rule_is_the_standard_one(tmp_path: Path) -> None:
    out, config = converted(tmp_path, Options())
    (out / "halfbyte.json").unlink()
    tensors, wanted = ranks.dense().tensors, read_all(out)
    for name, parts in parameters(tensors, ranks.dense().config):
        for tensor, data in quantize_params(arguments(out), name, parts, config):
            same_bits(data, wanted[tensor], tensor)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((UP,), "up_proj came without gate_proj"),
        ((GATE,), "gate_proj came without up_proj"),
        ((GATE, GATE, UP), f"{GATE}: is there twice"),
        ((GATE, UP, UP), f"{UP}: is there twice"),
    ],
)
def test_lone_and_duplicate_halves(tmp_path: Path, parts: tuple[str, ...], message: str) -> None:
    out, config = converted(tmp_path, Options())
    tensors = ranks.dense().tensors
    with pytest.raises(CheckpointError, match=message):
        quantize_params(arguments(out), FC1, [(name, tensors[name]) for name in parts], config)


def test_an_mlp_without_gates(tmp_path: Path) -> None:
    """Only where the trainer says so."""
    model = ranks.dense().without(*(f"model.layers.{i}.mlp.gate_proj.weight" for i in range(2)))
    out, config = converted(tmp_path, Options(), model)
    found = quantize_params(arguments(out, swiglu=False), FC1, [(UP, model.tensors[UP])], config)
    same_bits(dict(found)[UP], read_all(out)[UP])


def test_fused_layers_of_two_parameters_are_refused(tmp_path: Path) -> None:
    """MLA's two down projections share a scale in NVFP4, and nothing in MXFP8."""
    model = ranks.deepseek()
    name, part = "decoder.layers.0.self_attention.linear_q_down_proj.weight", "model.layers.0.self_attn.q_a_proj.weight"
    out, config = converted(tmp_path, Options(), model)
    with pytest.raises(CheckpointError, match=r"q_a_proj came without kv_a_proj_with_mqa.*halfbyte\.export\.Exporter"):
        quantize_params(arguments(out), name, [(part, model.tensors[part])], config)
    model.save(tmp_path / "second" / "model")
    convert(tmp_path / "second" / "model", tmp_path / "mxfp8", Options(format=MXFP8()))
    config = read_json(tmp_path / "mxfp8" / "config.json")["quantization_config"]
    found = quantize_params(arguments(tmp_path / "mxfp8"), name, [(part, model.tensors[part])], config)
    same_bits(dict(found)[part], read_all(tmp_path / "mxfp8")[part])


@pytest.mark.parametrize(
    "flags",
    [
        {"extra_high_precision_layers_megatron": ["decoder.layers.0."]},
        {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 1},
        {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 0, "num_layers_at_end_in_bf16": 2},
    ],
)
def test_flags_that_contradict_the_config(tmp_path: Path, flags: dict[str, Any]) -> None:
    out, config = converted(tmp_path, Options())
    parts = [(name, ranks.dense().tensors[name]) for name in (GATE, UP)]
    with pytest.raises(CheckpointError, match="leaves it in high precision, but the engine's quantization_config does"):
        quantize_params(arguments(out, **flags), FC1, parts, config)


def test_flags_that_agree(tmp_path: Path) -> None:
    out, config = converted(tmp_path, Options(policy=Policy(num_layers_at_start_in_bf16=1)))
    parts = [(name, ranks.dense().tensors[name]) for name in (GATE, UP)]
    flags = {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 0}
    equal([name for name, _ in quantize_params(arguments(out, **flags), FC1, parts, config)], [GATE, UP])


def test_config_and_policy_of_two_checkpoints(tmp_path: Path) -> None:
    out, config = converted(tmp_path, Options())
    parts = [(name, ranks.dense().tensors[name]) for name in (GATE, UP)]
    changed = json.loads(json.dumps(config)) | {"ignore": [*config["ignore"], GATE[:-7], UP[:-7]]}
    with pytest.raises(CheckpointError, match=r"halfbyte\.json quantizes it \(decoder mlp\)"):
        quantize_params(arguments(out), FC1, parts, changed)


def test_configs_of_others() -> None:
    with pytest.raises(CheckpointError, match="quant_method 'fp8'"):
        quantize_params(arguments(None), FC1, [(UP, torch.ones(16, 16))], {"quant_method": "fp8", "ignore": []})


def test_metadata() -> None:
    tensors = [
        ("a", torch.zeros(2, 3, dtype=torch.uint8)),
        ("b", torch.zeros(4).to(torch.float8_e4m3fn)),
        ("c", torch.ones(())),
    ]
    equal(metadata(tensors), (["a", "b", "c"], ["uint8", "float8_e4m3fn", "float32"], [[2, 3], [4], []]))


def test_flattened_and_back() -> None:
    """Mixed dtypes at any place; what it gives is what SGLang's bucket has."""
    tensors = {
        "a": torch.arange(5, dtype=torch.uint8),
        "b": torch.tensor([1.5, -2.5, float("nan")]),
        "c": torch.tensor(3.0),
        "d": torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).bfloat16().T,
        "e": torch.zeros(0, 4),
    }
    flat, places = flatten(tensors.items())
    equal((flat.dtype, len(flat)), (torch.uint8, 5 + 12 + 4 + 12))
    equal(
        [(p.name, p.start_idx, p.end_idx, p.numel) for p in places[:3]],
        [("a", 0, 5, 5), ("b", 5, 17, 12), ("c", 17, 21, 4)],
    )
    found = unflatten(flat, places)
    for name, tensor in tensors.items():
        same_bits(found[name], tensor.contiguous(), name)
    with pytest.raises(CheckpointError, match="d: the bucket holds 11 of its bytes; it is truncated"):
        unflatten(flat[:-1], places)
    with pytest.raises(CheckpointError, match="or none at all"):
        flatten([])


def test_update_from_distributed() -> None:
    """An engine is told names, dtypes and shapes, and receives one tensor after the other; float8 over gloo too."""
    one = Exporter(ranks.dense().config, headers(ranks.dense().tensors.items()), bucket_bytes=40_000)
    pair = links()
    here, there = (link._control for link in pair)
    for bucket in one.export(ranks.dense().tensors.items()):
        announced = list(zip(*metadata(bucket.tensors.items()), strict=True))
        engine = [(name, torch.zeros(shape, dtype=getattr(torch, dtype))) for name, dtype, shape in announced]

        def receive(engine: Any = engine) -> None:
            for _, tensor in engine:
                there.broadcast(tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor, 0).wait()

        sent = bucket.tensors
        equal(together(lambda sent=sent: broadcast(sent.items(), here), receive), [None, None])
        for name, tensor in engine:
            same_bits(tensor, sent[name], name)


def test_a_group_that_fails() -> None:
    group = links(timeout=1.0)[1]._control
    with pytest.raises(SyncError, match="a broadcast to the engine failed"):
        broadcast([("a", torch.zeros(4))], group)
