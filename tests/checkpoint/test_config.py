"""config.json and hf_quant_config.json, key by key, and as the compressed-tensors library reads them."""

import copy
import importlib
import warnings
from typing import Any

import pytest

from halfbyte import MXFP8, NVFP4, CheckpointError, __version__
from halfbyte.checkpoint.config import (
    Group,
    Quantization,
    hf_quant_config,
    is_quantized,
    quantization_config,
    read_quantization,
)
from halfbyte.checkpoint.schema import LAYOUTS, Layout
from halfbyte.formats import Format

from ..check import equal, true

IGNORE = ("lm_head", "model.layers.0.mlp.gate")
PRODUCER = {"name": "halfbyte", "version": __version__}
ALL = [
    (layout, fmt, activations, kv_cache)
    for layout in LAYOUTS
    for fmt in (NVFP4(), MXFP8())
    for activations in (False, True)
    for kv_cache in (False, True)
    if isinstance(fmt, NVFP4) or not activations
]


def quantization(layout: Layout, fmt: Format, activations: bool = False, kv_cache: bool = False) -> Quantization:
    return Quantization(layout, (Group(fmt),), activations, kv_cache, IGNORE)


def test_modelopt_nvfp4() -> None:
    args = {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": False}
    wanted: dict[str, Any] = {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "group_size": 16,
        "ignore": list(IGNORE),
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False},
        "config_groups": {"group_0": {"weights": args, "input_activations": args, "targets": ["Linear"]}},
        "producer": PRODUCER,
    }
    equal(quantization_config(quantization("modelopt", NVFP4(), True, True)), wanted)
    wanted["quant_algo"] = "W4A16_NVFP4"
    wanted["config_groups"]["group_0"]["input_activations"] = None
    del wanted["kv_cache_scheme"]
    equal(quantization_config(quantization("modelopt", NVFP4())), wanted)


@pytest.mark.parametrize(
    ("fmt", "activations", "kv_cache", "algorithm", "group_size", "kv"),
    [
        (NVFP4(), True, True, "NVFP4", 16, "FP8"),
        (NVFP4(), False, False, "W4A16_NVFP4", 16, None),
        (MXFP8(), False, False, "MXFP8", 32, None),
    ],
)
def test_hf_quant_config(
    fmt: Format, activations: bool, kv_cache: bool, algorithm: str, group_size: int, kv: Any
) -> None:
    """All three keys that vLLM insists on, whatever their value."""
    values = {"quant_algo": algorithm, "group_size": group_size, "kv_cache_quant_algo": kv}
    found = hf_quant_config(quantization("modelopt", fmt, activations, kv_cache))
    equal(found, {"producer": PRODUCER, "quantization": {**values, "exclude_modules": list(IGNORE)}})


def test_compressed_tensors_nvfp4() -> None:
    common = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    weights = {**common, "dynamic": False, "scale_dtype": "torch.float8_e4m3fn"}
    group = {"format": "nvfp4-pack-quantized", "targets": ["Linear"], "output_activations": None, "weights": weights}
    wanted: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "ignore": list(IGNORE),
        "config_groups": {"group_0": {**group, "input_activations": {**weights, "dynamic": "local"}}},
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False},
    }
    equal(quantization_config(quantization("compressed-tensors", NVFP4(), True, True)), wanted)
    wanted["config_groups"]["group_0"]["input_activations"] = None
    del wanted["kv_cache_scheme"]
    equal(quantization_config(quantization("compressed-tensors", NVFP4())), wanted)
    equal(hf_quant_config(quantization("compressed-tensors", NVFP4())), None)


def test_mxfp8() -> None:
    found = quantization_config(quantization("modelopt", MXFP8()))
    equal((found["quant_algo"], found["group_size"]), ("MXFP8", 32))
    found = quantization_config(quantization("compressed-tensors", MXFP8()))
    args = found["config_groups"]["group_0"]["weights"]
    equal(found["format"], "mxfp8-quantized")
    equal((args["strategy"], args["group_size"], args["num_bits"]), ("group", 32, 8))
    equal(args["scale_dtype"], "torch.uint8")


@pytest.mark.parametrize(("layout", "fmt", "activations", "kv_cache"), ALL)
def test_read_back(layout: Layout, fmt: Format, activations: bool, kv_cache: bool) -> None:
    written = quantization(layout, fmt, activations, kv_cache)
    equal(read_quantization({"quantization_config": quantization_config(written)}, "here"), written)


@pytest.mark.parametrize(("fmt", "activations", "kv_cache"), [row[1:] for row in ALL if row[0] != "modelopt"])
def test_their_library_reads_it(fmt: Format, activations: bool, kv_cache: bool) -> None:
    """It refuses unknown keys in args and schemes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, at import
        library = importlib.import_module("compressed_tensors.quantization")
    data = quantization_config(quantization("compressed-tensors", fmt, activations, kv_cache))
    parsed = library.QuantizationConfig.model_validate(copy.deepcopy(data))
    scheme = parsed.config_groups["group_0"]
    equal((parsed.format, scheme.weights.num_bits), (data["format"], 4 if fmt == NVFP4() else 8))
    equal(scheme.input_activations is not None, activations or fmt == MXFP8())
    equal((parsed.kv_cache_scheme is not None, parsed.ignore), (kv_cache, list(IGNORE)))


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"text_config": {"quantization_config": {"quant_method": "gptq"}}}, "gptq"),
        ({"compression_config": {"quant_algo": "INT8"}}, "INT8"),
        ({"quantization_config": {"bits": 4}}, "unknown"),
        ({"quantization_config": None, "text_config": {}}, None),
        ({}, None),
    ],
)
def test_is_quantized(config: dict[str, Any], method: str | None) -> None:
    equal(is_quantized(config), method)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "here: no quantization_config"),
        ({"quant_method": "awq"}, "quant_method 'awq'; halfbyte reads"),
        ({"quant_algo": "FP8"}, "quant_algo 'FP8'; halfbyte reads NVFP4, W4A16_NVFP4, MXFP8"),
        ({"ignore": "lm_head"}, "ignore must be a list of strings"),
        ({"ignore": None}, "ignore must be a list of strings"),
    ],
)
def test_read_refuses(change: dict[str, Any] | None, message: str) -> None:
    data = quantization_config(quantization("modelopt", NVFP4()))
    with pytest.raises(CheckpointError) as caught:
        read_quantization({} if change is None else {"quantization_config": data | change}, "here")
    true(message in str(caught.value), str(caught.value))


@pytest.mark.parametrize("change", [{"format": "pack-quantized"}, {"config_groups": {}}, {"config_groups": None}])
def test_read_refuses_other_compressed_tensors(change: dict[str, Any]) -> None:
    data = quantization_config(quantization("compressed-tensors", NVFP4()))
    with pytest.raises(CheckpointError, match="halfbyte reads nvfp4-pack-quantized, mxfp8-quantized with one"):
        read_quantization({"quantization_config": data | change}, "here")
