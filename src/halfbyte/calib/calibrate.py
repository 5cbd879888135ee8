"""Calibrate and convert: the whole way from a model and some text to a checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

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
) -> tuple[Report | None, Summary]:
    """Calibrate a model directory and write the result, which appears whole or not at all.

    Layers that are done are kept in `OUTPUT.partial` until then; with resume=True, an interrupted calibration goes on
    from there and ends with the same bytes. Under torch.distributed, call it on every rank: rank 0 writes, and the
    others get None for a report.

    Raises:
        CheckpointError: anything wrong with the source, the options for it, the data or the output place.
        UnsupportedError: transformers is not installed, or cannot show what is needed.
    """
    if output.exists():
        raise CheckpointError(f"{output}: already exists; choose another output directory or remove it")
    work = output.with_name(f"{output.name}.partial")
    store, summary = run(
        open_source(source), options, calibration, windows, work, device=device, resume=resume, progress=progress
    )
    ranks = Ranks.current()
    report = None
    if ranks.rank == 0:
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
        )
        shutil.rmtree(work)
    ranks.wait()
    return report, summary


def join_ranks(device: str) -> tuple[str, int]:
    """Under torchrun, join the other processes; returns this one's device and rank."""
    if not dist.is_available() or not dist.is_torchelastic_launched():
        return device, 0
    cuda = device.startswith("cuda")
    if cuda:
        device = f"cuda:{dist.get_node_local_rank()}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    return device, dist.get_rank()


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
