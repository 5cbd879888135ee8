"""Whatever is wrong with a source: one clear error with file, tensor and remedy; exit code 2; nothing left."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from halfbyte import CheckpointError, Policy
from halfbyte.checkpoint.convert import convert
from halfbyte.checkpoint.plan import Options
from halfbyte.cli import app

from ..check import equal, true
from . import models
from .models import Draw, Model

Q = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.1.mlp.experts.2.up_proj.weight"
STACK = "model.layers.0.mlp.experts.gate_up_proj"
SHARD = "model-00002-of-00003.safetensors"


def refused(where: Path, source: Path, *parts: str) -> None:
    """By the library and by the command, with a message that has all these parts."""
    before = sorted(where.rglob("*"))
    with pytest.raises(CheckpointError) as caught:
        convert(source, where / "out", Options())
    done = CliRunner().invoke(app, ["convert", str(source), str(where / "out"), "--device", "cpu"])
    equal(done.exit_code, 2, done.output)
    equal(done.stderr.strip(), f"error: {caught.value}")
    for part in parts:
        true(part in str(caught.value), f"{part!r} is not in: {caught.value}")
    equal(sorted(where.rglob("*")), before)


def edit_index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(source: Path) -> None:
        index = json.loads((source / models.INDEX).read_text())
        change(index)
        (source / models.INDEX).write_text(json.dumps(index))

    return spoil


def point_to(file: str) -> Callable[[Path], None]:
    return edit_index(lambda index: index["weight_map"].update({Q: file}))


def truncate(source: Path) -> None:
    data = (source / SHARD).read_bytes()
    (source / SHARD).write_bytes(data[: len(data) - 100])


def pickled(source: Path) -> None:
    for path in source.glob("model*"):
        path.unlink()
    torch.save({}, source / "pytorch_model.bin")


def second_copy(source: Path) -> None:
    """up_proj once more, in a shard that the index does not name for it."""
    file = next(path for path in sorted(source.glob("*.safetensors")) if UP not in load_file(path))
    save_file(load_file(file) | {UP: Draw()(32, 64)}, file)


FILES: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "missing shard": (lambda s: (s / SHARD).unlink(), (SHARD, "shard is missing; download it again")),
    "truncated shard": (truncate, (SHARD, "damaged or truncated", "download it again")),
    "empty shard": (lambda s: (s / SHARD).write_bytes(b""), (SHARD, "damaged or truncated")),
    "not safetensors": (lambda s: (s / SHARD).write_bytes(b"\x80\x02}q\x00." * 99), (SHARD, "damaged or truncated")),
    "shard is a directory": (lambda s: ((s / SHARD).unlink(), (s / SHARD).mkdir()), (SHARD, "shard is missing")),
    "absent tensor": (
        edit_index(lambda index: index["weight_map"].update(ghost=SHARD)),
        (models.INDEX, "tensor ghost is not in", SHARD),
    ),
    "path to the parent": (point_to("../x.safetensors"), (models.INDEX, Q, "outside the directory")),
    "absolute path": (point_to("/etc/x.safetensors"), (models.INDEX, Q, "outside the directory")),
    "path with backslash": (point_to("..\\x.safetensors"), (models.INDEX, Q, "outside the directory")),
    "path into a folder": (point_to("a/x.safetensors"), (models.INDEX, Q, "outside the directory")),
    "path to a pickle": (point_to("x.bin"), (models.INDEX, Q, "not a safetensors file")),
    "no weight_map": (edit_index(lambda index: index.pop("weight_map")), (models.INDEX, "weight_map is missing")),
    "weight_map of numbers": (edit_index(lambda i: i["weight_map"].update(x=1)), (models.INDEX, "weight_map")),
    "index not JSON": (lambda s: (s / models.INDEX).write_text("{"), (models.INDEX, "not readable as JSON")),
    "no index": (lambda s: (s / models.INDEX).unlink(), ("3 safetensors files but no", models.INDEX, "download")),
    "tensor not in index": (
        edit_index(lambda index: index["weight_map"].pop(Q)),
        ("model-0000", f"holds tensor {Q}", "does not list here"),
    ),
    "tensor in two shards": (second_copy, ("model-0000", f"holds tensor {UP}", "does not list here")),
    "pickled weights": (pickled, ("pytorch_model.bin", "never loaded; save the model as safetensors first")),
    "no weights": (lambda s: [path.unlink() for path in s.glob("model*")], ("no safetensors file; expected",)),
    "no config": (lambda s: (s / "config.json").unlink(), ("config.json", "no such file; is", "Hugging Face")),
    "config not JSON": (lambda s: (s / "config.json").write_text("{'a': 1}"), ("config.json", "not readable as JSON")),
    "config not text": (lambda s: (s / "config.json").write_bytes(b"\xff\xfe\x00"), ("config.json", "not readable")),
    "config not an object": (lambda s: (s / "config.json").write_text("[]"), ("config.json", "found list")),
    "empty directory": (lambda s: [path.unlink() for path in s.iterdir()], ("config.json", "no such file")),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_files(tmp_path: Path, case: str) -> None:
    spoil, parts = FILES[case]
    source = models.moe().save(tmp_path / "source", 3)
    spoil(source)
    refused(tmp_path, source, *parts)


def changed(name: str, tensor: torch.Tensor, model: Model | None = None) -> Model:
    return (model or models.moe()).plus({name: tensor})


def poisoned(name: str, value: float, dtype: torch.dtype = torch.bfloat16) -> Model:
    tensor = models.moe().tensors[name].to(dtype)
    tensor.view(-1)[77] = value
    return changed(name, tensor)


def stacked(**config: Any) -> Model:
    return models.stack(models.moe()).configured(**config)


FILE = "model.safetensors: tensor "
MODELS: dict[str, tuple[Model, tuple[str, ...]]] = {
    "int8": (changed(Q, torch.zeros(64, 64, dtype=torch.int8)), (FILE + Q, "is I8; halfbyte quantizes BF16")),
    "float64": (changed(Q, torch.zeros(64, 64).double()), (FILE + Q, "is F64; halfbyte quantizes BF16, F16, F32")),
    "fp8": (changed(Q, torch.zeros(64, 64).to(torch.float8_e4m3fn)), (FILE + Q, "is F8_E4M3", "the high-precision")),
    "uint8 embedding": (
        changed("model.embed_tokens.weight", torch.zeros(64, 64, dtype=torch.uint8)),
        (FILE + "model.embed_tokens.weight", "is U8; halfbyte quantizes BF16"),
    ),
    "fp8 norm": (changed("model.norm.weight", torch.ones(64).to(torch.float8_e4m3fn)), (FILE, "norm.weight: is F8_")),
    "20 columns": (
        changed("model.layers.1.self_attn.o_proj.weight", Draw()(64, 20)),
        (FILE + "model.layers.1.self_attn.o_proj.weight", "[64, 20]", "divisible by 16", "--ignore model.layers.1."),
    ),
    "no rows": (changed(Q, torch.zeros(0, 64).bfloat16()), (FILE + Q, "shape [0, 64]")),
    "NaN": (poisoned(UP, float("nan")), (FILE + UP, "contains NaN or inf; repair the model, or exclude it")),
    "inf": (poisoned(UP, float("inf")), (FILE + UP, "contains NaN or inf")),
    "-inf": (poisoned(UP, float("-inf"), torch.float32), (FILE + UP, "contains NaN or inf")),
    "quantized by its config": (
        models.moe().configured(quantization_config={"quant_method": "fp8"}),
        ("config.json: the model is quantized already, it says, as FP8", "but no weight is stored so"),
    ),
    "quantized by its text config": (
        models.moe().configured(text_config={"quantization_config": {"quant_method": "gptq"}}),
        ("config.json", "quantized already (gptq)"),
    ),
    **{
        f"quantized by {leaf}": (
            changed(f"model.layers.0.self_attn.q_proj.{leaf}", torch.ones(4)),
            (FILE + f"model.layers.0.self_attn.q_proj.{leaf}", "belongs to a quantized checkpoint; convert the high"),
        )
        for leaf in ("weight_scale", "weight_scale_inv", "weight_packed", "qweight", "weight_zero_point")
    },
    "no num_hidden_layers": (models.moe().configured(num_hidden_layers=None), ("config.json: num_hidden_layers is",)),
    "no up": (models.moe().without(UP), (UP, "is missing, the other half of", "experts.2.gate_proj.weight")),
    "no gate": (
        models.moe().without(UP.replace("up", "gate")),
        (UP.replace("up", "gate"), "is missing, the other half of", "experts.2.up_proj.weight"),
    ),
    "no w3": (
        models.mixtral().without("model.layers.0.block_sparse_moe.experts.1.w3.weight"),
        ("experts.1.w3.weight is missing, the other half of", "experts.1.w1.weight"),
    ),
    "stacked and per expert": (
        models.stack(models.moe()).plus({UP: Draw()(32, 64)}),
        (UP, "is there twice, from", "experts.gate_up_proj", "remove one"),
    ),
    "gpt_oss": (stacked(model_type="gpt_oss"), (FILE, ".mlp.experts.", "how 'gpt_oss' stacks its experts is not")),
    "unknown family": (stacked(model_type="nobody"), (FILE, "how 'nobody' stacks its experts", "per-expert")),
    "transposed": (
        changed(STACK, Draw()(4, 64, 128), stacked()),
        (FILE + STACK, "shape [4, 64, 128], but by config.json each expert's is [64, 64]", "per-expert 2-D weights"),
    ),
    "down transposed": (
        changed(STACK.replace("gate_up", "down"), Draw()(4, 32, 64), stacked()),
        (FILE + STACK.replace("gate_up", "down"), "[4, 32, 64], but by config.json each expert's is [64, 32]"),
    ),
    "no sizes to check by": (stacked(hidden_size=None), (FILE, "config.json lacks hidden_size or")),
    "stacked biases": (
        changed(STACK + "_bias", Draw()(4, 64), stacked()),
        (FILE + STACK + "_bias", "unknown stacked weights of shape [4, 64]"),
    ),
    "another stack": (
        changed("model.layers.0.mlp.banks.weight", Draw()(4, 64, 64)),
        (FILE + "model.layers.0.mlp.banks.weight", "unknown stacked weights of shape [4, 64, 64]; split them into 2-D"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_models(tmp_path: Path, case: str) -> None:
    model, parts = MODELS[case]
    refused(tmp_path, model.save(tmp_path / "source"), *parts)


def test_output_exists(tmp_path: Path) -> None:
    source = models.dense().save(tmp_path / "source")
    (tmp_path / "out").mkdir()
    refused(tmp_path, source, f"{tmp_path / 'out'}: already exists; choose another output directory or remove it")


def test_our_own_output_is_quantized_already(tmp_path: Path) -> None:
    for layout in ("modelopt", "compressed-tensors"):
        convert(models.dense().save(tmp_path / layout / "m"), tmp_path / layout / "q", Options(layout=layout))
        refused(tmp_path, tmp_path / layout / "q", "config.json", "quantized already", layout)
        config = json.loads((tmp_path / layout / "q" / "config.json").read_text())
        del config["quantization_config"]
        (tmp_path / layout / "q" / "config.json").write_text(json.dumps(config))
        (tmp_path / layout / "q" / "hf_quant_config.json").unlink(missing_ok=True)
        refused(tmp_path, tmp_path / layout / "q", "model.safetensors", "belongs to a quantized checkpoint")
        shutil.rmtree(tmp_path / layout)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_low_precision_weights_are_no_source_even_where_ignored(tmp_path: Path, dtype: torch.dtype) -> None:
    """Without their scales they mean nothing, and an engine takes them for quantized ones."""
    source = changed(Q, torch.ones(64, 64).to(dtype)).save(tmp_path / "source")
    with pytest.raises(CheckpointError, match="convert the high-precision original"):
        convert(source, tmp_path / "out", Options(policy=Policy(only="experts")))
