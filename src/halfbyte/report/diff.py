"""A comparison of two checkpoints on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from ..checkpoint.diff import Diff, Difference, Explanation
from ..checkpoint.producers import Producer
from .html import visible

SHOWN = 5


def print_diff(console: Console, found: Diff) -> None:
    """The first tensors that differ, each with its first byte; then whose rules they follow."""
    for letter, path, scheme in (("A", found.a, found.schemes[0]), ("B", found.b, found.schemes[1])):
        console.print(Text.assemble((f"{letter} ", "bold"), visible(f"{path}: {scheme}")))
    if found.same:
        console.print(f"[green]✓[/] all {found.compared} tensors are the same, byte for byte")
        return
    console.print(f"[red]✗[/] {len(found.differences)} of {found.compared} tensors differ, the first:")
    for difference in found.differences[:SHOWN]:
        _print_difference(console, difference)
    if len(found.differences) > SHOWN:
        console.print(Text(f"  … and {len(found.differences) - SHOWN} more (--json lists all)", style="dim"))
    for side in "AB":
        tried = [explanation for explanation in found.explanations if explanation.side == side]
        if rules := found.follows(side):
            text = f"{side} follows {' = '.join(rules)}: {len(tried)} weights tried, byte for byte"
            console.print(Text(text, style="green"))
        for explanation in tried:
            if not rules:
                _print_explanation(console, explanation)
            elif explanation is tried[-1]:
                _print_rule(console, next(p for p in explanation.producers if p.name == rules[0]))
    if not found.explanations and any(difference.blocks for difference in found.differences):
        console.print(Text("Whose rules are these? Give the original: --source MODEL", style="dim"))


def _print_difference(console: Console, difference: Difference) -> None:
    console.print(Text(visible(f"  {difference.tensor} {difference.what}"), style="bold"))
    if difference.first is not None:
        console.print(Text(f"    first: {difference.first}"))
        parts = [f"{difference.bytes} of {difference.total} bytes"]
        parts += [] if difference.blocks is None else [f"{difference.blocks} blocks"]
        parts += [] if difference.relative is None else [f"‖A − B‖ = {difference.relative:.3%} of ‖A‖"]
        parts += [] if not difference.largest else [f"at most {difference.largest:.3g} in a value"]
        console.print(Text(f"    {', '.join(parts)}"))


def _print_explanation(console: Console, explanation: Explanation) -> None:
    exact = explanation.share == 1.0
    names = " = ".join(producer.name for producer in explanation.producers)
    how = "is exactly" if exact else f"is nearest to ({explanation.share:.3%} of its bytes)"
    console.print(
        Text(visible(f"{explanation.tensor} in {explanation.side} {how} {names}"), "green" if exact else "yellow")
    )
    _print_rule(console, explanation.producers[0])


def _print_rule(console: Console, producer: Producer) -> None:
    console.print(Text(f"    {producer.peculiar} ({producer.source})", style="dim"))
