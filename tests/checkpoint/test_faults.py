"""Conversions that are killed, run out of disk or meet another: they never leave half a model, and --resume gives the
bytes of an uninterrupted run."""

import random
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from halfbyte import CheckpointError
from halfbyte.checkpoint.shards import Checkpoint

from ..check import equal, true
from . import models
from .faults import Faults

Files = dict[str, bytes]


@dataclass(frozen=True)
class Place:
    """A source, what it converts to, and a process that does it."""

    faults: Faults
    root: Path
    wanted: Files
    calls: list[str]  # those that a conversion makes
    order: dict[str, Any] = field(repr=False)

    @property
    def output(self) -> Path:
        return self.root / "out"

    @property
    def work(self) -> Path:
        return self.root / "out.partial"

    def run(self, **order: Any) -> dict[str, Any]:
        return self.faults(do="run", **(self.order | order))

    def clear(self) -> None:
        for path in (self.output, self.work):
            shutil.rmtree(path, ignore_errors=True)

    def check_no_half(self, what: str) -> None:
        """Whatever can be loaded is all of it."""
        for place in (self.output, self.work / "model", self.work):
            if place == self.output and place.exists():
                equal(files(place), self.wanted, f"{what}: the output")
            if (place / "config.json").exists():
                equal(files(place), self.wanted, f"{what}: {place}, which has a config")
            try:
                Checkpoint(place)
            except CheckpointError:
                continue
            equal(files(place), self.wanted, f"{what}: {place}, which can be loaded")

    def check_resumes(self, what: str) -> None:
        """To the bytes of an uninterrupted run, with nothing left beside them."""
        self.check_no_half(what)
        done = self.run(resume=True)
        whole = self.output.exists() and "already exists" in done["result"]  # it died after the last step
        true(done["status"] == 0 or whole, f"{what}: {done}")
        equal(files(self.output), self.wanted, what)
        equal(sorted(path.name for path in self.root.iterdir()), ["out", "source"], what)
        self.clear()


def files(directory: Path) -> Files:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("faults")
    source = models.moe().save(root / "source", 3)
    order = {"source": str(source), "output": str(root / "out"), "max_shard_bytes": 12_000}
    with Faults() as faults:
        faults(do="warm", **(order | {"output": str(root / "warm")}))
        shutil.rmtree(root / "warm")
        done = faults(do="run", **order)
        equal(done["status"], 0, str(done))
        place = Place(faults, root, files(root / "out"), done["calls"], order)
        true(len([name for name in place.wanted if name.endswith(".safetensors")]) > 2, "several shards")
        true(len(place.calls) > 200, f"only {len(place.calls)} places to fail at")
        place.clear()
        yield place


def killed(place: Place, fault: str, at: int, **order: Any) -> None:
    done = place.run(fault=fault, at=at, **order)
    true(done["status"] == signal.SIGKILL or (order and done["status"] == 0), f"{fault} at {at}: {done}")


def test_killed_and_resumed(place: Place) -> None:
    last = len(place.calls) - 1
    for at in (1, 3, last // 2, last - 12, last - 6, last - 4, last - 2, last):
        killed(place, "kill", at)
        place.check_resumes(f"kill at {at}")
    writes = [at for at, name in enumerate(place.calls) if name == "pwrite"]
    for at in (writes[1], writes[len(writes) // 3], writes[-1]):
        killed(place, "torn", at)
        place.check_resumes(f"torn at {at}")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["kill", "torn"])
def test_killed_at_every_call(place: Place, fault: str) -> None:
    for at in [at for at, name in enumerate(place.calls) if fault == "kill" or name == "pwrite"]:
        killed(place, fault, at)
        place.check_resumes(f"{fault} at {at}")


@pytest.mark.slow
def test_killed_at_random_times(place: Place) -> None:
    killed_at_random(place, trials=60, seconds=0.15)


@pytest.mark.slow
def test_a_resumed_run_is_killed_too(place: Place) -> None:
    draw = random.Random(1)
    for trial in range(40):
        for attempt in range(3):
            killed(place, draw.choice(["kill", "torn"]), draw.randrange(len(place.calls) // 2), resume=attempt > 0)
            if place.output.exists():
                break
        place.check_resumes(f"trial {trial}")


def killed_at_random(place: Place, trials: int, seconds: float) -> None:
    """Within so many seconds, between system calls too: by another process, up to three times in a row."""
    draw = random.Random(0)
    for trial in range(trials):
        for attempt in range(draw.randint(1, 3)):
            place.run(resume=attempt > 0 or place.work.exists(), kill_after_seconds=draw.uniform(0, seconds))
            place.check_no_half(f"trial {trial}")
            if place.output.exists():
                break
        if place.output.exists() and not place.work.exists():
            place.clear()
        else:
            place.check_resumes(f"trial {trial}")


def failed(place: Place, fault: str, at: int, **order: Any) -> None:
    done = place.run(fault=fault, at=at, **order)
    if done["status"] == 0:  # where it only cleaned up
        equal(files(place.output), place.wanted, f"{fault} at {at}")
        place.clear()
        return
    equal(done["status"], 2 << 8, f"{fault} at {at}: {done}")
    what = {"ENOSPC": "No space left on device", "EIO": "Input/output error"}[fault]
    true(what in done["result"], f"{fault} at {at}: {done}")
    if (place.work / "journal.jsonl").exists():
        true("go on with --resume" in done["result"], f"{fault} at {at}: {done}")
    place.check_resumes(f"{fault} at {at}")


@pytest.mark.parametrize("fault", ["ENOSPC", "EIO"])
def test_the_disk_fails(place: Place, fault: str) -> None:
    count = len(place.calls)
    for at in (1, count // 3, count - 5):
        failed(place, fault, at)
    failed(place, fault, count // 2, for_good=True)
    header = place.calls.index("ftruncate", count // 2) + 1
    equal(place.run(fault=fault, at=header)["status"], 2 << 8)
    equal([path.name for path in place.work.rglob("*.tmp")], [], "what takes room where there is none")
    place.check_resumes(f"{fault} at a header")
    done = place.run(fault=fault, at=place.calls.index("mkdir"))
    true("is kept" not in done["result"] and not place.work.exists(), f"nothing is kept: {done}")


@pytest.mark.slow
@pytest.mark.parametrize("for_good", [False, True])
@pytest.mark.parametrize("fault", ["ENOSPC", "EIO"])
def test_the_disk_fails_at_every_call(place: Place, fault: str, for_good: bool) -> None:
    for at in range(int(for_good), len(place.calls), 1 + 3 * for_good):
        failed(place, fault, at, for_good=for_good)


def test_short_writes(place: Place) -> None:
    equal(place.run(fault="short")["status"], 0)
    equal(files(place.output), place.wanted)
    place.clear()
    done = place.run(fault="zero")
    equal(done["status"], 2 << 8, str(done))
    true("wrote 0 of" in done["result"], str(done))
    place.check_resumes("writes of nothing")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signals(place: Place, name: str) -> None:
    """The command ends with the number that a shell expects, and says how to go on."""
    arguments = ["convert", place.order["source"], str(place.output), "--kv-cache", "fp8", "--max-shard-gb", "0.000012"]
    for at in (10, len(place.calls) // 2):
        done = place.run(cli=[*arguments, "--device", "cpu"], fault=name, at=at)
        equal(done["status"] >> 8, 128 + getattr(signal, name), str(done))
        command = " ".join(["halfbyte", *arguments, "--device", "cpu", "--resume"])
        true(f"what is finished is kept in {place.work}. Go on with: {command}" in done["result"], str(done))
        place.check_resumes(f"{name} at {at}")


def test_two_at_once(place: Place) -> None:
    """One of them converts, the other is told so; or it comes too late for anything."""
    refusals = ("is writing here", "another process has just finished", "already exists", "left by a job")
    met = 0
    for trial in range(6):
        order = place.order | {"resume": trial % 2 == 1, "quantize_seconds": 0.003}
        done = place.faults(do="pair", **order)
        equal(sorted(child["status"] for child in done), [0, 2 << 8], str(done))
        refused = next(child["result"] for child in done if child["status"])
        true(any(part in refused for part in refusals), refused)
        met += "is writing here" in refused
        equal(files(place.output), place.wanted, str(done))
        equal(sorted(path.name for path in place.root.iterdir()), ["out", "source"])
        place.clear()
    true(met > 0, "they never met")
