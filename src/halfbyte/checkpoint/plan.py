"""The plan of a conversion: every tensor of the output, where it comes from, what becomes of it and why.

Made from names, shapes and the config alone; no weight is read. Whatever can be wrong with a request is found here,
before anything is written.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .. import names
from ..errors import CheckpointError
from ..formats import Format
from ..names import Name
from ..policy import Decision, FormatOverride
from .config import is_quantized
from .exclusion import disagreements, exclusion_list
from .options import Options as Options
from .schema import DECAYS, FOREIGN_PARAMETERS, STACKED_EXPERTS, TRANSPOSED
from .shards import TensorInfo

QUANTIZABLE_DTYPES = ("BF16", "F16", "F32")

_EXPERT_COUNT = ("num_experts", "num_local_experts", "n_routed_experts")
_EXPERT_WIDTH = ("moe_intermediate_size", "intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size")


class Source(Protocol):
    """What a plan is made from: a `Checkpoint`, or anything that knows as much."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]


@dataclass
class Headers:
    """The headers of a model without its weights.

    Attributes:
        directory: what errors name; files are named below it.
        config: as config.json has it.
        tensors: name → dtype and shape.
    """

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]


@dataclass(frozen=True)
class Planned:
    """One tensor of the source, or one part of a stacked one, under the name that it gets in the output.

    Attributes:
        source, index: the tensor that it is read from, and where in it (empty: all of it).
        decision: whether it is quantized, and why (not).
        format: what it is quantized to, or None.
        linear: whether it is a Linear's weight, so that engines need to be told when it is not quantized.
        decoded: whether the source has it in another format; dtype is then what that decodes to.
    """

    name: Name
    dtype: str
    shape: tuple[int, ...]
    source: str
    index: tuple[int | slice, ...]
    decision: Decision
    format: Format | None
    linear: bool
    decoded: bool = False

    @property
    def kept_dtype(self) -> str:
        """What it is written as where it is not quantized: as it is, but bfloat16 for what was low precision."""
        return "BF16" if self.decoded else self.dtype

    @property
    def nbytes(self) -> int:
        """Size in memory, of the source's values."""
        return TensorInfo("", self.dtype, self.shape).nbytes


@dataclass(frozen=True)
class Plan:
    """All tensors in natural order of their names; the members of a group share one tensor scale."""

    groups: tuple[tuple[Planned, ...], ...]
    ignore: tuple[str, ...]

    def __iter__(self) -> Iterator[Planned]:
        return (item for group in self.groups for item in group)

    @property
    def quantized(self) -> list[Planned]:
        """What will be quantized."""
        return [item for item in self if item.format is not None]


def make_plan(source: Source, options: Options, found: Mapping[str, Format] | None = None) -> Plan:
    """Decide on every tensor of a source checkpoint.

    found: module → format of all that is quantized, instead of what the options' policy and overrides say.

    Raises:
        CheckpointError: the source is quantized already, or something in it is unknown, contradictory, or does not
            fit the format; a pattern matches nothing; nothing would be quantized.
    """
    where = source.directory
    if method := is_quantized(source.config):
        raise CheckpointError(
            f"{where}/config.json: the model is quantized already ({method}); convert the high-precision original, "
            "or run `halfbyte dequantize` on it first"
        )
    if (family := str(text_config(source.config).get("model_type"))) in TRANSPOSED:
        raise CheckpointError(f"{where}/config.json: weights of {family} are transposed; convert a model of Linears")
    layers = decoder_layers(source)
    items = list(_items(source, _Choice(options, layers, found)))
    _check_names(items, source)
    if found is None:
        _check_patterns(items, options, where)
    if not any(item.format for item in items):
        reasons = Counter(item.decision.reason for item in items if item.linear).most_common(4)
        why = ", ".join(f"{reason} ({count})" for reason, count in reasons) or "there is no Linear weight"
        raise CheckpointError(f"{where}: nothing to quantize under these options: {why}")
    for item in items:
        if item.name.parameter == "weight":
            _check_dtype(item, source)
        if item.format is not None:
            _check_shape(item, item.format, source)
    groups = _groups(items, where)
    _check_experts(items, source)
    excluded = [item.name for item in items if item.linear and item.format is None]
    quantized = [item.name for item in items if item.format is not None]
    ignore = exclusion_list(options.layout, quantized, excluded)
    if wrong := disagreements(options.layout, ignore, quantized, excluded):
        raise CheckpointError(
            f"{where}: engines would misread the result: {wrong[0]}; choose another --layout or policy"
        )
    return Plan(tuple(groups), tuple(ignore))


def places(source: Source) -> dict[str, Planned]:
    """Name of every tensor that a conversion would write unquantized → where it is in the source, stacks taken apart.

    Raises:
        CheckpointError: the source is quantized, or something in it is unknown.
    """
    if method := is_quantized(source.config):
        raise CheckpointError(
            f"{source.directory}/config.json: is quantized itself ({method}); give the high-precision original"
        )
    nothing: dict[str, Format] = {}
    return {item.name.full: item for item in _items(source, _Choice(Options(), decoder_layers(source), nothing))}


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a config, which multimodal models nest."""
    for key in ("text_config", "llm_config", "language_config", "thinker_config"):
        if isinstance(config.get(key), dict):
            return text_config(config[key])
    return config


def decoder_layers(source: Source) -> int:
    """Number of decoder layers, by the config; multi-token-prediction layers do not count."""
    config = text_config(source.config)
    for key in ("num_hidden_layers", "n_layer", "num_layers"):
        if isinstance(config.get(key), int) and not isinstance(config[key], bool):
            return int(config[key])
    raise CheckpointError(f"{source.directory}/config.json: num_hidden_layers is missing; add it")


@dataclass(frozen=True)
class _Choice:
    """Whether a Linear's weight is quantized, and to what."""

    options: Options
    layers: int
    found: Mapping[str, Format] | None

    def __call__(self, name: Name) -> tuple[Decision, Format | None]:
        if self.found is not None:
            return Decision(name.module in self.found, "as found"), self.found.get(name.module)
        decision = self.options.policy.decide(name, self.layers)
        return decision, self.options.format_of(name) if decision.quantize else None


def _items(source: Source, choose: _Choice) -> Iterator[Planned]:
    tied = bool(source.config.get("tie_word_embeddings", text_config(source.config).get("tie_word_embeddings")))
    for tensor, info in sorted(source.tensors.items(), key=lambda item: names.natural_key(item[0])):
        name = names.parse(tensor, choose.layers)
        where = f"{source.directory / info.file}: tensor {tensor}"
        if name.parameter in FOREIGN_PARAMETERS:
            raise CheckpointError(f"{where}: belongs to a quantized checkpoint; convert the high-precision original")
        if name.tower != "other" and _is_stacked(name, info):
            yield from _unstacked(source, name, info, choose, where)
            continue
        linear = name.parameter == "weight" and len(info.shape) == 2 and name.kind not in ("embedding", "norm")
        if not linear:
            kept = Decision(False, _not_linear(name, info))
            yield Planned(name, info.dtype, info.shape, tensor, (), kept, None, False, info.decoded)
            continue
        decision, fmt = choose(name)
        if fmt is not None and name.kind == "lm_head" and tied:
            raise CheckpointError(
                f"{where}: lm_head shares its weight with the embedding (tie_word_embeddings), which stays in high "
                "precision; drop it from --include"
            )
        yield Planned(name, info.dtype, info.shape, tensor, (), decision, fmt, True, info.decoded)


def _not_linear(name: Name, info: TensorInfo) -> str:
    if name.kind in ("embedding", "norm"):
        return name.kind
    return name.parameter if name.parameter != "weight" else f"{len(info.shape)}-D weight"


def _is_stacked(name: Name, info: TensorInfo) -> bool:
    """Whether a decoder tensor holds several matrices, or something that belongs to such a stack."""
    if name.kind == "conv" or name.parameter in DECAYS or (name.kind, name.parameter) == ("attention", "bias"):
        return False  # the last is a mask, in GPT-J and Pythia: a Linear's bias has one dimension
    inside = name.expert is None and "experts" in name.module.split(".") and name.parameter not in ("weight", "bias")
    return inside or (len(info.shape) >= 3 and math.prod(info.shape) > max(info.shape))  # A_log [1, 1, 32, 1] is none


def _unstacked(source: Source, name: Name, info: TensorInfo, choose: _Choice, where: str) -> Iterator[Planned]:
    """Experts [E, 2I, H] or [E, H, I] as per-expert gate, up and down; everything else is refused."""
    path = name.module if name.parameter == "weight" else name.full
    parent, _, leaf = path.rpartition(".")
    if not parent.endswith("experts") or leaf not in ("gate_up_proj", "down_proj"):
        raise CheckpointError(f"{where}: unknown stacked weights of shape {list(info.shape)}; split them into 2-D ones")
    config = text_config(source.config)
    family = str(config.get("model_type"))
    if family not in STACKED_EXPERTS:
        raise CheckpointError(
            f"{where}: how {family!r} stacks its experts is not known (transposed? interleaved?); "
            "save the model with per-expert 2-D weights first"
        )
    hidden = config.get("hidden_size")
    width = next((config[key] for key in _EXPERT_WIDTH if isinstance(config.get(key), int)), None)
    if not isinstance(hidden, int) or width is None:
        raise CheckpointError(f"{where}: config.json lacks hidden_size or moe_intermediate_size to check its shape by")
    wanted = (2 * width, hidden) if leaf == "gate_up_proj" else (hidden, width)
    if info.shape[1:] != wanted or len(info.shape) != 3 or 0 in info.shape:
        raise CheckpointError(
            f"{where}: shape {list(info.shape)}, but by config.json each expert's is {list(wanted)}; "
            "save the model with per-expert 2-D weights first"
        )
    halves = {"gate_proj": slice(0, width), "up_proj": slice(width, 2 * width)}
    parts = halves if leaf == "gate_up_proj" else {"down_proj": slice(0, hidden)}
    for expert in range(info.shape[0]):
        for part, rows in parts.items():
            unstacked = names.parse(f"{parent}.{expert}.{part}.weight", choose.layers)
            shape = (rows.stop - rows.start, wanted[1])
            where_in = (expert, rows)
            yield Planned(unstacked, info.dtype, shape, name.full, where_in, *choose(unstacked), True, info.decoded)


def _check_patterns(items: list[Planned], options: Options, where: object) -> None:
    """Every pattern of the policy and every override selects something: one that does not is most likely misspelt."""
    if unmatched := options.policy.unmatched(item.name for item in items):
        remedy = "`--dry-run` without it lists their names"
        if any(pattern.startswith("--include ") for pattern in unmatched):
            remedy += "; embeddings, norms and convolutions cannot be included"
        raise CheckpointError(f"{where}: {', '.join(unmatched)} matches no tensor; {remedy}")
    quantized = [item.name for item in items if item.format is not None]
    for i, override in enumerate(options.overrides):
        tests = [FormatOverride(override.format, (pattern,)) for pattern in override.match]
        tests += [FormatOverride(override.format, (), override.kinds)] if override.kinds else []
        for test in tests:
            if quantized and not any(test.selects(name) for name in quantized):
                what = ", ".join(test.match or test.kinds)
                raise CheckpointError(
                    f"{where}: override {i}: {what} selects no weight that is quantized; remove it; `--dry-run` "
                    "without it lists the names"
                )


def _check_names(items: list[Planned], source: Source) -> None:
    counts = Counter(item.name.full for item in items)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        origins = sorted({item.source for item in items if item.name.full == twice[0]})
        raise CheckpointError(
            f"{source.directory}: {twice[0]} is there twice, from {' and '.join(origins)}; remove one"
        )


def _check_experts(items: list[Planned], source: Source) -> None:
    """Every routed expert of a layer is there, each with the same weights."""
    modules: defaultdict[str, defaultdict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for item in items:
        if item.linear and item.name.expert is not None and (module := item.name.experts_module):
            modules[module][item.name.expert].add(item.name.full.removeprefix(f"{module}.{item.name.expert}."))
    config = text_config(source.config)
    declared = next((config[key] for key in _EXPERT_COUNT if isinstance(config.get(key), int)), 0)
    for module, experts in modules.items():
        weights = set().union(*experts.values())
        for expert in range(max(declared, max(experts) + 1)):
            if missing := sorted(weights - experts.get(expert, set())):
                raise CheckpointError(
                    f"{source.directory}: {module}.{expert}.{missing[0]} is missing, though other experts of the layer "
                    "have it; download the model again"
                )


def _check_dtype(item: Planned, source: Source) -> None:
    """Also of what stays as it is: low-precision weights without their scales mean nothing under another label."""
    if item.dtype not in (*QUANTIZABLE_DTYPES, "F64") or (item.dtype == "F64" and item.format):
        where = f"{source.directory / source.tensors[item.source].file}: tensor {item.name.full}"
        raise CheckpointError(
            f"{where}: is {item.dtype}; halfbyte quantizes {', '.join(QUANTIZABLE_DTYPES)}; "
            "convert the high-precision original"
        )


def _check_shape(item: Planned, fmt: Format, source: Source) -> None:
    where = f"{source.directory / source.tensors[item.source].file}: tensor {item.name.full}"
    block = fmt.block_columns
    if item.shape[1] % block or 0 in item.shape:
        raise CheckpointError(
            f"{where}: shape {list(item.shape)}; the last dimension must be divisible by {block}. "
            f"Exclude it with --ignore {item.name.module}"
        )


def _groups(items: list[Planned], where: object) -> list[tuple[Planned, ...]]:
    """Items in order, members of one fused layer together at the place of the first."""
    fused: defaultdict[str, list[Planned]] = defaultdict(list)
    experts: defaultdict[str, set[type[Format] | None]] = defaultdict(set)
    for item in items:
        if item.linear and item.name.fused is not None:
            fused[item.name.fused].append(item)
        if item.linear and item.name.experts_module is not None:
            experts[item.name.experts_module].add(type(item.format) if item.format else None)
    for module, kinds in experts.items():
        if len(kinds) > 1 and None not in kinds:
            raise CheckpointError(
                f"{where}: {module} would have experts in NVFP4 and in MXFP8, which no engine can load; give all of "
                "them one format"
            )
        if len(kinds) > 1:
            raise CheckpointError(
                f"{where}: some experts of {module} would be quantized and some not, which no engine can load; "
                f"exclude all with --ignore {module}"
            )
    gated = {_template(layer) for layer, members in fused.items() if len(members) > 1}
    groups: dict[str, tuple[Planned, ...]] = {}
    for layer, members in fused.items():
        if members[0].name.tower == "other" and not any(item.format for item in members):
            continue  # engines do not fuse them, and their names may mean something else
        _check_fused(layer, members, gated, where)
        if all(item.format for item in members):
            groups |= dict.fromkeys((item.name.full for item in members), tuple(members))
    everything = {item.name.full for item in items}
    for layer in fused:
        if f"{layer}.weight" in everything:
            raise CheckpointError(f"{where}: {layer}.weight is there both fused and in parts; remove one")
    ordered = (groups.get(item.name.full, (item,)) for item in items)
    return list({group[0].name.full: group for group in ordered}.values())


def _check_fused(layer: str, members: list[Planned], gated: set[str], where: object) -> None:
    name = members[0].name
    there = {item.name.leaf for item in members}
    wanted = name.partners
    is_pair = layer.rpartition(".")[2] in names.PAIRS
    # A lone up_proj is a plain MLP, unless the same place of another layer has a gate.
    lone_up = there == {wanted[-1]} and _template(layer) not in gated
    if is_pair and len(there) < len(wanted) and not lone_up:
        missing = next(leaf for leaf in wanted if leaf not in there)
        raise CheckpointError(
            f"{where}: {name.parent}.{missing}.weight is missing, the other half of {name.module}.weight"
        )
    if len({item.format is None for item in members}) > 1:
        kept = next(item for item in members if item.format is None)
        raise CheckpointError(
            f"{where}: {kept.name.module} would stay in high precision ({kept.decision.reason}) but the layers that "
            f"engines fuse with it would not; select all of {', '.join(sorted(there))} or none"
        )
    if len({item.format for item in members}) > 1:
        formats = ", ".join(f"{item.name.leaf} {item.format}" for item in members)
        raise CheckpointError(
            f"{where}: {layer}: engines fuse its parts under one format and tensor scale, but here: {formats}; let an "
            "override select all of them or none"
        )
    if len({item.shape[1] for item in members}) > 1:
        shapes = ", ".join(f"{item.name.leaf} {list(item.shape)}" for item in members)
        raise CheckpointError(f"{where}: {layer}: its parts do not fit together: {shapes}")


def _template(layer: str) -> str:
    """A layer's path with every index blanked: the same place in all layers and experts."""
    return ".".join("*" if part.isdigit() else part for part in layer.split("."))
