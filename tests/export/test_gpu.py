"""A live export on a GPU equals a conversion on the CPU; run with `-m gpu`."""

from pathlib import Path

import pytest
import torch

from halfbyte.checkpoint.convert import convert
from halfbyte.checkpoint.options import Options
from halfbyte.checkpoint.schema import LAYOUTS
from halfbyte.export import Exporter, Placement, headers
from halfbyte.export.shards import to_megatron
from halfbyte.recipe.load import load_recipe

from ..check import equal, same_bits, true
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


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_planned_exports(tmp_path: Path, name: str, recipe: str) -> None:
    """Two buffers, a stream of its own, and weights that change between exports, which follow each other at once."""
    model, options = MODELS[name](), load_recipe(recipe).options()
    exporter = Exporter.like(model.save(tmp_path / "model"), options, bucket_bytes=30_000)
    on_gpu = {key: tensor.cuda() for key, tensor in model.tensors.items()}
    for tensors in (on_gpu, to_megatron(exporter.model, on_gpu, Placement())):
        prepared = exporter.prepare(tensors.items())
        kept = exporter.prepare(tensors.items(), keep=True)
        found, wanted = [], []
        for _ in range(3):
            found.append({k: t.clone() for bucket in prepared.export() for k, t in bucket.tensors.items()})
            # What is not quantized comes as it is: the parameter, which changes below.
            wanted.append({k: t.clone() for k, t in exporter.export_all(tensors.items()).items()})
            at_the_end = {k: t for bucket in list(kept.export()) for k, t in bucket.tensors.items()}
            for key, tensor in wanted[-1].items():
                same_bits(at_the_end[key], tensor, key)
            for tensor in tensors.values():
                tensor.mul_(1.25)
        for step, tensors_of in enumerate(wanted):
            for key, tensor in tensors_of.items():
                same_bits(found[step][key], tensor, f"{key} of step {step}")


@pytest.mark.parametrize("layer", [0, -1])
def test_a_parameter_that_moved(layer: int) -> None:
    """One of the first bucket, and one of the last, which is noticed when the first is being filled already."""
    model = ranks.moe()
    one = Exporter(model.config, headers(model.tensors.items()), Options(), bucket_bytes=30_000)
    parameters = {
        name: torch.nn.Parameter(tensor.cuda(), requires_grad=False) for name, tensor in model.tensors.items()
    }
    prepared = one.prepare(parameters.items())
    list(prepared.export())
    parameter = list(parameters.values())[layer]
    parameter.data = parameter.data * 2
    found = {key: tensor.clone() for bucket in prepared.export() for key, tensor in bucket.tensors.items()}
    wanted = one.export_all(parameters.items())
    equal(sorted(found), sorted(wanted))
    for key, tensor in wanted.items():
        same_bits(found[key], tensor, key)


def test_launches_of_a_planned_export() -> None:
    """Few, however many experts there are."""
    model = ranks.moe()
    on_gpu = {key: tensor.cuda() for key, tensor in model.tensors.items()}
    prepared = Exporter(model.config, headers(on_gpu.items())).prepare(on_gpu.items())
    list(prepared.export())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        list(prepared.export())
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    equal(len(prepared.buckets), 1)
    true(0 < len(events) <= 12, f"{[e.name for e in events]}")


def test_shards_on_a_gpu(tmp_path: Path) -> None:
    model, options = ranks.deepseek(), Options()
    source = model.save(tmp_path / "model")
    convert(source, tmp_path / "out", options)
    on_gpu = {key: tensor.cuda() for key, tensor in model.tensors.items()}
    found = ranks.Ranks(source, options, ranks.placements(2, 2)).export(on_gpu)
    for key, tensor in read_all(tmp_path / "out").items():
        same_bits(found[key].cpu(), tensor, key)
