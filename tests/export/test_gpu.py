"""A live export on a GPU equals a conversion on the CPU; run with `-m gpu`."""

from pathlib import Path

import pytest
import torch

from halfbyte.checkpoint.convert import convert
from halfbyte.checkpoint.options import Options
from halfbyte.checkpoint.schema import LAYOUTS
from halfbyte.export import Exporter, Placement
from halfbyte.export.shards import to_megatron
from halfbyte.recipe.load import load_recipe

from ..check import equal, same_bits
from ..checkpoint.models import read_all
from . import ranks
from .test_bytes import MODELS, RECIPES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


# Every recipe on one model and every model with one recipe: tensors of other shapes are other kernels to compile.
CASES = [("moe", recipe) for recipe in RECIPES] + [(name, "nvfp4-w4a16") for name in MODELS if name != "moe"]


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_the_same_bytes_as_on_the_cpu(tmp_path: Path, name: str, recipe: str) -> None:
    model = MODELS[name]()
    source = model.save(tmp_path / "model")
    on_gpu = {key: tensor.cuda() for key, tensor in model.tensors.items()}
    for layout in LAYOUTS:
        options = load_recipe(recipe).options(layout)
        convert(source, tmp_path / layout, options)
        wanted = read_all(tmp_path / layout)
        exporter = Exporter.like(source, options)
        for tensors in (on_gpu, to_megatron(exporter.model, on_gpu, Placement())):
            found = exporter.export_all(tensors.items())
            equal(sorted(found), sorted(wanted))
            for key, tensor in wanted.items():
                equal(found[key].device.type, "cuda", key)
                same_bits(found[key].cpu(), tensor, key)


def test_shards_on_a_gpu(tmp_path: Path) -> None:
    model, options = ranks.deepseek(), Options()
    source = model.save(tmp_path / "model")
    convert(source, tmp_path / "out", options)
    on_gpu = {key: tensor.cuda() for key, tensor in model.tensors.items()}
    found = ranks.Ranks(source, options, ranks.placements(2, 2)).export(on_gpu)
    for key, tensor in read_all(tmp_path / "out").items():
        same_bits(found[key].cpu(), tensor, key)
