"""What is not the source's fault costs none of the work that is done; what a few bytes claim is not believed."""

import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from halfbyte import CheckpointError, Policy
from halfbyte.checkpoint import convert as conversion
from halfbyte.checkpoint import manifest, shards
from halfbyte.checkpoint.convert import convert
from halfbyte.checkpoint.files import remove_directory
from halfbyte.checkpoint.options import Options

from ..check import equal, true
from . import encoded, models


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def wait_until(true_now: Callable[[], bool]) -> None:
    """Shards are finished behind what reads and quantizes."""
    for _ in range(600):
        if true_now():
            return
        time.sleep(0.05)


def test_an_output_that_appears_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = models.dense(1).save(tmp_path / "source"), tmp_path / "out"
    convert(source, tmp_path / "wanted", Options())
    write = conversion.write_configs

    def late(*arguments: Any) -> None:
        write(*arguments)
        out.mkdir(exist_ok=True)

    monkeypatch.setattr(conversion, "write_configs", late)
    with pytest.raises(CheckpointError, match=r"already exists.*--resume"):
        convert(source, out, Options())
    monkeypatch.undo()
    out.rmdir()
    equal(convert(source, out, Options(), resume=True).resumed_shards, 1)
    equal(files(out), files(tmp_path / "wanted"))


def test_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says so by a RuntimeError."""
    source, out = models.moe().save(tmp_path / "source", 3), tmp_path / "out"
    convert(source, tmp_path / "wanted", Options(), max_shard_bytes=4_000)
    read, calls = shards._Descriptor.read_into, []

    def full(self: Any, *arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 30:
            wait_until(lambda: len(list((tmp_path / "out.partial" / "model").glob("*.safetensors"))) > 1)
            raise RuntimeError("can't allocate memory")
        read(self, *arguments)

    monkeypatch.setattr(shards._Descriptor, "read_into", full)
    with pytest.raises(CheckpointError, match="can't allocate memory"):
        convert(source, out, Options(), max_shard_bytes=4_000)
    monkeypatch.undo()
    report = convert(source, out, Options(), max_shard_bytes=4_000, resume=True)
    true(report.resumed_shards > 0, "nothing was kept")
    equal(files(out), files(tmp_path / "wanted"))


def test_many_experts_of_nothing(tmp_path: Path) -> None:
    """A header may claim 2^40 matrices that have no elements."""
    model = models.stack(models.moe(1))
    none = {
        name: torch.empty(2**40, 0, t.shape[-1]).bfloat16() for name, t in model.tensors.items() if "gate_up" in name
    }
    config = {"moe_intermediate_size": 0, "intermediate_size": 0}
    source = model.plus(none).configured(**config).save(tmp_path / "source")
    with pytest.raises(CheckpointError, match=r"but by config\.json each expert's is"):
        convert(source, tmp_path / "out", Options())


def test_nan_in_a_decoded_weight_that_is_kept(tmp_path: Path) -> None:
    """Its bfloat16 bytes would depend on the device."""
    name = "model.layers.0.mlp.up_proj.weight"
    source = encoded.fp8(models.dense(1), {"quant_method": "fp8", "weight_block_size": [48, 40]}, (48, 40)).model
    bad = source.tensors[name].view(torch.uint8).clone()
    bad[3, 5] = 0x7F
    directory = source.plus({name: bad.view(torch.float8_e4m3fn)}).save(tmp_path / "source")
    with pytest.raises(CheckpointError, match=r"up_proj\.weight: decodes to NaN or infinity"):
        convert(directory, tmp_path / "out", Options(policy=Policy(ignore=("*.mlp.*",))))


def test_removing_what_others_remove_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "work"
    directory.mkdir()
    (directory / "a").touch()
    remove, failures = shutil.rmtree, [FileNotFoundError(2, "a"), OSError(39, "Directory not empty")]
    monkeypatch.setattr(shutil, "rmtree", lambda path: remove(path) if not failures else _raise(failures.pop()))
    remove_directory(directory)
    equal((directory.exists(), failures), (False, []))


def _raise(error: BaseException) -> NoReturn:
    raise error


def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, act: Callable[[], Any]) -> Callable[..., Any]:
    """A conversion that has finished shards by the time it reads for the at-th time, when something is done first."""
    source = models.moe().save(tmp_path / "source", 3)
    run = lambda out, **more: convert(source, tmp_path / out, Options(), max_shard_bytes=4_000, **more)  # noqa: E731
    run("wanted")
    preadv, calls = os.preadv, []

    def read(*arguments: Any) -> int:
        calls.append(1)
        if len(calls) == at:
            wait_until(lambda: len(list((tmp_path / "out.partial" / "model").glob("*.safetensors"))) > 1)
            act()
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", read)
    return run


def test_a_disk_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = interrupted(tmp_path, monkeypatch, 30, lambda: _raise(OSError(errno.EIO, os.strerror(errno.EIO))))
    with pytest.raises(CheckpointError, match=r"source/model-0000.*tensor .*Input/output error.*go on with --resume"):
        run("out")
    monkeypatch.undo()
    true(run("out", resume=True).resumed_shards > 0, "nothing was kept")
    equal(files(tmp_path / "out"), files(tmp_path / "wanted"))


def test_a_source_that_is_replaced_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another of the same size; there is no output of both."""
    other = models.moe().plus({"lm_head.weight": torch.zeros(models.VOCAB, models.HIDDEN).bfloat16()})
    file = "model-00001-of-00003.safetensors"

    def replace() -> None:
        os.replace(other.save(tmp_path / "other", 3) / file, tmp_path / "source" / file)

    run = interrupted(tmp_path, monkeypatch, 30, replace)
    with pytest.raises(
        CheckpointError, match=rf"was changed while it was converted: {file}\.modified was .*begin again"
    ):
        run("out")
    equal(sorted(path.name for path in tmp_path.iterdir()), ["other", "source", "wanted"])


def test_another_version_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = interrupted(tmp_path, monkeypatch, 30, lambda: _raise(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run("out")
    monkeypatch.undo()
    monkeypatch.setattr(manifest, "__version__", "9.9")
    with pytest.raises(
        CheckpointError, match=r"cannot be resumed: halfbyte_version was '.*', now is '9\.9'; remove it"
    ):
        run("out", resume=True)


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that the lock file names decides; one on another machine may be alive."""
    run = interrupted(tmp_path, monkeypatch, 30, lambda: _raise(KeyboardInterrupt()))
    monkeypatch.setattr(fcntl, "flock", lambda *_: _raise(OSError(errno.ENOLCK, "no locks")))
    with pytest.raises(KeyboardInterrupt):
        run("out")
    lock, here = tmp_path / "out.partial" / "lock", socket.gethostname()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid, host in ((os.getpid(), here), (dead.pid, "elsewhere")):
        lock.write_text(json.dumps({"pid": pid, "host": host}))
        with pytest.raises(CheckpointError, match=rf"process {pid} on {host} is writing here, or died.*remove .*/lock"):
            run("out", resume=True)
    lock.write_text(json.dumps({"pid": dead.pid, "host": here}))
    true(run("out", resume=True).resumed_shards > 0, "nothing was kept")
    equal(files(tmp_path / "out"), files(tmp_path / "wanted"))
