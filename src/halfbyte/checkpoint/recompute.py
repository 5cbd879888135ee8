"""The strongest proof: convert the source again and compare every byte."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import HalfbyteError
from ..formats import E4M3_MAX_CHOICES, NVFP4, Format
from ..policy import Decision
from .convert import convert_group, kv_scales
from .manifest import FILE as MANIFEST
from .manifest import read_manifest
from .plan import Options, Plan, Planned, make_plan
from .shards import Checkpoint, companions
from .verify import Contents, Finding, Progress, open_quantized


def verify_source(
    directory: Path, source_directory: Path, device: str = "cpu", progress: Progress = lambda done: None
) -> Iterator[Finding]:
    """Where a quantized checkpoint differs from what its source gives; nothing where it does not.

    What is quantized is read off the checkpoint, and by which rule is in halfbyte.json; without it every rule of the
    contract is tried on one weight, and the best fit is held against the rest.
    """
    source = Checkpoint(source_directory)
    try:
        contents = open_quantized(directory)
        manifest = read_manifest(directory)
        options = manifest[0] if manifest else _options_as_found(contents)
        modules = {name.module for name in contents.quantized}
        plan = make_plan(source, options, lambda name, layers: Decision(name.module in modules, "as found"))
    except HalfbyteError as error:
        yield Finding(str(directory), str(error))
        return
    if manifest:
        yield from _policy_agrees(source, options, modules)
    else:
        options = replace(options, format=_closest_format(contents, source, plan, options, device))
    if tuple(plan.ignore) != contents.quantization.ignore:
        missing = sorted(set(plan.ignore) ^ set(contents.quantization.ignore))
        yield Finding("config.json", f"the ignore list differs from the expected one by {', '.join(missing)}")
    yield from _bytes(contents, source, plan, options, device, progress)
    yield from _rest(contents, source)


def _options_as_found(contents: Contents) -> Options:
    q = contents.quantization
    return Options(
        format=q.format,
        layout=q.layout,
        kv_cache="fp8" if q.kv_cache else "none",
        activations="constant" if q.activations else "none",
    )


def _policy_agrees(source: Checkpoint, options: Options, modules: set[str]) -> Iterator[Finding]:
    try:
        planned = {item.name.module for item in make_plan(source, options).quantized}
    except HalfbyteError as error:
        yield Finding(MANIFEST, f"its policy does not fit the source: {error}")
        return
    for module in sorted(planned ^ modules):
        is_quantized = "is" if module in modules else "is not"
        yield Finding(module, f"{is_quantized} quantized, against the policy in {MANIFEST}")


def _bytes(
    contents: Contents, source: Checkpoint, plan: Plan, options: Options, device: str, progress: Progress
) -> Iterator[Finding]:
    found = contents.checkpoint
    unseen = set(found.tensors)
    for group in plan.groups:
        try:
            for item, tensors, _ in convert_group(source, group, options, device):
                for tensor, data in tensors.items():
                    unseen.discard(tensor)
                    yield from _compare(found, tensor, data, options)
                progress(item.nbytes)
        except HalfbyteError as error:
            yield Finding(group[0].name.full, str(error))
    for tensor, data in kv_scales(plan, options).items():
        unseen.discard(tensor)
        yield from _compare(found, tensor, data, options)
    for tensor in sorted(unseen):
        yield Finding(tensor, "is not in what the source gives")


def _compare(found: Checkpoint, tensor: str, expected: Tensor, options: Options) -> Iterator[Finding]:
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
        rule = f"recomputed as {options.format}"
        yield Finding(tensor, f"{count} of {actual.nbytes} bytes differ, the first at {first} ({rule})")


def _differences(a: Tensor, b: Tensor) -> tuple[int, int]:
    """(number of differing bytes, position of the first)."""
    left, right = (t.cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    where = (left != right).nonzero()
    return len(where), int(where[0]) if len(where) else 0


def _closest_format(contents: Contents, source: Checkpoint, plan: Plan, options: Options, device: str) -> Format:
    """The rule whose bytes are nearest to the checkpoint's: judged on the smallest weights, until one is left."""
    if not isinstance(options.format, NVFP4):
        return options.format
    groups = [group for group in plan.groups if group[0].decision.quantize]

    def differing(fmt: Format, group: tuple[Planned, ...]) -> int:
        total = 0
        for _, tensors, _ in convert_group(source, group, replace(options, format=fmt), device):
            for tensor, data in tensors.items():
                actual = contents.checkpoint.read(tensor) if tensor in contents.checkpoint.tensors else None
                same_kind = actual is not None and (actual.dtype, actual.shape) == (data.dtype, data.shape)
                total += _differences(actual, data)[0] if actual is not None and same_kind else data.nbytes
        return total

    candidates = list(_weight_formats())
    for group in sorted(groups, key=lambda group: sum(item.nbytes for item in group)):
        counts = [differing(fmt, group) for fmt in candidates]
        candidates = [fmt for fmt, count in zip(candidates, counts, strict=True) if count == min(counts)]
        if len(candidates) == 1:
            break
    return candidates[0]


def _weight_formats() -> Iterator[NVFP4]:
    """Every format that a checkpoint's weights can have, the usual ones first."""
    for e4m3_max in sorted(E4M3_MAX_CHOICES, reverse=True):
        yield NVFP4(e4m3_max=e4m3_max)
    for e4m3_max, error, arithmetic in itertools.product(E4M3_MAX_CHOICES, ("mae", "mse"), ("exact", "fp16")):
        yield NVFP4(scale_rule="four_over_six", e4m3_max=e4m3_max, error=error, error_arithmetic=arithmetic)  # type: ignore[arg-type]
    for e4m3_max in sorted(E4M3_MAX_CHOICES, reverse=True):
        yield NVFP4(block=(16, 16), e4m3_max=e4m3_max)


def _rest(contents: Contents, source: Checkpoint) -> Iterator[Finding]:
    """config.json but for its quantization, and the files beside the weights."""
    found = contents.checkpoint
    config = {key: value for key, value in found.config.items() if key != "quantization_config"}
    for key in sorted(set(config) | set(source.config)):
        if config.get(key) != source.config.get(key):
            yield Finding("config.json", f"{key} is {config.get(key)!r}, in the source {source.config.get(key)!r}")
    for name in companions(source.directory):
        copy = found.directory / name
        if not copy.is_file():
            yield Finding(name, "is missing; the source has it")
        elif copy.read_bytes() != (source.directory / name).read_bytes():
            yield Finding(name, "differs from the source's")
