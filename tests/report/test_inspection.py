"""inspect: its numbers against sums taken by hand, checkpoints of other tools, and a report that nothing can hurt."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from halfbyte import MXFP8, NVFP4, quantize
from halfbyte.checkpoint.convert import convert
from halfbyte.checkpoint.dequantize import dequantize
from halfbyte.checkpoint.inspection import Inspection, inspect
from halfbyte.checkpoint.options import Options
from halfbyte.checkpoint.shards import Checkpoint
from halfbyte.errors import CheckpointError
from halfbyte.report.html import render, visible, write
from halfbyte.report.inspection import print_inspection

from ..check import equal, true
from ..checkpoint import models
from ..test_cli import cli, has, parsed, succeeds
from .page import Page

L0 = "model.layers.0"


def made(tmp_path: Path, model: models.Model, **options: Any) -> tuple[Path, Path]:
    source, out = model.save(tmp_path / "source"), tmp_path / "out"
    convert(source, out, Options(**options))
    return source, out


def change(path: Path, tensors: models.Tensors) -> None:
    found = {name: tensor.clone() for name, tensor in models.read_all(path).items()} | tensors
    save_file(found, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("options", [{}, {"layout": "compressed-tensors"}, {"format": MXFP8()}], ids=str)
def test_errors_are_those_of_the_decoded_weights(tmp_path: Path, options: dict[str, Any], stacked: bool) -> None:
    model = models.moe()
    source, out = made(tmp_path, models.stack(model) if stacked else model, **options)
    found = inspect(out, source)
    dequantize(out, tmp_path / "plain", dtype="float32")
    plain = Checkpoint(tmp_path / "plain")
    error = norm = 0.0
    for result in found.weights:
        name = result.weight.name.full
        x = model.tensors[name].double()
        squared = (plain.read(name).double() - x).square().sum()
        true(abs(result.squared_error / float(squared) - 1) < 1e-5, name)
        error, norm = error + float(squared), norm + float(x.square().sum())
    true(abs(found.total.relative_error / (error / norm) ** 0.5 - 1) < 1e-5, "in total")
    equal(found.total.weights, 32)
    equal((found.total.flushed, found.total.clipped or 0, found.total.dead), (0, 0, 0))
    equal([remark.to_json() for remark in found.remarks], [])
    sizes = sum(tensor.nbytes for tensor in models.read_all(out).values())
    equal(found.total.nbytes + sum(nbytes for _, nbytes in found.kept.values()), sizes)
    equal(sum(int(counts.sum()) for counts in found.scales.values()), found.total.blocks)


def wounded(tmp_path: Path) -> tuple[Path, Path]:
    """A model and its checkpoint with a dead expert, flushed and clipped blocks, and two scales in a fused layer."""
    model = models.moe(layers=4)
    source, out = made(tmp_path, model)
    tensors = models.read_all(out)
    planted: models.Tensors = {}
    for leaf in models.MLP_LEAVES:  # a dead expert
        name = f"{L0}.mlp.experts.2.{leaf}"
        planted[f"{name}.weight"] = torch.zeros_like(tensors[f"{name}.weight"])
    scale = tensors[f"{L0}.self_attn.o_proj.weight_scale"].clone()
    scale[3] = torch.zeros_like(scale[3])  # flushed blocks
    planted[f"{L0}.self_attn.o_proj.weight_scale"] = scale
    small = (tensors["model.layers.1.self_attn.o_proj.weight_scale"].float() / 4).to(torch.float8_e4m3fn)
    planted["model.layers.1.self_attn.o_proj.weight_scale"] = small  # clipped, and far off
    name = "model.layers.2.self_attn.q_proj.weight_scale_2"
    planted[name] = tensors[name] * 2  # fused, but two scales
    change(out, planted)
    return source, out


def test_what_stands_out(tmp_path: Path) -> None:
    """Each planted once, each found by its name, and only once."""
    source, out = wounded(tmp_path)
    for against in (None, source):
        said = [f"{r.severity} {r.where} {r.what}" for r in inspect(out, against).remarks]
        wanted = [
            f"warning {L0}.mlp.experts.2 dead expert: all its weights are zero",
            "4 of 256 blocks decode to zero",
            "warning model.layers.2.self_attn.qkv_proj.weight_scale_2 engines keep one scale",
        ]
        if against is not None:
            wanted += ["are zero, though their codes or their original are not"]
            wanted += ["blocks have elements beyond the largest", "warning layer 1 attention o_proj relative error"]
        for text in wanted:
            true(any(text in sentence for sentence in said), f"{text!r} is not among\n" + "\n".join(said))
        true(not any("layer 0 experts" in sentence for sentence in said), "the dead expert is reported twice")


def test_broken_values(tmp_path: Path) -> None:
    """NaN scales, an infinite one, one of the wrong shape, one that is missing: named, and the report still drawn."""
    source, out = made(tmp_path, models.dense(layers=3, tied=True))
    nan = torch.full((64, 6), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    planted = {f"{L0}.mlp.down_proj.weight_scale": nan}
    planted[f"{L0}.self_attn.o_proj.weight_scale_2"] = torch.tensor(torch.inf)
    for layer in range(3):  # every one of its kind
        planted[f"model.layers.{layer}.self_attn.k_proj.weight_scale_2"] = torch.ones(2)
    change(out, planted)
    tensors = {name: t for name, t in models.read_all(out).items() if name != f"{L0}.mlp.up_proj.weight_scale_2"}
    save_file({name: t.clone() for name, t in tensors.items()}, out / "model.safetensors", metadata={"format": "pt"})
    for against in (None, source):
        found = inspect(out, against)
        said = "\n".join(f"{r.severity} {r.where} {r.what}" for r in found.remarks)
        has(
            said,
            "384 of 384 block scales are NaN",
            "is [inf]",
            "2 values for one matrix",
            "up_proj.weight_scale_2 is missing",
        )
        equal(Page(render(found)).wrong, [])
        json.dumps(found.to_json(), allow_nan=False)
        if against is not None:
            has(said, f"{L0}.mlp.down_proj.weight it or its original has values that are NaN")
            true(0 < found.total.relative_error < 0.2, "what is sound is summed")


def test_other_tools_checkpoints(tmp_path: Path) -> None:
    """transformers' mxfp8 with its own names and E8M0 bytes; ModelOpt's stacked experts, declared in its sidecar."""
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    q = quantize(x, MXFP8())
    path = f"{L0}.mlp.down_proj"
    tensors = {f"{path}.weight": q.packed, f"{path}.weight_scale_inv": q.block_scale.view(torch.float8_e8m0fnu)}
    declared = {"quant_method": "mxfp8", "activation_scheme": "dynamic", "weight_block_size": [1, 32]}
    foreign = models.Model(tensors, {"num_hidden_layers": 1, "quantization_config": declared}).save(tmp_path / "mxfp8")
    source = models.Model({f"{path}.weight": x}, {"num_hidden_layers": 1}).save(tmp_path / "source")
    found = inspect(foreign, source)
    equal(found.schemes, {"config.json": "mxfp8"})
    wanted = float((q.dequantize() - x.float()).norm() / x.float().norm())
    true(abs(found.total.relative_error / wanted - 1) < 1e-5, f"{found.total.relative_error} instead of {wanted}")
    equal({v.engine: v.outcome for v in found.verdicts}["transformers"], "loads")

    w = torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(1))
    parts = [quantize(matrix, NVFP4()) for matrix in w]
    path = f"{L0}.mlp.experts.gate_up_proj"
    tensors = {path: torch.stack([part.packed for part in parts])}
    tensors[f"{path}_weight_scale"] = torch.stack([part.block_scale for part in parts])
    tensors[f"{path}_weight_scale_2"] = torch.stack([part.tensor_scale for part in parts])
    stacked = models.Model(tensors, {"num_hidden_layers": 1}).save(tmp_path / "stacked")
    sidecar = {"producer": {"name": "modelopt", "version": "0.29"}, "quantization": {"quant_algo": "NVFP4"}}
    (stacked / "hf_quant_config.json").write_text(json.dumps(sidecar))
    sizes = {"num_hidden_layers": 1, "model_type": "qwen3_moe", "hidden_size": 64, "moe_intermediate_size": 32}
    found = inspect(stacked, models.Model({path: w}, sizes).save(tmp_path / "stacks"))
    equal((found.producer, found.total.elements), ("modelopt 0.29", w.numel()))
    decoded = torch.stack([part.dequantize() for part in parts])
    true(abs(found.total.relative_error / float((decoded - w).norm() / w.norm()) - 1) < 1e-5, "error of a stack")
    true("stacks experts" in json.dumps(found.to_json()), "engines want one matrix for each expert")


def test_refuses_what_is_not_quantized(tmp_path: Path) -> None:
    source, out = made(tmp_path, models.dense(layers=1))
    with pytest.raises(CheckpointError, match="no weight is quantized as NVFP4 or MXFP8"):
        inspect(source)
    equal({weight.squared_error for weight in inspect(out, out).weights}, {0.0})  # a source is what it decodes to
    other = models.dense(layers=1).without(f"{L0}.mlp.down_proj.weight").save(tmp_path / "other")
    said = {remark.where: remark.what for remark in inspect(out, other).remarks}
    equal(said[f"{L0}.mlp.down_proj.weight"], "is not in the source")


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Inspection:
    root = tmp_path_factory.mktemp("moe")
    source, out = made(root, models.moe(), layout="compressed-tensors", activations="constant")
    return inspect(out, source)


def test_the_report_stands_alone(moe: Inspection) -> None:
    text = render(moe)
    page = Page(text)
    equal(page.wrong, [])
    true(len(text) < 400_000 and text.startswith("<!DOCTYPE html>"), f"{len(text)} characters")
    true(page.focusable > 12 and {"svg", "details", "table", "nav"} <= set(page.tags), "sections, plots and tables")
    has(text, "prefers-color-scheme:dark", 'name="viewport"', "Content-Security-Policy", "default-src 'none'")
    has(
        page.text,
        "experts down_proj",
        "Relative error by layer",
        "transformers",
        "SNR",
        f"{moe.total.relative_error:.3%}",
    )
    equal(page.tags.count("script"), 1)
    equal(page.tags.count("svg"), 1 + 2 + 2)  # errors; scales and codes of attention and experts


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "{{ 7 * 7 }}{% include 'x' %}",
    "</title></style><base href=//example.org>",
    "$(rm -rf ~); `id`",
    "javascript:alert(1)",
    "日本語 é ☃",
]


def hostile(tmp_path: Path) -> tuple[Path, Path]:
    """A model and its checkpoint with names that look like HTML, templates or shell."""
    draw = models.Draw()
    tensors: models.Tensors = {}
    weights = {}
    for i, name in enumerate(HOSTILE):
        q = quantize(draw(32, 32), NVFP4())
        module = f"model.layers.{i}.mlp.{name}.down_proj"
        weights[f"{module}.weight"] = draw(32, 32)
        tensors |= {f"{module}.weight": q.packed, f"{module}.weight_scale": q.block_scale}
        tensors[f"{module}.weight_scale_2"] = -q.tensor_scale  # a finding, so that each name is shown
    declared = {"quant_method": HOSTILE[0], "quant_algo": HOSTILE[1], "producer": {"name": HOSTILE[2], "version": 1}}
    configured = {"num_hidden_layers": len(HOSTILE), "quantization_config": declared}
    path = models.Model(tensors, configured).save(tmp_path / "a<b>&'\"c")
    return models.Model(weights, {"num_hidden_layers": len(HOSTILE)}).save(tmp_path / "source"), path


def test_names_cannot_hurt(tmp_path: Path) -> None:
    """Each is shown as it is, with nothing hidden."""
    source, path = hostile(tmp_path)
    page = Page(render(inspect(path, source)))
    equal(page.wrong, [])
    for name in HOSTILE:
        true(visible(name) in page.text, f"{name!r} is not shown")
    true(not set(page.text) & set("\u202e\x1b"), "hidden characters")
    done = cli("inspect", path)
    equal(done.exit_code, 0, done.output)
    true("\u202e" not in done.stdout, "hidden characters on the terminal")


def test_command(tmp_path: Path) -> None:
    source, out = made(tmp_path, models.dense(layers=2), activations="constant")
    html = tmp_path / "report.html"
    html.write_text("old")
    has(
        succeeds("inspect", out, "--against", source, "--html", html),
        "modelopt NVFP4",
        "attention q_proj",
        "vllm loads",
    )
    equal(Page(html.read_text(encoding="utf-8")).wrong, [])
    found = parsed("inspect", out, "--against", source)
    equal((len(found["weights"]), found["against"], found["html"]), (14, str(source), None))
    equal(sorted(path.name for path in tmp_path.iterdir()), ["out", "report.html", "source"])
    for arguments, message in (
        ((out, "--html", tmp_path / "no" / "x.html"), "no such directory"),
        ((source,), "no weight is quantized"),
        ((tmp_path / "nothing",), "no such directory"),
    ):
        has(parsed("inspect", *arguments, code=2)["error"], message)
    with pytest.raises(CheckpointError, match="must be a file"):
        write(inspect(out), tmp_path)


@pytest.mark.parametrize("width", [36, 60, 80, 140])
def test_terminal(tmp_path: Path, width: int) -> None:
    """However narrow the terminal: no cell is cut, every column is there, nothing runs over the edge."""
    source, out = wounded(tmp_path)
    text = io.StringIO()
    found = inspect(out, source)
    print_inspection(Console(file=text, width=width), found)
    lines = text.getvalue().splitlines()
    true(max(map(len, lines)) <= width and "…" not in text.getvalue(), text.getvalue())
    words = " ".join(text.getvalue().split())
    has(
        words,
        "SNR dB",
        "saturated",
        "flushed",
        "clipped",
        "all zero",
        "vllm loads wrongly (fused layers)",
        "dead expert",
    )
    has(words, f"{found.total.relative_error:.2%}", f"{found.total.snr:.2f}", f"{found.total.nbytes / 1000:.2f} kB")
    equal(sum(line.startswith(" experts down_proj") for line in lines), {36: 8, 60: 3, 80: 2, 140: 1}[width])
