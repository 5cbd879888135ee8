"""What a model's config says its weights are encoded as; whatever is not understood is refused by name.

Source: DeepSeek-V3's inference/fp8_cast_bf16.py, transformers' fp8 and mxfp4 integrations, vLLM's fp8 and modelopt
layers, compressed-tensors and ModelOpt's unified export, as of 2026.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ..config import declared_quantization
from ..files import read_json

Block = tuple[int | None, int | None]  # rows and columns under one scale; None: all of them

UNDERSTOOD = (
    "fp8 (DeepSeek's blocks, or one scale per tensor), mxfp8, mxfp4 (gpt-oss), modelopt (FP8, FP8_PB_WO, "
    "FP8_PER_CHANNEL_PER_TOKEN, MXFP8, NVFP4, MIXED_PRECISION of these) and compressed-tensors (FP8, MXFP8, MXFP4, "
    "NVFP4)"
)
STACKS = "*_blocks"
"""The elements of gpt-oss's experts."""
HF_QUANT_CONFIG = "hf_quant_config.json"


@dataclass(frozen=True)
class Encoding:
    """One way in which a weight may be stored.

    Attributes:
        what: its name for people.
        elements: the parameter that holds the elements, "weight" or "weight_packed", or `STACKS`.
        dtype: theirs: F8_E4M3, or U8 for two E2M1 codes per byte.
        scales: names that the block scale may have.
        block: what one scale is for.
        exponents: whether scales are E8M0; None where either may be.
        tensor_scale: the parameter that holds NVFP4's other scale.
        divides: whether that one divides.
    """

    what: str
    elements: str
    dtype: str
    scales: tuple[str, ...]
    block: Block
    exponents: bool | None = False
    tensor_scale: str | None = None
    divides: bool = False


@dataclass(frozen=True)
class Declared:
    """A config's claim: its quant_method, and the encodings that its weights may have under it."""

    method: str
    encodings: tuple[Encoding, ...]

    @property
    def what(self) -> str:
        """In words."""
        return f"{' and '.join(dict.fromkeys(e.what for e in self.encodings))} (quant_method {self.method})"

    @property
    def is_nvfp4(self) -> bool:
        """Whether weights may be 4-bit in the format that conversion writes."""
        return any(encoding.block == (1, 16) for encoding in self.encodings)


def read_declared(directory: Path, config: dict[str, Any]) -> Declared | None:
    """What the config, or hf_quant_config.json where the config is silent, says; None for a high-precision model.

    Raises:
        CheckpointError: it says something that is not understood.
    """
    where = f"{directory / 'config.json'}: quantization_config"
    found = declared_quantization(config)
    if found is None and (directory / HF_QUANT_CONFIG).exists():  # older exports of ModelOpt have no other
        where = f"{directory / HF_QUANT_CONFIG}: quantization"
        beside = read_json(directory / HF_QUANT_CONFIG).get("quantization")
        if isinstance(beside, dict) and beside.get("quant_algo"):
            found = {**beside, "quant_method": "modelopt"}
    if found is None:
        return None
    method = found.get("quant_method")
    readers = {"fp8": _fp8, "mxfp8": _mxfp8, "mxfp4": _mxfp4, "modelopt": _modelopt}
    if method is None and "config_groups" in found:
        method = "compressed-tensors"  # as its older releases wrote it
    if method == "compressed-tensors":
        return Declared(method, _compressed_tensors(found, where))
    if not isinstance(method, str) or method not in readers:
        raise CheckpointError(
            f"{where}: the model is quantized already ({_shown(method)}), and not in a way that is understood: "
            f"{UNDERSTOOD}. Convert the high-precision original"
        )
    return Declared(method, readers[method](found, where))


def _fp8(found: dict[str, Any], where: str) -> tuple[Encoding, ...]:
    size = found.get("weight_block_size")
    scales = ("weight_scale_inv", "weight_scale")
    if size is None:
        return (Encoding("FP8 with a scale per tensor", "weight", "F8_E4M3", scales, (None, None)),)
    block = _block_size(size, f"{where}.weight_block_size")
    what = "MXFP8" if block == (1, 32) else f"FP8 in blocks of {block[0]}×{block[1]}"
    return (Encoding(what, "weight", "F8_E4M3", scales, block, exponents=None),)


def _mxfp8(found: dict[str, Any], where: str) -> tuple[Encoding, ...]:
    if found.get("weight_block_size", [1, 32]) != [1, 32]:
        raise CheckpointError(f"{where}.weight_block_size is {found['weight_block_size']!r}; MXFP8's is [1, 32]")
    return (_MXFP8,)


def _mxfp4(found: dict[str, Any], where: str) -> tuple[Encoding, ...]:
    return (Encoding("MXFP4 experts", STACKS, "U8", ("*_scales",), (1, 32), exponents=True),)


_MXFP8 = Encoding("MXFP8", "weight", "F8_E4M3", ("weight_scale", "weight_scale_inv"), (1, 32), exponents=True)
_NVFP4 = Encoding("NVFP4", "weight", "U8", ("weight_scale",), (1, 16), tensor_scale="weight_scale_2")
_BY_TENSOR = Encoding("FP8 with a scale per tensor", "weight", "F8_E4M3", ("weight_scale",), (None, None))
_BY_ROW = Encoding("FP8 with a scale per output channel", "weight", "F8_E4M3", ("weight_scale",), (1, None))
_ALGORITHMS = {
    "FP8": _BY_TENSOR,
    "FP8_PER_CHANNEL_PER_TOKEN": _BY_ROW,
    "FP8_PB_WO": Encoding("FP8 in blocks of 128×128", "weight", "F8_E4M3", ("weight_scale",), (128, 128)),
    "MXFP8": _MXFP8,
    "NVFP4": _NVFP4,
    "W4A16_NVFP4": _NVFP4,
}


def _modelopt(found: dict[str, Any], where: str) -> tuple[Encoding, ...]:
    algorithm = found.get("quant_algo")
    each = {None: algorithm}
    if algorithm == "MIXED_PRECISION":
        layers = found.get("quantized_layers")
        if not isinstance(layers, dict) or not layers:
            raise CheckpointError(f"{where}: MIXED_PRECISION needs quantized_layers, a mapping of modules")
        each = {m: entry.get("quant_algo") if isinstance(entry, dict) else None for m, entry in layers.items()}
    for module, name in each.items():
        if not isinstance(name, str) or name not in _ALGORITHMS:
            of = f" of {module}" if module else ""
            raise CheckpointError(
                f"{where}: quant_algo {_shown(name)}{of} is not understood; known are {', '.join(_ALGORITHMS)}. "
                "Convert the high-precision original"
            )
    return tuple(dict.fromkeys(_ALGORITHMS[name] for name in each.values() if name is not None))


def _compressed_tensors(found: dict[str, Any], where: str) -> tuple[Encoding, ...]:
    groups = found.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError(f"{where}: compressed-tensors without config_groups; nothing says what its weights are")
    for key in ("sparsity_config", "transform_config"):
        if isinstance(found.get(key), dict) and found[key] and found[key].get("format") != "dense":
            raise CheckpointError(f"{where}.{key}: weights that are sparse or rotated are not understood")
    made = []
    for key, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        if weights is None:
            continue  # activations alone, or a scheme for the KV cache
        made.append(_scheme(weights, f"{where}.config_groups.{key}.weights"))
    if not made:
        raise CheckpointError(f"{where}: no group of config_groups says what weights are")
    return tuple(dict.fromkeys(made))


def _scheme(args: Any, where: str) -> Encoding:
    if not isinstance(args, dict):
        raise CheckpointError(f"{where} is {args!r}; expected a mapping")
    group = args.get("group_size")
    if not isinstance(group, int | None):
        raise CheckpointError(f"{where}.group_size is {_shown(group)}; expected a number")
    by_default = {None: "tensor", -1: "channel"}.get(group, "group")
    strategy = args.get("strategy") or by_default
    kind = (args.get("type", "int"), args.get("num_bits", 8), strategy)
    if not args.get("symmetric", True):
        raise CheckpointError(f"{where}: asymmetric weights are not understood; convert the high-precision original")
    is_mx = group == 32 and args.get("scale_dtype") in ("torch.uint8", "torch.float8_e8m0fnu")
    if kind == ("float", 8, "tensor"):
        return _BY_TENSOR
    if kind == ("float", 8, "channel"):
        return _BY_ROW
    if kind == ("float", 8, "block"):
        block = _block_size(args.get("block_structure"), f"{where}.block_structure")
        return Encoding(f"FP8 in blocks of {block[0]}×{block[1]}", "weight", "F8_E4M3", ("weight_scale",), block)
    if kind == ("float", 8, "group") and is_mx:
        return _MXFP8
    if kind == ("float", 4, "group") and group == 32:
        return Encoding("MXFP4", "weight_packed", "U8", ("weight_scale",), (1, 32), exponents=True)
    if kind == ("float", 4, "tensor_group") and group == 16:
        return Encoding(
            "NVFP4", "weight_packed", "U8", ("weight_scale",), (1, 16), tensor_scale="weight_global_scale", divides=True
        )
    words = f"{_shown(kind[0])} of {_shown(kind[1])} bits, strategy {_shown(kind[2])}, group_size {_shown(group)}"
    raise CheckpointError(
        f"{where}: {words} is not understood; known are {UNDERSTOOD}. Convert the high-precision original"
    )


def _block_size(value: Any, where: str) -> tuple[int, int]:
    good = isinstance(value, list) and len(value) == 2 and all(type(n) is int and 0 < n < 1 << 32 for n in value)
    if not good:
        raise CheckpointError(f"{where} is {_shown(value)}; expected two positive numbers")
    return value[0], value[1]


def _shown(value: Any) -> str:
    text = str(value)[:80]
    return text if text.isprintable() else ascii(text)
