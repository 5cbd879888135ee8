"""The conditions on fused layers, experts, scales and shapes behind `loader_rules.RULES`, seen from one engine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..formats import MXFP8, NVFP4
from .exclusion import engine_layer
from .load_case import Case
from .load_checks import Places
from .plan import text_config
from .survey import Weight

_COLUMN = frozenset({"q_proj", "k_proj", "v_proj", "query", "key", "value", "wq", "wk", "wv", "gate_proj", "up_proj"})
_COLUMN |= {"w1", "w3", "q_b_proj", "kv_b_proj", "qkv_proj", "gate_up_proj", "fc1", "in_proj_qkv", "in_proj_z"}
_ROW = frozenset({"o_proj", "down_proj", "w2", "wo", "out_proj", "fc2"})
MARLIN_SHARE = 0.01
"""Flushed blocks beyond this share of a layer change its output; below, they are far under the layer's maximum."""


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
    """An expert that is not there, or lacks a tensor that the others have."""
    for expert, missing in _experts(case):
        found = [m for m in missing if not (_fills(case) and m.endswith(".input_scale"))]
        if found:
            yield expert, f"lacks {', '.join(found)}, which other experts of the layer have"


def experts_without_input_scale(case: Case) -> Places:
    """An expert that no token reached, where the engine has a value to put in its place."""
    for expert, missing in _experts(case):
        found = [m for m in missing if _fills(case) and m.endswith(".input_scale")]
        if found:
            yield expert, f"lacks {', '.join(found)}; the engine takes 1.0 for it, and so for all experts of the layer"


def _fills(case: Case) -> bool:
    return (case.engine, case.declared.method) == ("sglang", "modelopt")


def _experts(case: Case) -> Iterator[tuple[str, list[str]]]:
    parts: defaultdict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    config = text_config(case.survey.checkpoint.config)
    keys = ("num_experts", "num_local_experts", "n_routed_experts")
    declared = next((config[key] for key in keys if isinstance(config.get(key), int)), 0)
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
                yield f"{module}.{expert}", missing


def experts_partly_quantized(case: Case) -> Places:
    """Some experts of a layer in NVFP4, others in high precision."""
    kept = {
        name.experts_module or name.module
        for name in case.survey.kept
        if name.leaf == "experts" or name.expert is not None
    }
    packed = {w.name.experts_module for w in case.survey.weights if isinstance(w.format, NVFP4)}
    for module in sorted(m for m in kept & packed if m is not None):
        yield module, "is one layer for engines, but only some of its experts are quantized"


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


def mxfp8_experts_in_transformers(case: Case) -> Places:
    """MXFP8 experts: transformers cannot convert them."""
    modules = {w.name.experts_module for w in case.survey.weights if isinstance(w.format, MXFP8)} - {None}
    for module in sorted(m for m in modules if m is not None and case.declared.method == "compressed-tensors"):
        yield module, "its MXFP8 experts cannot be stacked; loading fails in their conversion"


def mxfp8_in_llama(case: Case) -> Places:
    """Scales that SGLang's Llama classes rename to what no MXFP8 layer has: all stay 2^-127."""
    found = [w for w in case.survey.weights if isinstance(w.format, MXFP8)]
    if found and case.reader == "mxfp8" and (classes := case.architectures & SGLANG_LLAMA):
        yield ", ".join(sorted(classes)), f"loses the scales of {len(found)} MXFP8 weights; their values become zero"


SGLANG_LLAMA = frozenset({"LlamaForCausalLM", "Phi3ForCausalLM", "InternLM3ForCausalLM", "IQuestCoderForCausalLM"})
SGLANG_LLAMA |= {"TeleFLMForCausalLM", "Ministral3ForCausalLM"}


def mxfp8_in_mixture(case: Case) -> Places:
    """Scales that SGLang looks for under weight_scale_inv only, in a mixture: they stay 2^-127."""
    if case.declared.scheme == "modelopt MIXED_PRECISION":
        for weight in case.survey.weights:
            if isinstance(weight.format, MXFP8) and weight.spelling.block_scale != ".weight_scale_inv":
                yield weight.tensor(weight.spelling.block_scale), "is looked for as weight_scale_inv, and stays zero"


def weight_only_scales_differ(case: Case) -> Places:
    """Parts of one dense fused layer under different divisors, weight-only."""
    if case.declared.scheme == "compressed-tensors NVFP4 W4A16":
        for layer, members in case.fused.items():
            if members[0].name.expert is None:
                yield from _differ(case, layer, members, [weight.spelling.tensor_scale for weight in members])


def nan_scales(case: Case) -> Places:
    """NaN block scales of dense NVFP4, by which vLLM knows that nothing was loaded."""
    for weight in case.survey.weights:
        counts = case.histograms[weight.name.full]
        if isinstance(weight.format, NVFP4) and weight.name.expert is None and int(counts[0x7F] + counts[0xFF]):
            yield weight.tensor(weight.spelling.block_scale), "has NaN scales, which pass for scales never loaded"


def one_kv_scale(case: Case) -> Places:
    """The scale of keys without that of values, or the other way round."""
    tensors = case.survey.checkpoint.tensors
    parents = {n.parent for n in (*(w.name for w in case.survey.weights), *case.survey.kept) if n.leaf == "k_proj"}
    for attention in sorted(parents):
        spelled = (f"{attention}.k_proj.k_scale", f"{attention}.v_proj.v_scale")
        if case.declared.method == "compressed-tensors":
            spelled = (f"{attention}.k_scale", f"{attention}.v_scale")
        if len(missing := [tensor for tensor in spelled if tensor not in tensors]) == 1:
            yield missing[0], "is missing, but its counterpart is there"


def marlin_tiles(case: Case) -> Places:
    """Experts whose hidden size Marlin has no tiles for."""
    hidden = text_config(case.survey.checkpoint.config).get("hidden_size")
    packed = any(isinstance(w.format, NVFP4) and w.name.expert is not None for w in case.survey.weights)
    if packed and isinstance(hidden, int) and hidden % 64:
        yield (
            "config.json",
            f"hidden_size {hidden} is no multiple of 64; experts fail on GPUs without FP4 cores",
        )


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


def marlin_flushed(counts: Tensor, rescales: bool = True) -> int:
    """Blocks whose scale Marlin loses, by a layer's histogram [256].

    It holds 2^-6 … 448. vLLM first multiplies all scales of a layer by the power of two that keeps the largest in
    range; others do not.
    """
    value = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    present = counts[:127] > 0
    nonzero = value[1:][present[1:]]
    if not len(nonzero):
        return 0
    room = 1.0
    while rescales and float(nonzero.max()) * room * 2 <= 448:
        room *= 2
    return int(counts[1:127][value[1:] * room < 2.0**-6].sum())


def _marlin(case: Case) -> Iterator[tuple[str, int, int]]:
    """(layer, flushed, all blocks) of every layer that loses some; gate and up of all experts are one, down another."""
    config = text_config(case.survey.checkpoint.config)
    half = (config.get("dtype") or config.get("torch_dtype")) == "float16"
    if half and case.engine != "vllm":
        return  # scales are exact there; vLLM does not rescale, and zeroes the same ones
    layers: defaultdict[str, list[Weight]] = defaultdict(list)
    for weight in case.survey.weights:
        if isinstance(weight.format, NVFP4):
            experts = weight.name.experts_module
            part = f"{experts}.{weight.name.leaf if weight.name.leaf in _ROW else 'w13'}"
            layers[engine_layer(weight.name, case.modules)[0] if experts is None else part].append(weight)
    for layer, members in layers.items():
        counts = torch.stack([case.histograms[weight.name.full] for weight in members]).sum(0)
        if flushed := marlin_flushed(counts, rescales=case.engine == "vllm" and not half):
            yield layer, flushed, int(counts.sum())


def flushed_by_marlin(case: Case) -> Places:
    """Few blocks, all far below the layer's maximum."""
    found = [(layer, flushed, total) for layer, flushed, total in _marlin(case) if flushed <= MARLIN_SHARE * total]
    if found:
        flushed, total = sum(part for _, part, _ in found), sum(whole for _, _, whole in found)
        layers = f"{len(found)} layer{'s' if len(found) > 1 else ''}"
        yield (
            layers,
            f"on GPUs without FP4 cores {flushed} of {total} block scales are lost, too far below the largest",
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
