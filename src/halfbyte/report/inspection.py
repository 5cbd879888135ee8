"""An inspection on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from ..checkpoint.inspection import Inspection, Row
from .console import size
from .html import counted, visible
from .loaders import by_rule

SHOWN = 12
_COLORS = {"error": "red", "warning": "yellow", "note": "blue"}

_LEGEND = {
    "saturated": "blocks with the largest scale there is",
    "flushed": "blocks that decode to zero although they should not",
    "clipped": "blocks with an element beyond what their scale can hold",
    "all zero": "weights of nothing but zeros",
}

_COLUMNS: dict[str, Callable[[Row], str]] = {  # what is empty in all rows is not shown
    "weights": lambda row: f"{row.weights:,}",
    "size": lambda row: size(row.nbytes),
    "bits": lambda row: f"{row.bits:.3f}",
    "error": lambda row: "" if row.relative_error is None else f"{row.relative_error:.2%}",
    "SNR dB": lambda row: "" if row.snr is None else f"{row.snr:.2f}",
    "saturated": lambda row: f"{row.saturated:,}" if row.saturated else "",
    "flushed": lambda row: f"{row.flushed:,}" if row.flushed else "",
    "clipped": lambda row: f"{row.clipped:,}" if row.clipped else "",
    "all zero": lambda row: f"{row.dead:,}" if row.dead else "",
}


def print_inspection(console: Console, found: Inspection) -> None:
    """Sizes and errors by kind, what engines would do, and the first findings."""
    schemes = ", ".join(dict.fromkeys(found.schemes.values())) or "no quantization declared"
    console.print(Text.assemble((visible(str(found.path)), "bold"), visible(f" {schemes}, made by {found.producer}")))
    quantized = f"{found.total.weights:,} quantized weights at {found.total.bits:.3f} bits"
    console.print(f"{size(found.nbytes)}, {size(found.total.nbytes)} of it in {quantized} an element", highlight=False)
    rows = (*found.kinds, found.total)
    columns = {name: cell for name, cell in _COLUMNS.items() if any(cell(row) for row in rows)}
    for table in _tables(console, rows, columns):
        console.print(table)
    for name in columns:
        if name in _LEGEND:
            console.print(Text(f"{name}: {_LEGEND[name]}", style="dim"))
    if found.source is None:
        console.print(Text("error: needs the model that this was made from (--against)", style="dim"))
    kept = [f"{kind} {size(nbytes)} ({_some(count, 'tensor')})" for kind, (count, nbytes) in found.kept.items()]
    if kept:
        console.print(Text(visible(f"not quantized: {', '.join(kept)}"), style="dim"))
    console.print()
    for verdict in found.verdicts:
        rules = dict.fromkeys(group[0].rule for group in by_rule(verdict.objections))
        color = "green" if verdict.outcome == "loads" else "red"
        why = f" ({'caution: ' if verdict.outcome == 'loads' else ''}{', '.join(rules)})" if rules else ""
        console.print(Text.assemble((f"{verdict.engine} {verdict.outcome}", color), why))
    console.print(Text("why: halfbyte verify --for ENGINE", style="dim"))
    console.print()
    console.print(f"findings: {counted(found.remarks)}")
    for remark in found.remarks[:SHOWN]:
        text = (remark.severity, _COLORS[remark.severity]), visible(f" {remark.where}: {remark.what}")
        console.print(Padding(Text.assemble(*text), (0, 0, 0, 2), expand=False))
    if len(found.remarks) > SHOWN:
        console.print(f"  {len(found.remarks) - SHOWN} more: --html FILE or --json", style="dim")


def _tables(console: Console, rows: Sequence[Row], columns: Mapping[str, Callable[[Row], str]]) -> Iterator[Table]:
    """One table, or several side by side cut from it where the terminal is too narrow for it: no cell is cut."""

    def table(names: Sequence[str]) -> Table:
        made = Table(Column("kind", no_wrap=True), box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        for name in names:
            made.add_column(name, no_wrap=True, justify="right")
        for row in rows:
            cells = [columns[name](row) for name in names]
            made.add_row(visible(row.label), *cells, style="bold" if row is rows[-1] else "")
        return made

    names: list[str] = []
    for name in columns:
        wide = Measurement.get(console, console.options.update(max_width=10_000), table([*names, name])).maximum
        if names and wide > console.width:
            yield table(names)
            names = []
        names.append(name)
    yield table(names)


def _some(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
