"""Conversion on GPUs: the bytes of the CPU, two groups in its memory at most."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte import MXFP8, NVFP4
from halfbyte.checkpoint import convert as conversion
from halfbyte.checkpoint.convert import convert
from halfbyte.checkpoint.options import Options
from halfbyte.formats import Format

from ..check import equal, true
from . import models
from .test_faults import files
from .test_memory import zeros
from .test_ranks import torchrun

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("fmt", [NVFP4(), NVFP4(scale_rule="search"), MXFP8()], ids=repr)
@pytest.mark.parametrize("memory", [10**9, 1])
def test_the_bytes_of_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fmt: Format, memory: int) -> None:
    monkeypatch.setattr("halfbyte.checkpoint.convert.MEMORY", memory)
    source = models.moe(layers=4).save(tmp_path / "source", 3)
    for device in ("cpu", "cuda"):
        convert(source, tmp_path / device, Options(format=fmt), device=device, max_shard_bytes=12_000)
    equal(files(tmp_path / "cuda"), files(tmp_path / "cpu"))


def test_begun_on_one_and_finished_on_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = models.moe(layers=4).save(tmp_path / "source", 3)
    convert(source, tmp_path / "wanted", Options(), max_shard_bytes=12_000)
    publish, calls = conversion.publish, []

    def stop(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        publish(*arguments)

    for first, second in (("cpu", "cuda"), ("cuda", "cpu")):
        monkeypatch.setattr(conversion, "publish", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / second, Options(), device=first, max_shard_bytes=12_000)
        monkeypatch.undo()
        calls.clear()
        report = convert(source, tmp_path / second, Options(), device=second, max_shard_bytes=12_000, resume=True)
        true(0 < report.resumed_shards < report.shards, f"{report.resumed_shards} of {report.shards}")
        equal(files(tmp_path / second), files(tmp_path / "wanted"))


def test_two_groups_on_the_gpu(tmp_path: Path) -> None:
    """Of 67 MB; beside them, the comparison of one with its source takes a few float32 copies of 2^24 elements."""
    zeros(tmp_path / "source", layers=8, hidden=2048, width=8192)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    convert(tmp_path / "source", tmp_path / "out", Options(), device="cuda")
    most = torch.cuda.max_memory_allocated() - before
    true(most < 2 * 1.4 * 67e6 + 5 * 67e6, f"{most} bytes")


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_rank_on_each_of_two(tmp_path: Path) -> None:
    source = models.moe(layers=4).save(tmp_path / "source", 3)
    convert(source, tmp_path / "one", Options(), max_shard_bytes=12_000)
    done = torchrun(2, "convert", source, tmp_path / "two", "--max-shard-gb", "0.000012", "--device", "cuda")
    equal(done.returncode, 0, done.stderr)
    equal(files(tmp_path / "two"), files(tmp_path / "one"))
    shutil.rmtree(tmp_path / "two")
