"""What engines would do: good checkpoints load; known-bad ones, as other tools have written, are caught and named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte import MXFP8
from halfbyte.checkpoint.convert import convert
from halfbyte.checkpoint.engines import serve_commands
from halfbyte.checkpoint.load_case import ENGINES
from halfbyte.checkpoint.load_values import marlin_flushed
from halfbyte.checkpoint.loader_rules import OUTCOMES, RULES, SCHEMES
from halfbyte.checkpoint.loaders import judge, parse_engines
from halfbyte.checkpoint.options import Options
from halfbyte.checkpoint.survey import survey
from halfbyte.errors import CheckpointError
from halfbyte.policy import FormatOverride, Policy

from ..check import equal, true
from . import models
from .bad_edits import (
    CT,
    EXPERT,
    L0,
    SOURCES,
    W4A4,
    Edit,
    config,
    ignoring,
    in_config,
    sidecar,
    tensors,
    times,
    without,
)
from .bad_names import BAD_NAMES
from .bad_values import BAD_VALUES
from .test_loading_back import import_quietly

BAD = BAD_NAMES | BAD_VALUES


def few_small_scales(found: models.Tensors) -> models.Tensors:
    name = f"{L0}.mlp.down_proj.weight_scale"
    scale = torch.full(found[name].shape, 448.0)
    scale[0, 0] = 2.0**-8
    return found | {name: scale.to(torch.float8_e4m3fn)}


SCALE_2 = f"{L0}.mlp.down_proj.weight_scale_2"


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
        ("tied", {}, "+++-"),
        ("tied", W4A4, "+++-"),
        ("tied", {"format": MXFP8()}, "+++w"),
        ("tied", CT, "++-+"),
        ("tied", W4A4 | CT | {"kv_cache": "fp8"}, "++-+"),
        ("tied", CT | {"format": MXFP8()}, "+--+"),
        ("dense", CT | {"policy": Policy(include=("lm_head",))}, "++-+"),
        ("moe", W4A4, "+++-"),
        ("moe", CT, "++-w"),
        ("moe", CT | {"format": MXFP8()}, "+---"),
        ("moe", {"overrides": (FormatOverride(MXFP8(), kinds=("attention",)),), **W4A4}, "+w+-"),
        ("tied", CT | {"overrides": (FormatOverride(MXFP8(), kinds=("attention",)),)}, "+--+"),
    ],
)
def test_what_halfbyte_writes(converted: Callable[..., Path], model: str, options: dict[str, Any], wanted: str) -> None:
    """`serve_commands` offers no engine that would not load it; some more would, in recent releases."""
    path = converted(model, **options)
    found = outcomes(path)
    equal(found, expect(*wanted))
    formats = {type(weight.format) for weight in survey(path).weights}
    offered = serve_commands(path, Options(**options), formats, model == "moe")
    for engine, outcome in found.items():
        true(engine not in {name.lower() for name in offered} or outcome == "loads", f"{engine} is offered")


@pytest.mark.parametrize(
    ("family", "options", "offered"), [("llama", {}, False), ("qwen3", {}, True), ("qwen3", CT, False)]
)
def test_who_is_offered_mxfp8(family: str, options: dict[str, Any], offered: bool) -> None:
    """SGLang's Llama drops its scales, and its compressed-tensors has no scheme for it."""
    commands = serve_commands(Path("out"), Options(format=MXFP8(), **options), {MXFP8}, False, family)
    equal("SGLang" in commands, offered)


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


HELD_AGAINST_TRANSFORMERS = (
    "crash leaves quantized shards under a BF16 config",
    "layers.1 also hits layers.10",
    "a scalar divisor",
    "half of a fused layer excluded by re:",
    "quantized, but excluded",
    "MXFP8, but excluded: its elements are cast without scales",
    "left in high precision under compressed-tensors",
    "left in high precision under MXFP8",
    "lm_head in high precision, and no list",
    "the same in transformers",
    "no divisor",
    "no divisor of activations",
    "an FP8 cache without its scales",
    "a divisor of activations that weight-only has no place for",
    "MXFP8 in SGLang's Llama",
    "MXFP8 in compressed-tensors, but excluded",
    "left in high precision under compressed-tensors' MXFP8",
    "FP8 passed through under compressed-tensors",
    "NVFP4 under an MXFP8 label",
    "the scale of keys alone in compressed-tensors",
)


@pytest.mark.parametrize(
    "name", ["good", "good lm_head", "good MXFP8 experts", "ModelOpt's NVFP4", *HELD_AGAINST_TRANSFORMERS]
)
def test_transformers_agrees(converted: Callable[..., Path], tmp_path: Path, name: str) -> None:
    """The same checkpoints in transformers itself: does it raise, or report what is missing or unexpected?"""
    auto = import_quietly("transformers").AutoModelForCausalLM
    good = {
        "good": ("tied", CT),
        "good lm_head": ("dense", CT | {"policy": Policy(include=("lm_head",))}),
        "good MXFP8 experts": ("moe", CT | {"format": MXFP8()}),
        "ModelOpt's NVFP4": ("tied", W4A4),
    }
    model, options, edit = (*good[name], lambda path: None) if name in good else BAD[name][:3]
    path = Path(shutil.copytree(converted(model, **options), tmp_path / "bad"))
    edit(path)
    try:
        _, info = auto.from_pretrained(path, output_loading_info=True)
    except Exception:
        found = "refuses"
    else:
        lost = [*info["missing_keys"], *(key for key in info["unexpected_keys"] if "input_global_scale" not in key)]
        found = "loads wrongly" if lost else "loads"
    equal(outcomes(path)["transformers"], found)


def test_transformers_loses_scales_of_experts(converted: Callable[..., Path]) -> None:
    """NVFP4 experts, of which it reports nothing; dense layers come out right."""
    auto = import_quietly("transformers").AutoModelForCausalLM
    torch.manual_seed(0)
    tokens = torch.randint(32, (1, 16))
    errors = []
    for model in ("tied", "moe"):
        path = converted(model, **CT)
        source = auto.from_pretrained(path.with_name(path.name.replace("out", "source")), dtype=torch.bfloat16)
        loaded = auto.from_pretrained(path, dtype=torch.bfloat16)
        with torch.no_grad():
            expected, found = source(tokens).logits.float(), loaded(tokens).logits.float()
        errors.append(float((found - expected).norm() / expected.norm()))
    true(errors[0] < 0.4 < 0.8 < errors[1], str(errors))


@pytest.mark.parametrize(
    ("model", "options", "edit", "says"),
    [
        ("moe", W4A4, without(f"{EXPERT}.down_proj.input_scale"), {"sglang": "takes 1.0 for it"}),
        ("moe", W4A4, ignoring("lm_head"), dict.fromkeys(("sglang", "tensorrt-llm"), "leaves routers alone")),
        ("moe", W4A4, in_config(hidden_size=96), {"vllm": "hidden_size 96 is no multiple of 64"}),
        (
            "tied",
            W4A4,
            tensors(lambda found: found | {SCALE_2: found[SCALE_2].bfloat16()}),
            dict.fromkeys(("vllm", "sglang", "tensorrt-llm"), "is BF16; engines cast it"),
        ),
        ("tied", {"format": MXFP8()}, lambda path: None, {"sglang": "Blackwell", "tensorrt-llm": "releases of 2026"}),
        (
            "tied",
            W4A4 | {"overrides": (FormatOverride(MXFP8(), kinds=("attention",)),)},
            tensors(lambda found: found | {f"{L0}.extra.weight": torch.zeros(32, 32, dtype=torch.float8_e4m3fn)}),
            dict.fromkeys(("vllm", "sglang", "tensorrt-llm"), "this cannot judge it"),
        ),
        (
            "tied",
            W4A4,
            times(f"{L0}.self_attn.q_proj.input_scale", 2.0),
            dict.fromkeys(("vllm", "sglang"), "factor of 2"),
        ),
        ("tied", W4A4, without(f"{L0}.mlp.down_proj.input_scale"), {"sglang": "quantizes activations"}),
        ("tied", W4A4, tensors(few_small_scales), dict.fromkeys(("vllm", "sglang", "tensorrt-llm"), "1 of 384")),
    ],
)
def test_cautions(
    converted: Callable[..., Path],
    tmp_path: Path,
    model: str,
    options: dict[str, Any],
    edit: Edit,
    says: dict[str, str],
) -> None:
    path = Path(shutil.copytree(converted(model, **options), tmp_path / "odd"))
    edit(path)
    for verdict in judge(survey(path)):
        if verdict.engine in says:
            found = [o.what for o in verdict.objections if o.outcome == "caution"]
            true(any(says[verdict.engine] in what for what in found), f"{verdict.engine}: {found}")


def test_marlin_rescales_first() -> None:
    """Only what no power of two brings into 2^-6 … 448 is lost; where nothing is rescaled, all below 2^-6."""
    counts = torch.zeros(256, dtype=torch.int64)
    counts[1] = 5  # 2^-9
    equal(marlin_flushed(counts), 0)
    equal(marlin_flushed(counts, rescales=False), 5)
    counts[0x36] = 7  # 0.875
    equal(marlin_flushed(counts), 0)
    counts[0x7E] = 1  # 448
    equal(marlin_flushed(counts), 5)
    counts[0] = 100  # zero stays zero
    equal(marlin_flushed(counts), 5)


def test_what_is_no_checkpoint_of_these(converted: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="declares nothing and has no weight in NVFP4 or MXFP8"):
        judge(survey(SOURCES["tied"]().save(tmp_path / "plain")))
    declared = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(CheckpointError, match="declares gptq"):
        judge(survey(SOURCES["tied"]().configured(quantization_config=declared).save(tmp_path / "gptq")))
    path = Path(shutil.copytree(converted("tied", **CT), tmp_path / "regex"))
    config(ignore=["re:("])(path)
    with pytest.raises(CheckpointError, match="is not a regular expression"):
        judge(survey(path))


@pytest.mark.parametrize(
    "value",
    [None, 1, "x", [], [1], {}, {"a": 1}, {"group_0": None}, {"group_0": {"targets": 1}}, float("nan"), -1, True],
)
def test_configs_of_any_shape(converted: Callable[..., Path], tmp_path: Path, value: Any) -> None:
    """Whatever a key holds: a verdict, or a CheckpointError."""
    for i, options in enumerate((CT, W4A4, {"format": MXFP8()})):
        path = Path(shutil.copytree(converted("tied", **options), tmp_path / str(i)))
        raw = json.loads((path / "config.json").read_text())
        for key in ("quant_method", "quant_algo", "ignore", "config_groups", "format", "quantization", "producer"):
            changed = {**raw, "quantization_config": {**raw["quantization_config"], key: value}}
            (path / "config.json").write_text(json.dumps(changed))
            try:
                true(len(judge(survey(path))) == len(ENGINES), key)
            except CheckpointError as error:
                true(str(error), key)
        for key in ("num_attention_heads", "num_key_value_heads", "num_experts", "text_config", "num_hidden_layers"):
            (path / "config.json").write_text(json.dumps({**raw, key: value}))
            true(len(judge(survey(path), tensor_parallel=2)) == len(ENGINES), key)


def test_the_tables() -> None:
    methods = {"", "modelopt", "compressed-tensors", "mxfp8"}
    for rule in RULES:
        for key, answer in rule.answers.items():
            engine, _, method = key.partition(" ")
            true(engine in ENGINES and method in methods, f"{rule.name}: {key}")
            true(answer.outcome in OUTCOMES and (answer.source or answer.outcome == "caution"), f"{rule.name}: {key}")
    for engines in SCHEMES.values():
        for engine, answer in engines.items():
            true(engine in ENGINES and answer.outcome in OUTCOMES and answer.source and answer.why, engine)
    equal(parse_engines("vllm, SGLang"), ("vllm", "sglang"))
    equal(parse_engines("all"), ENGINES)
    for text, message in (("vllm,tgi", "no engine tgi"), ("", "no engine named")):
        with pytest.raises(CheckpointError, match=message):
            parse_engines(text)
