"""Megatron-LM's --te-precision-config-file: which layers get another format, by Megatron-Core's module names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import FormatError
from ..formats import MXFP8, NVFP4
from .document import Document, parse
from .training import LayerOverride, LayerRecipe, TrainingRecipe

_TYPE_KEY, _TYPE = "transformer_engine_config_type", "TEQuantizationParams"
_RECIPE_KEYS = {
    "fp8_quantization_recipe", "fp4_quantization_recipe", "custom_recipe_factory", "fp8_format",
    "override_quantized_autocast", "override_nonquantized_autocast", "tp_only_amax_red",
}  # fmt: skip


def read_precision_config(path: str | Path, default: TrainingRecipe) -> TrainingRecipe:
    """`default` with the overrides of a precision config; layers that no matcher selects keep the default.

    Args:
        path: the YAML file.
        default: what Megatron's --fp4-format and its environment say: its policy decides which layers are quantized
            at all (--first-last-layers-bf16 and the like), and a config "nvfp4" means its own formats.

    Raises:
        FormatError: with file, line and key: not the schema, or what halfbyte has no equal for: FP8 other than mxfp8,
            custom recipes, override_nonquantized_autocast, tp_only_amax_red, an evaluation recipe that is neither the
            training one nor empty.

    Source: megatron/core/quantization. Matchers are tried in their order and the first enabled one holds.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: cannot be read ({error})") from error
    documents = parse(text, str(path))
    if len(documents) != 1:
        raise FormatError(f"{path}: has {len(documents)} YAML documents; needs one")
    document = documents[0]
    _keys(document, (), {"configs", "matchers"})
    configs = {
        name: _config(document, ("configs", name), default) for name in _mapping(document, ("configs",), optional=True)
    }
    overrides: list[LayerOverride] = []
    for name, matcher in _mapping(document, ("matchers",), optional=True).items():
        key = ("matchers", name)
        _keys(document, key, {"type", "enabled", "pattern", "config"})
        if not isinstance(matcher.get("enabled", False), bool):
            raise document.error((*key, "enabled"), "needs true or false")
        if not matcher.get("enabled", False):
            continue
        if matcher.get("type") != "glob":
            raise document.error((*key, "type"), f"{matcher.get('type')!r}: Megatron knows 'glob'")
        if not isinstance(matcher.get("pattern"), str):
            raise document.error(key, "needs a pattern")
        if matcher.get("config") not in configs:
            raise document.error((*key, "config"), f"{matcher.get('config')!r} is none of {', '.join(configs)}")
        overrides.append(LayerOverride(configs[matcher["config"]], megatron=(matcher["pattern"],)))
    return replace(default, overrides=(*overrides, *default.overrides))


def _config(document: Document, key: tuple[str, ...], default: TrainingRecipe) -> LayerRecipe | None:
    _keys(document, key, {_TYPE_KEY, "training_recipe", "evaluation_recipe"})
    config = _mapping(document, key)
    if config.get(_TYPE_KEY) != _TYPE:
        raise document.error((*key, _TYPE_KEY), f"{config.get(_TYPE_KEY)!r}: needs {_TYPE!r}")
    if "training_recipe" not in config:
        raise document.error(key, "needs a training_recipe")
    training = _layer(document, (*key, "training_recipe"), default)
    if "evaluation_recipe" not in config:
        return training
    evaluation = _layer(document, (*key, "evaluation_recipe"), default)
    if evaluation == training:
        return training
    if evaluation is not None or training is None:
        raise document.error((*key, "evaluation_recipe"), "must be the training recipe, or empty for high precision")
    return replace(training, evaluation="high_precision")


def _layer(document: Document, key: tuple[str, ...], default: TrainingRecipe) -> LayerRecipe | None:
    _keys(document, key, _RECIPE_KEYS)
    recipe = _mapping(document, key)
    for refused in ("custom_recipe_factory", "override_nonquantized_autocast", "tp_only_amax_red"):
        if recipe.get(refused):
            raise document.error((*key, refused), "has no equal here; remove it")
    fp8, fp4 = recipe.get("fp8_quantization_recipe"), recipe.get("fp4_quantization_recipe")
    if fp8 is not None and fp4 is not None:
        raise document.error(key, "gives both fp8_quantization_recipe and fp4_quantization_recipe; remove one")
    if not recipe.get("override_quantized_autocast", True):
        return default.to_layer()
    if fp4 is not None:
        if fp4 != "nvfp4":
            raise document.error((*key, "fp4_quantization_recipe"), f"{fp4!r}: halfbyte has 'nvfp4'")
        if not any(isinstance(fmt, NVFP4) for fmt in (default.activations, default.weights)):
            raise document.error(
                (*key, "fp4_quantization_recipe"), "means the default recipe's formats, none of which is NVFP4"
            )
        return default.to_layer()
    if fp8 is None:
        return None
    if fp8 != "mxfp8" or recipe.get("fp8_format", "e4m3") != "e4m3":
        raise document.error((*key, "fp8_quantization_recipe"), f"{fp8!r}: halfbyte has 'mxfp8' with fp8_format e4m3")
    gradients = MXFP8() if default.backward == "quantized" else None
    return replace(default.to_layer(), activations=MXFP8(), weights=MXFP8(), gradients=gradients, hadamard=False)


def _mapping(document: Document, key: tuple[str, ...], optional: bool = False) -> Mapping[str, Any]:
    value: Any = document.data
    for part in key:
        value = value.get(part) if isinstance(value, dict) else None
    if value is None and optional:
        return {}
    if not isinstance(value, dict):
        raise document.error(key, f"needs a mapping; got {value!r}")
    return value


def _keys(document: Document, key: tuple[str, ...], known: set[str]) -> None:
    for name in _mapping(document, key):
        if name not in known:
            raise document.error((*key, name), f"unknown; known are {', '.join(sorted(known))}")
