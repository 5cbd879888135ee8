"""`halfbyte inspect` and `halfbyte diff`: parse → call → exit code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_tools import Device, Json, emit, errors, progress, usable_device
from .errors import FormatError


def inspect(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint in NVFP4 or MXFP8, anyone's: directory or hub id.")],
    html: Annotated[
        Path | None, typer.Option(help="Write a report here: one file that needs nothing else.", dir_okay=False)
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="The model it was made from: measure errors too.")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Look into a quantized checkpoint: sizes, errors, scale bytes, dead experts, and what engines would do with it.

    Exit code 0 whatever is found: `verify` judges, this shows.
    """
    from .checkpoint.hub import resolve
    from .checkpoint.inspection import inspect as run
    from .checkpoint.shards import Checkpoint
    from .report.html import write
    from .report.inspection import print_inspection

    with errors(as_json):
        path = resolve(checkpoint)
        source = None if against is None else resolve(against)
        if html is not None and not html.absolute().parent.is_dir():
            raise FormatError(f"--html {html}: no such directory to put it in; create it first")
        with progress("inspect", Checkpoint(path).nbytes) as advance:
            found = run(path, source, usable_device(device), advance)
        if html is not None:
            write(found, html)
    data = lambda: {**found.to_json(), "html": None if html is None else str(html)}  # noqa: E731
    emit(as_json, data, lambda console: print_inspection(console, found))
    if html is not None and not as_json:
        print(f"report: {html}")


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A checkpoint: directory or hub id.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another; it may be in another layout.")],
    source: Annotated[
        str | None, typer.Option(help="The model that both were made from: name the rules that they follow.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Where two checkpoints first differ, by how much, and by whose rule: exit code 0 if nowhere, else 1."""
    from .checkpoint.diff import diff as run
    from .checkpoint.hub import resolve
    from .checkpoint.shards import Checkpoint
    from .report.diff import print_diff

    with errors(as_json):
        first, second = resolve(a), resolve(b)
        original = None if source is None else resolve(source)
        with progress("compare", Checkpoint(first).nbytes) as advance:
            found = run(first, second, original, advance)
    emit(as_json, found.to_json, lambda console: print_diff(console, found))
    raise typer.Exit(0 if found.same else 1)
