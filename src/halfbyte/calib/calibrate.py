"""Calibrate and convert: the whole way from a model and some text to a checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.convert import DEFAULT_SHARD_BYTES, Report, convert
from ..checkpoint.options import Options
from ..checkpoint.plan import text_config
from ..checkpoint.shards import Checkpoint
from ..checkpoint.sources import open_source
from ..errors import CheckpointError, UnsupportedError
from .data import Windows, load_windows
from .options import Calibration
from .ranks import Ranks
from .runner import Progress, Summary, run


def calibrate(
    source: Path,
    output: Path,
    options: Options,
    calibration: Calibration,
    windows: Windows,
    *,
    device: torch.device | str = "cpu",
    resume: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress = lambda text, share: None,
) -> tuple[Report, Summary]:
    """Calibrate a model directory and write the result, which appears whole or not at all.

    Layers that are done are kept in `OUTPUT.partial` until then; with resume=True, an interrupted calibration goes on
    from there and ends with the same bytes. Under torch.distributed, call it on every rank.

    Raises:
        CheckpointError: anything wrong with the source, the options for it, the data or the output place; or another
            rank's error.
        UnsupportedError: transformers is not installed, or cannot show what is needed.
    """
    work = output.with_name(f"{output.name}.partial")
    ranks = Ranks.current()
    with ranks.job.leaving():
        with ranks.together():
            if output.exists():
                done = work.is_dir() and not (work / "conversion").exists() and (output / "config.json").exists()
                hint = f"; if it is what a job that died had finished, remove {work} only" if resume and done else ""
                raise CheckpointError(f"{output}: already exists; choose another output directory or remove it{hint}")
            checkpoint = open_source(source)
        arguments = (checkpoint, options, calibration, windows, work)
        store, summary = run(*arguments, device=device, resume=resume, ranks=ranks, progress=progress)
        progress("writing", 1.0)
        report = convert(
            source,
            output,
            options,
            calibrated=store,
            device=device,
            max_shard_bytes=max_shard_bytes,
            resume=resume,
            work=work / "conversion",
            ranks=ranks.job,
        )
        del store, arguments  # their open files: a network file system would keep those
        with ranks.together():
            pass
        if ranks.rank == 0:
            shutil.rmtree(work, ignore_errors=True)  # the result is whole by now
    return report, summary


def model_windows(source: Path, data: Path | None, samples: int, sequence_length: int) -> Windows:
    """Windows of a file, or of the shipped text, in a model's own tokens.

    Raises:
        CheckpointError, UnsupportedError: as `load_windows`, or the model has no tokenizer that transformers can load.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UnsupportedError("calibration needs transformers: pip install 'halfbyte[hf]'") from error
    config = text_config(Checkpoint(source).config)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source)
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(f"{source}: no tokenizer that transformers can load ({error})") from error
    return load_windows(data, tokenizer, int(config.get("vocab_size", 1 << 62)), samples, sequence_length)
