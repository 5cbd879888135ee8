"""ModelOpt's PTQ recipes (`quant_cfg`) as recipes of ours: what halfbyte can do is mapped, the rest refused by name.

ModelOpt applies quant_cfg's entries in order, the last that matches a quantizer's name wins. Source: nvidia-modelopt
0.47, `modelopt.recipe` and the recipes in its package `modelopt_recipes`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import FormatError
from .imports import Placed, read

_CALIBRATION = {"layerwise", "skip_forward_without_activation_calib", "distributed_sync", "fused", "block_size"}
_MULTIPLIERS = ("start_multiplier", "stop_multiplier", "step_size")
_KV = "*[kv]_bmm_quantizer"
_PLACES = ("model.layers.0.self_attn", "")  # where a pattern may find a cache's quantizers, if not everywhere
_ROUTED = ("experts", "block_sparse_moe")
_MIXER_MLP = ("*.mixer.up_proj", "*.mixer.down_proj")
_E2M1, _E4M3, _E8M0 = ("e2m1", [2, 1]), ("e4m3", [4, 3]), ("e8m0", [8, 0])
Data = dict[str, Any]


def is_modelopt(data: Any) -> bool:
    """Whether a YAML file is a recipe of ModelOpt's."""
    return isinstance(data, dict) and bool(data.keys() & {"quantize", "quant_cfg", "auto_quantize"})


def translate(path: Path) -> Data:
    """A recipe of ours, as plain values.

    Raises:
        FormatError: naming the file, the line and the key that halfbyte cannot follow.
    """
    config = read(path)
    metadata = config.get("metadata", Placed())
    body = config.get("quantize", config)
    if not isinstance(metadata, Placed) or not isinstance(body, Placed):
        raise config.error("metadata and quantize must be mappings")
    kind = metadata.get("recipe_type", "ptq")
    if kind != "ptq":
        raise config.error(f"metadata.recipe_type: {kind}; halfbyte reads ptq")
    _known(body, {"algorithm", "quant_cfg", "metadata"} if body is config else {"algorithm", "quant_cfg"})
    if body is not config:
        _known(config, {"metadata", "quantize"})
    if not isinstance(body.get("quant_cfg"), list):
        raise body.error("quant_cfg: must be a list of quantizer_name and cfg")
    algorithm = _Algorithm.read(body.get("algorithm"), body)
    found = _Found()
    for entry in body["quant_cfg"]:
        found.apply(entry, algorithm)
    description = " ".join(str(metadata.get("description", path.stem)).split())
    return {"description": description, **found.recipe(body), **algorithm.ours}


def _known(data: Placed, keys: Iterable[str], prefix: str = "") -> None:
    if unknown := sorted(str(key) for key in data.keys() - set(keys)):
        raise data.error(f"{prefix}{unknown[0]}: not supported by halfbyte")


@dataclass(frozen=True)
class _Algorithm:
    """`static`: keys of our weights where blocks are scaled statically. `multipliers`: those of method mse."""

    static: Data
    ours: Data = field(default_factory=dict)
    multipliers: tuple[Any, ...] = ()

    @classmethod
    def read(cls, data: Any, body: Placed) -> _Algorithm:
        if not isinstance(data, Placed):
            place, data = body.place, Placed(method=data)
            data.place = place
        method = data.get("method")
        sweep = {"method", "fp8_scale_sweep", *_MULTIPLIERS, *_CALIBRATION}
        if method in (None, "max"):
            _known(data, {"method", *_CALIBRATION}, "algorithm.")
            return cls({})
        if method == "gptq":
            _known(data, {"method", "perc_damp", *_CALIBRATION}, "algorithm.")
            return cls({}, {"algorithm": {"method": "gptq", "damping": data.get("perc_damp", 0.01)}})
        if method in ("mse", "local_hessian"):
            _known(data, sweep, "algorithm.")
            if data.get("fp8_scale_sweep"):
                return cls({"scale_rule": "search", "error": "mse" if method == "mse" else "hessian"})
            multipliers = tuple(data.get(key) for key in _MULTIPLIERS)
            if method == "mse" and multipliers == (1.0, 1.5, 0.5):
                return cls({}, {}, multipliers)
            raise data.error(
                f"algorithm.fp8_scale_sweep: {data.get('fp8_scale_sweep', False)}; halfbyte does not try multiples of "
                "the maximum, but finds the best of all scales: set it to true"
            )
        raise data.error(f"algorithm.method: {method}; halfbyte knows max, mse, local_hessian and gptq")


@dataclass
class _Found:
    """What the entries so far say. Weights and inputs by glob over modules, in the order in which they win."""

    weights: dict[str, Data] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)  # "calibrated", "constant" or "mxfp8"
    places: dict[str, Placed] = field(default_factory=dict)
    disabled: list[str] = field(default_factory=list)
    kv_cache: str = "none"
    base: bool = False

    def apply(self, entry: Any, algorithm: _Algorithm) -> None:
        if not isinstance(entry, Placed) or not isinstance(entry.get("quantizer_name"), str):
            raise FormatError(f"{getattr(entry, 'place', entry)}: quantizer_name: is missing")
        name: str = entry["quantizer_name"]
        _known(entry, {"quantizer_name", "cfg", "enable", "parent_class"}, f"{name}: ")
        cfg = entry.get("cfg")
        if entry.get("enable", True) is False:
            self._disable(name, entry)
        elif not isinstance(cfg, Placed) or "parent_class" in entry:
            key = "parent_class" if "parent_class" in entry else "cfg"
            raise entry.error(f"{name}: {key}: {entry.get(key)}; halfbyte needs a mapping cfg for all classes")
        elif not self.base:
            raise entry.error(f"{name}: quant_cfg must begin with quantizer_name '*', enable false")
        elif name == _KV:
            self.kv_cache = _kv_cache(cfg, entry)
        elif self.disabled:
            raise entry.error(f"{name}: enabled after {self.disabled[-1]} was disabled; halfbyte wants those last")
        elif (glob := _modules(name, "weight_quantizer")) is not None:
            _override(self.weights, glob, _weights(cfg, entry, algorithm))
            self.places[glob] = entry
        elif (glob := _modules(name, "input_quantizer")) is not None:
            _override(self.inputs, glob, _input(cfg, entry))
            self.places.setdefault(glob, entry)
        else:
            raise entry.error(f"quantizer_name: {name}; halfbyte quantizes weights, inputs and the KV cache of Linears")

    def _disable(self, name: str, entry: Placed) -> None:
        caches = [fnmatch.fnmatchcase(f"{place}.{part}_bmm_quantizer", name) for place in _PLACES for part in "kv"]
        if "parent_class" in entry:
            if "Linear" in str(entry["parent_class"]):
                raise entry.error(f"{name}: parent_class: {entry['parent_class']}; halfbyte selects by name")
        elif name == "*":
            for found in (self.weights, self.inputs, self.places, self.disabled):
                found.clear()
            self.kv_cache, self.base = "none", True
        elif all(caches):
            self.kv_cache = "none"
        elif any(caches) and self.kv_cache != "none":
            raise entry.error(f"{name}: leaves a part of the KV cache out; halfbyte's is FP8 as a whole, or not at all")
        elif _modules(name, "input_quantizer") == "*":
            self.inputs.clear()
        elif name.endswith("_quantizer"):
            if "bmm" not in name and "output" not in name:
                raise entry.error(f"quantizer_name: {name}; halfbyte leaves out whole modules only")
        else:
            self.disabled.append(name)

    def recipe(self, body: Placed) -> Data:
        """Weights, overrides, activations, kv_cache and policy of ours."""
        if not self.weights:
            raise body.error("quant_cfg: quantizes no weight")
        if unused := [glob for glob in self.inputs if glob not in self.weights]:
            raise self.places[unused[0]].error(f"input_quantizer of {unused[0]}: its weights are not quantized")
        activations = {self._activations(glob) for glob in self.weights} - {"mxfp8"}
        if len(activations) > 1:
            raise body.error(f"quant_cfg: NVFP4 inputs both {' and '.join(sorted(activations))}; halfbyte has one kind")
        policy: Data = {"ignore_if_present": self.disabled} if self.disabled else {}
        globs = list(self.weights)
        if "*" in globs:
            if not any(fnmatch.fnmatchcase("lm_head.", name) or "lm_head" in name for name in self.disabled):
                raise body.error("quant_cfg: quantizes lm_head, which halfbyte leaves alone: disable '*lm_head*'")
            base = self.weights["*"]
            later = globs[globs.index("*") + 1 :]
            overrides = [{"match": [glob], "weights": self.weights[glob]} for glob in reversed(later)]
        else:
            base, overrides = self.weights[globs[0]], []
            policy["only"] = self._only(globs)
        found: Data = {"weights": base, "policy": policy, "kv_cache": self.kv_cache}
        found["activations"] = activations.pop() if activations else "none"
        return found | ({"overrides": overrides} if overrides else {})

    def _activations(self, glob: str) -> str:
        kind = self.weights[glob]["format"]
        mode = self.inputs.get(glob, self.inputs.get("*", "none"))
        if (kind == "mxfp8") is not (mode == "mxfp8"):
            raise self.places[glob].error(f"input_quantizer of {glob}: {mode}, with {kind} weights; no engine has that")
        return mode

    def _only(self, globs: list[str]) -> str:
        others = [glob for glob in globs if not any(part in glob for part in _ROUTED) or "shared" in glob]
        if odd := [glob for glob in others if glob not in ("*mlp*", *_MIXER_MLP)]:
            raise self.places[odd[0]].error(f"weight_quantizer of {odd[0]}: halfbyte selects all, mlp or experts")
        if any(self.weights[glob] != self.weights[globs[0]] for glob in globs):
            raise self.places[globs[-1]].error("weight_quantizer: two formats need one for '*' that others override")
        return "mlp" if "*mlp*" in others else "routed_experts"


def _override(found: dict[str, Any], glob: str, value: Any) -> None:
    """The entry wins over all before it that it matches too; of those that it may match in part, all are kept."""
    if glob == "*":
        found.clear()
    found.pop(glob, None)
    found[glob] = value


def _modules(name: str, quantizer: str) -> str | None:
    """The glob over modules in one over quantizers, or None where it is about another quantizer."""
    stem, found, rest = name.partition(quantizer)
    return stem.removesuffix(".") if found and not rest.strip("*") and not stem.endswith("_") else None


def _numbers(cfg: Placed, entry: Placed, also: Iterable[str] = ()) -> tuple[Any, Any]:
    """(num_bits, block_sizes)"""
    name = entry["quantizer_name"]
    if unknown := sorted(cfg.keys() - {"num_bits", "block_sizes", "effective_bits", "axis", *also}):
        raise entry.error(f"{name}: cfg.{unknown[0]}: not supported by halfbyte")
    sizes = cfg.get("block_sizes") or {}
    if not isinstance(sizes, dict):
        raise entry.error(f"{name}: cfg.block_sizes: must be a mapping; got {sizes!r}")
    return cfg.get("num_bits"), dict(sizes)


def _kind(cfg: Placed, entry: Placed, also: Iterable[str] = ()) -> tuple[str, Any, bool]:
    """("nvfp4" or "mxfp8", block type, four_over_six)."""
    bits, sizes = _numbers(cfg, entry, also)
    size, kind, scale = (sizes.pop(key, None) for key in (-1, "type", "scale_bits"))
    four_over_six = bool(sizes.pop("four_over_six", False))
    if not sizes and bits in _E2M1 and size == 16 and scale in _E4M3 and kind in ("static", "dynamic"):
        return "nvfp4", kind, four_over_six
    if not sizes and bits in _E4M3 and size == 32 and scale in _E8M0 and kind == "dynamic":
        return "mxfp8", kind, False
    raise entry.error(
        f"{entry['quantizer_name']}: cfg.num_bits {bits}, block_sizes {dict(cfg.get('block_sizes') or {}) or None}; "
        "halfbyte writes NVFP4 (e2m1, blocks of 16 under e4m3) and MXFP8 (e4m3, blocks of 32 under e8m0)"
    )


def _weights(cfg: Placed, entry: Placed, algorithm: _Algorithm) -> Data:
    kind, scaling, four_over_six = _kind(cfg, entry)
    if kind == "mxfp8":
        return {"format": "mxfp8"}
    if four_over_six is not bool(algorithm.multipliers):
        need = f"{', '.join(_MULTIPLIERS)} 1.0, 1.5, 0.5"
        raise entry.error(f"{entry['quantizer_name']}: cfg.block_sizes.four_over_six goes with method mse, {need}")
    if four_over_six:
        return {"format": "nvfp4", "scale_rule": "four_over_six", "error": "mse"}
    return {"format": "nvfp4", **(algorithm.static if scaling == "static" else {})}


def _input(cfg: Placed, entry: Placed) -> str:
    kind, scaling, _ = _kind(cfg, entry, ("constant_amax",))
    if kind == "mxfp8":
        return "mxfp8"
    amax = cfg.get("constant_amax")
    if scaling != "dynamic" or amax not in (None, 2688.0):
        raise entry.error(
            f"{entry['quantizer_name']}: cfg.constant_amax {amax}, {scaling} blocks; halfbyte scales inputs "
            "dynamically, under a calibrated amax or 2688"
        )
    return "calibrated" if amax is None else "constant"


def _kv_cache(cfg: Placed, entry: Placed) -> str:
    bits, sizes = _numbers(cfg, entry, ("use_constant_amax",))
    if bits not in _E4M3 or sizes:
        raise entry.error(f"{_KV}: cfg.num_bits {bits}; halfbyte's KV cache is FP8 (e4m3) with one scale")
    return "fp8" if cfg.get("use_constant_amax") else "fp8_calibrated"
