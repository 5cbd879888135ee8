"""`halfbyte calibrate`: parse → call → exit code."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, cast

import typer

from .checkpoint.schema import Layout
from .cli_tools import Device, Json, emit, errors, resumable, usable_device, warn
from .errors import FormatError


def calibrate(
    model: Annotated[str, typer.Argument(help="Model directory, or hub id such as Qwen/Qwen3-0.6B.")],
    out_dir: Annotated[Path, typer.Argument(help="New directory for the result; must not exist.")],
    recipe: Annotated[str, typer.Option(help="Name of a recipe (see `halfbyte recipes`) or its file.")] = "nvfp4-gptq",
    data: Annotated[
        Path | None, typer.Option(help="Text, .jsonl or .parquet; default: the small set that comes with halfbyte.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Windows of text.")] = 64,
    sequence_length: Annotated[int, typer.Option(help="Tokens in each.")] = 512,
    layout: Annotated[str, typer.Option(help="modelopt or compressed-tensors: whose tensor names.")] = "modelopt",
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change a key of the recipe. Repeatable.")
    ] = None,
    every_expert: Annotated[
        bool, typer.Option("--every-expert", help="Show every token to every expert of a mixture.")
    ] = False,
    layers_path: Annotated[
        str | None, typer.Option(help="Where the decoder layers are in transformers' model, such as model.layers.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16: what the model computes in.")] = "float32",
    spill_gb: Annotated[float, typer.Option(help="Activations beyond this go to disk, in GB.")] = 16.0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what an interrupted run left.")] = False,
    device: Device = "auto",
    max_shard_gb: Annotated[float, typer.Option(help="Size of an output file, in GB.")] = 5.0,
    as_json: Json = False,
) -> None:
    """Quantize with calibration data: GPTQ, searched scales, static input and KV-cache scales."""
    import torch

    from .calib.calibrate import calibrate as run
    from .calib.calibrate import model_windows
    from .calib.options import Calibration
    from .calib.ranks import Ranks
    from .calib.store import is_interrupted
    from .checkpoint.hub import resolve
    from .checkpoint.journal import working_directory
    from .checkpoint.ranks import join, part
    from .recipe import load_recipe
    from .report.calibration import print_calibration, summary_json, watched

    with errors(as_json):
        if dtype not in ("float32", "bfloat16"):
            raise FormatError(f"--dtype {dtype}: choose float32 or bfloat16")
        for option, value in (("--max-shard-gb", max_shard_gb), ("--spill-gb", spill_gb)):
            if not 0 < value < math.inf:
                raise FormatError(f"{option} {value}: must be positive and finite")
        chosen = load_recipe(recipe, changes or ())
        if not chosen.needs_data:
            raise FormatError(f"--recipe {recipe}: needs no data; use `halfbyte convert --recipe {recipe}`")
        calibration = Calibration.of(
            chosen,
            every_expert=every_expert,
            layers_path=layers_path,
            dtype=getattr(torch, dtype),
            spill=int(spill_gb * 1e9),
        )
        where, rank = join(usable_device(device))
        ranks = Ranks.current()
    with errors(as_json, ranks.job):
        source = resolve(model)
        windows = model_windows(source, data, samples, sequence_length)
        with resumable(working_directory(out_dir), is_interrupted, rank == 0), watched(rank == 0) as show:
            report, summary = run(
                source,
                out_dir,
                chosen.options(cast(Layout, layout)),
                calibration,
                windows,
                device=where,
                resume=resume,
                max_shard_bytes=int(max_shard_gb * 1e9),
                ranks=ranks,
                progress=show,
            )
        part()
        if rank > 0:
            return
        for sentence in summary.warnings:
            warn(sentence)
        emit(
            as_json, lambda: summary_json(report, summary), lambda console: print_calibration(console, report, summary)
        )
