"""The command line: help, exit codes, JSON, and that nothing is left behind."""

import json
import os
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from halfbyte import NVFP4, Policy, __version__, evaluate
from halfbyte.checkpoint import convert as converting
from halfbyte.checkpoint import hub, weights
from halfbyte.checkpoint.manifest import read_manifest
from halfbyte.checkpoint.options import Options
from halfbyte.checkpoint.shards import ShardWriter
from halfbyte.cli import app

from .check import equal, true
from .checkpoint import models

WIDE = {"COLUMNS": "250", "TERM": "dumb", "NO_COLOR": "1"}


def cli(*arguments: object) -> Result:
    return CliRunner(env=WIDE).invoke(app, [str(argument) for argument in arguments])


def succeeds(*arguments: object) -> str:
    done = cli(*arguments)
    equal(done.exit_code, 0, done.output + repr(done.exception))
    return done.stdout


def parsed(*arguments: object, code: int = 0) -> dict[str, Any]:
    done = cli(*arguments, "--json")
    equal(done.exit_code, code, done.output + repr(done.exception))
    return json.loads(done.stdout)


def has(text: str, *parts: str) -> None:
    for part in parts:
        true(part in text, f"{part!r} is not in:\n{text}")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return models.moe(shared="shared_expert").save(tmp_path / "source", 2)


@pytest.mark.parametrize(
    "command", ["convert", "calibrate", "recipes", "verify", "inspect", "diff", "dequantize", "demo"]
)
def test_help_has_examples(command: str) -> None:
    has(succeeds(command, "--help"), "Example", f"halfbyte {command}")


def test_names_stay_whole_in_a_pipe(source: Path) -> None:
    done = CliRunner(env={"COLUMNS": "40"}).invoke(app, ["convert", str(source), "out", "--dry-run"])
    has(done.stdout, "model.layers.1.mlp.shared_expert_gate.weight")
    true(all(line == line.rstrip() or "Plan:" in line for line in done.stdout.splitlines()), "no trailing spaces")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required: model, text"),
        (["no", "text"], "no/config.json: no such file"),
        (["source", "text"], "text: not UTF-8 text"),
        (["source", "no"], "No such file or directory: 'no'"),
        (["source", "source/config.json", "1", "all"], "choose from"),
    ],
)
def test_evaluate_refuses(
    tmp_path: Path, source: Path, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_bytes(b"\xff\xfe")
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(arguments)
    equal(stopped.value.code, 2)
    has(capsys.readouterr().err, said)


def test_help_names_every_option_of_convert() -> None:
    options = ["--format", "--layout", "--scale-rule", "--error", "--e4m3-max", "--only", "--ignore", "--kv-cache"]
    options += [f"--num-layers-at-{end}-in-bf16" for end in ("start", "end")]
    options += [f"--extra-high-precision-layers-{side}" for side in ("hf", "megatron")]
    options += ["--include-mtp", "--activations", "--device", "--dry-run", "--json", "--max-shard-gb", "--resume"]
    has(succeeds("convert", "--help"), *options)


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "halfbyte", "--version"], capture_output=True, text=True)
    equal((done.returncode, done.stdout, done.stderr), (0, f"halfbyte {__version__}\n", ""))


def test_convert(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    text = succeeds("convert", source, out, "--device", "cpu")
    has(text, "38 weights at 4.5", "12 fused groups under one tensor scale", "1 shard(s)", "modelopt layout", "E = 448")
    has(text, "experts gate_proj", "attention o_proj", "worst five tensors", f"vllm serve {out}", f"load('{out}')")
    has(text, "with impl='cpu'")
    equal(text.count(".weight "), 5)  # the worst five
    has(succeeds("verify", out, "--source", source), "every byte is what its source gives")
    has(succeeds("verify", out), "structure and digests (add --source to recompute)")
    has(succeeds("dequantize", out, tmp_path / "plain"), "in bfloat16")


@pytest.mark.parametrize(
    ("options", "engines"),
    [
        ((), {"vLLM"}),
        (("--activations", "constant"), {"vLLM", "SGLang", "TensorRT-LLM"}),
        (("--format", "mxfp8"), {"vLLM", "SGLang"}),
        (("--layout", "compressed-tensors"), {"vLLM", "SGLang"}),
        (("--layout", "compressed-tensors", "--ignore", "*.experts.*"), {"vLLM", "SGLang", "transformers"}),
    ],
)  # fmt: skip
def test_convert_names_the_engines_that_load_it(
    tmp_path: Path, source: Path, options: tuple[str, ...], engines: set[str]
) -> None:
    report = parsed("convert", source, tmp_path / "out", *options)
    equal(set(report["serve"]), engines | {"halfbyte"})
    true(report["impl"] in ("cpu", "triton"), "which implementation quantized")


def test_every_option_reaches_the_record(tmp_path: Path) -> None:
    source, out = models.with_mtp(models.dense(layers=6)).save(tmp_path / "source"), tmp_path / "out"
    rule = ("--scale-rule", "four_over_six", "--error", "mse", "--e4m3-max", "320", "--error-arithmetic", "fp16")
    layers = ("--num-layers-at-start-in-bf16", "1", "--num-layers-at-end-in-bf16", "2", "--include-mtp")
    extra = (
        "--extra-high-precision-layers-hf",
        "2.mlp.down",
        "--extra-high-precision-layers-megatron",
        "2.mlp.linear_fc1",
    )
    names = (
        "--only",
        "mlp",
        "--ignore",
        "layers.1.mlp.down_proj",
        "--ignore",
        "layers.3",
        "--include",
        "lm_head",
        *extra,
    )
    rest = ("--layout", "compressed-tensors", "--kv-cache", "fp8", "--activations", "constant")
    succeeds("convert", source, out, *rule, *layers, *names, *rest)
    fmt = NVFP4(scale_rule="four_over_six", error="mse", e4m3_max=320, error_arithmetic="fp16")
    ignore = ("layers.1.mlp.down_proj", "layers.3")
    policy = Policy("mlp", ignore, ("lm_head",), 1, 2, ("2.mlp.down",), ("2.mlp.linear_fc1",), include_mtp=True)
    manifest = read_manifest(out)
    true(manifest is not None, "a record is written")
    equal(manifest[0], Options(fmt, "compressed-tensors", policy, "fp8", "constant"))


def test_json(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    report = parsed("convert", source, out, "--scale-rule", "four_over_six", "--error", "mse", "--kv-cache", "fp8")
    equal(
        (report["format"]["scale_rule"], report["format"]["error"], report["format"]["e4m3_max"]),
        ("four_over_six", "mse", 256),
    )
    equal((report["weights_quantized"], report["fused_groups"], report["shards"]), (38, 12, 1))
    equal(report["output_bytes"], sum(t.nbytes for t in models.read_all(out).values()))
    errors = [row["relative_error"] for row in report["worst"]]
    equal((len(errors), errors), (5, sorted(errors, reverse=True)))
    true(errors[0] > max(report["relative_error_by_kind"].values()), "the worst are those with the largest errors")
    equal(parsed("verify", out, "--source", source), {"ok": True, "findings": []})
    (out / "chat_template.jinja").unlink()
    wanted = [{"where": "chat_template.jinja", "what": "is missing; the source has it"}]
    equal(parsed("verify", out, "--source", source, code=1), {"ok": False, "findings": wanted})
    equal(parsed("dequantize", out, tmp_path / "plain")["dtype"], "bfloat16")
    error = parsed("convert", source, out, code=2)["error"]
    equal(error, f"{out}: already exists; choose another output directory or remove it")


def test_dry_run_lists_everything_and_writes_nothing(tmp_path: Path, source: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    options = [
        "--extra-high-precision-layers-hf",
        "1.self_attn",
        "--extra-high-precision-layers-megatron",
        "layers.0.mlp.shared",
    ]
    options += ["--ignore", "layers.0.mlp.experts"]
    plan = parsed("convert", source, tmp_path / "out", *options, "--dry-run")
    tensors = {item["tensor"]: item for item in plan["tensors"]}
    equal(set(tensors), set(models.read_all(source)))
    reasons = {name: (item["becomes"], item["reason"]) for name, item in tensors.items()}
    l0, l1 = "model.layers.0", "model.layers.1"
    equal(reasons[f"{l1}.self_attn.q_proj.weight"], ("bf16", "--extra-high-precision-layers-hf 1.self_attn"))
    equal(
        reasons[f"{l0}.mlp.shared_expert.up_proj.weight"][1],
        "--extra-high-precision-layers-megatron layers.0.mlp.shared",
    )
    equal(reasons[f"{l0}.mlp.experts.3.up_proj.weight"], ("bf16", "--ignore layers.0.mlp.experts"))
    equal(reasons[f"{l1}.mlp.experts.3.up_proj.weight"], ("nvfp4", "decoder experts"))
    equal(reasons["lm_head.weight"], ("bf16", "lm_head"))
    text = succeeds("convert", source, tmp_path / "out", *options, "--dry-run")
    has(text, "Nothing was written.", *tensors, *{reason for _, reason in reasons.values()})
    equal(sorted(tmp_path.rglob("*")), before)


def test_constant_activations_come_with_a_warning(tmp_path: Path, source: Path) -> None:
    done = cli("convert", source, tmp_path / "out", "--activations", "constant", "--json")
    equal(done.exit_code, 0)
    has(done.stderr, "warning: input scale 1.0 everywhere", "static scale clip activations")
    json.loads(done.stdout)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "fp4"], "--format fp4: choose nvfp4 or mxfp8"),
        (["--layout", "awq"], "layout='awq': choose one of modelopt, compressed-tensors"),
        (["--scale-rule", "best"], "scale_rule='best': choose one of 'amax', 'four_over_six'"),
        (["--scale-rule", "four_over_six", "--error", "rmse"], "error='rmse': choose one of 'mae', 'mse'"),
        (["--error", "mse"], "scale_rule='amax' measures no error"),
        (["--e4m3-max", "300"], "--e4m3-max 300: choose one of 256, 288, 320, 448"),
        (["--format", "mxfp8", "--e4m3-max", "256"], "--e4m3-max: MXFP8 has one rule and nothing to choose"),
        (["--format", "mxfp8", "--activations", "constant"], "leave activations out"),
        (["--only", "moe"], "only='moe': choose one of 'all', 'mlp', 'experts', 'routed_experts'"),
        (["--kv-cache", "int8"], "kv_cache='int8': choose one of none, fp8"),
        (["--activations", "dynamic"], "activations='dynamic': choose one of none, constant"),
        (["--ignore", "layers.7"], "--ignore layers.7 matches no tensor; `--dry-run` without it lists their names"),
        (["--ignore", "*"], "nothing to quantize under these options"),
        (["--num-layers-at-end-in-bf16", "-1"], "must not be negative"),
        (["--max-shard-gb", "0"], "--max-shard-gb 0.0: must be positive"),
        (["--device", "tpu9"], "--device tpu9: not a device"),
        (["--ingore", "x"], "No such option: --ingore"),
        (["--e4m3-max", "many"], "Invalid value for '--e4m3-max'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(tmp_path: Path, source: Path, options: list[str], message: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = cli("convert", source, tmp_path / "out", *options)
    equal(done.exit_code, 2, done.output)
    has(done.stderr, message)
    equal((done.stdout, sorted(tmp_path.rglob("*"))), ("", before))


@pytest.mark.parametrize(
    "options", [("--max-shard-gb", "nan"), ("--max-shard-gb", "inf"), ("--device", "meta")], ids=" ".join
)
def test_strange_options(tmp_path: Path, source: Path, options: tuple[str, str]) -> None:
    done = cli("convert", source, tmp_path / "out", *options)
    equal(done.exit_code, 2, repr(done.exception))
    has(done.stderr, f"error: {options[0]} {options[1]}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["convert", "nowhere", "out"],
            "nowhere: no such directory (and no hub id, which looks like organisation/name)",
        ),
        (["convert", "source", "no/out"], "no such directory to put the output in; create it first"),
        (["convert", "source", "source"], "already exists"),
        (["verify", "nowhere"], "nowhere: no such directory"),
        (["verify", "source", "--source", "nowhere"], "nowhere: no such directory"),
        (["dequantize", "source", "out"], "config.json: no quantization_config; this is not a quantized checkpoint"),
        (["dequantize", "nowhere", "out"], "no such directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_places(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    done = cli(*arguments)
    equal(done.exit_code, 2, done.output)
    has(done.stderr, "error: ", message)
    equal(sorted(tmp_path.rglob("*")), before)


def test_verify_names_every_finding(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    succeeds("convert", source, out)
    name = "model.layers.1.mlp.shared_expert.up_proj.weight_scale"
    tensors = load_file(out / "model.safetensors")
    tensors[name].view(torch.uint8)[0, 0] ^= 1
    save_file(tensors, out / "model.safetensors")
    for arguments, count in ((("verify", out), 1), (("verify", out, "--source", source), 2)):
        done = cli(*arguments)
        equal(done.exit_code, 1, done.output)
        has(done.stdout, f"✗ {name}: ", f"{out}: {count} finding(s)")
    has(cli("verify", source).stdout, "no quantization_config")
    equal(cli("verify", source).exit_code, 1)


def test_verify_prints_findings_as_they_are(tmp_path: Path, source: Path) -> None:
    succeeds("convert", source, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.weight_scale_2"].fill_(torch.nan)
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    has(cli("verify", tmp_path / "out").stdout, "is [nan]; a scale is positive and finite")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_interrupted_half_way(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """What is finished stays, but is no model; --resume ends with the same bytes and does only the rest."""
    before, quantized, stop = sorted(tmp_path.iterdir()), [], []

    def fail(*arguments: Any) -> Any:
        quantized.append(arguments)
        if len(quantized) in stop:
            stop.clear()
            raise error
        return weights.quantize_groups(*arguments)

    monkeypatch.setattr(converting, "quantize_groups", fail)
    options = ("--max-shard-gb", "0.00002", "--device", "cpu")
    succeeds("convert", source, tmp_path / "whole", *options)
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    shutil.rmtree(tmp_path / "whole")
    every = len(quantized)
    quantized.clear()
    stop.append(21)
    done = cli("convert", source, tmp_path / "out", *options)
    true(done.exit_code not in (0, None), "a failure that looks like success")
    partial = tmp_path / "out.partial"
    has(done.stderr, f"stopped; what is finished is kept in {partial}. Go on with: halfbyte ", " --resume")
    equal((len(quantized), sorted(tmp_path.iterdir())), (21, sorted([*before, partial])))
    shards = sorted(path.name for path in (partial / "model").iterdir())
    true(shards and all(name.endswith(".safetensors") for name in shards), f"only finished shards: {shards}")
    has(
        cli("convert", source, tmp_path / "out", *options).stderr,
        f"{partial}: left by a job that was interrupted; go on",
    )
    quantized.clear()
    report = parsed("convert", source, tmp_path / "out", *options, "--resume")
    equal(report["shards_resumed"], len(shards))
    # Shards are finished behind the quantizer: how many of them there were by then is not told.
    true(0 < len(quantized) < every, f"{len(quantized)} of {every} groups were quantized again")
    equal({path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}, wanted)
    equal(sorted(tmp_path.iterdir()), sorted([*before, tmp_path / "out"]))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda s: None, ("--scale-rule", "search"), "format.scale_rule was 'amax', now is 'search'"),
        (lambda s: None, ("--max-shard-gb", "0.00003"), "max_shard_bytes was 20000, now is 30000"),
        (lambda s: None, ("--kv-cache", "fp8"), "kv_cache was 'none', now is 'fp8'"),
        (lambda s: os.utime(s / "config.json", (1, 1)), (), "source.config.json.modified was '2"),
        (lambda s: (s / "tokenizer.json").write_text("{}"), (), "source.tokenizer.json.bytes was 31, now is 2"),
        (lambda s: (s / "new.txt").write_text("{}"), (), "source.new.txt was None, now is {'bytes': 2, "),
        (lambda s: models.moe(layers=3).save(s.parent / "m", 2).rename(s), (), "source.model-00001-of-00002.safeten"),
    ],
)  # fmt: skip
def test_what_cannot_be_resumed(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, change: Any, options: tuple[str, ...], message: str
) -> None:
    """The difference is named, and nothing is touched."""

    def fail(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(converting, "quantize_groups", fail)
        cli("convert", source, tmp_path / "out", "--max-shard-gb", "0.00002")
    if "models" in message or "00001" in message:
        shutil.rmtree(source)
    change(source)
    before = sorted(tmp_path.rglob("*"))
    arguments = () if "--max-shard-gb" in options else ("--max-shard-gb", "0.00002")
    done = cli("convert", source, tmp_path / "out", *arguments, *options, "--resume")
    equal(done.exit_code, 2, done.output)
    has(done.stderr, f"error: {tmp_path / 'out.partial'}: cannot be resumed: ", message, "remove it to begin again")
    true("Go on with" not in done.stderr, done.stderr)
    equal(sorted(tmp_path.rglob("*")), before)


def test_resume_touches_nothing_of_others(tmp_path: Path, source: Path) -> None:
    """A directory that no conversion left, a calibration's store among them."""
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "calibration.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    done = cli("convert", source, tmp_path / "out", "--resume")
    equal(done.exit_code, 2, done.output)
    has(
        done.stderr, "out.partial: holds calibration.json, which no interrupted conversion leaves; remove the directory"
    )
    equal(sorted(tmp_path.rglob("*")), before)


def test_a_finished_shard_that_was_changed_is_written_again(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--max-shard-gb", "0.00002", "--device", "cpu")
    succeeds("convert", source, tmp_path / "whole", *options)
    with monkeypatch.context() as patch:
        patch.setattr(converting, "write_configs", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        true(cli("convert", source, tmp_path / "out", *options).exit_code == 130, "not interrupted")
    shard = sorted((tmp_path / "out.partial" / "model").glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    report = parsed("convert", source, tmp_path / "out", *options, "--resume")
    equal(report["shards_resumed"], report["shards"] - 1)
    for path in (tmp_path / "whole").iterdir():
        equal((tmp_path / "out" / path.name).read_bytes(), path.read_bytes(), path.name)


def test_full_disk(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: ShardWriter, name: str, tensor: torch.Tensor) -> str:
        raise OSError(28, "No space left on device", str(tmp_path / "out"))

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", fail)
        done = cli("convert", source, tmp_path / "out")
    partial = tmp_path / "out.partial"
    what = f"{tmp_path / 'out'}: No space left on device; what is finished is kept in {partial}: go on with --resume"
    equal(done.exit_code, 2)
    has(done.stderr, f"error: {what}", "Go on with: halfbyte ")
    equal(list((partial / "model").iterdir()), [])
    succeeds("convert", source, tmp_path / "out", "--resume")
    equal(sorted(tmp_path.iterdir()), [tmp_path / "out", source])


def test_hub_ids(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[str] = []

    def download(model: str, allow_patterns: list[str]) -> str:
        asked.append(model)
        true(not any("bin" in pattern or "pt" in pattern for pattern in allow_patterns), f"pickles: {allow_patterns}")
        wanted = ("model.safetensors", "config.json", "merges.txt", "tokenizer.model", *models.COMPANIONS)
        equal([name for name in wanted if not any(fnmatch(name, pattern) for pattern in allow_patterns)], [])
        if model != "somebody/model":
            raise OSError("not there\nand much more")
        return str(source)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    equal(hub.resolve("somebody/model"), source)
    succeeds("convert", "somebody/model", tmp_path / "out")
    done = cli("convert", "nobody/model", tmp_path / "out2")
    equal(done.exit_code, 2)
    has(done.stderr, "nobody/model: neither a directory here nor a model that can be fetched from the hub (not there)")
    equal(asked, ["somebody/model", "somebody/model", "nobody/model"])


def test_recipes() -> None:
    text = succeeds("recipes")
    has(
        text,
        "nvfp4-search",
        "mixed-mxfp8-attention-nvfp4-experts",
        "needs data",
        "NVFP4 1×16, four_over_six (mse), E = 256",
    )
    rows = parsed("recipes")["recipes"]
    equal({row["name"] for row in rows if not row["needs_data"]} >= {"mxfp8", "nvfp4-search", "nvfp4-w4a16"}, True)
    has(succeeds("recipes", "nvfp4-gptq"), "description:", "method: gptq")
    equal(parsed("recipes", "nvfp4-gptq")["algorithm"]["method"], "gptq")
    equal(parsed("recipes", "nvfp4-gpt", code=2)["error"], "recipe nvfp4-gpt: not found; did you mean nvfp4-gptq?")


def test_convert_by_recipe(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    report = parsed(
        "convert", source, out, "--recipe", "nvfp4-4over6", "--set", "kv_cache=fp8", "--set", "policy.only=mlp"
    )
    equal((report["recipe"], report["format"]["scale_rule"]), ("nvfp4-4over6", "four_over_six"))
    equal(json.loads((out / "halfbyte.json").read_text())["recipe"]["kv_cache"], "fp8")
    equal(parsed("verify", out, "--source", source), {"ok": True, "findings": []})
    mixed = "mixed-mxfp8-attention-nvfp4-experts"
    plan = parsed("convert", source, tmp_path / "b", "--recipe", mixed, "--layout", "compressed-tensors", "--dry-run")
    becomes = {
        row["becomes"] for row in plan["tensors"] if "self_attn" in row["tensor"] and "norm" not in row["tensor"]
    }
    equal((becomes, plan["layout"]), ({"mxfp8"}, "compressed-tensors"))


def test_convert_searches(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    text = succeeds("convert", source, out, "--scale-rule", "search", "--error", "mae", "--only", "routed_experts")
    has(text, "search (mae), E = 448", "weights searched 24 of 24, unequal fused scales 0")
    has(succeeds("verify", out, "--source", source), "every byte is what its source gives")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--recipe", "nvfp4"), "activations: calibrated needs calibration data: use `halfbyte calibrate"),
        (("--recipe", "nvfp4-gptq"), "algorithm.method: gptq needs calibration data"),
        (("--recipe", "nvfp4-serch"), "did you mean nvfp4-search?"),
        (("--recipe", "no/such.yaml"), "recipe no/such.yaml: no such file"),
        (("--recipe", "mxfp8", "--format", "mxfp8"), "--recipe mxfp8 and --format: the recipe says that"),
        (("--recipe", "mxfp8", "--scale-rule", "amax", "--only", "all"), "mxfp8 and --scale-rule, --only: the recipe"),
        (("--recipe", "mxfp8", "--ignore", "lm_head", "--kv-cache", "none"), "mxfp8 and --ignore, --kv-cache: "),
        (("--set", "kv_cache=fp8"), "--set kv_cache=fp8: changes a recipe's key; give --recipe as well"),
        (("--recipe", "mxfp8", "--set", "kvcache=fp8"), "kvcache: unknown key; did you mean kv_cache?"),
        (("--recipe", "nvfp4-w4a16", "--set", "policy.ignore=[layers]"), "nothing to quantize under these options"),
        (("--recipe", "mxfp8", "--layout", "gguf"), "layout='gguf': choose one of modelopt, compressed-tensors"),
        (("--scale-rule", "search", "--error", "hessian"), "error='hessian' needs calibration data"),
        (("--activations", "calibrated"), "activations='calibrated' needs calibration data"),
    ],
)  # fmt: skip
def test_bad_recipes(tmp_path: Path, source: Path, options: tuple[str, ...], message: str) -> None:
    done = cli("convert", source, tmp_path / "out", *options)
    equal(done.exit_code, 2, done.output)
    true(message in done.stderr.replace("\n", " "), f"{message!r} is not in {done.stderr!r}")
    true(not (tmp_path / "out").exists(), "something was written")


def test_verify_for_engines(tmp_path: Path) -> None:
    """1 if an engine that was asked for would not load it; foreign checkpoints are read by it alone."""
    source, out = models.dense(tied=True).save(tmp_path / "source"), tmp_path / "out"
    succeeds("convert", source, out)
    has(succeeds("verify", out, "--for", "vllm"), "vllm loads", "config.json: modelopt W4A16_NVFP4")
    found = parsed("verify", out, "--for", "all", "--tp", 4, code=1)
    equal({engine["engine"]: engine["outcome"] for engine in found["engines"]}["sglang"], "refuses")
    done = cli("verify", out, "--for", "vllm", "--tp", 4)
    equal(done.exit_code, 1, done.output)
    has(done.stdout, "vllm refuses", "24 each, not a multiple of 16", "source: vllm 0.33.0, layers/")
    has(succeeds("verify", out, "--for", "vllm", "--source", source), "every byte is what its source gives")
    for options, message in ((("--for", "tgi"), "no engine tgi"), (("--tp", 2), "together with --for")):
        error = parsed("verify", out, *options, code=2)["error"]
        has(error, message)
