"""The conditions behind `loaders.RULES`: where a checkpoint breaks each of them, seen from one engine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..formats import MXFP8, NVFP4
from .load_case import Case
from .plan import text_config
from .survey import SIDECAR, Weight

Places = Iterator[tuple[str, str]]  # where, and what is wrong there

_COLUMN = frozenset({"q_proj", "k_proj", "v_proj", "query", "key", "value", "wq", "wk", "wv", "gate_proj", "up_proj"})
_COLUMN |= {"w1", "w3", "q_b_proj", "kv_b_proj", "qkv_proj", "gate_up_proj", "fc1", "in_proj_qkv", "in_proj_z"}
_ROW = frozenset({"o_proj", "down_proj", "w2", "wo", "out_proj", "fc2"})
MARLIN_SHARE = 0.01
"""Flushed blocks beyond this share of a layer change its output; below, they are far under the layer's maximum."""


def unknown_tensors(case: Case) -> Places:
    """Weights in few bits that are of no format under this config."""
    for tensor, what in case.survey.unknown.items():
        yield tensor, f"is {what}, whatever the config says"


def other_layout(case: Case) -> Places:
    """Weights under the names of another layout, or of another format, than the config declares."""
    method, scheme = case.declared.method, case.declared.scheme
    for weight in case.survey.weights:
        spelling = weight.spelling
        shared = isinstance(weight.format, MXFP8) and spelling.layout == "modelopt" and method == "compressed-tensors"
        if spelling.layout != method and not shared:
            yield weight.tensor(spelling.elements), f"has the names of {spelling.layout}; the config says {method}"
            continue
        kind = type(weight.format).__name__
        if kind not in scheme.upper() and "MIXED" not in scheme.upper():
            yield weight.tensor(spelling.elements), f"is {kind}; the config says {scheme}"


def wrong_tensors(case: Case) -> Places:
    """A tensor scale that is missing or no float32 scalar."""
    tensors = case.survey.checkpoint.tensors
    for weight in case.survey.weights:
        for suffix in (weight.spelling.tensor_scale, weight.spelling.input_scale):
            info = tensors.get(weight.tensor(suffix))
            if info is None:
                if suffix is not None and suffix == weight.spelling.tensor_scale:
                    yield weight.tensor(suffix), "is missing"
            elif info.dtype != "F32" or (len(weight.shape) == 2 and info.shape not in ((), (1,))):
                yield weight.tensor(suffix), f"is {info.dtype} {list(info.shape)}; one float32 is asked for"


def required_keys(case: Case) -> Places:
    """Keys without which the engine's config class raises."""
    raw, file = case.declared.raw, case.declared.file
    needed: tuple[str, ...] = ()
    if file == SIDECAR and case.declared.scheme.endswith("NVFP4") and case.engine == "vllm":
        needed = ("group_size", "kv_cache_quant_algo", "exclude_modules")
    elif case.declared.scheme == "modelopt NVFP4" and case.engine == "sglang":
        needed = ("group_size", "exclude_modules" if file == SIDECAR else "ignore")
        groups = raw.get("config_groups")
        if isinstance(groups, dict) and '"group_size"' in repr(groups).replace("'", '"'):
            needed = needed[1:]
    elif case.declared.scheme == "mxfp8":
        needed = ("activation_scheme", "weight_block_size")
        if raw.get("activation_scheme", "dynamic") != "dynamic" or raw.get("weight_block_size", [1, 32]) != [1, 32]:
            yield file, "mxfp8 needs activation_scheme 'dynamic' and weight_block_size [1, 32]"
    elif case.declared.scheme == "modelopt MIXED_PRECISION":
        if not raw.get("quantized_layers"):
            yield file, "MIXED_PRECISION needs quantized_layers, a mapping of modules that is not empty"
        return
    for key in needed:
        if key not in raw:
            yield file, f"{key} is missing"


def no_input_scale(case: Case) -> Places:
    """4-bit activations without a static scale."""
    if case.declared.scheme not in ("modelopt NVFP4", "compressed-tensors NVFP4 W4A4"):
        return
    for weight in case.survey.weights:
        suffix = weight.spelling.input_scale
        if suffix is not None and weight.tensor(suffix) not in case.survey.checkpoint.tensors:
            yield weight.tensor(suffix), f"is missing, but {case.declared.scheme} quantizes activations"


def quantized_but_excluded(case: Case) -> Places:
    """Quantized on disk, but the engine takes it for a layer in high precision."""
    for layer, members in dict.fromkeys(case.layer(weight.name) for weight in case.survey.weights):
        if not case.quantized_by_config(layer, members):
            yield layer, f"is quantized, but {case.culprit(layer, members)}"


def kept_but_not_excluded(case: Case) -> Places:
    """In high precision on disk, but the engine expects packed weights and scales."""
    for layer, members in dict.fromkeys(case.layer(name) for name in case.survey.kept):
        if case.quantized_by_config(layer, members):
            yield layer, "is in high precision, but nothing in the ignore list names it"


def partly_excluded(case: Case) -> Places:
    """A fused layer of which the list names some parts."""
    for name in (*(weight.name for weight in case.survey.weights), *case.survey.kept):
        _, members = case.layer(name)
        named = [member for member in members if member in case.declared.ignore]
        if len(members) > 1 and 0 < len(named) < len(members) and name.module == members[0]:
            yield name.fused or name.module, f"the ignore list names {', '.join(named)}, but not its other parts"


def formats_differ(case: Case) -> Places:
    """Parts of one fused layer in NVFP4, MXFP8 or high precision."""
    kept = {name.module for name in case.survey.kept}
    for layer, members in case.fused.items():
        kinds = {weight.name.leaf: type(weight.format).__name__ for weight in members}
        name = members[0].name
        kinds |= {leaf: "high precision" for leaf in name.partners if f"{name.parent}.{leaf}" in kept}
        if len(set(kinds.values())) > 1:
            yield layer, f"is one layer for engines, but {', '.join(f'{k} is {v}' for k, v in kinds.items())}"


def tensor_scales_differ(case: Case) -> Places:
    """Parts of one fused layer under different tensor scales."""
    for layer, members in case.fused.items():
        yield from _differ(case, layer, members, [weight.spelling.tensor_scale for weight in members])


def input_scales_differ(case: Case) -> Places:
    """Parts of one fused layer under different input scales, though they have the same input."""
    if case.declared.scheme in ("modelopt NVFP4", "compressed-tensors NVFP4 W4A4"):
        for layer, members in case.fused.items():
            yield from _differ(case, layer, members, [weight.spelling.input_scale for weight in members])


def _differ(case: Case, layer: str, members: list[Weight], suffixes: list[str | None]) -> Places:
    values = {}
    for weight, suffix in zip(members, suffixes, strict=True):
        tensor = weight.tensor(suffix)
        if suffix is not None and tensor in case.survey.checkpoint.tensors:
            values[weight.name.leaf] = case.survey.checkpoint.read(tensor).float().flatten().tolist()
    if len({str(value) for value in values.values()}) > 1:
        listed = ", ".join(f"{leaf} {', '.join(f'{v:.9g}' for v in value)}" for leaf, value in values.items())
        factor = _spread(values)
        yield f"{layer}{suffixes[0]}", f"engines keep one scale for the fused layer; here {listed}{factor}"


def _spread(values: Mapping[str, list[float]]) -> str:
    every = [abs(v) for value in values.values() for v in value if v]
    return f" (a factor of {max(every) / min(every):.3g})" if every else ""


def experts_incomplete(case: Case) -> Places:
    """A layer's experts that lack a tensor which others have, by the count in config.json."""
    config = text_config(case.survey.checkpoint.config)
    keys = ("num_experts", "num_local_experts", "n_routed_experts")
    declared = next((config[key] for key in keys if isinstance(config.get(key), int)), 0)
    parts: defaultdict[str, defaultdict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for weight in case.survey.weights:
        module = weight.name.experts_module
        if module is not None and weight.name.expert is not None:
            for suffix in (weight.spelling.elements, weight.spelling.tensor_scale, weight.spelling.input_scale):
                if suffix is not None and weight.tensor(suffix) in case.survey.checkpoint.tensors:
                    parts[module][weight.name.expert].add(weight.name.leaf + suffix)
    for module, experts in parts.items():
        wanted = set().union(*experts.values())
        for expert in range(min(max(declared, max(experts) + 1), 1 << 16)):
            if missing := sorted(wanted - experts.get(expert, set())):
                yield f"{module}.{expert}", f"lacks {', '.join(missing)}, which other experts of the layer have"


def experts_partly_quantized(case: Case) -> Places:
    """Some experts of a layer in few bits, others in high precision."""
    kept = {
        name.experts_module or name.module
        for name in case.survey.kept
        if name.leaf == "experts" or name.expert is not None
    }
    for module in sorted(kept & {weight.name.experts_module for weight in case.survey.weights}):
        yield str(module), "is one layer for engines, but only some of its experts are quantized"


def stacked_experts(case: Case) -> Places:
    """Experts quantized as one 3-D tensor."""
    for weight in case.survey.weights:
        if len(weight.shape) == 3:
            yield weight.name.full, f"stacks experts as {list(weight.shape)}; loaders look for one matrix per expert"


def fused_experts_in_transformers(case: Case) -> Places:
    """NVFP4 experts: transformers stacks them and loses their tensor scales."""
    modules = {w.name.experts_module for w in case.survey.weights if isinstance(w.format, NVFP4)} - {None}
    for module in sorted(m for m in modules if m is not None):
        yield module, "its NVFP4 experts would be stacked without their weight_global_scale: wrong by a factor of 10^4"


def bad_scales(case: Case) -> Places:
    """NaN or negative block scales; tensor scales that are not positive and finite."""
    for weight in case.survey.weights:
        counts = case.histograms[weight.name.full]
        tensor = weight.tensor(weight.spelling.block_scale)
        if isinstance(weight.format, NVFP4):
            nan, negative = int(counts[0x7F] + counts[0xFF]), int(counts[0x80:0xFF].sum())
            for count, what in ((nan, "NaN (0x7F)"), (negative, "negative")):
                if count:
                    yield tensor, f"{count} of {int(counts.sum())} block scales are {what}"
        elif count := int(counts[0xFF]):
            yield tensor, f"{count} of {int(counts.sum())} block scales are NaN (0xFF)"
        yield from _bad_scalars(case, weight)


def _bad_scalars(case: Case, weight: Weight) -> Places:
    for suffix in (weight.spelling.tensor_scale, weight.spelling.input_scale):
        if suffix is not None and weight.tensor(suffix) in case.survey.checkpoint.tensors:
            values = case.survey.checkpoint.read(weight.tensor(suffix)).float().flatten()
            if not bool(((values > 0) & (values < torch.inf)).all()):
                yield weight.tensor(suffix), f"is {values.tolist()[:4]}; a scale is positive and finite"


def scalar_scales(case: Case) -> Places:
    """Tensor scales of shape [] where [1] is expected."""
    if case.declared.method != "compressed-tensors":
        return
    for weight in case.survey.weights:
        for suffix in (weight.spelling.tensor_scale, weight.spelling.input_scale):
            info = case.survey.checkpoint.tensors.get(weight.tensor(suffix))
            if info is not None and info.shape == ():
                yield weight.tensor(suffix), "has shape []; transformers fails on anything but [1]"


def no_kv_scales(case: Case) -> Places:
    """A declared FP8 KV cache without its scales."""
    if case.declared.method != "compressed-tensors" or not case.declared.raw.get("kv_cache_scheme"):
        return
    parents = {n.parent for n in (*(w.name for w in case.survey.weights), *case.survey.kept) if n.leaf == "k_proj"}
    for attention in sorted(parents):
        for letter in "kv":
            if f"{attention}.{letter}_scale" not in case.survey.checkpoint.tensors:
                yield f"{attention}.{letter}_scale", "is missing, though the config declares an FP8 KV cache"


def marlin_flushed(counts: Tensor) -> int:
    """Blocks whose scale Marlin loses, by a layer's histogram [256].

    It holds 2^-6 … 448 and may first multiply all scales of a layer by a power of two that keeps the largest in range.
    """
    value = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    present = counts[:127] > 0
    nonzero = value[1:][present[1:]]
    if not len(nonzero):
        return 0
    room = 1.0
    while float(nonzero.max()) * room * 2 <= 448:
        room *= 2
    return int(counts[1:127][value[1:] * room < 2.0**-6].sum())


def _marlin(case: Case) -> Iterator[tuple[str, int, int]]:
    """(layer, flushed, all blocks) of every layer that loses some; an engine rescales a layer as a whole."""
    layers: defaultdict[str, list[Weight]] = defaultdict(list)
    for weight in case.survey.weights:
        if isinstance(weight.format, NVFP4):
            layers[case.layer(weight.name)[0]].append(weight)
    for layer, members in layers.items():
        counts = torch.stack([case.histograms[weight.name.full] for weight in members]).sum(0)
        if flushed := marlin_flushed(counts):
            yield layer, flushed, int(counts.sum())


def flushed_by_marlin(case: Case) -> Places:
    """Few blocks, all far below the layer's maximum."""
    found = [(layer, flushed, total) for layer, flushed, total in _marlin(case) if flushed <= MARLIN_SHARE * total]
    if found:
        flushed, total = sum(part for _, part, _ in found), sum(whole for _, _, whole in found)
        layers = f"{len(found)} layer{'s' if len(found) > 1 else ''}"
        yield (
            layers,
            f"on GPUs without FP4 cores {flushed} of {total} block scales are lost, all below 2^-14 of the largest",
        )


def mostly_flushed_by_marlin(case: Case) -> Places:
    """So many that the layer's output changes."""
    for layer, flushed, total in _marlin(case):
        if flushed > MARLIN_SHARE * total:
            yield layer, f"on GPUs without FP4 cores {flushed} of {total} block scales ({flushed / total:.1%}) are lost"


def rows_do_not_split(case: Case) -> Places:
    """Layers split by output rows, and the attention heads that they hold."""
    tp = case.tensor_parallel
    config = text_config(case.survey.checkpoint.config)
    heads = config.get("num_attention_heads")
    kv_heads = config.get("num_key_value_heads", heads)
    if tp > 1 and isinstance(heads, int) and heads % tp:
        yield "config.json", f"{heads} attention heads do not divide into {tp} parts"
    replicated = isinstance(kv_heads, int) and 0 < kv_heads < tp and tp % kv_heads == 0
    if tp > 1 and isinstance(kv_heads, int) and kv_heads % tp and not replicated:
        yield "config.json", f"{kv_heads} key/value heads do not divide into {tp} parts, nor {tp} by them"
    for weight in case.survey.weights:
        leaf, rows = weight.name.leaf, weight.shape[-2]
        copied = replicated and leaf in ("k_proj", "v_proj", "key", "value", "wk", "wv")
        if leaf in _COLUMN and rows % tp and not copied and weight.name.tower != "other":
            yield weight.name.full, f"{rows} rows do not divide into {tp} parts"


def blocks_do_not_split(case: Case) -> Places:
    """Layers split by input columns: each part must hold whole blocks."""
    tp = case.tensor_parallel
    for weight in case.survey.weights:
        columns, block = weight.shape[-1], weight.format.block_columns
        if weight.name.leaf in _ROW and weight.name.tower != "other" and (columns % tp or (columns // tp) % block):
            yield (
                weight.name.full,
                f"{columns} columns in {tp} parts are {columns / tp:g} each, not a multiple of {block}",
            )
