"""What a calibration prints: a bar while it runs, and a summary."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..calib.runner import Summary
from ..checkpoint.convert import Report
from .console import print_report, report_json


@contextlib.contextmanager
def watched(wanted: bool) -> Iterator[Callable[[str, float], None]]:
    """A progress bar on stderr, where someone looks at it; called with a text and the share that is done."""
    console = Console(stderr=True)
    text = TextColumn("{task.description}")
    columns = (text, BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not (wanted and console.is_terminal)) as progress:
        task = progress.add_task("calibrate", total=1.0)
        yield lambda description, share: progress.update(task, description=description, completed=share)


def summary_json(report: Report, summary: Summary) -> dict[str, Any]:
    """A calibration as plain values."""
    return {
        **report_json(report),
        "calibration": {
            "groups": list(summary.groups),
            "methods": dict(Counter(group["method"] for group in summary.groups)),
            "saturated_blocks": summary.saturated,
            "expert_tokens": summary.routed,
            "warnings": list(summary.warnings),
        },
    }


def print_calibration(console: Console, report: Report, summary: Summary) -> None:
    """What was written, and how the layers fared."""
    print_report(console, report)
    methods = Counter(group["method"] for group in summary.groups)
    counted = ", ".join(f"{count} groups by {method}" for method, count in methods.items())
    console.print(f"Calibrated: {counted}; {summary.saturated} blocks saturated")
    for path, counts in summary.routed.items():
        console.print(f"  {path}: {min(counts)} to {max(counts)} tokens an expert", highlight=False)
    errors = [group["error"] for group in summary.groups if group["error"] is not None]
    if errors:
        console.print(
            f"Error of the layers' outputs, E‖(W − Q)x‖² / E‖Wx‖²: {sum(errors) / len(errors):.3%} on average"
        )
