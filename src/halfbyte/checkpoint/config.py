"""The quantization part of config.json and hf_quant_config.json: written, and read back.

Source: CompressedTensorsConfig (its args and schemes refuse unknown keys) and ModelOpt's unified export, as read by
vLLM, SGLang, TensorRT-LLM and transformers in 2026.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..errors import CheckpointError
from ..formats import MXFP8, NVFP4, Format
from ..version import __version__
from .schema import Layout

KVCache = Literal["none", "fp8"]
Activations = Literal["none", "constant"]


@dataclass(frozen=True)
class Quantization:
    """What a config says of a checkpoint.

    Attributes:
        layout: whose names and JSON.
        format: NVFP4 or MXFP8; on disk neither the scale rule nor E shows, so those are the defaults when read.
        activations: whether activations are 4-bit too, with a static scale (always dynamic for MXFP8).
        kv_cache: whether the KV cache is FP8.
        ignore: patterns of the modules that are not quantized.
    """

    layout: Layout
    format: Format
    activations: bool
    kv_cache: bool
    ignore: tuple[str, ...]


def is_quantized(config: dict[str, Any]) -> str | None:
    """The quant_method that a model's config declares, wherever it hides; None for a high-precision model."""
    for part in (config, *(v for v in config.values() if isinstance(v, dict))):
        found = part.get("quantization_config") or part.get("compression_config")
        if isinstance(found, dict):
            return str(found.get("quant_method") or found.get("quant_algo") or "unknown")
    return None


def quantization_config(q: Quantization) -> dict[str, Any]:
    """The value of config.json's "quantization_config"."""
    return _modelopt(q) if q.layout == "modelopt" else _compressed_tensors(q)


def hf_quant_config(q: Quantization) -> dict[str, Any] | None:
    """The content of hf_quant_config.json, which TensorRT-LLM trusts; None for layouts without one."""
    if q.layout != "modelopt":
        return None
    return {
        "producer": {"name": "halfbyte", "version": __version__},
        "quantization": {
            "quant_algo": _algorithm(q),
            "kv_cache_quant_algo": "FP8" if q.kv_cache else None,
            "group_size": q.format.block_columns,
            "exclude_modules": list(q.ignore),
        },
    }


def _algorithm(q: Quantization) -> str:
    if isinstance(q.format, MXFP8):
        return "MXFP8"
    return "NVFP4" if q.activations else "W4A16_NVFP4"


def _modelopt(q: Quantization) -> dict[str, Any]:
    bits = 4 if isinstance(q.format, NVFP4) else 8
    args = {"num_bits": bits, "type": "float", "group_size": q.format.block_columns, "dynamic": False}
    inputs: dict[str, Any] | None = dict(args) if q.activations else None
    if isinstance(q.format, MXFP8):
        inputs = {**args, "dynamic": True}
    config: dict[str, Any] = {
        "quant_method": "modelopt",
        "quant_algo": _algorithm(q),
        "group_size": q.format.block_columns,
        "ignore": list(q.ignore),
        "config_groups": {"group_0": {"weights": args, "input_activations": inputs, "targets": ["Linear"]}},
        "producer": {"name": "halfbyte", "version": __version__},
    }
    if q.kv_cache:
        config["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "dynamic": False}
    return config


def _compressed_tensors(q: Quantization) -> dict[str, Any]:
    common = {"type": "float", "symmetric": True}
    if isinstance(q.format, NVFP4):
        name = "nvfp4-pack-quantized"
        args = {**common, "num_bits": 4, "strategy": "tensor_group", "group_size": 16, "dynamic": False}
        args["scale_dtype"] = "torch.float8_e4m3fn"
        inputs = {**args, "dynamic": "local"} if q.activations else None
    else:
        name = "mxfp8-quantized"
        args = {**common, "num_bits": 8, "strategy": "group", "group_size": 32, "dynamic": False}
        args["scale_dtype"] = "torch.uint8"
        inputs = {**args, "dynamic": True}
    group = {"format": name, "targets": ["Linear"], "weights": args, "input_activations": inputs}
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "ignore": list(q.ignore),
        "config_groups": {"group_0": {**group, "output_activations": None}},
    }
    if q.kv_cache:
        config["kv_cache_scheme"] = {**common, "num_bits": 8, "strategy": "tensor", "dynamic": False}
    return config


def read_quantization(config: dict[str, Any], where: str) -> Quantization:
    """Parse config.json's quantization_config.

    Raises:
        CheckpointError: there is none, or it describes a layout or format that halfbyte does not write.
    """
    found = config.get("quantization_config")
    if not isinstance(found, dict):
        raise CheckpointError(f"{where}: no quantization_config; this is not a quantized checkpoint")
    method = found.get("quant_method")
    ignore = found.get("ignore")
    if not isinstance(ignore, list) or not all(isinstance(pattern, str) for pattern in ignore):
        raise CheckpointError(f"{where}: quantization_config.ignore must be a list of strings")
    kv_cache = bool(found.get("kv_cache_scheme"))
    if method == "modelopt":
        algorithm = found.get("quant_algo")
        formats: dict[Any, Format] = {"NVFP4": NVFP4(), "W4A16_NVFP4": NVFP4(), "MXFP8": MXFP8()}
        if algorithm not in formats:
            raise CheckpointError(f"{where}: quant_algo {algorithm!r}; halfbyte reads {', '.join(formats)}")
        return Quantization("modelopt", formats[algorithm], algorithm == "NVFP4", kv_cache, tuple(ignore))
    if method == "compressed-tensors":
        names: dict[Any, Format] = {"nvfp4-pack-quantized": NVFP4(), "mxfp8-quantized": MXFP8()}
        groups = found.get("config_groups")
        if found.get("format") not in names or not isinstance(groups, dict) or len(groups) != 1:
            raise CheckpointError(
                f"{where}: format {found.get('format')!r}; halfbyte reads {', '.join(names)} with one config group"
            )
        fmt = names[found["format"]]
        (group,) = groups.values()
        inputs = isinstance(group, dict) and group.get("input_activations") is not None
        return Quantization("compressed-tensors", fmt, inputs and isinstance(fmt, NVFP4), kv_cache, tuple(ignore))
    raise CheckpointError(f"{where}: quant_method {method!r}; halfbyte reads 'modelopt' and 'compressed-tensors'")
