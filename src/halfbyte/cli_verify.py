"""`halfbyte verify`: parse → call → exit code."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from .cli_tools import Device, Json, emit, errors, escape, progress, usable_device
from .errors import FormatError


def verify(
    checkpoint: Annotated[
        str, typer.Argument(help="A quantized checkpoint: directory or hub id; with --for, anyone's.")
    ],
    source: Annotated[
        str | None, typer.Option(help="The model it was made from: recompute it and compare every byte.")
    ] = None,
    engines: Annotated[
        str | None,
        typer.Option(
            "--for", metavar="ENGINES", help="vllm, sglang, tensorrt-llm, transformers or all: what would each do?"
        ),
    ] = None,
    tp: Annotated[int, typer.Option(metavar="N", help="Tensor-parallel size, for --for.")] = 1,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Prove a quantized checkpoint: exit code 0 if nothing is wrong with it, 1 if something is.

    Without --for: that it is whole, and what halfbyte writes. With it: whether engines load it, and compute the right
    numbers; 1 if one of them would not.
    """
    from .checkpoint.hub import resolve
    from .checkpoint.loaders import Verdict, judge, parse_engines
    from .checkpoint.manifest import is_calibrated
    from .checkpoint.recompute import verify_source
    from .checkpoint.sources import open_source
    from .checkpoint.survey import survey
    from .checkpoint.verify import Finding, verify_structure
    from .report.loaders import print_verdicts

    findings: list[Finding] = []
    verdicts: list[Verdict] = []
    with errors(as_json):
        if tp < 1 or (tp > 1 and engines is None):
            raise FormatError(f"--tp {tp}: a positive number, together with --for")
        wanted = None if engines is None else parse_engines(engines)
        out_dir = resolve(checkpoint)
        total = sum(path.stat().st_size for path in out_dir.glob("*.safetensors"))
        if wanted is None:
            with progress("structure", total) as advance:
                findings += verify_structure(out_dir, advance)
        else:
            with progress("block scales", None) as advance:
                verdicts += judge(survey(out_dir), wanted, tp, advance)
        if source is not None:
            source_path = resolve(source)
            with progress("against source", open_source(source_path, requantize=True).nbytes) as advance:
                findings += verify_source(out_dir, source_path, usable_device(device), advance)
    unique = list(dict.fromkeys(findings))
    ok = not unique and all(verdict.outcome == "loads" for verdict in verdicts)
    data: dict[str, Any] = {"ok": ok, "findings": [{"where": f.where, "what": f.what} for f in unique]}
    if engines is not None:
        data["engines"] = [verdict.to_json() for verdict in verdicts]

    def show(console: Console) -> None:
        if verdicts:
            print_verdicts(console, verdicts)
        for finding in unique:
            console.print(f"[red]✗[/] {escape(str(finding))}", highlight=False)
        scope = "structure and digests (add --source to recompute)"
        if source is not None:
            scope = "every byte is what its source gives"
            if is_calibrated(out_dir):
                scope = "structure and digests; every calibrated weight is as near its source as it should be"
        name = escape(str(out_dir))
        if unique:
            console.print(f"{name}: {len(unique)} finding(s)")
        elif engines is None or source is not None:
            console.print(f"[green]✓[/] {name}: {scope}")

    emit(as_json, lambda: data, show)
    raise typer.Exit(0 if ok else 1)
