"""Checkpoints as other tools have really written them: verify names what is wrong with each, without the source."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte import MXFP8, NVFP4, Policy
from halfbyte.policy import FormatOverride

from ..check import equal
from . import models
from .test_verify import edit, edit_json, make, named, structure

EXPERT = "model.layers.0.mlp.experts.1"
MODELOPT = {"layout": "modelopt"}
COMPRESSED = {"layout": "compressed-tensors"}
Change = Callable[[Path], Any]


def ignores(change: Callable[[list[str]], Any]) -> Change:
    """Both lists of what is not quantized."""

    def spoil(out: Path) -> None:
        edit_json(out, "config.json", lambda data: change(data["quantization_config"]["ignore"]))
        if (out / "hf_quant_config.json").exists():
            edit_json(out, "hf_quant_config.json", lambda data: change(data["quantization"]["exclude_modules"]))

    return spoil


def stacked_experts_left(out: Path) -> None:
    tensors = models.read_all(out)
    for path in out.glob("*.safetensors"):
        path.unlink()
    kept = {name: t for name, t in tensors.items() if ".layers.0.mlp.experts." not in name}
    original = models.stack(models.moe()).tensors
    kept |= {name: t for name, t in original.items() if ".layers.0.mlp.experts." in name}
    save_file(kept, out / "model.safetensors")
    (out / models.INDEX).unlink(missing_ok=True)


def fp8_under_another_name(out: Path) -> None:
    (file,) = [path for path in out.glob("*.safetensors") if f"{EXPERT}.down_proj.weight" in load_file(path)]
    tensors = load_file(file)
    for leaf in ("weight_scale", "weight_scale_2"):
        tensors.pop(f"{EXPERT}.down_proj.{leaf}", None)
    tensors[f"{EXPERT}.down_proj.weight"] = torch.ones(64, 32).to(torch.float8_e4m3fn)
    tensors[f"{EXPERT}.down_proj.weight_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, file)
    models.write_index(out)


def crashed(out: Path) -> None:
    """The source's config and index came first; then shards were overwritten one by one."""
    edit_json(out, "config.json", lambda data: data.pop("quantization_config"))


def crashed_later(out: Path) -> None:
    sorted(out.glob("*.safetensors"))[-1].unlink()


def swizzled(out: Path) -> None:
    edit(
        out, f"{EXPERT}.down_proj.weight_scale", lambda t: torch.nn.functional.pad(t.float(), (0, 2, 0, 64)).to(t.dtype)
    )


MIXED = {"overrides": (FormatOverride(MXFP8(), kinds=("attention",)),), "format": NVFP4()}
CASES: dict[str, tuple[dict[str, Any], Change, tuple[str, ...]]] = {
    "miles: stacked experts stay BF16, the config says NVFP4": (
        MODELOPT,
        stacked_experts_left,
        ("model.layers.0.mlp.experts.gate_up_proj", "high precision"),
    ),
    "miles: FP8 weights passed through under an NVFP4 label": (
        MODELOPT,
        fp8_under_another_name,
        (f"{EXPERT}.down_proj.weight", "is F8_E4M3", "should be U8"),
    ),
    "miles: one excluded expert excludes all in the config": (
        MODELOPT,
        ignores(lambda found: found.append("model.layers.0.mlp.experts")),
        ("config.json", "model.layers.0.mlp.experts is quantized but", "excludes it"),
    ),
    "miles: a crash leaves quantized shards under the source's config": (
        MODELOPT,
        crashed,
        ("no quantization_config",),
    ),
    "a crash leaves an index without its last shard": (MODELOPT, crashed_later, ("shard is missing",)),
    "ModelOpt: an all-zero weight's scales are NaN": (
        MODELOPT,
        lambda out: edit(
            out, f"{EXPERT}.up_proj.weight_scale", lambda t: t.view(torch.uint8).fill_(0x7F).view(t.dtype)
        ),
        (f"{EXPERT}.up_proj.weight_scale", "NaN (0x7F)"),
    ),
    "ModelOpt: mixed precision drops the ignore list": (
        MODELOPT | MIXED,
        ignores(lambda found: found.clear()),
        ("config.json", "lm_head is not quantized but missing from the ignore list"),
    ),
    "llm-compressor: gate and up of an expert have two scales": (
        COMPRESSED,
        lambda out: edit(out, f"{EXPERT}.up_proj.weight_global_scale", lambda t: t * 1.25),
        (f"{EXPERT}.gate_up_proj weight_global_scale", "one scale for the fused layer"),
    ),
    "a global scale of shape [] where transformers wants [1]": (
        COMPRESSED,
        lambda out: edit(out, f"{EXPERT}.down_proj.weight_global_scale", lambda t: t.reshape(())),
        ("weight_global_scale", "is F32 []; should be F32 [1]"),
    ),
    "an expert that no token reached has no input scale": (
        MODELOPT | {"activations": "constant"},
        lambda out: edit(out, f"{EXPERT}.down_proj.input_scale", lambda t: None),
        (f"{EXPERT}.down_proj.input_scale", "is missing"),
    ),
    "an input scale of zero amax": (
        MODELOPT | {"activations": "constant"},
        lambda out: edit(out, f"{EXPERT}.down_proj.input_scale", lambda t: t * 0),
        (f"{EXPERT}.down_proj.input_scale", "positive and finite"),
    ),
    "kv_cache_scheme without scales, which transformers reports missing": (
        COMPRESSED | {"kv_cache": "fp8"},
        lambda out: edit(out, "model.layers.1.self_attn.v_scale", lambda t: None),
        ("model.layers.1.self_attn.v_scale", "is missing"),
    ),
    "block scales stored swizzled and padded": (
        MODELOPT,
        swizzled,
        (f"{EXPERT}.down_proj.weight_scale", "is F8_E4M3 [128, 4]; should be F8_E4M3 [64, 2]"),
    ),
    "vLLM's substrings: mlp.gate also hits mlp.gate_up_proj": (
        MODELOPT | {"policy": Policy(), "model": "dense"},
        ignores(lambda found: found.append("model.layers.1.mlp.gate")),
        ("config.json", "model.layers.1.mlp.gate_up_proj is quantized but vLLM excludes it"),
    ),
    "hf_quant_config.json without exclude_modules, on which vLLM raises": (
        MODELOPT,
        lambda out: edit_json(out, "hf_quant_config.json", lambda data: data["quantization"].pop("exclude_modules")),
        ("hf_quant_config.json", "exclude_modules"),
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], Path]:
    """A sound checkpoint for these options; each is made once."""
    known: dict[str, Path] = {}

    def find(options: dict[str, Any]) -> Path:
        options = dict(options)
        if str(options) not in known:
            key = str(options)
            model = models.dense() if options.pop("model", "") == "dense" else models.moe()
            _, known[key] = make(tmp_path_factory.mktemp("made"), model, **options)
            equal(structure(known[key]), [])
            return known[key]
        return known[str(options)]

    return find


@pytest.mark.parametrize("case", CASES)
def test_known_failures(tmp_path: Path, made: Callable[[dict[str, Any]], Path], case: str) -> None:
    options, spoil, parts = CASES[case]
    out = shutil.copytree(made(options), tmp_path / "out")
    (out / "halfbyte.json").unlink()  # those tools write none
    spoil(out)
    named(structure(out), *parts)
