"""Calibrate and convert: the whole way from a model and some text to a checkpoint."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.convert import DEFAULT_SHARD_BYTES, Report, convert
from ..checkpoint.files import check_new
from ..checkpoint.journal import is_interrupted, said, working_directory
from ..checkpoint.options import Options
from ..checkpoint.plan import text_config
from ..checkpoint.shards import Checkpoint
from ..checkpoint.sources import open_source
from ..errors import CheckpointError, UnsupportedError
from .data import Windows, load_windows
from .options import Calibration
from .ranks import Ranks
from .runner import Progress, Summary, run
from .store import CONVERSION, discard, is_left_over, working


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
    ranks: Ranks | None = None,
    progress: Progress = lambda text, share: None,
) -> tuple[Report, Summary]:
    """Calibrate a model directory and write the result, which appears whole or not at all.

    Layers that are done are kept in `OUTPUT.partial` until then; with resume=True, an interrupted calibration goes on
    from there and ends with the same bytes. Under torch.distributed, call it on every rank.

    ranks: `Ranks.current()`, which is the default.

    Raises:
        CheckpointError: anything wrong with the source, the options for it, the data or the output place. Or the disk
            failed, which says where to go on from; or another job works there; or another rank failed: then it is that
            rank's error.
        UnsupportedError: transformers is not installed, or cannot show what is needed.
    """
    work = working_directory(output)
    ranks = ranks or Ranks.current()
    with ranks.job.leaving(), ExitStack() as held:
        with ranks.together():
            if not (resume and work.is_dir()):
                check_new(output)
            checkpoint = open_source(source)
        held.enter_context(said(work))
        with ranks.together():
            if ranks.rank == 0:
                held.enter_context(working(work, resume=resume))
                _check_new(output, work)
        arguments = (checkpoint, options, calibration, windows, work)
        store, summary = run(*arguments, device=device, ranks=ranks, progress=progress)
        progress("writing", 1.0)
        report = convert(
            source,
            output,
            options,
            calibrated=store,
            device=device,
            max_shard_bytes=max_shard_bytes,
            resume=resume,
            work=work / CONVERSION,
            ranks=ranks.job,
        )
        del store, arguments  # their open files: a network file system would keep those
        with ranks.together():
            pass
        if ranks.rank == 0:
            with suppress(OSError):  # the result is whole by now
                discard(work)
    return report, summary


def _check_new(output: Path, work: Path) -> None:
    """Refuse an output that is there, unless it is what a conversion that died had just given its name."""
    if not (output.exists() or output.is_symlink()) or is_interrupted(work / CONVERSION):
        return
    if work.is_dir() and is_left_over(work, output):
        discard(work)
        raise CheckpointError(f"{output}: already exists; the job that was interrupted had finished it")
    raise CheckpointError(f"{output}: already exists; choose another output directory or remove it")


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
        tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(f"{source}: no tokenizer that transformers can load ({error})") from error
    return load_windows(data, tokenizer, int(config.get("vocab_size", 1 << 62)), samples, sequence_length)
