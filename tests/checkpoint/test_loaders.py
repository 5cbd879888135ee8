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
from halfbyte.checkpoint.load_case import ENGINES
from halfbyte.checkpoint.load_values import marlin_flushed
from halfbyte.checkpoint.loader_rules import OUTCOMES, RULES, SCHEMES
from halfbyte.checkpoint.loaders import judge, parse_engines
from halfbyte.checkpoint.options import Options
from halfbyte.checkpoint.survey import survey
from halfbyte.errors import CheckpointError
from halfbyte.policy import FormatOverride

from ..check import equal, true
from .bad_checkpoints import BAD, CT, L0, SOURCES, W4A4, config, sidecar, tensors
from .test_loading_back import import_quietly


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
        ("moe", W4A4, "+++-"),
        ("moe", CT, "++-w"),
        ("moe", CT | {"format": MXFP8()}, "+---"),
        ("moe", {"overrides": (FormatOverride(MXFP8(), kinds=("attention",)),), **W4A4}, "+w+-"),
        ("tied", CT | {"overrides": (FormatOverride(MXFP8(), kinds=("attention",)),)}, "+--+"),
    ],
)
def test_what_halfbyte_writes(converted: Callable[..., Path], model: str, options: dict[str, Any], wanted: str) -> None:
    """As `serve_commands` promises; TensorRT-LLM reads some more, in recent releases."""
    equal(outcomes(converted(model, **options)), expect(*wanted))


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
