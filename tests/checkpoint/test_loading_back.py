"""What we write, read by code that nobody here wrote: transformers, compressed-tensors, modelopt, llm-dequant."""

import importlib
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import halfbyte
from halfbyte import MXFP8, NVFP4, quantize
from halfbyte.checkpoint.convert import convert
from halfbyte.checkpoint.dequantize import dequantize
from halfbyte.checkpoint.plan import Options

from ..check import close, equal, same_bits, true
from . import models
from .test_convert import group_amaxes

IDS = torch.arange(24).reshape(2, 12) % models.VOCAB


def import_quietly(name: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, at import
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama, written by transformers itself."""
    transformers = import_quietly("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(
        **sizes, vocab_size=models.VOCAB, num_hidden_layers=2, attention_bias=True, initializer_range=0.1
    )
    directory = tmp_path_factory.mktemp("llama") / "source"
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


def from_pretrained(path: Path) -> Any:
    """In bfloat16; every key of the checkpoint and of the model has to find its partner."""
    auto = import_quietly("transformers").AutoModelForCausalLM
    model, info = auto.from_pretrained(path, dtype=torch.bfloat16, output_loading_info=True)
    equal({key: value for key, value in info.items() if value}, {})
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


def fake_quantized(path: Path, fmt: NVFP4 | MXFP8) -> Any:
    """The original with its decoder Linears' weights replaced by their decoded values: no checkpoint code of ours."""
    model = from_pretrained(path)
    tensors = {f"{name}.weight": m.weight.data for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    amaxes = group_amaxes(models.Model(tensors, {}))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            amax = {"amax": amaxes[name]} if isinstance(fmt, NVFP4) else {}
            module.weight.data = quantize(module.weight.data, fmt, **amax).dequantize(torch.bfloat16)
    return model


@pytest.mark.parametrize(
    "fmt",
    [NVFP4(), NVFP4(scale_rule="four_over_six"), NVFP4(scale_rule="four_over_six", e4m3_max=448, error="mse")],
    ids=["amax", "4over6", "4over6-448-mse"],
)
def test_transformers_runs_nvfp4(tmp_path: Path, llama: Path, fmt: NVFP4) -> None:
    """Weights only. They divide by S_enc in float32 and round to bfloat16 once, as we do: not a bit apart."""
    convert(llama, tmp_path / "out", Options(format=fmt, layout="compressed-tensors"))
    theirs = logits(from_pretrained(tmp_path / "out"))
    same_bits(theirs, logits(fake_quantized(llama, fmt)))
    distance = (theirs - logits(from_pretrained(llama))).abs().max()
    true(distance > 0.1, "as good as not quantized")


def test_transformers_loads_an_fp8_kv_cache(tmp_path: Path, llama: Path) -> None:
    convert(llama, tmp_path / "out", Options(layout="compressed-tensors", kv_cache="fp8", activations="constant"))
    true(logits(from_pretrained(tmp_path / "out")).isfinite().all(), "not finite")


def test_transformers_runs_w4a4(tmp_path: Path, llama: Path) -> None:
    """In float32, where their activation scales are computed as ours are; in bfloat16 they round in between."""
    convert(llama, tmp_path / "out", Options(layout="compressed-tensors", activations="constant"))
    theirs = from_pretrained(tmp_path / "out")
    logits(theirs)  # decompresses
    found = logits(halfbyte.load(tmp_path / "out").float())
    close(logits(theirs.to(torch.float32)), found, 1e-5)
    true((found - logits(fake_quantized(llama, NVFP4()).float())).abs().max() > 0.1, "activations are not quantized")


def test_transformers_runs_mxfp8(tmp_path: Path, llama: Path) -> None:
    convert(llama, tmp_path / "out", Options(format=MXFP8(), layout="compressed-tensors"))
    theirs = logits(from_pretrained(tmp_path / "out"))
    close(theirs, logits(halfbyte.load(tmp_path / "out")), 2.0**-5)  # 2 units of bfloat16 at the largest logit, 3
    true((theirs - logits(from_pretrained(llama))).abs().max() > 0.1, "as good as not quantized")


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("name", ["dense", "tied", "moe", "mixtral", "mla"])
def test_transformers_loads_what_was_dequantized(tmp_path: Path, name: str, layout: Any) -> None:
    """An ordinary model again; its logits are those of `halfbyte.load`, which decodes by itself."""
    made = {
        "dense": models.dense(),
        "tied": models.dense(tied=True),
        "moe": models.moe(),
        "mixtral": models.mixtral(),
        "mla": models.mla(),
    }
    convert(made[name].save(tmp_path / "source"), tmp_path / "out", Options(layout=layout))
    dequantize(tmp_path / "out", tmp_path / "plain")
    same_bits(logits(from_pretrained(tmp_path / "plain")), logits(halfbyte.load(tmp_path / "out")))


def quantized_moe(where: Path, layout: Any, fmt: NVFP4) -> tuple[models.Tensors, dict[str, Tensor]]:
    """(tensors on disk, our decoded values by module) of a model whose experts were stacked."""
    source = models.stack(models.moe(shared="shared_experts")).save(where / "source", 3)
    convert(source, where / "out", Options(format=fmt, layout=layout))
    dequantize(where / "out", where / "plain", dtype="float32")
    found = models.read_all(where / "out")
    plain = models.read_all(where / "plain")
    modules = [name.removesuffix(".weight_scale") for name in found if name.endswith(".weight_scale")]
    equal(len(modules), 38)
    return found, {module: plain[f"{module}.weight"] for module in modules}


@pytest.mark.slow  # its import
@pytest.mark.parametrize("fmt", [NVFP4(), NVFP4(scale_rule="four_over_six")], ids=["amax", "4over6"])
def test_modelopt_decodes_every_expert(tmp_path: Path, fmt: NVFP4) -> None:
    """The same products in the same order."""
    qtensor = import_quietly("modelopt.torch.quantization.qtensor.nvfp4_tensor").NVFP4QTensor
    found, ours = quantized_moe(tmp_path, "modelopt", fmt)
    for module, values in ours.items():
        scales = {"scale": found[f"{module}.weight_scale"], "double_scale": found[f"{module}.weight_scale_2"]}
        theirs = qtensor(values.shape, torch.float32, found[f"{module}.weight"])
        equal(theirs.dequantize(torch.float32, **scales, block_sizes={-1: 16}), values, module)


@pytest.mark.parametrize("fmt", [NVFP4(), NVFP4(scale_rule="four_over_six")], ids=["amax", "4over6"])
def test_llm_dequant_decodes_every_expert(tmp_path: Path, fmt: NVFP4) -> None:
    """It divides by S_enc where we multiply by S_dec, itself rounded: at most 2 ulp of float32 apart."""
    decode = import_quietly("llm_dequant.nvfp4").dequantize_nvfp4
    found, ours = quantized_moe(tmp_path, "compressed-tensors", fmt)
    for module, values in ours.items():
        packed, scale = found[f"{module}.weight_packed"], found[f"{module}.weight_scale"]
        theirs = decode(packed, scale, found[f"{module}.weight_global_scale"], dtype=torch.float32)
        close(theirs, values, values.abs() * 2.0**-22, module)
