"""The strongest proof: convert the source again and compare every byte."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import HalfbyteError
from ..formats import E4M3_MAX_CHOICES, NVFP4, Format
from ..names import Kind
from ..policy import FormatOverride
from .bounds import calibrated_weights
from .convert import convert_group, kv_scales
from .manifest import FILE as MANIFEST
from .manifest import is_calibrated, read_manifest
from .options import Options
from .plan import Plan, Planned, make_plan
from .shards import Checkpoint, companions
from .sources import open_source
from .verify import Contents, Finding, Progress, open_quantized

_INPUT_SCALES = frozenset({"input_scale", "input_global_scale"})
_KV_SCALES = frozenset({"k_scale", "v_scale"})


def verify_source(
    directory: Path, source_directory: Path, device: str = "cpu", progress: Progress = lambda done: None
) -> Iterator[Finding]:
    """Where a quantized checkpoint differs from what its source gives; nothing where it does not.

    What is quantized is read off the checkpoint, and by which rule is in halfbyte.json; without it every rule of the
    contract is tried on one weight of each kind, and the best fit is held against the rest.
    """
    source = open_source(source_directory, requantize=True)
    try:
        contents = open_quantized(directory)
        manifest = read_manifest(directory)
        options = manifest[0] if manifest else _options_as_found(contents)
        plan = make_plan(source, options, _formats(contents, options))
    except HalfbyteError as error:
        yield Finding(str(directory), str(error))
        return
    if manifest:
        yield from _policy_agrees(source, options, contents)
    else:
        options = replace(options, overrides=tuple(_closest_formats(contents, source, plan, options, device)))
        plan = make_plan(source, options, _formats(contents, options))
    if tuple(plan.ignore) != contents.quantization.ignore:
        missing = sorted(set(plan.ignore) ^ set(contents.quantization.ignore))
        yield Finding("config.json", f"the ignore list differs from the expected one by {', '.join(missing)}")
    if is_calibrated(directory):
        yield from calibrated_weights(contents, source, plan, device, progress)
    else:
        yield from _bytes(contents, source, plan, options, device, progress)
    yield from _rest(contents, source)


def _options_as_found(contents: Contents) -> Options:
    q = contents.quantization
    nvfp4 = any(isinstance(group.format, NVFP4) for group in q.groups)
    return Options(
        format=NVFP4() if nvfp4 else q.groups[0].format,
        layout=q.layout,
        kv_cache=("fp8_calibrated" if _differ(contents, _KV_SCALES) else "fp8") if q.kv_cache else "none",
        activations=("calibrated" if _differ(contents, _INPUT_SCALES) else "constant") if q.activations else "none",
    )


def _differ(contents: Contents, leaves: frozenset[str]) -> bool:
    """Whether any scale of these names is not 1.0: then it was measured."""
    found = contents.checkpoint
    scales = (tensor for tensor in found.tensors if tensor.rpartition(".")[2] in leaves)
    return any(bool((found.read(tensor) != 1.0).any()) for tensor in scales)


def _measured(options: Options) -> frozenset[str]:
    """Names of the scales that come from data; the source cannot tell what they should be."""
    inputs = _INPUT_SCALES if options.activations == "calibrated" else frozenset()
    return inputs | (_KV_SCALES if options.kv_cache == "fp8_calibrated" else frozenset())


def _without_measured_inputs(options: Options) -> Options:
    return replace(options, activations="none") if options.activations == "calibrated" else options


def _formats(contents: Contents, options: Options) -> dict[str, Format]:
    """Module → the format that the options give it, as far as the checkpoint's own is of that kind."""
    formats = {}
    for name in contents.quantized:
        wanted, found = options.format_of(name), contents.formats[name.module]
        formats[name.module] = wanted if type(wanted) is type(found) else found
    return formats


def _policy_agrees(source: Checkpoint, options: Options, contents: Contents) -> Iterator[Finding]:
    modules = set(contents.formats)
    try:
        formats = {item.name.module: item.format for item in make_plan(source, options).quantized}
    except HalfbyteError as error:
        yield Finding(MANIFEST, f"its policy does not fit the source: {error}")
        return
    for module in sorted(formats.keys() ^ modules):
        is_quantized = "is" if module in modules else "is not"
        yield Finding(module, f"{is_quantized} quantized, against the policy in {MANIFEST}")
    for module in sorted(formats.keys() & modules):
        found, wanted = type(contents.formats[module]), type(formats[module])
        if found is not wanted:
            yield Finding(module, f"is {found.__name__}, against the {wanted.__name__} in {MANIFEST}")


def _bytes(
    contents: Contents, source: Checkpoint, plan: Plan, options: Options, device: str, progress: Progress
) -> Iterator[Finding]:
    found = contents.checkpoint
    unseen = set(found.tensors)
    recomputable = _without_measured_inputs(options)
    for group in plan.groups:
        try:
            for item, tensors, _ in convert_group(source, group, recomputable, device):
                for tensor, data in tensors.items():
                    unseen.discard(tensor)
                    yield from _compare(found, tensor, data, item.format)
                progress(item.nbytes)
        except HalfbyteError as error:
            yield Finding(group[0].name.full, str(error))
    measured = _measured(options)
    unseen -= {tensor for tensor in unseen if tensor.rpartition(".")[2] in measured}  # by structure they are right
    for tensor, data in kv_scales(plan, options).items():
        unseen.discard(tensor)
        if tensor.rpartition(".")[2] not in measured:
            yield from _compare(found, tensor, data, None)
    for tensor in sorted(unseen):
        yield Finding(tensor, "is not in what the source gives")


def _compare(found: Checkpoint, tensor: str, expected: Tensor, fmt: Format | None) -> Iterator[Finding]:
    if tensor not in found.tensors:
        yield Finding(tensor, "is missing")
        return
    actual = found.read(tensor)
    if (actual.dtype, actual.shape) != (expected.dtype, expected.shape):
        shapes = f"is {actual.dtype} {list(actual.shape)}; the source gives {expected.dtype} {list(expected.shape)}"
        yield Finding(tensor, shapes)
        return
    count, first = _differences(actual, expected)
    if count:
        rule = f" (recomputed as {fmt})" if fmt else ""
        yield Finding(tensor, f"{count} of {actual.nbytes} bytes differ, the first at {first}{rule}")


def _differences(a: Tensor, b: Tensor) -> tuple[int, int]:
    """(number of differing bytes, position of the first)."""
    left, right = (t.cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    where = (left != right).nonzero()
    return len(where), int(where[0]) if len(where) else 0


def _closest_formats(
    contents: Contents, source: Checkpoint, plan: Plan, options: Options, device: str
) -> Iterator[FormatOverride]:
    """For each kind of weight the NVFP4 rule whose bytes are nearest to the checkpoint's."""
    kinds: defaultdict[Kind, list[tuple[Planned, ...]]] = defaultdict(list)
    for group in plan.groups:
        if isinstance(group[0].format, NVFP4):
            kinds[group[0].name.kind].append(group)
    for kind, groups in kinds.items():
        yield FormatOverride(_closest_format(contents, source, groups, options, device), kinds=(kind,))


def _closest_format(
    contents: Contents, source: Checkpoint, groups: list[tuple[Planned, ...]], options: Options, device: str
) -> NVFP4:
    """Judged on the smallest weights, until one is left."""

    def differing(fmt: NVFP4, group: tuple[Planned, ...]) -> int:
        total = 0
        members = tuple(replace(item, format=fmt) for item in group)
        for _, tensors, _ in convert_group(source, members, _without_measured_inputs(options), device):
            for tensor, data in tensors.items():
                actual = contents.checkpoint.read(tensor) if tensor in contents.checkpoint.tensors else None
                same_kind = actual is not None and (actual.dtype, actual.shape) == (data.dtype, data.shape)
                total += _differences(actual, data)[0] if actual is not None and same_kind else data.nbytes
        return total

    def closest(candidates: list[NVFP4]) -> tuple[int, list[NVFP4]]:
        misses = 0
        for i, group in enumerate(sorted(groups, key=lambda group: sum(item.nbytes for item in group))):
            counts = [differing(fmt, group) for fmt in candidates]
            misses = misses if i else min(counts)
            candidates = [fmt for fmt, count in zip(candidates, counts, strict=True) if count == min(counts)]
            if len(candidates) == 1:
                break
        return misses, candidates

    misses, found = closest(list(_quick_formats()))
    if misses:  # the search tries 126 scales for each block: only where nothing else fits
        fewer, searched = closest(list(_search_formats()))
        found = searched if fewer < misses else found
    return found[0]


def _quick_formats() -> Iterator[NVFP4]:
    """Every format that a checkpoint's weights can have, but for the searched ones; the usual ones first."""
    for e4m3_max in sorted(E4M3_MAX_CHOICES, reverse=True):
        yield NVFP4(e4m3_max=e4m3_max)
    for e4m3_max, error, arithmetic in itertools.product(E4M3_MAX_CHOICES, ("mae", "mse"), ("exact", "fp16")):
        yield NVFP4(scale_rule="four_over_six", e4m3_max=e4m3_max, error=error, error_arithmetic=arithmetic)  # type: ignore[arg-type]
    for e4m3_max in sorted(E4M3_MAX_CHOICES, reverse=True):
        yield NVFP4(block=(16, 16), e4m3_max=e4m3_max)


def _search_formats() -> Iterator[NVFP4]:
    for block, e4m3_max, error in itertools.product(((1, 16), (16, 16)), E4M3_MAX_CHOICES[::-1], ("mse", "mae")):
        yield NVFP4(block=block, scale_rule="search", e4m3_max=e4m3_max, error=error)


def _rest(contents: Contents, source: Checkpoint) -> Iterator[Finding]:
    """config.json but for its quantization, and the files beside the weights."""
    found = contents.checkpoint
    for key in sorted(
        (set(found.config) | set(source.config)) - {"quantization_config"}
    ):  # an empty one's, in a source
        value, wanted = found.config.get(key), source.config.get(key)
        if json.dumps(value) != json.dumps(wanted):  # NaN is itself here
            yield Finding("config.json", f"{key} is {value!r}, in the source {wanted!r}")
    for name in companions(source.directory):
        copy = found.directory / name
        if not copy.is_file():
            yield Finding(name, "is missing; the source has it")
        elif copy.read_bytes() != (source.directory / name).read_bytes():
            yield Finding(name, "differs from the source's")
