"""What engines would do: good checkpoints load; known-bad ones, as other tools have written, are caught and named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from halfbyte import MXFP8
from halfbyte.checkpoint.convert import convert
from halfbyte.checkpoint.load_case import ENGINES
from halfbyte.checkpoint.load_checks import marlin_flushed
from halfbyte.checkpoint.loaders import RULES, SCHEMES, judge, parse_engines
from halfbyte.checkpoint.options import Options
from halfbyte.checkpoint.survey import survey
from halfbyte.errors import CheckpointError
from halfbyte.policy import FormatOverride, Policy

from ..check import equal, true
from . import models
from .test_loading_back import import_quietly

L0 = "model.layers.0"
EXPERT = f"{L0}.mlp.experts.1"
Edit = Callable[[Path], None]
W4A4 = {"activations": "constant"}
CT = {"layout": "compressed-tensors"}
SOURCES = {
    "dense": lambda: models.dense(layers=11),
    "moe": models.moe,
    "tied": lambda: models.dense(layers=1, tied=True),
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(model, options) → a checkpoint, made once."""
    made: dict[str, Path] = {}
    root = tmp_path_factory.mktemp("made")

    def make(model: str, **options: Any) -> Path:
        key = repr((model, options))
        if key not in made:
            source = root / f"source{len(made)}"
            SOURCES[model]().save(source)
            made[key] = root / f"out{len(made)}"
            convert(source, made[key], Options(**options))
        return made[key]

    return make


def outcomes(path: Path, **options: Any) -> dict[str, str]:
    return {verdict.engine: verdict.outcome for verdict in judge(survey(path), **options)}


def expect(*engines: str) -> dict[str, str]:
    """Outcomes in the order of ENGINES: + loads, w loads wrongly, - refuses."""
    words = {"+": "loads", "w": "loads wrongly", "-": "refuses"}
    return dict(zip(ENGINES, (words[letter] for letter in engines), strict=True))


@pytest.mark.parametrize(
    ("model", "options", "wanted"),
    [
        ("tied", {}, "+-+-"),
        ("tied", W4A4, "+++-"),
        ("tied", {"format": MXFP8()}, "+++-"),
        ("tied", CT, "++-+"),
        ("tied", W4A4 | CT | {"kv_cache": "fp8"}, "++++"),
        ("tied", CT | {"format": MXFP8()}, "++-+"),
        ("moe", W4A4, "+++-"),
        ("moe", CT, "++-w"),
        ("moe", {"overrides": (FormatOverride(MXFP8(), kinds=("attention",)),), **W4A4}, "+-+-"),
    ],
)
def test_what_halfbyte_writes(converted: Callable[..., Path], model: str, options: dict[str, Any], wanted: str) -> None:
    """As `serve_commands` promises; TensorRT-LLM reads some more, in recent releases."""
    equal(outcomes(converted(model, **options)), expect(*wanted))


def config(**values: Any) -> Edit:
    """Change config.json's quantization_config; None removes a key."""

    def edit(path: Path) -> None:
        data = json.loads((path / "config.json").read_text())
        merged = {**data["quantization_config"], **values}
        data["quantization_config"] = {key: value for key, value in merged.items() if value is not None}
        (path / "config.json").write_text(json.dumps(data))

    return edit


def both(*edits: Edit) -> Edit:
    return lambda path: [edit(path) for edit in edits] and None


def sidecar(**values: Any) -> Edit:
    def edit(path: Path) -> None:
        data = json.loads((path / "hf_quant_config.json").read_text())
        merged = {**data["quantization"], **values}
        data["quantization"] = {key: value for key, value in merged.items() if value is not None}
        (path / "hf_quant_config.json").write_text(json.dumps(data))

    return edit


def without_declaration(path: Path) -> None:
    data = json.loads((path / "config.json").read_text())
    del data["quantization_config"]
    (path / "config.json").write_text(json.dumps(data))


def tensors(change: Callable[[models.Tensors], models.Tensors]) -> Edit:
    def edit(path: Path) -> None:
        found = {name: tensor.clone() for name, tensor in models.read_all(path).items()}
        for file in path.glob("*.safetensors*"):
            file.unlink()
        save_file(change(found), path / "model.safetensors", metadata={"format": "pt"})

    return edit


def times(name: str, factor: float) -> Edit:
    return tensors(lambda found: found | {name: found[name] * factor})


def without(*names: str) -> Edit:
    return tensors(lambda found: {name: tensor for name, tensor in found.items() if name not in names})


def stacked_bf16(found: models.Tensors) -> models.Tensors:
    """A converter that knows 2-D weights only leaves stacked experts as they are."""
    kept = {name: tensor for name, tensor in found.items() if ".experts." not in name}
    for layer in range(2):
        kept[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.zeros(4, 64, 64, dtype=torch.bfloat16)
    return kept


def fp8_blocks(found: models.Tensors) -> models.Tensors:
    """FP8 128×128 passed through, under the label that the rest deserves."""
    kept = {name: tensor for name, tensor in found.items() if not name.startswith(f"{L0}.self_attn.o_proj.")}
    kept[f"{L0}.self_attn.o_proj.weight"] = torch.zeros(64, 64, dtype=torch.float8_e4m3fn)
    return kept | {f"{L0}.self_attn.o_proj.weight_scale_inv": torch.ones(1, 1)}


def plain_expert(found: models.Tensors) -> models.Tensors:
    """One expert left in high precision."""
    kept = {name: tensor for name, tensor in found.items() if not name.startswith(f"{EXPERT}.")}
    shapes = {"gate_proj": (32, 64), "up_proj": (32, 64), "down_proj": (64, 32)}
    return kept | {
        f"{EXPERT}.{leaf}.weight": torch.zeros(shape, dtype=torch.bfloat16) for leaf, shape in shapes.items()
    }


def nan_scales(found: models.Tensors) -> models.Tensors:
    """An all-zero weight's block scales, 0/0."""
    name = f"{L0}.mlp.down_proj.weight_scale"
    return found | {name: torch.full_like(found[name].view(torch.uint8), 0x7F).view(torch.float8_e4m3fn)}


def spread_scales(found: models.Tensors) -> models.Tensors:
    """448 once, and 2^-8 everywhere else."""
    name = f"{L0}.mlp.down_proj.weight_scale"
    scale = torch.full(found[name].shape, 2.0**-8)
    scale[0, 0] = 448
    return found | {name: scale.to(torch.float8_e4m3fn)}


BAD: dict[str, tuple[str, dict[str, Any], Edit, str, str, dict[str, int]]] = {
    # what another tool did: (model, options, how to make it, outcomes, what is said, tensor parallelism)
    "crash leaves quantized shards under a BF16 config": (
        "tied",
        CT,
        without_declaration,
        "----",
        "no quantization is declared",
        {},
    ),
    "vLLM needs three keys of hf_quant_config.json": (
        "tied",
        W4A4,
        both(without_declaration, sidecar(kv_cache_quant_algo=None), lambda p: None),
        "-++-",
        "kv_cache_quant_algo is missing",
        {},
    ),
    "SGLang needs a group size": (
        "tied",
        W4A4,
        config(group_size=None, config_groups=None),
        "+-+-",
        "group_size is missing",
        {},
    ),
    "mlp.gate also hits gate_up_proj": (
        "tied",
        W4A4,
        config(ignore=["lm_head", f"{L0}.mlp.gate"]),
        "-++-",
        f"'{L0}.mlp.gate' in the ignore list also matches",
        {},
    ),
    "layers.1 also hits layers.10": (
        "dense",
        CT | {"policy": Policy(ignore=("layers.1",))},
        config(ignore=["lm_head", r"re:model\.layers\.1"]),
        "----",
        "also matches it",
        {},
    ),
    "a whole layer by a dotted part": (
        "dense",
        W4A4 | {"policy": Policy(ignore=("layers.1",))},
        config(ignore=["lm_head", "model.layers.1"]),
        "-++-",
        "'model.layers.1' in the ignore list also matches it",
        {},
    ),
    "routers missing from the ignore list": (
        "moe",
        W4A4,
        both(config(ignore=["lm_head"]), sidecar(exclude_modules=["lm_head"])),
        "----",
        "nothing in the ignore list names it",
        {},
    ),
    "mixed precision drops the ignore list": (
        "moe",
        W4A4 | {"overrides": (FormatOverride(MXFP8(), kinds=("attention",)),)},
        config(quantized_layers={}),
        "--+-",
        "MIXED_PRECISION needs quantized_layers",
        {},
    ),
    "one expert excluded": ("moe", W4A4, tensors(plain_expert), "----", "only some of its experts are quantized", {}),
    "stacked experts left in BF16 under an NVFP4 label": (
        "moe",
        W4A4,
        tensors(stacked_bf16),
        "----",
        "is in high precision, but nothing in the ignore list names it",
        {},
    ),
    "FP8 passed through under an NVFP4 label": (
        "tied",
        W4A4,
        tensors(fp8_blocks),
        "----",
        "neither NVFP4 nor MXFP8",
        {},
    ),
    "gate and up of an expert under two scales": (
        "moe",
        W4A4,
        times(f"{EXPERT}.gate_proj.weight_scale_2", 2.0),
        "ww--",
        "a factor of 2",
        {},
    ),
    "q and k with different input scales": (
        "tied",
        W4A4,
        times(f"{L0}.self_attn.q_proj.input_scale", 2.0),
        "++--",
        "input_scale",
        {},
    ),
    "an expert that no token reached has no input scale": (
        "moe",
        W4A4,
        without(f"{EXPERT}.down_proj.input_scale"),
        "ww--",
        "lacks down_proj.input_scale",
        {},
    ),
    "4-bit activations without input scales": (
        "tied",
        {},
        both(config(quant_algo="NVFP4"), sidecar(quant_algo="NVFP4")),
        "ww--",
        "quantizes activations",
        {},
    ),
    "NaN scale bytes of an all-zero weight": (
        "tied",
        W4A4,
        tensors(nan_scales),
        "www-",
        "384 of 384 block scales are NaN (0x7F)",
        {},
    ),
    "an input scale of infinity": (
        "tied",
        W4A4,
        times(f"{L0}.mlp.down_proj.input_scale", torch.inf),
        "www-",
        "is [inf]",
        {},
    ),
    "a scalar divisor": (
        "tied",
        CT,
        tensors(
            lambda found: {
                name: tensor.reshape(()) if name.endswith("weight_global_scale") else tensor
                for name, tensor in found.items()
            }
        ),
        "++--",
        "transformers fails on anything but [1]",
        {},
    ),
    "another layout's names": (
        "tied",
        W4A4,
        tensors(
            lambda found: {
                name.replace("weight_scale_2", "weight_global_scale"): tensor for name, tensor in found.items()
            }
        ),
        "----",
        "is missing",
        {},
    ),
    "scales beyond what Marlin holds": (
        "tied",
        W4A4,
        tensors(spread_scales),
        "ww+-",
        "383 of 384 block scales (99.7%) are lost",
        {},
    ),
    "K % 16 holds for the tensor, not for a shard": (
        "tied",
        W4A4,
        lambda path: None,
        "----",
        "24 each, not a multiple of 16",
        {"tensor_parallel": 4},
    ),
}


@pytest.mark.parametrize("name", list(BAD))
def test_known_bad(converted: Callable[..., Path], tmp_path: Path, name: str) -> None:
    model, options, edit, wanted, says, parallel = BAD[name]
    path = Path(shutil.copytree(converted(model, **options), tmp_path / "bad"))
    true(outcomes(path) != expect(*wanted), "it was as bad before")
    edit(path)
    verdicts = judge(survey(path), **parallel)
    equal({verdict.engine: verdict.outcome for verdict in verdicts}, expect(*wanted))
    said = [f"{objection.where} {objection.what}" for verdict in verdicts for objection in verdict.objections]
    true(any(says in sentence for sentence in said), f"{says!r} is not among\n" + "\n".join(said[:20]))
    true(all(objection.source for verdict in verdicts for objection in verdict.objections), "a rule without its source")
    json.dumps([verdict.to_json() for verdict in verdicts])


def test_the_files_may_disagree(converted: Callable[..., Path], tmp_path: Path) -> None:
    """TensorRT-LLM trusts hf_quant_config.json, the others config.json."""
    path = Path(shutil.copytree(converted("tied", **W4A4), tmp_path / "bad"))
    sidecar(exclude_modules=["lm_head", "*"])(path)
    equal(outcomes(path), expect(*"++--"))


def test_transformers_agrees(converted: Callable[..., Path], tmp_path: Path) -> None:
    """The same three checkpoints in transformers itself."""
    auto = import_quietly("transformers").AutoModelForCausalLM
    good = converted("tied", **CT)
    _, info = auto.from_pretrained(good, output_loading_info=True)
    equal({key: value for key, value in info.items() if value}, {})
    scalar = Path(shutil.copytree(good, tmp_path / "scalar"))
    BAD["a scalar divisor"][2](scalar)
    with pytest.raises(Exception):  # noqa: B017 - whatever it raises
        auto.from_pretrained(scalar)
    kept = Path(shutil.copytree(good, tmp_path / "kept"))
    name = f"{L0}.mlp.down_proj"
    parts = [f"{name}.{part}" for part in ("weight_packed", "weight_scale", "weight_global_scale")]
    plain = {f"{name}.weight": torch.zeros(64, 96, dtype=torch.bfloat16)}
    tensors(lambda found: {key: value for key, value in found.items() if key not in parts} | plain)(kept)
    _, info = auto.from_pretrained(kept, output_loading_info=True)
    true(any("weight_packed" in key for key in info["missing_keys"]), str(info))
    equal(outcomes(kept)["transformers"], "loads wrongly")


def test_marlin_rescales_first() -> None:
    """Only what no power of two brings into 2^-6 … 448 is lost."""
    counts = torch.zeros(256, dtype=torch.int64)
    counts[1] = 5  # 2^-9
    equal(marlin_flushed(counts), 0)
    counts[0x36] = 7  # 0.875
    equal(marlin_flushed(counts), 0)
    counts[0x7E] = 1  # 448
    equal(marlin_flushed(counts), 5)
    counts[0] = 100  # zero stays zero
    equal(marlin_flushed(counts), 5)


def test_the_tables() -> None:
    for rule in RULES:
        true(rule.outcomes and rule.source and set(rule.outcomes) <= set(ENGINES), rule.name)
    true(all(set(engines) <= set(ENGINES) for engines in SCHEMES.values()), "an unknown engine")
    equal(parse_engines("vllm, SGLang"), ("vllm", "sglang"))
    equal(parse_engines("all"), ENGINES)
    for text, message in (("vllm,tgi", "no engine tgi"), ("", "no engine named")):
        with pytest.raises(CheckpointError, match=message):
            parse_engines(text)
