"""Data-free built-in recipes: converted, proven, decoded to the same weights by nvidia-modelopt and llm-dequant."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from halfbyte.checkpoint.convert import Report, convert
from halfbyte.checkpoint.dequantize import dequantize
from halfbyte.checkpoint.manifest import read_manifest
from halfbyte.checkpoint.recompute import verify_source
from halfbyte.checkpoint.schema import LAYOUTS, Layout
from halfbyte.checkpoint.verify import verify_structure
from halfbyte.demo import DATA
from halfbyte.formats import NVFP4
from halfbyte.recipe import builtin_recipes, load_recipe

from .check import close, equal, true
from .checkpoint import models
from .test_interop import import_quietly

DATA_FREE = [name for name, recipe in builtin_recipes().items() if not recipe.needs_data]


def proven(source: Path, out: Path, name: str, layout: Layout) -> Report:
    recipe = load_recipe(name)
    report = convert(source, out, recipe.options(layout))
    equal([str(f) for f in (*verify_structure(out), *verify_source(out, source))], [])
    equal((report.searched, report.unequal_fused_scales), (report.to_search, 0))
    manifest = read_manifest(out)
    true(manifest is not None and manifest[0].recipe == recipe.to_json(), "another recipe is recorded")
    return report


def by_modelopt(tensors: dict[str, Tensor], module: str, fmt: object) -> Tensor:
    kind, name = ("nvfp4", "NVFP4QTensor") if isinstance(fmt, NVFP4) else ("mxfp8", "MXFP8QTensor")
    tensor = getattr(import_quietly(f"modelopt.torch.quantization.qtensor.{kind}_tensor"), name)
    elements, scale = tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"]
    columns = elements.shape[1] * (2 if isinstance(fmt, NVFP4) else 1)
    q = tensor((elements.shape[0], columns), torch.float32, elements)
    if isinstance(fmt, NVFP4):
        double = tensors[f"{module}.weight_scale_2"]
        return q.dequantize(torch.float32, scale=scale, double_scale=double, block_sizes={-1: 16})
    return q.dequantize(torch.float32, scale=scale)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", DATA_FREE)
def test_dense(tmp_path: Path, name: str, layout: Layout) -> None:
    source = models.dense(layers=1).save(tmp_path / "source")
    out = tmp_path / "out"
    report = proven(source, out, name, layout)
    dequantize(out, tmp_path / "plain", dtype="float32")
    ours, tensors = models.read_all(tmp_path / "plain"), models.read_all(out)
    for weight in report.weights:
        module = weight.name.removesuffix(".weight")
        if layout == "modelopt":
            equal(by_modelopt(tensors, module, weight.format), ours[weight.name], weight.name)
        elif isinstance(weight.format, NVFP4):
            theirs = import_quietly("llm_dequant.nvfp4").dequantize_nvfp4(
                *(tensors[f"{module}.{part}"] for part in ("weight_packed", "weight_scale", "weight_global_scale")),
                dtype=torch.float32,
            )
            close(theirs, ours[weight.name], ours[weight.name].abs() * 2.0**-22, weight.name)


@pytest.mark.slow
@pytest.mark.parametrize("name", DATA_FREE)
def test_the_shipped_model(tmp_path: Path, name: str) -> None:
    """A Qwen3-MoE: 119 Linear weights, experts among them."""
    report = proven(DATA / "tiny", tmp_path / "out", name, "modelopt")
    equal(len(report.weights), 119)
    true(report.relative_error() < 0.1, str(report.relative_error()))
