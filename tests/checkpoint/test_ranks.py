"""Several processes convert one checkpoint: the bytes of one process, whoever dies on the way."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from halfbyte.checkpoint.ranks import Ranks, divide, share_cores

from ..check import equal, true
from . import models
from .encoded import SOURCES
from .faults import Faults
from .test_faults import Files, files

ROOT = Path(__file__).parents[2]


def test_the_largest_go_first_to_whoever_has_least() -> None:
    rounds = divide({"a": [1, 9, 5, 5, 2], "b": [4, 4, 4], "c": []}, ["host"] * 2)
    equal(rounds, [{"a": [1, 0, 1, 1, 0]}, {"b": [0, 1, 0]}, {"c": []}])


def test_one_process_does_everything() -> None:
    equal(divide({"a": [1, 2], "b": [3]}, [""]), [{"a": [0, 0]}, {"b": [0]}])


def test_no_two_machines_write_one_file() -> None:
    hosts = ["x", "x", "y", "y", "z"]
    shards = {str(number): list(range(20)) for number in range(10)}
    rounds = divide(shards, hosts)
    equal([list(owners) for owners in rounds], [list("012"), list("345"), list("678"), list("9")])
    for owners in rounds:
        teams = [{hosts[rank] for rank in ranks} for ranks in owners.values()]
        true(all(len(team) == 1 for team in teams), f"{teams}")
        true(len(set().union(*teams)) == len(teams), f"{teams}: one shard each")


def test_shares_are_even() -> None:
    """Over many shards nobody has more than the largest unit above anybody else."""
    draw = random.Random(0)
    shards = {str(number): [draw.randint(1, 100) for _ in range(draw.randint(1, 30))] for number in range(40)}
    for world in (2, 3, 8):
        loads = [0] * world
        for file, ranks in (item for owners in divide(shards, ["one"] * world) for item in owners.items()):
            for cost, owner in zip(shards[file], ranks, strict=True):
                loads[owner] += cost
        true(max(loads) - min(loads) <= 100, f"{loads}")


@pytest.mark.parametrize(("rank", "before", "after"), [(0, 1, 4), (2, 1, 8), (0, 2, 2)])
def test_ranks_share_the_cores_of_their_machine(
    monkeypatch: pytest.MonkeyPatch, rank: int, before: int, after: int
) -> None:
    """Of eight; unless somebody chose a number of threads."""
    threads = [before]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr("torch.get_num_threads", lambda: threads[-1])
    monkeypatch.setattr("torch.set_num_threads", threads.append)
    share_cores(Ranks(rank, ("a", "a", "b")))
    equal(threads[-1], after)


@dataclass(frozen=True)
class Place:
    """A source, what one process makes of it, and a process that forks ranks."""

    faults: Faults
    root: Path
    wanted: Files
    order: dict[str, Any] = field(repr=False)
    _meetings: Iterator[int] = field(default_factory=itertools.count, repr=False)

    @property
    def output(self) -> Path:
        return self.root / "out"

    @property
    def work(self) -> Path:
        return self.root / "out.partial"

    def run(self, ranks: int, **order: Any) -> list[dict[str, Any]]:
        meet = str(self.root.parent / f"{self.root.name}-{next(self._meetings)}")
        return self.faults(do="ranks", ranks=ranks, meet=meet, **(self.order | order))

    def check_resumes(self, ranks: int, what: str) -> None:
        """To the bytes of one process; what is there before cannot be taken for a model."""
        true(not self.output.exists() or files(self.output) == self.wanted, f"{what}: an output that is not whole")
        if not self.output.exists():
            true(not (self.work / "model" / "config.json").exists(), f"{what}: a config that comes too early")
        done = self.run(ranks, resume=self.work.exists()) if not self.output.exists() or self.work.exists() else []
        equal([child["status"] for child in done], [0] * len(done), f"{what}: {done}")
        self.check(what)

    def check(self, what: str) -> None:
        equal(files(self.output), self.wanted, what)
        equal(sorted(path.name for path in self.root.iterdir()), ["out", "source"], what)
        shutil.rmtree(self.output)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("ranks")
    source = models.moe().save(root / "source", 3)
    order = {"source": str(source), "output": str(root / "out"), "max_shard_bytes": 12_000}
    with Faults() as faults:
        faults(do="warm", **order)
        wanted = files(root / "out")
        true(len([name for name in wanted if name.endswith(".safetensors")]) > 4, "several shards")
        shutil.rmtree(root / "out")
        yield Place(faults, root, wanted, order)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_bytes_of_one_process(place: Place, ranks: int) -> None:
    done = place.run(ranks)
    equal([child["status"] for child in done], [0] * ranks, str(done))
    place.check(f"{ranks} ranks")


def test_two_machines(place: Place) -> None:
    done = place.run(3, hosts=["a", "a", "b"])
    equal([child["status"] for child in done], [0] * 3, str(done))
    place.check("two machines")


def test_one_large_shard(place: Place) -> None:
    """Which all write together; and the number of files does not depend on how many do."""
    place.run(1, max_shard_bytes=10**9)
    wanted = files(place.output)
    shutil.rmtree(place.output)
    place.run(3, max_shard_bytes=10**9)
    equal(files(place.output), wanted)
    true("model.safetensors" in wanted, str(list(wanted)))
    shutil.rmtree(place.output)


@pytest.mark.parametrize("name", ["DeepSeek", "ModelOpt FP8", "MXFP8 of SGLang", "gpt-oss", "ModelOpt NVFP4"])
def test_encoded_sources(place: Place, tmp_path: Path, name: str) -> None:
    """Each rank reads the scales of its own weights; a rank that dies costs no more than elsewhere."""
    source = SOURCES[name]().model.save(tmp_path / "source", 2)
    order = {"source": str(source), "max_shard_bytes": 30_000, "requantize": True}
    run = lambda ranks, out, **more: place.run(ranks, output=str(tmp_path / out), **order, **more)  # noqa: E731
    for ranks, out in ((1, "one"), (2, "two")):
        equal([child["status"] for child in run(ranks, out)], [0] * ranks)
    wanted = files(tmp_path / "one")
    true(len([file for file in wanted if file.endswith(".safetensors")]) > 1, "several shards")
    equal(differing(tmp_path / "two", wanted), [])
    done = run(2, "died", faulty=1, fault="kill", at=8)
    equal([child["status"] for child in done], [2 << 8, int(signal.SIGKILL)], str(done))
    equal([child["status"] for child in run(2, "died", resume=True)], [0, 0])
    equal(differing(tmp_path / "died", wanted), [])


def differing(directory: Path, wanted: Files) -> list[str]:
    found = files(directory)
    return sorted(file for file in found.keys() | wanted.keys() if found.get(file) != wanted.get(file))


def killed(place: Place, ranks: int, faulty: int, **order: Any) -> None:
    """One dies; the others end by themselves, and say why; what is finished is kept."""
    done = place.run(ranks, faulty=faulty, **order)
    equal(done[faulty]["status"], int(signal.SIGKILL), str(done))
    for rank, child in enumerate(done):
        if rank != faulty:
            equal(child["status"], 2 << 8, str(done))
            true("another rank has died" in child["result"] and "go on with --resume" in child["result"], str(child))


@pytest.mark.parametrize(("faulty", "at"), [(0, 60), (1, 3), (1, 20)])
def test_a_rank_dies(place: Place, faulty: int, at: int) -> None:
    """Writing; then another number of ranks goes on."""
    killed(place, 2, faulty, fault="kill", at=at)
    true((place.work / "journal.jsonl").exists(), "no journal")
    place.check_resumes({0: 3, 1: 1}[faulty], f"rank {faulty} at {at}")


@pytest.mark.slow
def test_ranks_die_anywhere(place: Place) -> None:
    """Up to three times in a row, each time with another number of ranks."""
    draw = random.Random(0)
    for trial in range(25):
        for attempt in range(draw.randint(1, 3)):
            ranks = draw.randint(2, 4)
            faulty, at = draw.randrange(ranks), draw.randrange(60)
            place.run(ranks, faulty=faulty, fault=draw.choice(["kill", "torn"]), at=at, resume=attempt > 0)
            if place.output.exists() or not place.work.exists():
                break
        place.check_resumes(draw.randint(1, 4), f"trial {trial}")


@pytest.mark.parametrize("faulty", [0, 1])
def test_a_full_disk_on_one_rank_ends_all(place: Place, faulty: int) -> None:
    done = place.run(2, faulty=faulty, fault="ENOSPC", at=[40, 8][faulty])
    equal([child["status"] for child in done], [2 << 8] * 2, str(done))
    for rank, child in enumerate(done):
        has = "No space left on device" in child["result"] and "go on with --resume" in child["result"]
        true(has and child["result"].count("is kept in") == 1, str(child))
        equal(f"rank {faulty}: " in child["result"], rank != faulty, str(child))
    place.check_resumes(2, "a full disk")


def test_what_is_wrong_with_the_source_leaves_nothing(place: Place) -> None:
    for name in ("model.layers.0", "model.layers.1.mlp"):
        done = place.run(3, faulty=2, raises=name, error="source")
        equal([child["status"] for child in done], [2 << 8] * 3, str(done))
        equal([child["result"] for child in done], ["rank 2: no luck", "rank 2: no luck", "no luck"])
        equal(sorted(path.name for path in place.root.iterdir()), ["source"])


def test_an_error_of_no_known_kind(place: Place) -> None:
    done = place.run(2, faulty=1, raises="model.layers.1.mlp", error="memory")
    true("rank 1: MemoryError: no luck; what is finished is kept in" in done[0]["result"], str(done))
    true("Traceback" in done[1]["result"] and "MemoryError" in done[1]["result"], str(done))
    place.check_resumes(2, "an error of no known kind")


def test_a_missing_source_on_one_machine_keeps_what_is_finished(place: Place) -> None:
    killed(place, 2, 1, fault="kill", at=30)
    before = files(place.work)
    done = place.run(2, faulty=0, resume=True, source=str(place.root / "nowhere"))
    equal([child["status"] for child in done], [2 << 8] * 2, str(done))
    equal(files(place.work).keys(), before.keys(), "nothing was removed")
    place.check_resumes(2, "a missing source")


def test_two_jobs_of_two_ranks(place: Place) -> None:
    """The second one is told so, on both ranks, by the lock that the first one's rank 0 holds."""
    killed(place, 2, 1, fault="kill", at=20)
    done = place.run(2)
    equal([child["status"] for child in done], [2 << 8] * 2, str(done))
    true("left by a job that was interrupted" in done[0]["result"], str(done))
    equal(done[1]["result"], f"rank 0: {done[0]['result']}")
    place.check_resumes(2, "after a refusal")


def torchrun(ranks: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*launcher, "-m", "halfbyte", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path])}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


def test_torchrun(place: Place) -> None:
    """The command, by its name; one rank speaks."""
    options = ("--max-shard-gb", "0.000012", "--device", "cpu", "--kv-cache", "fp8", "--json")
    done = torchrun(2, "convert", place.order["source"], place.output, *options)
    equal(done.returncode, 0, done.stderr)
    equal(json.loads(done.stdout)["shards_resumed"], 0)
    place.check("torchrun")


@pytest.mark.slow
def test_torchrun_ends_with_the_error(place: Place) -> None:
    done = torchrun(2, "convert", place.root / "nowhere", place.output, "--device", "cpu", "--json")
    true(done.returncode != 0 and "nowhere" in done.stderr, done.stderr)
    equal(list(json.loads(done.stdout)), ["error"])
    equal(sorted(path.name for path in place.root.iterdir()), ["source"])
