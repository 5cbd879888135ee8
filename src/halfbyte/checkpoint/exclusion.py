"""How engines decide that a layer is not quantized: rules that differ, and names that mean the same in all.

Engines ask with the name of *their* layer: the fused one (qkv_proj, gate_up_proj), or the module of all experts.
Read from vLLM 0.33.0, SGLang 0.5.23, TensorRT-LLM of autumn 2026, transformers 5.23.0 and compressed-tensors 0.20.0.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import cache

from ..errors import CheckpointError
from ..names import Name
from .schema import Layout

Rule = Callable[[str, tuple[str, ...], Sequence[str]], bool]


def engine_layer(name: Name, modules: Collection[str] | None = None) -> tuple[str, tuple[str, ...]]:
    """(layer as an engine names it, modules on disk that it is made of).

    modules: all that the model has; a part of a fused layer without partners among them goes by its own name.
    """
    experts = name.experts_module
    if experts is not None:
        return experts, (name.module,)
    if name.fused is not None:
        members = tuple(f"{name.parent}.{leaf}" for leaf in name.partners)
        there = tuple(member for member in members if modules is None or member in modules)
        if len(there) > 1:
            return name.fused, there
    return name.module, (name.module,)


def check_patterns(patterns: Iterable[str], longest: int) -> None:
    """Refuse regular expressions that are none, or that could take forever on names of `longest` characters.

    A repeated group can take exponential time, and so can a reference to a group; n repeats of single characters take
    at most the n-th power of the length.

    Raises:
        CheckpointError: names the pattern.
    """
    for pattern in patterns:
        if not pattern.startswith("re:"):
            continue
        try:
            re.compile(pattern[3:])
        except (re.error, OverflowError, RecursionError, MemoryError) as error:
            raise CheckpointError(f"pattern {pattern[:80]!r} is no regular expression ({error})") from error
        plain = re.sub(r"\\[^0-9]|\[[^]]*\]", "x", pattern[3:])
        repeats = len(re.findall(r"[*+{]", plain))
        if re.search(r"\)[*+{]|\\[0-9]|\(\?P=|\(\?\(", plain) or longest**repeats > _STEPS:
            raise CheckpointError(f"pattern {pattern[:80]!r} could take forever to match; use fewer repeats")


_STEPS = 10**8


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise CheckpointError(f"config.json: {pattern!r} is not a regular expression ({error}); repair it") from error


def excluded_by_vllm_modelopt(layer: str, members: tuple[str, ...], patterns: Sequence[str]) -> bool:
    """Exact for the layer or all members, then raw substring, then glob; an expert that is named excludes all of them.

    Source: vLLM's `ModelOptQuantConfigBase.is_layer_excluded` and `is_layer_skipped`.
    """
    if "experts" in layer and len(members) < 2:
        named = any(layer in p for p in patterns if "experts" in p)
    else:
        named = layer in patterns or all(member in patterns for member in members)
    return named or any(p in layer for p in patterns) or any(fnmatch.fnmatchcase(layer, p) for p in patterns)


_MLA = frozenset({"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"})


def excluded_by_sglang_modelopt(layer: str, members: tuple[str, ...], patterns: Sequence[str]) -> bool:
    """A dotted part of the name, or a glob over all of it or over one part; experts only by the latter.

    An MLA projection that is named in one layer is excluded in all of them.
    Source: SGLang's `ModelOptQuantConfig._get_quant_method` and `is_layer_excluded`, `is_layer_skipped`. Where SGLang
    reads a pattern as a regular expression with `*` for `.*`, this reads a glob.
    """
    names = {layer, layer.removeprefix("language_model.")}
    parts = {part for name in names for part in name.split(".")}
    if any(fnmatch.fnmatchcase(text, p) for p in patterns for text in names | parts):
        return True
    last = layer.rpartition(".")[2]
    last = "fused_qkv_a_proj_with_mqa" if last == "fused_qkv_a_proj" else last
    if any((tail := p.rpartition(".")[2]) in _MLA and tail in last for p in patterns):
        return True
    return not layer.endswith(".experts") and _skipped_by_sglang(layer, members, patterns)


def excluded_by_sglang_mxfp8(layer: str, members: tuple[str, ...], patterns: Sequence[str]) -> bool:
    """Dotted parts only, with or without "model." before them; an expert that is named excludes all of them.

    Source: SGLang's `Fp8Config.from_config` and `is_layer_skipped`, which read ModelOpt's MXFP8 too.
    """
    bare = [p.removeprefix("model.") for p in patterns]
    both = [*bare, *(f"model.{p}" for p in bare)]
    experts = "experts" in layer and len(members) < 2
    return _skipped_by_sglang(layer, members, both) or (experts and any(layer in p for p in both if "experts" in p))


def contains_path(name: str, pattern: str) -> bool:
    """Whether a pattern is a run of a name's dotted parts. Source: SGLang's `_module_path_match`."""
    return f".{pattern.rstrip('.')}." in f".{name}."


def _skipped_by_sglang(layer: str, members: tuple[str, ...], patterns: Sequence[str]) -> bool:
    names = members if len(members) > 1 else (layer,)
    return all(any(contains_path(name, p) for p in patterns) for name in names)


def excluded_by_compressed_tensors(layer: str, members: tuple[str, ...], patterns: Sequence[str]) -> bool:
    """Exact, or `re:` with re.match; a fused layer by all its members."""

    def one(name: str) -> bool:
        return any(_regex(p[3:]).match(name) is not None if p.startswith("re:") else p == name for p in patterns)

    return one(layer) or all(one(member) for member in members)


def excluded_by_sglang_compressed_tensors(layer: str, members: tuple[str, ...], patterns: Sequence[str]) -> bool:
    """The same, but a plain pattern may also be the end of a name, from a dot on.

    Source: SGLang's `should_ignore_layer` and `check_equal_or_regex_match` of its compressed-tensors.
    """

    def one(name: str) -> bool:
        return any(name.endswith(f".{p}") or excluded_by_compressed_tensors(name, (name,), [p]) for p in patterns)

    return layer in patterns or all(one(member) for member in members)


def excluded_by_tensorrt_llm(layer: str, members: tuple[str, ...], patterns: Sequence[str]) -> bool:
    """A glob over the whole name of the layer, of any member, or of a module that they are in; `re:` likewise.

    Source: TensorRT-LLM's `QuantConfig.is_module_excluded_from_quantization` and `apply_quant_config_exclude_modules`.
    """

    def one(name: str) -> bool:
        parts = name.split(".")
        paths = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
        return any(
            _regex(p[3:]).fullmatch(path) is not None if p.startswith("re:") else fnmatch.fnmatchcase(path, p)
            for p in patterns
            for path in paths
        )

    return any(one(name) for name in (layer, *members))


def excluded_by_transformers(layer: str, members: tuple[str, ...], patterns: Sequence[str]) -> bool:
    """`modules_to_not_convert`: a regular expression from the start up to a module's end, or a suffix.

    Source: transformers' `should_convert_module` (5.23).
    """

    def one(name: str) -> bool:
        end = r"(?:(?<=\.)|(?=\.|$))"
        return any(_regex(f"(?:{p}){end}").match(name) is not None or name.endswith(p) for p in patterns)

    return one(layer) or all(one(member) for member in members)


RULES: dict[Layout, dict[str, Rule]] = {
    "modelopt": {"vLLM": excluded_by_vllm_modelopt, "SGLang": excluded_by_sglang_modelopt},
    "compressed-tensors": {
        "compressed-tensors": excluded_by_compressed_tensors,
        "SGLang": excluded_by_sglang_compressed_tensors,
    },
}


def exclusion_list(layout: Layout, quantized: Iterable[Name], excluded: Iterable[Name]) -> list[str]:
    """Patterns for the config that exclude exactly these modules: whole names, and one entry for a layer's experts.

    lm_head is named even where it is not on disk: a tied one still is a Linear in the engine.
    """
    quantized = tuple(quantized)
    patterns = [] if any(name.kind == "lm_head" for name in quantized) else ["lm_head"]
    mla = layout == "modelopt" and any(name.leaf in _MLA for name in quantized)
    inside = {parent for name in quantized for parent in _ancestors(name.module)} if mla else set()
    for name in excluded:
        by_experts = name.experts_module if layout == "modelopt" else None
        if mla and name.leaf in _MLA and name.parent not in inside:
            patterns.append(name.parent)  # by its own name, SGLang would take the projection out of every layer
        else:
            patterns.append(by_experts or _compressed_tensors_pattern(name))
    return list(dict.fromkeys(patterns))


def _ancestors(module: str) -> Iterator[str]:
    parts = module.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts)))


def linear_targets(layout: Layout, quantized: Iterable[Name]) -> tuple[str, ...]:
    """Targets of the only group of a config: all Linears, and lm_head by name, which is none to compressed-tensors."""
    heads = (name.module for name in quantized if name.kind == "lm_head" and layout == "compressed-tensors")
    return ("Linear", *heads)


def target_list(layout: Layout, names: Iterable[Name]) -> tuple[str, ...]:
    """Patterns by which a config of mixed precision gives these modules their format: ModelOpt lists each."""
    pattern = _compressed_tensors_pattern if layout == "compressed-tensors" else lambda name: name.module
    return tuple(dict.fromkeys(pattern(name) for name in names))


def _compressed_tensors_pattern(name: Name) -> str:
    experts = name.experts_module
    return name.module if experts is None else f"re:{re.escape(experts)}\\..*"


def disagreements(
    layout: Layout, patterns: Sequence[str], quantized: Iterable[Name], excluded: Iterable[Name]
) -> list[str]:
    """Where an engine's rule selects other modules than meant; one sentence each."""
    found = []
    quantized, excluded = tuple(quantized), tuple(excluded)
    modules = {name.module for name in (*quantized, *excluded)}
    for names, should in ((quantized, False), (excluded, True)):
        for layer, members in dict.fromkeys(engine_layer(name, modules) for name in names):
            for engine, rule in RULES[layout].items():
                if rule(layer, members, patterns) is not should:
                    state = "is not quantized but" if should else "is quantized but"
                    verb = "does not exclude" if should else "excludes"
                    found.append(f"{layer} {state} {engine} {verb} it under the config's ignore list")
    return found
