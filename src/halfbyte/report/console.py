"""Tables and sentences for a terminal, and the same facts as plain values for --json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ..checkpoint.convert import Report
from ..checkpoint.engines import serve_commands
from ..checkpoint.manifest import format_to_json
from ..checkpoint.options import Options
from ..checkpoint.plan import Plan, Planned
from ..formats import Format

_LISTED = 4


def size(count: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def format_name(fmt: Format) -> str:
    """A format in a few words."""
    data = format_to_json(fmt)
    if data["name"] == "mxfp8":
        return "MXFP8"
    rule = data["scale_rule"] + (f" ({data['error']})" if data["error"] else "")
    return f"NVFP4 {data['block'][0]}×{data['block'][1]}, {rule}, E = {data['e4m3_max']}"


def formats_name(options: Options) -> str:
    """All formats of the options in a few words."""
    return " and ".join(dict.fromkeys(map(format_name, options.formats)))


def _worst(report: Report, count: int = 5) -> list[Any]:
    return sorted(report.weights, key=lambda weight: -weight.relative_error)[:count]


def report_json(report: Report) -> dict[str, Any]:
    """A conversion's summary as plain values."""
    kinds = {kind: report.relative_error(weights) for kind, weights in report.by_kind().items()}
    return {
        "output": str(report.output),
        **_options_json(report.options),
        "layout": report.options.layout,
        "impl": report.impl,
        "source_bytes": report.source_bytes,
        "source_encoding": None if report.encoded is None else asdict(report.encoded),
        "output_bytes": report.output_bytes,
        "bits_per_weight": report.bits_per_weight,
        "weights_quantized": len(report.weights),
        "tensors_kept": report.kept,
        "weights_to_search": report.to_search,
        "weights_searched": report.searched,
        "fused_groups": report.fused_groups,
        "unequal_fused_scales": report.unequal_fused_scales,
        "shards": report.shards,
        "shards_resumed": report.resumed_shards,
        "relative_error": report.relative_error(),
        "relative_error_by_kind": kinds,
        "worst": [{"tensor": w.name, "relative_error": w.relative_error} for w in _worst(report)],
        "seconds": report.seconds,
        "serve": _serve(report),
    }


def print_report(console: Console, report: Report) -> None:
    """A conversion's summary."""
    shrink = report.source_bytes / report.output_bytes
    console.print(
        Text(str(report.output), style="bold"),
        f" {formats_name(report.options)}, {report.options.layout} layout: "
        f"{size(report.source_bytes)} → {size(report.output_bytes)} ({shrink:.2f}× smaller) in {report.seconds:.1f} s "
        f"with impl={report.impl!r}",
    )
    console.print(
        f"{len(report.weights)} weights at {report.bits_per_weight:.3f} bits each, {report.kept} tensors kept, "
        f"{report.fused_groups} fused groups under one tensor scale, {report.shards} shard(s)"
        + (f", {report.resumed_shards} of them from before" if report.resumed_shards else "")
    )
    searched = f"weights searched {report.searched} of {report.to_search}, " if report.to_search else ""
    console.print(f"{searched}unequal fused scales {report.unequal_fused_scales}")
    for sentence in _source_sentences(report):
        console.print(Text(sentence))
    kinds = Table("kind", "weights", "elements", "relative error", title="Error by kind", title_justify="left")
    for kind, weights in sorted(report.by_kind().items()):
        elements = sum(weight.elements for weight in weights)
        kinds.add_row(kind, str(len(weights)), f"{elements:,}", f"{report.relative_error(weights):.4%}")
    kinds.add_row("all", str(len(report.weights)), "", f"{report.relative_error():.4%}", style="bold")
    worst = Table("worst five tensors", "relative error")
    for weight in _worst(report):
        worst.add_row(Text(weight.name, overflow="fold"), f"{weight.relative_error:.4%}")
    console.print(kinds, worst)
    serve = Table("engine", "command", title="Load it with", title_justify="left")
    for engine, command in _serve(report).items():
        serve.add_row(engine, Text(command, overflow="fold"))
    console.print(serve)


def _source_sentences(report: Report) -> Iterator[str]:
    """What became of a source that was quantized already."""
    encoded = report.encoded
    if encoded is None:
        return
    yield f"The source is {encoded.what}: {encoded.decoded} weights decoded"
    if encoded.kept:
        more = f" and {len(encoded.kept) - _LISTED} more" if len(encoded.kept) > _LISTED else ""
        listed = ", ".join(encoded.kept[:_LISTED])
        yield f"{len(encoded.kept)} of them stay unquantized, and are bfloat16 now: {listed}{more}"
    for what, count in encoded.left_out.items():
        means = "activations are scaled anew"
        if what == "KV-cache scales":
            none = report.options.kv_cache == "none"
            means = "the KV cache is not quantized" if none else "scales of its own are written instead"
        yield f"{count} {what} of the source left out: {means}"
    if encoded.mxfp8:
        lossy = encoded.mxfp8 - encoded.exact
        why = f"; {lossy} had to be rounded, since their scales are no powers of two that MXFP8 has" if lossy else ""
        yield f"{encoded.exact} of {encoded.mxfp8} became MXFP8 without loss: every value is the source's{why}"


def _serve(report: Report) -> dict[str, str]:
    has_experts = any(".experts." in weight.name for weight in report.weights)
    formats = {type(weight.format) for weight in report.weights}
    commands = serve_commands(report.output, report.options, formats, has_experts, report.model_type)
    if report.model_type == "gpt_oss":  # engines read its experts stacked, with their biases, in MXFP4 or bfloat16
        return {engine: command for engine, command in commands.items() if engine == "halfbyte"}
    return commands


def _options_json(options: Options) -> dict[str, Any]:
    """The formats and the recipe's name."""
    overrides = [{"format": format_to_json(o.format), "match": o.match, "kinds": o.kinds} for o in options.overrides]
    name = None if options.recipe is None else options.recipe["name"]
    return {"recipe": name, "format": format_to_json(options.format), "overrides": overrides}


def _becomes(item: Planned) -> str:
    return format_to_json(item.format)["name"] if item.format else item.kept_dtype.lower()


def _why(item: Planned) -> str:
    return item.decision.reason + ("; decoded" if item.decoded else "")


def plan_json(plan: Plan, options: Options) -> dict[str, Any]:
    """A plan as plain values."""
    tensors = [
        {
            "tensor": item.name.full,
            "shape": list(item.shape),
            "dtype": item.dtype,
            "becomes": _becomes(item),
            "reason": item.decision.reason,
            "source": item.source,
            "decoded": item.decoded,
        }
        for item in plan
    ]
    return {**_options_json(options), "layout": options.layout, "tensors": tensors}


def print_plan(console: Console, plan: Plan, options: Options) -> None:
    """Every tensor, what becomes of it, and why."""
    table = Table("tensor", "shape", "becomes", "why", title=f"Plan: {formats_name(options)}, {options.layout}")
    for item in plan:
        becomes = Text(_becomes(item), style="green" if item.format else "dim")
        shape = "×".join(map(str, item.shape))
        table.add_row(Text(item.name.full, overflow="fold"), shape, becomes, Text(_why(item)))
    totals = Counter((_becomes(item) if item.format else "kept", _why(item)) for item in plan)
    lines = [Text(f"{count:6}  {state}: {reason}") for (state, reason), count in totals.items()]
    console.print(Group(table, *lines, Text("Nothing was written.")))
