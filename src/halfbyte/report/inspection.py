"""An inspection on the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ..checkpoint.inspection import SEVERITIES, Inspection, Row
from .console import size
from .html import visible

SHOWN = 12
_COLORS = {"error": "red", "warning": "yellow", "note": "blue"}

_COLUMNS: dict[str, Callable[[Row], str]] = {  # what is empty in all rows is not shown
    "weights": lambda row: str(row.weights),
    "size": lambda row: size(row.nbytes),
    "bits": lambda row: f"{row.bits:.3f}",
    "error": lambda row: "" if row.relative_error is None else f"{row.relative_error:.3%}",
    "SNR dB": lambda row: "" if row.snr is None else f"{row.snr:.2f}",
    "saturated": lambda row: str(row.saturated or ""),
    "flushed": lambda row: str(row.flushed or ""),
    "clipped": lambda row: str(row.clipped or ""),
    "all zero": lambda row: str(row.dead or ""),
}


def print_inspection(console: Console, found: Inspection) -> None:
    """Sizes and errors by kind, what engines would do, and the first findings."""
    schemes = ", ".join(dict.fromkeys(found.schemes.values())) or "no quantization declared"
    head = f" {schemes}, made by {found.producer}: {size(found.nbytes)}, {found.total.weights} weights at "
    console.print(Text.assemble((visible(str(found.path)), "bold"), visible(f"{head}{found.total.bits:.3f} bits each")))
    columns = {name: cell for name, cell in _COLUMNS.items() if any(cell(row) for row in (*found.kinds, found.total))}
    table = Table(Column("kind", no_wrap=True), *columns, box=SIMPLE_HEAD, padding=(0, 1))
    for row in (*found.kinds, found.total):
        cells = [cell(row) for cell in columns.values()]
        table.add_row(visible(row.label), *cells, style="bold" if row is found.total else "")
    console.print(table)
    for kind, (count, nbytes) in found.kept.items():
        console.print(Text(visible(f"  {kind} as it was: {count} tensors, {size(nbytes)}"), style="dim"))
    engines = Text("engines: ")
    for verdict in found.verdicts:
        engines.append(f"{verdict.engine} {verdict.outcome}  ", "green" if verdict.outcome == "loads" else "red")
    console.print(engines)
    for remark in found.remarks[:SHOWN]:
        text = (remark.severity, _COLORS[remark.severity]), visible(f" {remark.where}: {remark.what}")
        console.print(Text.assemble(*text))
    counts = Counter(remark.severity for remark in found.remarks)
    listed = ", ".join(f"{counts[severity]} {severity}s" for severity in SEVERITIES if counts[severity])
    hidden = f" ({len(found.remarks) - SHOWN} not shown: --html or --json)" if len(found.remarks) > SHOWN else ""
    console.print(f"findings: {listed or 'none'}{hidden}")
