"""Mixed precision: every weight in its own format, in both layouts, from the plan to a model that runs."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte
from halfbyte import MXFP8, NVFP4, CheckpointError, Policy, quantize
from halfbyte.checkpoint.config import read_quantization
from halfbyte.checkpoint.convert import Report, convert
from halfbyte.checkpoint.dequantize import dequantize
from halfbyte.checkpoint.manifest import read_manifest
from halfbyte.checkpoint.options import Options
from halfbyte.checkpoint.plan import make_plan
from halfbyte.checkpoint.recompute import verify_source
from halfbyte.checkpoint.schema import LAYOUTS, Layout
from halfbyte.checkpoint.shards import Checkpoint
from halfbyte.checkpoint.verify import verify_structure
from halfbyte.formats import Format
from halfbyte.policy import FormatOverride
from halfbyte.report.console import plan_json, report_json

from ..check import equal, same_bits, true
from . import models
from .test_convert import group_amaxes
from .test_loading_back import import_quietly
from .test_verify import edit, edit_json

ATTENTION = (FormatOverride(MXFP8(), kinds=("attention",)),)
MODELS = {
    "dense": models.dense,
    "moe": lambda: models.moe(shared="shared_expert"),
    "mixtral": models.mixtral,
    "mla": models.mla,
}
LAYER = "model.layers.0"


def run(where: Path, model: models.Model, **options: Any) -> tuple[Path, Path, Report]:
    source = model.save(where / "source", 2)
    report = convert(source, where / "out", Options(**{"overrides": ATTENTION, **options}), max_shard_bytes=30_000)
    return source, where / "out", report


def findings(out: Path, source: Path | None = None) -> list[str]:
    return [str(finding) for finding in (*verify_structure(out), *(verify_source(out, source) if source else ()))]


def wanted(model: models.Model, name: str, fmt: Format) -> torch.Tensor:
    amax = {"amax": group_amaxes(model)[name.removesuffix(".weight")]} if isinstance(fmt, NVFP4) else {}
    return quantize(model.tensors[name], fmt, **amax).dequantize(torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", MODELS)
def test_every_weight_has_its_format(tmp_path: Path, layout: Layout, family: str) -> None:
    model = MODELS[family]()
    source, out, report = run(tmp_path, model, layout=layout)
    equal(findings(out, source), [])
    (out / "halfbyte.json").unlink()
    equal(findings(out, source), [])
    equal(report.unequal_fused_scales, 0)
    dequantize(out, tmp_path / "plain", dtype="float32")
    decoded = models.read_all(tmp_path / "plain")
    by_name = {weight.name: weight for weight in report.weights}
    equal({type(weight.format) for weight in report.weights}, {NVFP4, MXFP8})
    for name, weight in by_name.items():
        fmt: Format = MXFP8() if "attn" in name else NVFP4()
        equal(weight.format, fmt, name)
        same_bits(decoded[name], wanted(model, name, fmt), name)


def test_modelopt_config(tmp_path: Path) -> None:
    _, out, _ = run(tmp_path, models.moe(layers=1), kv_cache="fp8", activations="constant")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    beside = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    layers = {f"{LAYER}.self_attn.{leaf}_proj": {"quant_algo": "MXFP8", "group_size": 32} for leaf in "kqvo"}
    for expert in range(models.EXPERTS):
        for leaf in models.MLP_LEAVES:
            layers[f"{LAYER}.mlp.experts.{expert}.{leaf}"] = {"quant_algo": "NVFP4", "group_size": 16}
    ignore = ["lm_head", f"{LAYER}.mlp.gate"]
    algorithms = {"quant_algo": "MIXED_PRECISION", "group_size": 16, "quantized_layers": layers}
    equal(beside, {**algorithms, "kv_cache_quant_algo": "FP8", "exclude_modules": ignore})
    for key, value in {**algorithms, "ignore": ignore, "quant_method": "modelopt"}.items():
        equal(config[key], value, key)
    groups = config["config_groups"].values()
    equal([group["weights"]["num_bits"] for group in groups], [8, 4])
    equal([group["input_activations"]["dynamic"] for group in groups], [True, False])
    equal(sorted(name for group in groups for name in group["targets"]), sorted(layers))
    tensors = models.read_all(out)
    equal(tensors[f"{LAYER}.self_attn.q_proj.weight_scale"].dtype, torch.uint8)
    equal(sum(name.endswith("input_scale") for name in tensors), 3 * models.EXPERTS)


def test_weights_only_is_w4a16(tmp_path: Path) -> None:
    _, out, _ = run(tmp_path, models.dense())
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    equal({v["quant_algo"] for v in config["quantized_layers"].values()}, {"W4A16_NVFP4", "MXFP8"})
    equal(read_quantization({"quantization_config": config}, "here").activations, False)


@pytest.mark.parametrize("activations", ["none", "constant"])
def test_compressed_tensors_config(tmp_path: Path, activations: str) -> None:
    """As their library reads it: each Linear gets the scheme of its group."""
    _, out, _ = run(tmp_path, models.moe(layers=1), layout="compressed-tensors", activations=activations)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    equal(config["format"], "mixed-precision")
    library = import_quietly("compressed_tensors.quantization")
    match = import_quietly("compressed_tensors.utils.match").match_targets
    parsed = library.QuantizationConfig.model_validate(copy.deepcopy(config))
    schemes = list(parsed.config_groups.values())
    equal([scheme.format for scheme in schemes], ["mxfp8-quantized", "nvfp4-pack-quantized"])
    equal([scheme.input_activations is not None for scheme in schemes], [True, activations == "constant"])
    linear = torch.nn.Linear(1, 1)
    for name in models.moe(layers=1).tensors:
        module = name.removesuffix(".weight")
        found = [bool(match(module, linear, scheme.targets)) for scheme in schemes]
        equal(found, ["attn" in name and "norm" not in name, ".experts." in name], name)


def test_the_record(tmp_path: Path) -> None:
    overrides = (FormatOverride(MXFP8(), ("self_attn.o_proj", "layers.0")), FormatOverride(NVFP4(), (), ("mlp",)))
    recipe = {"name": "mine", "description": "x"}
    _, out, _ = run(tmp_path, models.dense(), overrides=overrides, recipe=recipe)
    manifest = read_manifest(out)
    true(manifest is not None and manifest[0] == Options(overrides=overrides), str(manifest))
    equal(manifest is not None and manifest[0].recipe, recipe)
    for broken in (3, [{}], [{"format": {"name": "mxfp8"}, "match": "a", "kinds": []}]):
        edit_json(out, "halfbyte.json", lambda data, broken=broken: data.update(overrides=broken))
        true(any("overrides" in finding for finding in findings(out)), str(broken))


def test_rules_of_one_kind_are_not_mixed_precision(tmp_path: Path) -> None:
    """Engines see NVFP4; the rules differ, and verify knows which is where."""
    overrides = (FormatOverride(NVFP4(scale_rule="four_over_six"), kinds=("mlp",)),)
    source, out, report = run(tmp_path, models.dense(), overrides=overrides)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    equal((config["quant_algo"], "quantized_layers" in config), ("W4A16_NVFP4", False))
    equal({weight.format.e4m3_max for weight in report.weights}, {256, 448})
    equal(findings(out, source), [])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([FormatOverride(MXFP8(), ("q_proj",))], "qkv_proj: engines fuse its parts under one format"),
        ([FormatOverride(NVFP4(e4m3_max=256), ("up_proj",))], "gate_up_proj: engines fuse its parts under one format"),
        ([FormatOverride(MXFP8(), ("down_proj",))], "mlp.experts would have experts in NVFP4 and in MXFP8"),
        ([FormatOverride(MXFP8(), ("experts.0",))], "mlp.experts would have experts in NVFP4 and in MXFP8"),
        ([FormatOverride(MXFP8(), ("o_prj",))], "override 0: o_prj selects no weight that is quantized"),
        (
            [*ATTENTION, FormatOverride(MXFP8(), ("lm_head",))],
            "override 1: lm_head selects no weight",
        ),
        ([FormatOverride(MXFP8(), kinds=("mlp",))], "override 0: mlp selects no weight that is quantized"),
        ([FormatOverride(NVFP4(scaling="row"), kinds=("mlp",))], "a checkpoint has one scale per tensor"),
    ],
)
def test_refused(tmp_path: Path, overrides: list[FormatOverride], message: str) -> None:
    with pytest.raises(CheckpointError) as error:
        run(tmp_path, models.moe(), overrides=tuple(overrides))
    true(message in str(error.value), f"{message!r} is not in {error.value}")
    true(not (tmp_path / "out").exists(), "something was written")


def test_only_mxfp8_has_no_activations_option() -> None:
    with pytest.raises(CheckpointError, match="leave activations out"):
        Options(MXFP8(), activations="constant", overrides=ATTENTION)
    Options(MXFP8(), activations="constant", overrides=(FormatOverride(NVFP4(), kinds=("experts",)),))


def test_columns_of_each_format(tmp_path: Path) -> None:
    """48 columns fit NVFP4's blocks of 16 but not MXFP8's of 32."""
    model = models.dense(bias=False)
    odd = {f"{LAYER}.mlp.down_proj.weight": torch.randn(64, 48).bfloat16()}
    odd |= {f"{LAYER}.mlp.{leaf}_proj.weight": torch.randn(48, 64).bfloat16() for leaf in ("gate", "up")}
    _, out, _ = run(tmp_path / "a", model.plus(odd))
    equal(findings(out), [])
    with pytest.raises(CheckpointError, match="must be divisible by 32"):
        run(tmp_path / "b", model.plus(odd), overrides=(FormatOverride(MXFP8(), kinds=("mlp",)),))


@pytest.mark.parametrize(
    ("layout", "engines"), [("modelopt", {"vLLM"}), ("compressed-tensors", {"vLLM", "transformers"})]
)
def test_engines(tmp_path: Path, layout: Layout, engines: set[str]) -> None:
    _, _, report = run(tmp_path, models.dense(), layout=layout)
    equal(set(report_json(report)["serve"]), engines | {"halfbyte"})


def test_plan(tmp_path: Path) -> None:
    source = models.moe().save(tmp_path / "source")
    options = Options(overrides=ATTENTION, policy=Policy(ignore=("layers.1.self_attn",)))
    tensors = plan_json(make_plan(Checkpoint(source), options), options)["tensors"]
    becomes = {row["tensor"]: row["becomes"] for row in tensors}
    equal(becomes[f"{LAYER}.self_attn.o_proj.weight"], "mxfp8")
    equal(becomes["model.layers.1.self_attn.o_proj.weight"], "bf16")
    equal(becomes["model.layers.1.mlp.experts.3.up_proj.weight"], "nvfp4")


def swapped(data: dict[str, Any]) -> None:
    """q_proj said to be what down_proj is, in ModelOpt's layout."""
    layers = data["quantized_layers"]
    layers[f"{LAYER}.self_attn.q_proj"] = layers[f"{LAYER}.mlp.down_proj"]


def dropped(data: dict[str, Any]) -> None:
    del data["quantized_layers"][f"{LAYER}.mlp.down_proj"]


def extra(data: dict[str, Any]) -> None:
    data["quantized_layers"]["lm_head"] = {"quant_algo": "MXFP8", "group_size": 32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swapped, f"{LAYER}.self_attn.q_proj.weight: is F8_E4M3 [64, 64]; should be U8"),
        (dropped, f"{LAYER}.mlp.down_proj is quantized, but none of its groups of formats have it"),
        (extra, "lm_head is in high precision, but a group of formats has it"),
        (lambda data: data.update(quantized_layers={}), "MIXED_PRECISION needs quantized_layers"),
        (lambda data: data.update(quantized_layers={"a": {"quant_algo": "FP8"}}), "layers.a: quant_algo 'FP8'"),
        (lambda data: data.update(ignore=[]), "lm_head is not quantized but missing from the ignore list"),
        (lambda data: data.update(group_size=32), "quantization_config.group_size is 32"),
    ],
)  # fmt: skip
def test_a_wrong_config_is_found(tmp_path: Path, change: Any, message: str) -> None:
    _, out, _ = run(tmp_path, models.dense())
    edit_json(out, "config.json", lambda config: change(config["quantization_config"]))
    found = findings(out)
    true(any(message in finding for finding in found), f"{message!r} is not in {found}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_changed_bytes_are_found(tmp_path: Path, layout: Layout) -> None:
    source, out, _ = run(tmp_path, models.dense(), layout=layout)
    (out / "halfbyte.json").unlink()
    for name in (f"{LAYER}.self_attn.q_proj.weight_scale", f"{LAYER}.mlp.up_proj.weight_scale"):
        edit(out, name, lambda t: (t.view(torch.uint8) ^ 1).view(t.dtype))
        true(any(finding.startswith(f"{name}: ") for finding in findings(out, source)), name)


def test_another_format_than_recorded(tmp_path: Path) -> None:
    source, out, _ = run(tmp_path, models.dense())
    edit_json(out, "halfbyte.json", lambda data: data["overrides"][0].update(kinds=["mlp"]))
    found = findings(out, source)
    true(f"{LAYER}.mlp.up_proj: is NVFP4, against the MXFP8 in halfbyte.json" in found, str(found))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activations", ["none", "constant"])
def test_load_runs_it(tmp_path: Path, layout: Layout, activations: str) -> None:
    """MXFP8 layers always quantize their inputs, NVFP4 ones only if asked."""
    _, out, _ = run(tmp_path, models.moe(), layout=layout, activations=activations)
    model = halfbyte.load(out, dtype=torch.float32)
    hooked = {name for name, module in model.named_modules() if module._forward_pre_hooks}
    equal(len(hooked), 8)
    true(all("self_attn" in name for name in hooked), str(hooked))
    experts = [module for name, module in model.named_modules() if name.endswith(".experts")]
    equal([hasattr(module, "halfbyte_inputs") for module in experts], [activations == "constant"] * 2)
    true(model(torch.arange(8)[None]).logits.isfinite().all(), "not finite")


@pytest.mark.slow
def test_experts_of_some_layers(tmp_path: Path) -> None:
    """The others' keep running as they were."""
    policy = Policy(ignore=("layers.0.mlp.experts",))
    _, out, _ = run(tmp_path, models.moe(), activations="constant", policy=policy)
    true(halfbyte.load(out)(torch.arange(8)[None]).logits.isfinite().all(), "not finite")


def test_transformers_runs_it(tmp_path: Path) -> None:
    """Their decoding of both formats in one model: the weights that we decode to."""
    _, out, _ = run(tmp_path, models.dense(), layout="compressed-tensors")
    auto = import_quietly("transformers").AutoModelForCausalLM
    model, info = auto.from_pretrained(out, dtype=torch.bfloat16, output_loading_info=True)
    equal({key: value for key, value in info.items() if value}, {})
    ours = halfbyte.load(out)
    same_bits(model(torch.arange(8)[None]).logits, ours(torch.arange(8)[None]).logits)
