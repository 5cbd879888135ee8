"""Prove a quantized checkpoint: its structure by itself, and every byte against its source.

Nothing is believed because halfbyte.json says so: what can be recomputed is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import names
from ..errors import CheckpointError, HalfbyteError
from ..formats import MXFP8, NVFP4, Format
from ..names import Name
from .config import Group, Quantization, hf_quant_config, quantization_config, read_quantization
from .exclusion import (
    RULES,
    check_patterns,
    disagreements,
    engine_layer,
    excluded_by_compressed_tensors,
    linear_targets,
)
from .manifest import FILE as MANIFEST
from .manifest import read_manifest
from .options import Options
from .plan import decoder_layers
from .schema import SCALE_PARAMETERS, Entry, kv_scale_entries, weight_entries, weight_names
from .shards import INDEX, Checkpoint, read_json, tensor_digest

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Finding:
    """Something wrong: where (a tensor, module or file) and what."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True)
class Contents:
    """A quantized checkpoint sorted by what its tensors are."""

    checkpoint: Checkpoint
    quantization: Quantization
    quantized: tuple[Name, ...]  # by the name "….weight"
    formats: dict[str, Format]  # module → what the config says its weight is, or what it looks like
    excluded: tuple[Name, ...]  # Linear weights in high precision, likewise

    def holds_elements(self, tensor: str) -> bool:
        """Whether a tensor is the elements of a quantized weight."""
        module, _, parameter = tensor.rpartition(".")
        fmt = self.formats.get(module)
        return fmt is not None and parameter == weight_names(self.quantization.layout, fmt).elements


def open_quantized(directory: Path) -> Contents:
    """Read config and headers of a quantized checkpoint.

    Raises:
        CheckpointError: it cannot be read, or is not one of the formats and layouts that halfbyte knows.
    """
    checkpoint = Checkpoint(directory)
    quantization = read_quantization(checkpoint.config, str(directory / "config.json"))
    elements = {weight_names(quantization.layout, group.format).elements for group in quantization.groups}
    layers = decoder_layers(checkpoint)
    patterns = [*quantization.ignore, *(target for group in quantization.groups for target in group.targets)]
    try:
        check_patterns(patterns, max(map(len, checkpoint.tensors), default=1))
    except CheckpointError as error:
        raise CheckpointError(f"{directory / 'config.json'}: quantization_config: {error}") from error
    quantized, excluded = [], []
    formats: dict[str, Format] = {}
    for tensor, info in checkpoint.tensors.items():
        name = names.parse(tensor, layers)
        if name.parameter in elements and info.dtype in ("U8", "F8_E4M3"):
            quantized.append(names.parse(f"{name.module}.weight", layers))
            looks_like = NVFP4() if info.dtype == "U8" else MXFP8()
            formats[name.module] = quantization.format_of(name.module) or looks_like
        elif name.parameter == "weight" and len(info.shape) == 2 and name.kind not in ("embedding", "norm"):
            excluded.append(name)
    order = lambda name: names.natural_key(name.full)  # noqa: E731
    quantized.sort(key=order)
    excluded.sort(key=order)
    return Contents(checkpoint, quantization, tuple(quantized), formats, tuple(excluded))


def verify_structure(directory: Path, progress: Progress = lambda done: None) -> Iterator[Finding]:
    """Everything that can be wrong without knowing the source; reads every tensor once."""
    try:
        contents = open_quantized(directory)
    except HalfbyteError as error:
        yield Finding(str(directory), str(error))
        return
    if not contents.quantized:
        yield Finding(str(directory), "the config declares a quantization, but no weight is quantized")
    yield from _configs(contents)
    yield from _tensors_present(contents)
    yield from _exclusions(contents)
    yield from _values(contents, progress)
    yield from _fused(contents)


def _configs(contents: Contents) -> Iterator[Finding]:
    directory = contents.checkpoint.directory
    quantization = contents.quantization
    if len(quantization.groups) == 1:
        targets = linear_targets(quantization.layout, contents.quantized)
        quantization = replace(quantization, groups=(replace(quantization.groups[0], targets=targets),))
    declared = contents.checkpoint.config["quantization_config"]
    for path, value, should in _differences(declared, quantization_config(quantization)):
        yield Finding("config.json", f"quantization_config{path} is {value!r}; the format asks for {should!r}")
    expected = hf_quant_config(quantization)
    if expected is not None:
        try:
            found = read_json(directory / "hf_quant_config.json").get("quantization")
        except HalfbyteError as error:
            yield Finding("hf_quant_config.json", str(error))
        else:
            if found != expected["quantization"]:
                values = found if isinstance(found, dict) else {}
                keys = [key for key, value in expected["quantization"].items() if values.get(key) != value]
                yield Finding(
                    "hf_quant_config.json", f"disagrees with config.json about {', '.join(keys) or 'its keys'}"
                )
    if (directory / INDEX).exists():
        metadata = read_json(directory / INDEX).get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        if total != contents.checkpoint.nbytes:
            yield Finding(INDEX, f"total_size is {total}, the tensors have {contents.checkpoint.nbytes} bytes")


def _differences(found: Any, wanted: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(path, value, expected) wherever a config differs; who produced it does not matter, nor keys beyond ours."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in wanted.keys() - {"producer"}:
            yield from _differences(found.get(key), wanted[key], f"{path}.{key}")
    elif found != wanted:
        yield path, found, wanted


def _tensors_present(contents: Contents) -> Iterator[Finding]:
    """Each quantized weight has all its tensors, with the right dtypes and shapes, and there are no others."""
    quantization, tensors = contents.quantization, contents.checkpoint.tensors
    layout = quantization.layout
    expected: dict[str, Entry] = {}
    for name in contents.quantized:
        fmt = contents.formats[name.module]
        elements = weight_names(layout, fmt).elements
        if f"{name.module}.{elements}" not in tensors:
            yield Finding(f"{name.module}.{elements}", "is missing")
            continue
        shape = tensors[f"{name.module}.{elements}"].shape
        if len(shape) != 2:
            yield Finding(f"{name.module}.{elements}", f"has shape {list(shape)}; a quantized weight is 2-D")
            continue
        columns = shape[1] * (2 if isinstance(fmt, NVFP4) else 1)
        if columns % fmt.block_columns:
            yield Finding(f"{name.module}.{elements}", f"{columns} columns are not divisible by {fmt.block_columns}")
        expected |= weight_entries(layout, fmt, name.module, (shape[0], columns), quantization.activations)
    if quantization.kv_cache:
        leaves = defaultdict(set)
        for name in (*contents.quantized, *contents.excluded):
            if name.kind == "attention" and name.tower != "other":
                leaves[name.parent].add(name.leaf)
        for attention, found in leaves.items():
            for tensor, entry in kv_scale_entries(layout, attention, frozenset(found)).items():
                if tensor in tensors or (layout == "compressed-tensors" and {"k_proj", "kv_b_proj"} & found):
                    expected[tensor] = entry
    for tensor, (dtype, shape) in expected.items():
        info = tensors.get(tensor)
        if info is None:
            yield Finding(tensor, "is missing")
        elif (info.dtype, info.shape) != (dtype, shape):
            yield Finding(tensor, f"is {info.dtype} {list(info.shape)}; should be {dtype} {list(shape)}")
    for tensor in tensors:
        if tensor.rpartition(".")[2] in SCALE_PARAMETERS and tensor not in expected:
            yield Finding(tensor, "is a scale that belongs to no quantized weight")


def _exclusions(contents: Contents) -> Iterator[Finding]:
    ignore = contents.quantization.ignore
    if "lm_head" not in {name.leaf for name in contents.quantized} and not any("lm_head" in p for p in ignore):
        yield Finding("config.json", "lm_head is not quantized but missing from the ignore list")
    yield from _assigned(contents)
    yield from _stacked(contents)
    for sentence in disagreements(contents.quantization.layout, ignore, contents.quantized, contents.excluded):
        yield Finding("config.json", sentence)


def _stacked(contents: Contents) -> Iterator[Finding]:
    """Experts still stacked, in high precision, where the config says that they are quantized."""
    ignore, rules = contents.quantization.ignore, RULES[contents.quantization.layout]
    for tensor, info in contents.checkpoint.tensors.items():
        experts, _, parameter = tensor.rpartition(".")
        stacked = len(info.shape) == 3 and experts.endswith("experts") and parameter in ("gate_up_proj", "down_proj")
        if stacked and not all(rule(experts, (experts,), ignore) for rule in rules.values()):
            yield Finding(tensor, "stacked experts in high precision, but the config does not exclude them")


def _assigned(contents: Contents) -> Iterator[Finding]:
    """Where precision is mixed, the config gives every quantized weight one format, and nothing else has any."""
    groups = contents.quantization.groups
    if len(groups) == 1:
        return
    modules = {name.module for name in (*contents.quantized, *contents.excluded)}
    for layer, members in dict.fromkeys(engine_layer(name, modules) for name in contents.quantized):
        found = [i for i, group in enumerate(groups) if _targets(group, layer, members)]
        if len(found) != 1:
            among = "both" if found else "none"
            yield Finding("config.json", f"{layer} is quantized, but {among} of its groups of formats have it")
    for name in contents.excluded:
        if contents.quantization.format_of(name.module) is not None:
            yield Finding("config.json", f"{name.module} is in high precision, but a group of formats has it")


def _targets(group: Group, layer: str, members: tuple[str, ...]) -> bool:
    """Whether an engine finds a layer in a group: by its own name, all its members', or as the parent of experts."""
    inside = any(target.startswith(f"{layer}.") for target in group.targets)
    return inside or excluded_by_compressed_tensors(layer, members, group.targets)


def _values(contents: Contents, progress: Progress) -> Iterator[Finding]:
    """Scale bytes and scalars that no quantizer may write, and digests."""
    checkpoint = contents.checkpoint
    try:
        manifest = read_manifest(checkpoint.directory)
    except HalfbyteError as error:
        yield Finding(MANIFEST, str(error))
        manifest = None
    digests = manifest[1] if manifest else None
    if manifest:
        yield from _manifest_agrees(contents, manifest[0])
    scales = {f"{name.module}.weight_scale": contents.formats[name.module] for name in contents.quantized}
    for tensor, info in checkpoint.tensors.items():
        data = checkpoint.read(tensor)
        if tensor in scales:
            yield from _scale_bytes(tensor, data, scales[tensor])
        elif tensor.rpartition(".")[2] in SCALE_PARAMETERS and not _positive(data.float()):
            yield Finding(tensor, f"is {data.flatten().tolist()}; a scale is positive and finite")
        if digests is not None and digests.get(tensor) != tensor_digest(data):
            known = "its bytes are not those that were written" if tensor in digests else "was not written by halfbyte"
            yield Finding(tensor, f"{known} (SHA-256 in {MANIFEST})")
        progress(info.nbytes)
    for tensor in sorted(set(digests or ()) - set(checkpoint.tensors)):
        yield Finding(tensor, f"is missing, but {MANIFEST} lists it")


def _positive(data: Tensor) -> bool:
    return bool(((data > 0) & (data < torch.inf)).all())


def _manifest_agrees(contents: Contents, options: Options) -> Iterator[Finding]:
    quantization = contents.quantization
    if options.layout != quantization.layout:
        yield Finding(MANIFEST, f"says layout {options.layout}, config.json says {quantization.layout}")
    says = {type(fmt).__name__ for fmt in options.formats}
    declared = {type(group.format).__name__ for group in quantization.groups}
    if not declared <= says:
        yield Finding(MANIFEST, f"says {' and '.join(sorted(says))}, config.json says {' and '.join(sorted(declared))}")


def _scale_bytes(tensor: str, data: Tensor, fmt: Format) -> Iterator[Finding]:
    scale = data.reshape(-1).view(torch.uint8)
    if isinstance(fmt, MXFP8):
        if count := int((scale == 255).sum()):
            yield Finding(tensor, f"{count} block scales are NaN (0xFF)")
        return
    if count := int(((scale & 0x7F) == 0x7F).sum()):
        yield Finding(tensor, f"{count} block scales are NaN (0x7F)")
    if count := int(((scale & 0x80) != 0).sum()):
        yield Finding(tensor, f"{count} block scales are negative")


def _fused(contents: Contents) -> Iterator[Finding]:
    """Layers that engines fuse have all their parts, all quantized or none, under one tensor scale."""
    groups: defaultdict[str, list[Name]] = defaultdict(list)
    for name in contents.quantized:
        if name.fused is not None:
            groups[name.fused].append(name)
    excluded = {name.module for name in contents.excluded}
    for layer, members in groups.items():
        there = {name.leaf for name in members}
        for leaf in members[0].partners:
            module = f"{members[0].parent}.{leaf}"
            if module in excluded:
                yield Finding(module, f"is in high precision, but engines fuse it with {', '.join(sorted(there))}")
        if layer.rpartition(".")[2] in names.PAIRS and len(there | _leaves(excluded, members[0])) < 2:
            lone = members[0]
            if lone.leaf != lone.partners[-1]:
                yield Finding(layer, f"has {lone.leaf} but not its other half")
        formats = {type(contents.formats[name.module]) for name in members}
        if len(formats) > 1:
            yield Finding(layer, "engines fuse its parts, but some are NVFP4 and some MXFP8")
            continue
        parameters = weight_names(contents.quantization.layout, contents.formats[members[0].module])
        for parameter in (parameters.tensor_scale, parameters.input_scale):
            tensors = [f"{name.module}.{parameter}" for name in members]
            values = {
                t: contents.checkpoint.read(t).flatten().tolist() for t in tensors if t in contents.checkpoint.tensors
            }
            if len({str(value) for value in values.values()}) > 1:
                listed = ", ".join(f"{tensor.split('.')[-2]} {value}" for tensor, value in values.items())
                yield Finding(f"{layer} {parameter}", f"engines keep one scale for the fused layer; here: {listed}")


def _leaves(modules: set[str], name: Name) -> set[str]:
    return {leaf for leaf in name.partners if f"{name.parent}.{leaf}" in modules}
