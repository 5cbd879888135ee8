"""ModelOpt's recipes: those that ship with it, as we read them, and what we refuse in others."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml

from halfbyte import FormatError
from halfbyte.recipe import load_recipe, recipe_text

from .check import equal, true

SEARCH = {"format": "nvfp4", "scale_rule": "search", "error": "mse"}
NVFP4 = {"format": "nvfp4"}
W4A4 = {"weights": NVFP4, "activations": "calibrated"}
ROUTED, MLP = {"policy": {"only": "routed_experts"}}, {"policy": {"only": "mlp"}}
CAST, CALIBRATED = {"kv_cache": "fp8"}, {"kv_cache": "fp8_calibrated"}
MAPPED: dict[str, dict[str, Any]] = {
    "configs/ptq/presets/model/mamba_moe_nvfp4_aggressive": W4A4,
    "configs/ptq/presets/model/mamba_moe_nvfp4_conservative": W4A4,
    "configs/ptq/presets/model/mxfp8": {"weights": {"format": "mxfp8"}},
    "configs/ptq/presets/model/nvfp4": W4A4,
    "configs/ptq/presets/model/nvfp4_experts_only": W4A4 | ROUTED,
    "configs/ptq/presets/model/nvfp4_four_over_six": W4A4
    | {"weights": {"format": "nvfp4", "scale_rule": "four_over_six", "error": "mse"}},
    "configs/ptq/presets/model/nvfp4_mlp_only": W4A4 | MLP,
    "configs/ptq/presets/model/nvfp4_w4a4_weight_local_hessian": W4A4 | {"weights": SEARCH | {"error": "hessian"}},
    "configs/ptq/presets/model/nvfp4_w4a4_weight_mse_fp8_sweep": W4A4 | {"weights": SEARCH},
    "configs/ptq/presets/model/w4a16_nvfp4": {"weights": NVFP4},
    "general/ptq/nvfp4_default-kv_fp8": W4A4 | CALIBRATED,
    "general/ptq/nvfp4_default-kv_fp8_cast": W4A4 | CAST,
    "general/ptq/nvfp4_default-kv_none-gptq": W4A4 | {"algorithm": {"method": "gptq"}},
    "general/ptq/nvfp4_experts_only-kv_fp8": W4A4 | ROUTED | CALIBRATED,
    "general/ptq/nvfp4_experts_only-kv_fp8_cast": W4A4 | ROUTED | CAST,
    "general/ptq/nvfp4_experts_only-kv_fp8_layerwise": W4A4 | ROUTED | CALIBRATED,
    "general/ptq/nvfp4_experts_only-kv_fp8_layerwise_offload": W4A4 | ROUTED | CALIBRATED,
    "general/ptq/nvfp4_experts_only_input_scale1-kv_fp8_cast": W4A4 | ROUTED | CAST | {"activations": "constant"},
    "general/ptq/nvfp4_experts_only_mse-kv_fp8_cast": W4A4 | ROUTED | CAST | {"weights": SEARCH},
    "general/ptq/nvfp4_mlp_only-kv_fp8": W4A4 | MLP | CALIBRATED,
    "general/ptq/nvfp4_mlp_only-kv_fp8_cast": W4A4 | MLP | CAST,
    "general/ptq/nvfp4_mlp_only-novit-kv_fp8": W4A4 | MLP | CALIBRATED,
    "general/ptq/nvfp4_mlp_only_mse-kv_fp8_cast": W4A4 | MLP | CAST | {"weights": SEARCH},
    "general/ptq/nvfp4_weight_only-kv_fp16": {"weights": NVFP4},
    "general/ptq/nvfp4_weight_only-kv_fp8_cast": {"weights": NVFP4} | CAST,
    "general/qad/nvfp4_default-kv_fp8": W4A4 | CALIBRATED,
    "huggingface/diffusion_gemma/ptq/nvfp4_experts_only": W4A4 | ROUTED | CAST,
    "huggingface/nemotron_vl/ptq/nvfp4-kv_fp8_cast": W4A4 | CAST,
}
REFUSED = {
    "configs/ptq/presets/model/fp8": "cfg.num_bits e4m3, block_sizes None",
    "configs/ptq/presets/model/mxfp4": "cfg.num_bits e2m1, block_sizes {-1: 32, ",
    "configs/ptq/presets/model/nvfp4_awq_lite": "algorithm.method: awq_lite; halfbyte knows max",
    "configs/ptq/presets/model/nvfp4_fp8_mha": "quantizer_name: *[qkv]_bmm_quantizer",
    "configs/ptq/presets/model/nvfp4_mlp_weight_only": "block_sizes {-1: 32",
    "general/auto_quantize/nvfp4_fp8_at_5p4bits": "metadata.recipe_type: auto_quantize; halfbyte reads ptq",
    "general/ptq/nvfp4_act_headroom-kv_fp8_cast": "algorithm.method: nvfp4_act_headroom",
    "general/ptq/nvfp4_default-kv_nvfp4_cast": "*[kv]_bmm_quantizer: cfg.num_bits e2m1",
    "general/ptq/nvfp4_omlp_only-kv_fp8": "weight_quantizer of *o_proj*: halfbyte selects all, mlp or experts",
    "huggingface/minimax_m3_vl/ptq/mxfp8_nvfp4_experts": "algorithm.fp8_scale_sweep: False",
    "huggingface/qwen3_5/ptq/w4a16_nvfp4-fp8_attn-kv_fp8_cast": "*self_attn*weight_quantizer: cfg.num_bits e4m3",
}
OURS = """\
metadata: {recipe_type: ptq, description: mine}
quantize:
  algorithm: {method: mse, fp8_scale_sweep: true}
  quant_cfg:
  - {quantizer_name: '*', enable: false}
  - quantizer_name: '*weight_quantizer'
    cfg: &mx {num_bits: e4m3, block_sizes: {-1: 32, type: dynamic, scale_bits: e8m0}}
  - {quantizer_name: '*input_quantizer', cfg: *mx}
  - quantizer_name: '*.experts.*weight_quantizer'
    cfg: {num_bits: [2, 1], block_sizes: {-1: 16, type: static, scale_bits: [4, 3]}}
  - quantizer_name: '*.experts.*input_quantizer'
    cfg: {num_bits: e2m1, block_sizes: {-1: 16, type: dynamic, scale_bits: e4m3}, constant_amax: 2688.0}
  - {quantizer_name: '*[kv]_bmm_quantizer', cfg: {num_bits: e4m3, use_constant_amax: true}}
  - {quantizer_name: '*lm_head*', enable: false}
"""


@pytest.fixture(scope="module")
def library() -> Path:
    spec = importlib.util.find_spec("modelopt_recipes")
    true(spec is not None and spec.origin is not None, "nvidia-modelopt is not installed")
    return Path(str(spec and spec.origin)).parent


def written(directory: Path, text: str) -> str:
    (directory / "x.yaml").write_text(text)
    return str(directory / "x.yaml")


def refused(name: str) -> str:
    with pytest.raises(FormatError) as error:
        load_recipe(name)
    return str(error.value)


def mapped(name: str, *changes: str) -> dict[str, Any]:
    """Without the name, the description and what is left out wherever it occurs."""
    found = load_recipe(name, changes).to_json()
    policy = found.get("policy", {})
    policy.pop("ignore_if_present", None)
    return {key: value for key, value in found.items() if key not in ("name", "description") and value != {}}


@pytest.mark.parametrize("name", MAPPED)
def test_theirs(library: Path, name: str) -> None:
    path = str(library / f"{name}.yaml")
    equal(mapped(path), MAPPED[name])
    ignored = load_recipe(path).policy.ignore_if_present
    true({"*lm_head*", "*router*", "*vision_tower*"} <= set(ignored), str(ignored))


@pytest.mark.parametrize("name", REFUSED)
def test_theirs_refused_by_name(library: Path, name: str) -> None:
    found = refused(str(library / f"{name}.yaml"))
    true(REFUSED[name] in found, f"{REFUSED[name]!r} is not in {found!r}")


def test_all_of_theirs_are_mapped_or_refused_with_a_place(library: Path) -> None:
    recipes = [path for path in library.rglob("*.yaml") if "recipe_type: ptq" in path.read_text()]
    true(len(recipes) > 40, f"found {len(recipes)}")
    ok = set()
    for path in recipes:
        try:
            load_recipe(str(path))
            ok.add(str(path.relative_to(library).with_suffix("")))
        except FormatError as error:
            true(".yaml:" in str(error), f"{path}: {error}")
    equal(ok, {name for name in MAPPED if not name.startswith("configs")})


def test_mixed(tmp_path: Path) -> None:
    name = written(tmp_path, OURS)
    wanted = {
        "weights": {"format": "mxfp8"},
        "overrides": [{"weights": SEARCH, "match": ["*.experts.*"]}],
        "activations": "constant",
        "kv_cache": "fp8",
    }
    equal(mapped(name), wanted)
    equal(mapped(name, "kv_cache=none"), {key: value for key, value in wanted.items() if key != "kv_cache"})
    equal(yaml.safe_load(recipe_text(name))["policy"], {"ignore_if_present": ["*lm_head*"]})


def test_later_entries_win(tmp_path: Path) -> None:
    """The last of several that match a weight; one before '*' never does."""
    entry = "  - {quantizer_name: '*%s*weight_quantizer', cfg: *mx}\n"
    text = OURS.replace("  - {quantizer_name: '*[kv]", entry % "layers.0." + "  - {quantizer_name: '*[kv]")
    overrides = load_recipe(written(tmp_path, text)).overrides
    equal([override.match for override in overrides], [("*layers.0.*",), ("*.experts.*",)])


def test_what_every_module_has_comes_last(tmp_path: Path) -> None:
    """An entry for all makes those before it, for some, void; and a cache that is enabled may be disabled again."""
    lines = OURS.splitlines(keepends=True)
    cast = [line.replace("cfg: {num_bits: e4m3, use_constant_amax: true}", "enable: false") for line in lines[12:13]]
    found = mapped(written(tmp_path, "".join([*lines[:5], *lines[8:12], *lines[5:8], *lines[12:], *cast])))
    equal(found, {"weights": {"format": "mxfp8"}})
    everything = cast[0].replace("[kv]_bmm", "bmm")
    equal(mapped(written(tmp_path, OURS + everything)).get("kv_cache"), None)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("fp8_scale_sweep", "fp8_sweep", "x.yaml:3: algorithm.fp8_sweep: not supported by halfbyte"),
        ("mse, fp8_scale_sweep: true", "awq_clip", "x.yaml:3: algorithm.method: awq_clip"),
        ("use_constant_amax: true", "rotate: true", "x.yaml:13: *[kv]_bmm_quantizer: cfg.rotate: not supported"),
        ("constant_amax: 2688.0", "constant_amax: 448.0", "*.experts.*input_quantizer: cfg.constant_amax 448.0"),
        ("constant_amax: 2688.0", "pass_through_bwd: true", "cfg.pass_through_bwd: not supported by halfbyte"),
        ("'*input_quantizer', cfg", "'*output_quantizer', cfg", "x.yaml:8: quantizer_name: *output_quantizer; "),
        ("'*input_quantizer', cfg: *mx", "'*input_quantizer', enable: false", "mxfp8 weights; no engine has that"),
        ("'*lm_head*'", "'*router*'", "quantizes lm_head, which halfbyte leaves alone"),
        ("'*lm_head*', enable: false", "'*lm_head*', enable: true", "x.yaml:14: *lm_head*: cfg: None"),
        ("{quantizer_name: '*', enable: false}", "{quantizer_name: 'a', enable: false}", "must begin with"),
        ("{quantizer_name: '*', enable: false}", "{enable: false}", "x.yaml:5: quantizer_name: is missing"),
        ("{quantizer_name: '*', enable: false}", "{$import: a}", "$import: a is not among the imports: none"),
        ("metadata:", "imports: {a: nowhere/b}\nmetadata:", "x.yaml:1: imports.a: nowhere/b: no such file"),
        ("metadata:", "imports: {a: x}\nmetadata:", "imports itself"),
        ("metadata:", "export: {}\nmetadata:", "export: not supported by halfbyte"),
        ("type: static", "type: static, -2: 16", "*.experts.*weight_quantizer: cfg.num_bits [2, 1]"),
        ("recipe_type: ptq", "recipe_type: qat", "metadata.recipe_type: qat; halfbyte reads ptq"),
        ("'*lm_head*', enable", "'*lm_head*', parent_class: nn.Linear, enable", "parent_class: nn.Linear; halfbyte"),
        ("'*lm_head*', enable", "'*q_proj.weight_quantizer', enable", "halfbyte leaves out whole modules only"),
        ("'*lm_head*', enable", "'*k_bmm_quantizer', enable", "x.yaml:14: *k_bmm_quantizer: leaves a part of the KV"),
        ("'*lm_head*', enable", "'*self_attn*', enable", "x.yaml:14: *self_attn*: leaves a part of the KV cache out"),
        ("'*weight_quantizer'", "'*mlp*weight_quantizer'", "input_quantizer of *: its weights are not quantized"),
    ],
)  # fmt: skip
def test_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    true(old in OURS, f"{old!r} is not in the recipe")
    found = refused(written(tmp_path, OURS.replace(old, new, 1)))
    true(message in found, f"{message!r} is not in {found!r}")


def test_imports_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "units").mkdir()
    (tmp_path / "units" / "off.yaml").write_text("- {quantizer_name: '*lm_head*', enable: false}\n")
    text = OURS.replace("{quantizer_name: '*lm_head*', enable: false}", "{$import: off}")
    equal(mapped(written(tmp_path, "imports: {off: units/off}\n" + text))["kv_cache"], "fp8")
