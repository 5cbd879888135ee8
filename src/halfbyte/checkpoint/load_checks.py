"""The conditions on names, config keys and exclusion behind `loader_rules.RULES`, seen from one engine."""

from __future__ import annotations

from collections.abc import Iterator

from ..formats import MXFP8, NVFP4
from ..names import Name
from .load_case import Case
from .plan import text_config
from .schema import SCALE_PARAMETERS
from .shards import TensorInfo
from .survey import SIDECAR, Weight

Places = Iterator[tuple[str, str]]  # where, and what is wrong there


def unknown_tensors(case: Case) -> Places:
    """Weights in few bits that are of no format under this config."""
    if not case.mixed:
        for tensor, what in case.survey.unknown.items():
            yield tensor, f"is {what}, whatever the config says"


def other_formats(case: Case) -> Places:
    """The same under a config of mixed precision, which may well mean them."""
    if case.mixed:
        for tensor, what in case.survey.unknown.items():
            yield tensor, f"is {what}; this cannot judge it"


def other_layout(case: Case) -> Places:
    """Weights under the names of another layout than the config declares."""
    method = case.declared.method
    for weight in case.survey.weights:
        layout, mxfp8 = weight.spelling.layout, isinstance(weight.format, MXFP8)
        shared = mxfp8 and layout == "modelopt" and method == "compressed-tensors"
        # SGLang renames one to the other; TensorRT-LLM is not known to mind.
        renamed = mxfp8 and {layout, method} == {"modelopt", "mxfp8"} and case.engine in ("sglang", "tensorrt-llm")
        if layout != method and not shared and not renamed:
            yield weight.tensor(weight.spelling.elements), f"has the names of {layout}; the config says {method}"


def other_format(case: Case) -> Places:
    """NVFP4 where the config says MXFP8, or the other way round."""
    for weight in case.survey.weights:
        if not case.mixed and (kind := type(weight.format).__name__) not in case.declared.scheme.upper():
            yield weight.tensor(weight.spelling.elements), f"is {kind}; the config says {case.declared.scheme}"


def surplus_scales(case: Case) -> Places:
    """Scales that a layer has no parameter for."""
    tensors, scheme = case.survey.checkpoint.tensors, case.declared.scheme
    unused = {".input_global_scale"} if scheme == "compressed-tensors NVFP4 W4A16" else set()
    for weight in case.survey.weights:
        spelling = weight.spelling
        own = {spelling.elements, spelling.block_scale, spelling.tensor_scale, spelling.input_scale} - unused
        for suffix in sorted({f".{parameter}" for parameter in SCALE_PARAMETERS - KV_SCALES} - own):
            if weight.tensor(suffix) in tensors:
                yield weight.tensor(suffix), f"is no parameter of a layer in {scheme}"


KV_SCALES = frozenset({"k_scale", "v_scale"})


def no_tensor_scale(case: Case) -> Places:
    """A weight without its tensor scale."""
    for weight in case.survey.weights:
        suffix = weight.spelling.tensor_scale
        if suffix is not None and weight.tensor(suffix) not in case.survey.checkpoint.tensors:
            yield weight.tensor(suffix), "is missing"


def no_scalars(case: Case) -> Places:
    """Tensor scales with more than one value."""
    for tensor, info, weight in _scalars(case):
        if len(weight.shape) == 2 and info.shape not in ((), (1,)):
            yield tensor, f"is {info.dtype} {list(info.shape)}; one float32 is asked for"


def rounded_scalars(case: Case) -> Places:
    """Tensor scales in another dtype than float32."""
    for tensor, info, _ in _scalars(case):
        if info.dtype != "F32":
            yield tensor, f"is {info.dtype}; engines cast it to float32, as it was rounded"


def _scalars(case: Case) -> Iterator[tuple[str, TensorInfo, Weight]]:
    for weight in case.survey.weights:
        for suffix in (weight.spelling.tensor_scale, weight.spelling.input_scale):
            if (info := case.survey.checkpoint.tensors.get(weight.tensor(suffix))) is not None:
                yield weight.tensor(suffix), info, weight


# (engine, scheme), or with the file where it matters → keys without which the engine's config class raises.
REQUIRED: dict[tuple[str, ...], tuple[str, ...]] = {
    ("vllm", "modelopt NVFP4", SIDECAR): ("group_size", "kv_cache_quant_algo", "exclude_modules"),
    ("vllm", "modelopt W4A16_NVFP4", SIDECAR): ("group_size", "kv_cache_quant_algo", "exclude_modules"),
    ("vllm", "modelopt MXFP8", SIDECAR): ("kv_cache_quant_algo", "exclude_modules"),
    ("sglang", "modelopt NVFP4", SIDECAR): ("group_size",),
    ("sglang", "modelopt W4A16_NVFP4", SIDECAR): ("group_size",),
    ("sglang", "mxfp8"): ("activation_scheme",),
    ("transformers", "mxfp8"): ("weight_block_size",),
}


def required_keys(case: Case) -> Places:
    """Keys without which the engine's config class raises, and values that it cannot take."""
    raw, file, scheme = case.declared.raw, case.declared.file, case.declared.scheme
    for key in REQUIRED.get((case.engine, scheme, file), REQUIRED.get((case.engine, scheme), ())):
        if key not in raw:
            yield file, f"{key} is missing"
    if scheme == "mxfp8":
        if raw.get("activation_scheme", "dynamic") != "dynamic" or raw.get("weight_block_size", [1, 32]) != [1, 32]:
            yield file, "mxfp8 needs activation_scheme 'dynamic' and weight_block_size [1, 32]"
    elif scheme == "modelopt MIXED_PRECISION" and not raw.get("quantized_layers"):
        yield file, "MIXED_PRECISION needs quantized_layers, a mapping of modules that is not empty"
    key = "exclude_modules" if file == SIDECAR else "ignore"
    value = raw.get(key, [])
    if case.declared.method == "modelopt" and (
        (case.engine == "vllm" and not isinstance(value, list)) or (case.engine == "sglang" and value is None)
    ):
        yield file, f"{key} is {value!r}, not a list"


def no_input_scale(case: Case) -> Places:
    """4-bit activations without a static scale; of experts, `experts_incomplete` tells more."""
    if case.declared.scheme not in _STATIC or (case.engine == "vllm" and _weight_only_groups(case)):
        return
    for weight in case.survey.weights:
        suffix = weight.spelling.input_scale
        if suffix is not None and weight.tensor(suffix) not in case.survey.checkpoint.tensors:
            yield weight.tensor(suffix), f"is missing, but {case.declared.scheme} quantizes activations"


_STATIC = ("modelopt NVFP4", "compressed-tensors NVFP4 W4A4")


def _weight_only_groups(case: Case) -> bool:
    """vLLM takes "NVFP4" for weight-only where no config group has input_activations."""
    groups = case.declared.raw.get("config_groups")
    if not isinstance(groups, dict) or not groups or case.declared.method != "modelopt":
        return False
    return all(isinstance(group, dict) and group.get("input_activations") is None for group in groups.values())


def packed_but_excluded(case: Case) -> Places:
    """NVFP4 on disk, but the engine takes it for a layer in high precision."""
    yield from _excluded(case, NVFP4)


def mxfp8_but_excluded(case: Case) -> Places:
    """The same for MXFP8, whose elements fit where high precision is expected."""
    yield from _excluded(case, MXFP8)


def _excluded(case: Case, kind: type) -> Places:
    names = (weight.name for weight in case.survey.weights if isinstance(weight.format, kind))
    for layer, members in dict.fromkeys(map(case.layer, names)):
        if not case.quantized_by_config(layer, members):
            yield layer, f"is quantized, but {case.culprit(layer, members)}"


def kept_for_packed(case: Case) -> Places:
    """In high precision on disk, but the engine expects packed weights and scales."""
    if not case.expects_mxfp8:
        yield from _kept(case)


def kept_for_mxfp8(case: Case) -> Places:
    """The same under MXFP8: high precision fits where 8-bit elements are expected, and is cast."""
    if case.expects_mxfp8:
        yield from _kept(case)


def _kept(case: Case) -> Places:
    names = (name for name in case.survey.kept if not _built_plain(case, name))
    for layer, members in dict.fromkeys(map(case.layer, names)):
        if case.quantized_by_config(layer, members):
            yield layer, "is in high precision, but nothing in the ignore list names it"


ROUTERS = {"vllm": ("Qwen3MoeForCausalLM", "Lfm2MoeForCausalLM")}
"""Engine → architectures whose code quantizes routers unless they are named; all others' builds them plain."""


def _built_plain(case: Case, name: Name) -> bool:
    """Routers that the model's code never quantizes, whatever the config says."""
    if name.kind != "router":
        return False
    if case.engine == "transformers":
        return name.leaf in ("gate", "router")  # no Linear there
    return not case.architectures & frozenset(ROUTERS.get(case.engine, ()))


def routers_not_named(case: Case) -> Places:
    """Routers that only the model's code keeps out."""
    for name in case.survey.kept:
        if _built_plain(case, name) and case.quantized_by_config(*case.layer(name)):
            yield name.module, "is not in the ignore list; most models' code, but not all, leaves routers alone"


def partly_excluded(case: Case) -> Places:
    """A fused layer of which the list names some parts."""
    for name in (*(weight.name for weight in case.survey.weights), *case.survey.kept):
        layer, members = case.layer(name)
        named = case.named_parts(members)
        whole = case.engine == "vllm" and layer in case.declared.ignore
        if 0 < len(named) < len(members) and not whole and name.module == members[0]:
            yield layer, f"the ignore list names {', '.join(named)}, but not its other parts"


def tied_lm_head(case: Case) -> Places:
    """An lm_head that is the embedding, and that nothing keeps from being quantized."""
    config = text_config(case.survey.checkpoint.config)
    tied = config.get("tie_word_embeddings", case.survey.checkpoint.config.get("tie_word_embeddings"))
    built = case.engine != "vllm" or not any(name.startswith(NO_LM_HEAD) for name in case.architectures)
    if tied is True and built and "lm_head" not in case.modules and case.quantized_by_config("lm_head", ("lm_head",)):
        yield "lm_head", "is tied to the embedding, but the ignore list does not name it"


NO_LM_HEAD = ("Gemma2", "Gemma3n", "Cohere")
"""Families for which vLLM builds none: the embedding itself gives the logits."""


def mixture_without_nvfp4(case: Case) -> Places:
    """A mixture that SGLang takes for W4AFP8."""
    layers = case.declared.raw.get("quantized_layers")
    if case.declared.scheme == "modelopt MIXED_PRECISION" and isinstance(layers, dict):
        names = {str(entry.get("quant_algo")).upper() for entry in layers.values() if isinstance(entry, dict)}
        if not names & {"NVFP4", "W4A16_NVFP4"}:
            yield case.declared.file, f"mixes {', '.join(sorted(names)) or 'nothing'} without NVFP4"


def mxfp8_groups(case: Case) -> Places:
    """Config groups in MXFP8."""
    groups = case.declared.raw.get("config_groups")
    for key, group in groups.items() if isinstance(groups, dict) else ():
        name = group.get("format") or case.declared.raw.get("format") if isinstance(group, dict) else None
        if case.declared.method == "compressed-tensors" and name == "mxfp8-quantized":
            yield case.declared.file, f"config_groups.{key} is mxfp8-quantized, for which there is no scheme"
