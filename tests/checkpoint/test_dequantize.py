"""Back to high precision: the decoded values under the original names, in an ordinary checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte import MXFP8, NVFP4, CheckpointError, quantize
from halfbyte.checkpoint.convert import convert
from halfbyte.checkpoint.dequantize import dequantize
from halfbyte.checkpoint.plan import Options
from halfbyte.checkpoint.schema import LAYOUTS, Layout
from halfbyte.formats import Format

from ..check import close, equal, same_bits, true
from . import models
from .test_convert import group_amaxes

MODELS = {
    "dense": (models.dense(), 14),
    "moe": (models.moe(shared="shared_expert"), 38),
    "mixtral": (models.mixtral(), 16),
    "mla": (models.mla(mtp_layers=1), 16),
}


def make(model: models.Model, where: Path, **options: Any) -> Path:
    convert(model.save(where / "source", 2), where / "quantized", Options(**options))
    return where / "quantized"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fmt", [NVFP4(), NVFP4(scale_rule="four_over_six"), MXFP8()], ids=["amax", "4over6", "mxfp8"])
@pytest.mark.parametrize("name", MODELS)
def test_values(tmp_path: Path, name: str, layout: Layout, fmt: Format) -> None:
    """Equal to QuantizedTensor.dequantize of the source, S_dec included; the rest is the source's, bit for bit."""
    model, count = MODELS[name]
    out = make(model, tmp_path, layout=layout, format=fmt, kv_cache="fp8")
    written = dequantize(out, tmp_path / "plain")
    found = models.read_all(tmp_path / "plain")
    equal(set(found), set(model.tensors))
    equal(written, sum(t.nbytes for t in found.values()))
    amaxes, changed = group_amaxes(model), 0
    for tensor, original in model.tensors.items():
        if torch.equal(found[tensor], original):
            continue
        changed += 1
        amax = {"amax": amaxes[tensor.removesuffix(".weight")]} if isinstance(fmt, NVFP4) else {}
        same_bits(found[tensor], quantize(original, fmt, **amax).dequantize(torch.bfloat16), tensor)
    equal(changed, count)


def test_an_ordinary_checkpoint(tmp_path: Path) -> None:
    model = models.moe()
    out = make(model, tmp_path, activations="constant", kv_cache="fp8")
    done: list[int] = []
    dequantize(out, tmp_path / "plain", max_shard_bytes=50_000, progress=done.append)
    equal(json.loads((tmp_path / "plain" / "config.json").read_text()), model.config)
    files = {path.name for path in (tmp_path / "plain").iterdir()}
    shards = {name for name in files if name.endswith(".safetensors")}
    equal(files - shards, {"config.json", models.INDEX, *models.COMPANIONS})
    true(len(shards) > 2, str(shards))
    index = json.loads((tmp_path / "plain" / models.INDEX).read_text())
    equal((set(index["weight_map"]), set(index["weight_map"].values())), (set(model.tensors), shards))
    equal(index["metadata"]["total_size"], sum(t.nbytes for t in model.tensors.values()))
    equal(sum(done), index["metadata"]["total_size"])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_dtypes(tmp_path: Path, dtype: str) -> None:
    model = models.dense(layers=1)
    dequantize(make(model, tmp_path), tmp_path / "plain", dtype=dtype)
    found = models.read_all(tmp_path / "plain")
    name = "model.layers.0.mlp.down_proj.weight"
    wanted = quantize(model.tensors[name], NVFP4()).dequantize(getattr(torch, dtype))
    same_bits(found[name], wanted)
    equal(found["model.norm.weight"].dtype, torch.bfloat16)  # not quantized, so left as it was
    equal(json.loads((tmp_path / "plain" / "config.json").read_text())["dtype"], dtype)  # or loaders would round again


def test_the_dtype_of_nested_configs(tmp_path: Path) -> None:
    dequantize(make(models.multimodal(), tmp_path), tmp_path / "plain", dtype="float16")
    equal(json.loads((tmp_path / "plain" / "config.json").read_text())["text_config"]["dtype"], "float16")


def test_values_beyond_the_dtype(tmp_path: Path) -> None:
    """Refused, not written as infinities."""
    model = models.dense(layers=1)
    name = "model.layers.0.mlp.down_proj.weight"
    out = make(model.plus({name: model.tensors[name] * 1e6}), tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=f"{name} has values beyond float16; choose a wider --dtype"):
        dequantize(out, tmp_path / "plain", dtype="float16")
    equal(sorted(path.name for path in tmp_path.iterdir()), before)
    dequantize(out, tmp_path / "plain")


def test_twice_is_once(tmp_path: Path) -> None:
    """Decoded values lie on the grid: quantized again they decode to the same, up to the tensor scale's rounding."""
    dequantize(make(models.moe(), tmp_path / "a"), tmp_path / "plain", dtype="float32")
    convert(tmp_path / "plain", tmp_path / "again", Options())
    dequantize(tmp_path / "again", tmp_path / "plain2", dtype="float32")
    again = models.read_all(tmp_path / "plain2")
    for name, tensor in models.read_all(tmp_path / "plain").items():
        close(again[name], tensor, tensor.double().abs() * 2.0**-22, name)


def test_refuses(tmp_path: Path) -> None:
    source = models.dense().save(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="no quantization_config; this is not a quantized checkpoint"):
        dequantize(source, tmp_path / "out")
    out = make(models.dense(), tmp_path)
    with pytest.raises(CheckpointError, match="dtype='int8': choose one of bfloat16, float16, float32"):
        dequantize(out, tmp_path / "out", dtype="int8")
    with pytest.raises(CheckpointError, match="already exists"):
        dequantize(out, source)
    tensors = models.read_all(out)
    scale = "model.layers.1.mlp.up_proj.weight_scale_2"
    models.save_file({n: t for n, t in tensors.items() if n != scale}, out / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{scale} is missing"):
        dequantize(out, tmp_path / "out")
    equal(sorted(path.name for path in tmp_path.iterdir()), ["plain", "quantized", "source"])
