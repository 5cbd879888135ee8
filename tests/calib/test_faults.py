"""Calibrations that are killed, run out of disk or meet another: --resume gives the bytes of an uninterrupted run."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import halfbyte

from ..check import equal, true
from ..checkpoint import models
from ..checkpoint.faults import Faults
from ..checkpoint.test_faults import Place, failed, files, killed, killed_at_random

pytest.importorskip("transformers")
TINY = str(Path(halfbyte.__file__).parent / "data" / "tiny")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("faults")
    source = models.dense().save(root / "source")
    order = {"source": str(source), "output": str(root / "out"), "max_shard_bytes": 12_000, "calibrate": models.VOCAB}
    with Faults() as faults:
        faults(do="warm", **(order | {"output": str(root / "warm")}))
        shutil.rmtree(root / "warm")
        done = faults(do="run", **order)
        equal(done["status"], 0, str(done))
        place = Place(faults, root, files(root / "out"), done["calls"], order)
        true(len(place.calls) > 200, f"only {len(place.calls)} places to fail at")
        place.clear()
        yield place


def layers(place: Place) -> list[str]:
    return sorted(path.name for path in place.work.glob("layer-*.json"))


def kept(place: Place) -> dict[str, str]:
    """Digests of what a job has left and another may take up."""
    found = files(place.work).items()
    return {n: hashlib.sha256(data).hexdigest() for n, data in found if not n.endswith("lock") and "spilled" not in n}


def test_killed_and_resumed(place: Place) -> None:
    """At the beginning, within the first layer, within the conversion, and while all is removed."""
    last = len(place.calls) - 1
    for at in (0, 1, 3, last // 8, last // 2, last - 12, last - 6, last - 3, last - 1, last):
        killed(place, "kill", at)
        place.check_resumes(f"kill at {at}")
    killed(place, "torn", place.calls.index("pwrite", last // 8))
    place.check_resumes("torn")


@pytest.mark.slow
def test_killed_at_many_calls(place: Place) -> None:
    """Every seventh; and every one at the end, which no conversion has: there the output has its name."""
    end = len(place.calls) - 24
    for at in (*range(0, end, 7), *range(end, len(place.calls))):
        killed(place, "kill", at)
        place.check_resumes(f"kill at {at}")


@pytest.mark.slow
def test_killed_at_random_times(place: Place) -> None:
    killed_at_random(place, trials=16, seconds=1.5)


@pytest.mark.parametrize("fault", ["ENOSPC", "EIO"])
def test_the_disk_fails(place: Place, fault: str) -> None:
    count = len(place.calls)
    for at in (3, count // 8, count // 2):
        failed(place, fault, at)
    spilled = place.calls.index("mkdir", 1) + 2  # after it is made, a file in it is opened
    equal(place.calls[spilled], "pwrite")
    failed(place, fault, spilled)
    failed(place, fault, count // 8, for_good=True)
    equal(place.run(fault="short")["status"], 0)
    equal(files(place.output), place.wanted)
    place.clear()


def test_two_at_once(place: Place) -> None:
    """Which would write each other's layers."""
    for resume in (False, True):
        if resume:
            killed(place, "kill", len(place.calls) // 2)
        done = place.faults(do="pair", **(place.order | {"resume": resume, "layer_seconds": 0.1}))
        equal(sorted(child["status"] for child in done), [0, 2 << 8], str(done))
        refused = next(child["result"] for child in done if child["status"])
        true("is writing here" in refused, refused)
        equal(files(place.output), place.wanted, str(done))
        equal(sorted(path.name for path in place.root.iterdir()), ["out", "source"])
        place.clear()


def test_what_cannot_be_resumed(place: Place) -> None:
    """Other data, and what another kind of job left: nothing is touched."""
    killed(place, "kill", len(place.calls) // 2)
    true(layers(place), "no layer is done")
    before = kept(place)
    for resume, data, message in [
        (True, 1, "cannot be resumed: data.sha256 was '"),
        (False, 0, "left by a job that was interrupted; go on with --resume"),
    ]:
        done = place.run(resume=resume, data=data)
        equal(done["status"], 2 << 8, str(done))
        true(message in done["result"], str(done))
        equal(kept(place), before)
    (place.work / "journal.jsonl").touch()
    done = place.run(resume=True)
    true("holds journal.jsonl, which no interrupted calibration leaves" in done["result"], str(done))
    (place.work / "journal.jsonl").unlink()
    equal(kept(place), before)
    place.check_resumes("refusals")


def test_a_source_that_was_touched(place: Place) -> None:
    """Layers go by what is in their weights; a conversion that had begun goes by size and time, like any other."""
    killed(place, "kill", place.calls.index("mkdir", 12))  # the conversion's directory is about to be made
    equal((len(layers(place)), (place.work / "conversion").exists()), (2, False), "both layers, and no conversion yet")
    os.utime(Path(place.order["source"]) / "model.safetensors")
    done = place.run(resume=True)
    equal(done["status"], 0, str(done))
    equal(files(place.output), place.wanted)
    place.clear()


def test_a_damaged_layer_is_done_again(place: Place) -> None:
    killed(place, "kill", place.calls.index("rename"))  # all layers and shards are done, and the config
    path = place.work / layers(place)[0].replace(".json", ".safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    shutil.rmtree(place.work / "conversion")
    place.check_resumes("a damaged layer")


def test_ranks_die(place: Place) -> None:
    """Either of two, in a layer; one goes on, or two do."""
    for faulty, at, ranks in ((0, 30, 2), (1, 3, 1)):
        meet = str(place.root.parent / f"meet-{faulty}")
        order = place.order | {"meet": meet, "faulty": faulty, "fault": "kill", "at": at}
        done = place.faults(do="ranks", ranks=2, **order)
        equal(done[faulty]["status"], int(signal.SIGKILL), str(done))
        other = done[1 - faulty]
        equal(other["status"], 2 << 8, str(done))
        true("another rank has died" in other["result"] and "go on with --resume" in other["result"], str(other))
        place.check_no_half(f"rank {faulty}")
        done = place.faults(do="ranks", ranks=ranks, **(place.order | {"meet": f"{meet}-again", "resume": True}))
        equal([child["status"] for child in done], [0] * ranks, str(done))
        equal(files(place.output), place.wanted)
        equal(sorted(path.name for path in place.root.iterdir()), ["out", "source"])
        place.clear()


LONG = ("--samples", "96", "--sequence-length", "128", "--device", "cpu")  # a second or two after its first layer
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path]), "OMP_NUM_THREADS": "1"}


def started(work: Path, *command: object) -> subprocess.Popen[str]:
    """A command that has finished a layer by now."""
    arguments = [sys.executable, "-m", *map(str, command)]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    while process.poll() is None and not (work / "layer-00000.json").exists():
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_signals(tmp_path: Path, name: str) -> None:
    """The command ends with the number that a shell expects, and says how to go on."""
    work = tmp_path / "out.partial"
    process = started(work, "halfbyte", "calibrate", TINY, tmp_path / "out", *LONG)
    process.send_signal(getattr(signal, name))
    said = process.communicate(timeout=60)[1]
    equal(process.returncode, 128 + getattr(signal, name), said)
    true(f"what is finished is kept in {work}. Go on with: halfbyte calibrate" in said, said)
    kept = sorted(path.name for path in work.iterdir())
    true("layer-00000.json" in kept and not any(name.startswith("spilled") for name in kept), str(kept))


@pytest.mark.slow
def test_torchrun_loses_a_rank(tmp_path: Path) -> None:
    """The command: of two ranks one dies; two go on, to the bytes of one."""
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node")
    calibrate = ("-m", "halfbyte", "calibrate", TINY, tmp_path / "out", *LONG)
    process = started(tmp_path / "out.partial", *launcher, 2, *calibrate)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    said = process.communicate(timeout=120)[1]
    true(process.returncode != 0, said)  # the launcher may end the other one before it can say how to go on
    true((tmp_path / "out.partial" / "layer-00000.json").exists() and not (tmp_path / "out").exists(), "not kept")
    commands = {
        "out": (*launcher, 2, *calibrate, "--resume"),
        "one": ("halfbyte", "calibrate", TINY, tmp_path / "one", *LONG),
    }
    for command in commands.values():
        arguments = [sys.executable, "-m", *map(str, command)]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=300)
        equal(done.returncode, 0, done.stderr)
    equal(sorted(path.name for path in tmp_path.iterdir()), ["one", "out"])
    true(files(tmp_path / "out") == files(tmp_path / "one"), "other bytes")
