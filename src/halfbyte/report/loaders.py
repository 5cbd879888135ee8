"""What engines would do with a checkpoint, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from ..checkpoint.loaders import Objection, Verdict

_MARKS = {"loads": ("✓", "green"), "loads wrongly": ("✗", "red"), "refuses": ("✗", "red"), "caution": ("!", "yellow")}
SHOWN = 3  # objections of one rule; --json has all


def print_verdicts(console: Console, verdicts: Sequence[Verdict]) -> None:
    """A paragraph for each engine: what it would do, and why."""
    for verdict in verdicts:
        mark, color = _MARKS[verdict.outcome]
        seen = f"  reads {verdict.reads}: {verdict.scheme}"
        console.print(Text.assemble((f"{mark} {verdict.engine} {verdict.outcome}", f"bold {color}"), (seen, "dim")))
        for objections in by_rule(verdict.objections):
            _print_rule(console, objections)


def by_rule(objections: Sequence[Objection]) -> list[list[Objection]]:
    """Objections of one rule, outcome and source together, the worst first."""
    groups: dict[tuple[str, str, str], list[Objection]] = {}
    for objection in objections:
        groups.setdefault((objection.outcome, objection.rule, objection.source), []).append(objection)
    order = ("refuses", "loads wrongly", "caution")
    return sorted(groups.values(), key=lambda group: order.index(group[0].outcome))


def _print_rule(console: Console, objections: list[Objection]) -> None:
    first = objections[0]
    mark, color = _MARKS[first.outcome]
    lines = [Text.assemble((f"{mark} {first.outcome}", color), f" · {first.rule}")]
    lines += [Text(f"{objection.where}: {objection.what}") for objection in objections[:SHOWN]]
    if len(objections) > SHOWN:
        lines.append(Text(f"… and {len(objections) - SHOWN} more (--json lists all)", style="dim"))
    lines.append(Text(f"source: {first.source}", style="dim"))
    for i, line in enumerate(lines):
        console.print(Padding(line, (0, 0, 0, 6 if i else 4), expand=False))
