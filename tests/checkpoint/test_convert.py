"""What conversion writes: names, dtypes, shapes and bytes, the files beside them, and one tensor scale per group."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from halfbyte import MXFP8, NVFP4, Policy, __version__, names, quantize
from halfbyte.checkpoint.config import Group, Quantization, hf_quant_config, quantization_config
from halfbyte.checkpoint.convert import convert
from halfbyte.checkpoint.manifest import read_manifest
from halfbyte.checkpoint.plan import Options
from halfbyte.checkpoint.schema import LAYOUTS, Layout
from halfbyte.checkpoint.shards import Checkpoint, tensor_digest
from halfbyte.formats import Format

from ..check import close, equal, same_bits, true
from . import models
from .models import Model, Tensors

FORMATS: list[Format] = [
    NVFP4(),
    NVFP4(e4m3_max=256),
    NVFP4(scale_rule="four_over_six"),
    NVFP4(scale_rule="four_over_six", error="mse", e4m3_max=448, error_arithmetic="fp16"),
    NVFP4(scale_rule="four_over_six", e4m3_max=288),
    NVFP4(scale_rule="four_over_six", e4m3_max=320),
    MXFP8(),
]
MODELS = {  # and how many weights of each are quantized
    "dense": (models.dense(), 14),
    "float32": (models.dense(dtype=torch.float32), 14),
    "moe": (models.moe(shared="shared_experts"), 38),
    "mixtral": (models.mixtral(), 16),
    "mla": (models.mla(mtp_layers=1), 16),
    "multimodal": (models.multimodal(), 14),
}
ids = {"ids": lambda v: v if isinstance(v, str) else repr(v).replace(" ", "")}


def run(model: Model, where: Path, shards: int = 1, max_shard_bytes: int = 10**9, **options: Any) -> Path:
    source = model.save(where / "source", shards)
    convert(source, where / "out", Options(**options), max_shard_bytes=max_shard_bytes)
    return where / "out"


def group_amaxes(model: Model) -> dict[str, Tensor]:
    """Module → maximum over its fused group, by nothing but the table of names."""
    groups: defaultdict[str, list[Tensor]] = defaultdict(list)
    layer_of = {name: names.parse(name).fused or names.parse(name).module for name in model.tensors}
    for name, tensor in model.tensors.items():
        if name.endswith(".weight"):
            groups[layer_of[name]].append(tensor.abs().max().float())
    return {names.parse(n).module: torch.stack(groups[layer]).max() for n, layer in layer_of.items() if layer in groups}


def expected(layout: Layout, fmt: Format, module: str, weight: Tensor, amax: Tensor) -> Tensors:
    """The tensors of one weight, written out by the contract rather than by the code under test."""
    if isinstance(fmt, MXFP8):
        q = quantize(weight, fmt)
        return {f"{module}.weight": q.packed, f"{module}.weight_scale": q.block_scale}
    q = quantize(weight, fmt, amax=amax)
    encode_scale = torch.tensor(6.0 * fmt.e4m3_max) / amax  # one float32 division each
    if layout == "modelopt":
        return {
            f"{module}.weight": q.packed,
            f"{module}.weight_scale": q.block_scale,
            f"{module}.weight_scale_2": 1 / encode_scale,
        }
    return {
        f"{module}.weight_packed": q.packed,
        f"{module}.weight_scale": q.block_scale,
        f"{module}.weight_global_scale": encode_scale.reshape(1),
    }


def check(model: Model, count: int, out: Path, layout: Layout, fmt: Format, also: Tensors) -> None:
    """Every tensor of an output, bit for bit; `count` of the weights are quantized, the rest is as it was."""
    found = models.read_all(out)
    equal(sum(name.endswith(".weight_scale") for name in found), count)
    amaxes = group_amaxes(model)
    parameter = "weight_packed" if layout == "compressed-tensors" and isinstance(fmt, NVFP4) else "weight"
    wanted = dict(also)
    for name, tensor in model.tensors.items():
        module = name.removesuffix(".weight")
        if found.get(f"{module}.{parameter}", tensor).dtype != tensor.dtype:
            wanted |= expected(layout, fmt, module, tensor, amaxes[module])
        else:
            wanted[name] = tensor
    equal(set(found), set(wanted))
    for name, tensor in wanted.items():
        same_bits(found[name], tensor, name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_models(tmp_path: Path, name: str, layout: Layout) -> None:
    model, count = MODELS[name]
    check(model, count, run(model, tmp_path, 3, layout=layout), layout, NVFP4(), {})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fmt", FORMATS, **ids)
def test_formats(tmp_path: Path, fmt: Format, layout: Layout) -> None:
    check(models.dense(), 14, run(models.dense(), tmp_path, layout=layout, format=fmt), layout, fmt, {})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stacked_experts_become_the_same_files(tmp_path: Path, layout: Layout) -> None:
    apart = run(models.moe(), tmp_path / "a", layout=layout)
    stacked = run(models.stack(models.moe()), tmp_path / "b", 2, layout=layout)
    same_files(apart, stacked)


def same_files(a: Path, b: Path) -> None:
    read = [{path.name: path.read_bytes() for path in directory.iterdir()} for directory in (a, b)]
    equal(set(read[0]), set(read[1]))
    equal([name for name in read[0] if read[0][name] != read[1][name]], [])


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_one_file_or_seven(tmp_path: Path, max_shard_bytes: int) -> None:
    outputs = [run(models.moe(), tmp_path / str(n), n, max_shard_bytes, kv_cache="fp8") for n in (1, 2, 7)]
    for other in outputs[1:]:
        same_files(outputs[0], other)


def test_output_shards(tmp_path: Path) -> None:
    """Index and sizes are right, nothing is lost, and a fused group is never torn apart."""
    whole = models.read_all(run(models.moe(), tmp_path / "a"))
    out = run(models.moe(), tmp_path / "b", max_shard_bytes=8_000)
    index = json.loads((out / models.INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    count = len(files)
    true(count > 5, f"only {count} files")
    equal(files, [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)])
    equal({path.name for path in out.glob("*.safetensors")}, set(files))
    found = models.read_all(out)
    equal(index["metadata"]["total_size"], sum(t.nbytes for t in found.values()))
    for file in files:
        true((out / file).stat().st_size < 8_000 + 4_000 or file == files[0], f"{file} is too large")
    equal(set(index["weight_map"]), set(found))
    for name, tensor in whole.items():
        same_bits(found[name], tensor, name)
    together = {n: index["weight_map"][f"model.layers.1.self_attn.{n}_proj.weight"] for n in "qkv"}
    equal(len(set(together.values())), 1, str(together))


def test_zero_weights_have_finite_scales(tmp_path: Path) -> None:
    model = models.dense()
    zero = {name: torch.zeros_like(t) for name, t in model.tensors.items() if ".layers.0." in name}
    zero["model.layers.1.mlp.gate_proj.weight"] = torch.zeros(96, 64, dtype=torch.bfloat16)  # its partner is not
    for fmt in FORMATS:
        found = models.read_all(run(model.plus(zero), tmp_path / repr(fmt), format=fmt))
        for name, tensor in found.items():
            true(tensor.float().isfinite().all(), name)
        if isinstance(fmt, NVFP4):
            equal(found["model.layers.0.mlp.down_proj.weight_scale_2"], torch.tensor(1.0))
            scales = [found[f"model.layers.1.mlp.{leaf}_proj.weight_scale_2"] for leaf in ("gate", "up")]
            same_bits(*scales)


@pytest.mark.parametrize("name", ["dense", "moe", "mla"])
def test_fp8_kv_cache(tmp_path: Path, name: str) -> None:
    """ModelOpt hangs the scales on k_proj and v_proj, compressed-tensors on the attention, and always wants them."""
    model, count = MODELS[name]
    attentions = [f"model.layers.{i}.self_attn" for i in range(3 if name == "mla" else 2)]
    one = torch.tensor(1.0)
    out = run(model, tmp_path / "a", layout="modelopt", kv_cache="fp8")
    also = {} if name == "mla" else {f"{a}.{c}_proj.{c}_scale": one for a in attentions for c in "kv"}
    check(model, count, out, "modelopt", NVFP4(), also)
    out = run(model, tmp_path / "b", layout="compressed-tensors", kv_cache="fp8")
    also = {f"{a}.{c}_scale": one.reshape(1) for a in attentions for c in "kv"}
    check(model, count, out, "compressed-tensors", NVFP4(), also)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_towers_have_no_kv_cache(tmp_path: Path, layout: Layout) -> None:
    tower = models.under("model.vision_tower.encoder.layers.0.self_attn", models.Draw().attention())
    out = run(models.multimodal().plus(tower), tmp_path, layout=layout, kv_cache="fp8")
    scales = [name for name in models.read_all(out) if name.endswith(("k_scale", "v_scale"))]
    equal((len(scales), [name for name in scales if "vision_tower" in name]), (4, []))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_constant_activations(tmp_path: Path, layout: Layout) -> None:
    """Every expert carries an input scale: vLLM reads a missing one as inf."""
    leaf, one = {
        "modelopt": ("input_scale", torch.tensor(1.0)),
        "compressed-tensors": ("input_global_scale", torch.ones(1)),
    }[layout]
    out = run(models.moe(), tmp_path, layout=layout, activations="constant")
    modules = [n.removesuffix(".weight_scale") for n in models.read_all(out) if n.endswith(".weight_scale")]
    check(models.moe(), 32, out, layout, NVFP4(), {f"{module}.{leaf}": one for module in modules})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kv_cache", ["none", "fp8"])
@pytest.mark.parametrize("activations", ["none", "constant"])
def test_configs(tmp_path: Path, layout: Layout, kv_cache: Any, activations: Any) -> None:
    model = models.moe(tied=True)
    out = run(model, tmp_path, layout=layout, kv_cache=kv_cache, activations=activations)
    ignore = ("lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate")
    wanted = Quantization(layout, (Group(NVFP4()),), activations == "constant", kv_cache == "fp8", ignore)
    equal(
        json.loads((out / "config.json").read_text()),
        {**model.config, "quantization_config": quantization_config(wanted)},
    )
    beside = out / "hf_quant_config.json"
    equal(json.loads(beside.read_text()) if beside.exists() else None, hf_quant_config(wanted))
    for name, text in models.COMPANIONS.items():
        equal((out / name).read_text(), text)


def test_the_record(tmp_path: Path) -> None:
    fmt = NVFP4(scale_rule="four_over_six", error="mse")
    policy = Policy(only="experts", ignore=("layers.0",))
    out = run(models.moe(), tmp_path, format=fmt, policy=policy, kv_cache="fp8")
    data = json.loads((out / "halfbyte.json").read_text())
    digests = {n: tensor_digest(t) for n, t in models.read_all(out).items()}
    choices = {"scale_rule": "four_over_six", "error": "mse", "e4m3_max": 256, "error_arithmetic": "exact"}
    blocks = {"block": [1, 16], "scaling": "tensor", "hadamard": False, "rounding": "nearest"}
    wanted = {
        "halfbyte_version": __version__,
        "contract_version": 1,
        "format": {"name": "nvfp4", **choices, **blocks},
        "layout": "modelopt",
        "kv_cache": "fp8",
        "activations": "none",
        "policy": policy.to_json(),
        "overrides": [],
        "recipe": None,
        "sha256": digests,
    }
    equal(data, wanted)
    equal(read_manifest(out), (Options(format=fmt, policy=policy, kv_cache="fp8"), digests))


def test_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors against ones computed in float64; and every tensor is read exactly once."""
    reads: list[str] = []
    read = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name, *a, **k: reads.append(name) or read(self, name, *a, **k))
    model = models.moe()
    done: list[int] = []
    report = convert(model.save(tmp_path / "source", 7), tmp_path / "out", Options(), progress=done.append)
    equal(sorted(reads), sorted(model.tensors))
    equal(sum(done), sum(t.nbytes for t in model.tensors.values()))
    equal((report.source_bytes, report.output), (sum(done), tmp_path / "out"))
    equal((len(report.weights), report.kept, report.fused_groups, report.shards), (32, 13, 10, 1))
    found = models.read_all(tmp_path / "out")
    equal(report.output_bytes, sum(t.nbytes for t in found.values()))
    elements = sum(w.elements for w in report.weights)
    close(torch.tensor(report.bits_per_weight), torch.tensor(4.5 + 32 * 32 / elements), 1e-6)
    amaxes = group_amaxes(model)
    errors, norms = {}, {}
    for w in report.weights:
        x = model.tensors[w.name].double()
        decoded = quantize(model.tensors[w.name], NVFP4(), amax=amaxes[w.name.removesuffix(".weight")]).dequantize()
        errors[w.name], norms[w.name] = (decoded.double() - x).square().sum(), x.square().sum()
        close(torch.tensor(w.relative_error), (errors[w.name] / norms[w.name]).sqrt(), 1e-6)
    close(torch.tensor(report.relative_error()), (sum(errors.values()) / sum(norms.values())).sqrt(), 1e-6)
    equal(
        set(report.by_kind()), {*(f"attention {c}_proj" for c in "qkvo"), *(f"experts {m}" for m in models.MLP_LEAVES)}
    )


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_errors_of_extreme_weights(tmp_path: Path, size: float) -> None:
    """Their squares are outside float32's range."""
    model = models.dense(layers=1)
    scaled = Model({name: (t.double() * size).to(t.dtype) for name, t in model.tensors.items()}, model.config)
    usual = convert(model.save(tmp_path / "a"), tmp_path / "usual", Options()).relative_error()
    extreme = convert(scaled.save(tmp_path / "b"), tmp_path / "extreme", Options()).relative_error()
    close(torch.tensor(extreme), torch.tensor(usual), 0.01)
