"""Every built-in recipe: carried out, proven, decoded to the same weights by nvidia-modelopt and llm-dequant."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from halfbyte.calib.calibrate import calibrate
from halfbyte.calib.data import Windows
from halfbyte.calib.options import Calibration
from halfbyte.checkpoint.convert import Report, convert
from halfbyte.checkpoint.dequantize import dequantize
from halfbyte.checkpoint.manifest import read_manifest
from halfbyte.checkpoint.recompute import verify_source
from halfbyte.checkpoint.schema import LAYOUTS, Layout
from halfbyte.checkpoint.verify import verify_structure
from halfbyte.errors import CheckpointError
from halfbyte.formats import NVFP4, Format
from halfbyte.recipe import builtin_recipes

from .check import close, equal, true
from .checkpoint import models
from .test_interop import import_quietly

MODELS = {"dense": lambda: models.dense(layers=1), "moe": lambda: models.moe(layers=1)}


def carry_out(source: Path, out: Path, name: str, layout: Layout) -> Report:
    """By `convert`, or with a little data; whatever can be verified is."""
    recipe = builtin_recipes()[name]
    if recipe.needs_data:
        pytest.importorskip("transformers")
        ids = torch.randint(models.VOCAB, (8, 16), generator=torch.Generator().manual_seed(0))
        report, _ = calibrate(
            source, out, recipe.options(layout), Calibration.of(recipe, every_expert=True), Windows(ids, "random")
        )
        true(report is not None, "there is one rank")
    else:
        report = convert(source, out, recipe.options(layout))
    equal([str(f) for f in (*verify_structure(out), *verify_source(out, source))], [])
    equal((report.searched, report.unequal_fused_scales), (report.to_search, 0))
    manifest = read_manifest(out)
    true(manifest is not None and manifest[0].recipe == recipe.to_json(), "another recipe is recorded")
    return report


def by_modelopt(tensors: dict[str, Tensor], module: str, fmt: Format) -> Tensor:
    kind, name = ("nvfp4", "NVFP4QTensor") if isinstance(fmt, NVFP4) else ("mxfp8", "MXFP8QTensor")
    tensor = getattr(import_quietly(f"modelopt.torch.quantization.qtensor.{kind}_tensor"), name)
    elements, scale = tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"]
    columns = elements.shape[1] * (2 if isinstance(fmt, NVFP4) else 1)
    q = tensor((elements.shape[0], columns), torch.float32, elements)
    if isinstance(fmt, NVFP4):
        double = tensors[f"{module}.weight_scale_2"]
        return q.dequantize(torch.float32, scale=scale, double_scale=double, block_sizes={-1: 16})
    return q.dequantize(torch.float32, scale=scale)


def check_by_llm_dequant(tensors: dict[str, Tensor], module: str, ours: Tensor) -> None:
    """It divides by S_enc, itself a rounded reciprocal, where we multiply by S_dec: two units in the last place."""
    parts = (tensors[f"{module}.{part}"] for part in ("weight_packed", "weight_scale", "weight_global_scale"))
    theirs = import_quietly("llm_dequant.nvfp4").dequantize_nvfp4(*parts, dtype=torch.float32)
    close(theirs, ours, ours.abs() * 2.0**-22, module)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", builtin_recipes())
def test_every_recipe(tmp_path: Path, name: str, model: str, layout: Layout) -> None:
    source = MODELS[model]().save(tmp_path / "source")
    out = tmp_path / "out"
    if model == "dense" and "experts-search" in name:
        with pytest.raises(CheckpointError, match="nothing to quantize"):
            carry_out(source, out, name, layout)
        equal([path.name for path in tmp_path.iterdir()], ["source"])
        return
    report = carry_out(source, out, name, layout)
    true(len(report.weights) >= 3, "hardly anything is quantized")
    dequantize(out, tmp_path / "plain", dtype="float32")
    ours, tensors = models.read_all(tmp_path / "plain"), models.read_all(out)
    for weight in report.weights:
        module = weight.name.removesuffix(".weight")
        if layout == "modelopt" or not isinstance(weight.format, NVFP4):  # MXFP8 is alike in both
            equal(by_modelopt(tensors, module, weight.format), ours[weight.name], weight.name)
        else:
            check_by_llm_dequant(tensors, module, ours[weight.name])
