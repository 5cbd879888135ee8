"""The quantization part of config.json and hf_quant_config.json: written, and read back.

Source: CompressedTensorsConfig (its args and schemes refuse unknown keys) and ModelOpt's unified export, as read by
vLLM, SGLang, TensorRT-LLM and transformers in 2026.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from ..errors import CheckpointError
from ..formats import MXFP8, NVFP4, Format
from ..version import __version__
from .exclusion import excluded_by_compressed_tensors
from .schema import Layout

KVCache = Literal["none", "fp8", "fp8_calibrated"]
Activations = Literal["none", "constant", "calibrated"]


@dataclass(frozen=True)
class Group:
    """Weights of one format.

    Attributes:
        format: NVFP4 or MXFP8; on disk neither the scale rule nor E shows, so those are the defaults when read.
        targets: patterns of their modules as `exclusion_list` writes them, or ("Linear",) where there is one group.
    """

    format: Format
    targets: tuple[str, ...] = ("Linear",)


@dataclass(frozen=True)
class Quantization:
    """What a config says of a checkpoint.

    Attributes:
        layout: whose names and JSON.
        groups: formats; more than one where precision is mixed.
        activations: whether activations of NVFP4 weights are 4-bit too, with a static scale (always dynamic for MXFP8).
        kv_cache: whether the KV cache is FP8.
        ignore: patterns of the modules that are not quantized.
    """

    layout: Layout
    groups: tuple[Group, ...]
    activations: bool
    kv_cache: bool
    ignore: tuple[str, ...]

    def format_of(self, module: str) -> Format | None:
        """The format that the config gives to a module on disk, or None where it names none."""
        if len(self.groups) == 1:
            return self.groups[0].format
        if module in self._exact:
            return self._exact[module]
        found = (g for g in self.groups if excluded_by_compressed_tensors(module, (module,), g.targets))
        return next((group.format for group in found), None)

    @cached_property
    def _exact(self) -> dict[str, Format]:
        return {target: group.format for group in self.groups for target in group.targets}


_KEYS = ("quantization_config", "compression_config")


def declared_quantization(config: dict[str, Any]) -> dict[str, Any] | None:
    """What a model's config says of its quantization, wherever that hides; None for a high-precision model."""
    for part in (config, *(v for v in config.values() if isinstance(v, dict))):
        found = next((part[key] for key in _KEYS if part.get(key)), None)
        if isinstance(found, dict):
            return found
    return None


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """A config without any such part."""
    return {
        key: without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _KEYS
    }


def is_quantized(config: dict[str, Any]) -> str | None:
    """The quant_method that a model's config declares; None for a high-precision model."""
    found = declared_quantization(config)
    if found is None:
        return None
    method = str(found.get("quant_method") or found.get("quant_algo") or "unknown")
    return method if method.isprintable() else ascii(method)


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
            **_modelopt_algorithms(q),
            "kv_cache_quant_algo": "FP8" if q.kv_cache else None,
            "exclude_modules": list(q.ignore),
        },
    }


_ALGORITHMS: dict[Any, Format] = {"NVFP4": NVFP4(), "W4A16_NVFP4": NVFP4(), "MXFP8": MXFP8()}  # quant_algo → format


def _algorithm(fmt: Format, activations: bool) -> str:
    if isinstance(fmt, MXFP8):
        return "MXFP8"
    return "NVFP4" if activations else "W4A16_NVFP4"


def _modelopt_algorithms(q: Quantization) -> dict[str, Any]:
    """quant_algo and group_size; of mixed precision, by module too (vLLM takes the outer group_size for NVFP4)."""
    each = [{"quant_algo": _algorithm(g.format, q.activations), "group_size": g.format.block_columns} for g in q.groups]
    if len(q.groups) == 1:
        return each[0]
    layers = {module: each[i] for i, group in enumerate(q.groups) for module in group.targets}
    return {"quant_algo": "MIXED_PRECISION", "group_size": 16, "quantized_layers": layers}


def _modelopt(q: Quantization) -> dict[str, Any]:
    config: dict[str, Any] = {
        "quant_method": "modelopt",
        **_modelopt_algorithms(q),
        "ignore": list(q.ignore),
        "config_groups": {f"group_{i}": _modelopt_group(group, q.activations) for i, group in enumerate(q.groups)},
        "producer": {"name": "halfbyte", "version": __version__},
    }
    if q.kv_cache:
        config["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "dynamic": False}
    return config


def _modelopt_group(group: Group, activations: bool) -> dict[str, Any]:
    bits = 4 if isinstance(group.format, NVFP4) else 8
    args = {"num_bits": bits, "type": "float", "group_size": group.format.block_columns, "dynamic": False}
    inputs: dict[str, Any] | None = dict(args) if activations else None
    if isinstance(group.format, MXFP8):
        inputs = {**args, "dynamic": True}
    return {"weights": args, "input_activations": inputs, "targets": list(group.targets)}


def _compressed_tensors(q: Quantization) -> dict[str, Any]:
    groups = [_compressed_tensors_group(group, q.activations) for group in q.groups]
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": groups[0]["format"] if len(groups) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": list(q.ignore),
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
    }
    if q.kv_cache:
        config["kv_cache_scheme"] = {
            "type": "float",
            "symmetric": True,
            "num_bits": 8,
            "strategy": "tensor",
            "dynamic": False,
        }
    return config


def _compressed_tensors_group(group: Group, activations: bool) -> dict[str, Any]:
    args: dict[str, Any] = {"type": "float", "symmetric": True, "dynamic": False}
    inputs: dict[str, Any] | None
    if isinstance(group.format, NVFP4):
        name = "nvfp4-pack-quantized"
        args |= {"num_bits": 4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
        inputs = {**args, "dynamic": "local"} if activations else None
    else:
        name = "mxfp8-quantized"
        args |= {"num_bits": 8, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
        inputs = {**args, "dynamic": True}
    return {
        "format": name,
        "targets": list(group.targets),
        "weights": args,
        "input_activations": inputs,
        "output_activations": None,
    }


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
    if method == "modelopt":
        groups, activations = _read_modelopt(found, where)
    elif method == "compressed-tensors":
        groups, activations = _read_compressed_tensors(found, where)
    else:
        raise CheckpointError(f"{where}: quant_method {method!r}; halfbyte reads 'modelopt' and 'compressed-tensors'")
    layout: Layout = method
    return Quantization(layout, groups, activations, bool(found.get("kv_cache_scheme")), tuple(ignore))


def _read_modelopt(found: dict[str, Any], where: str) -> tuple[tuple[Group, ...], bool]:
    algorithm = found.get("quant_algo")
    if algorithm != "MIXED_PRECISION":
        if not isinstance(algorithm, str) or algorithm not in _ALGORITHMS:
            known = ", ".join((*_ALGORITHMS, "MIXED_PRECISION"))
            raise CheckpointError(f"{where}: quant_algo {algorithm!r}; halfbyte reads {known}")
        return (Group(_ALGORITHMS[algorithm]),), algorithm == "NVFP4"
    layers = found.get("quantized_layers")
    if not isinstance(layers, dict) or not layers:
        raise CheckpointError(f"{where}: MIXED_PRECISION needs quantized_layers, a mapping of modules")
    modules: dict[Any, list[str]] = {}
    for module, entry in layers.items():
        algorithm = entry.get("quant_algo") if isinstance(entry, dict) else None
        if not isinstance(algorithm, str) or algorithm not in _ALGORITHMS:
            raise CheckpointError(
                f"{where}: quantized_layers.{module}: quant_algo {algorithm!r}; halfbyte reads {', '.join(_ALGORITHMS)}"
            )
        modules.setdefault(algorithm, []).append(module)
    if len(modules) == 1 or {"NVFP4", "W4A16_NVFP4"} <= modules.keys():
        raise CheckpointError(f"{where}: MIXED_PRECISION of {' and '.join(modules)}; halfbyte reads NVFP4 with MXFP8")
    return tuple(Group(_ALGORITHMS[name], tuple(part)) for name, part in modules.items()), "NVFP4" in modules


def _read_compressed_tensors(found: dict[str, Any], where: str) -> tuple[tuple[Group, ...], bool]:
    names: dict[Any, Format] = {"nvfp4-pack-quantized": NVFP4(), "mxfp8-quantized": MXFP8()}
    name, config_groups = found.get("format"), found.get("config_groups")
    count = 2 if name == "mixed-precision" else 1
    if name not in (*names, "mixed-precision") or not isinstance(config_groups, dict) or len(config_groups) != count:
        raise CheckpointError(
            f"{where}: format {name!r}; halfbyte reads {', '.join(names)} with one config group, and mixed-precision "
            "with one of each"
        )
    groups: list[Group] = []
    activations = False
    for key, group in config_groups.items():
        group = group if isinstance(group, dict) else {}
        part = group.get("format") if count > 1 else name
        targets = group.get("targets") if count > 1 else ["Linear"]
        if (
            not isinstance(part, str)
            or part not in names
            or not isinstance(targets, list)
            or not all(isinstance(t, str) for t in targets)
        ):
            raise CheckpointError(f"{where}: config_groups.{key}: format {part!r} for targets {targets!r}")
        groups.append(Group(names[part], tuple(targets)))
        activations |= part == "nvfp4-pack-quantized" and group.get("input_activations") is not None
    if len({type(group.format) for group in groups}) != count:
        raise CheckpointError(f"{where}: mixed-precision with two groups of one format; halfbyte reads one of each")
    return tuple(groups), activations
