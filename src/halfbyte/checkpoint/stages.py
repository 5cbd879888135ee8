"""A conversion's work: reading ahead, quantizing, hashing and writing behind, finishing shards behind that.

All of it goes on at the same time, on every rank for its own share; what is in memory between the stages fits a budget.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .pipeline import Behind, Budget, read_ahead
from .ranks import Ranks, divide
from .result import WeightReport
from .schema import Entry
from .shards import Fetched, ShardWriter, tensor_digest
from .staging import Staging

_HASHING = 4  # threads: one hashes slower than a disk writes
_ON_DEVICE = 2  # groups
_UNFINISHED = 2  # rounds that are written, but not synced by all ranks

Progress = Callable[[int], None]  # called with the bytes of the source just finished
Converted = tuple[dict[str, Tensor], list[Callable[[], WeightReport]]]
Record = dict[str, Any]  # of a shard: "tensors" (name → SHA-256) and "weights" (reports, in any order)


@dataclass(frozen=True, eq=False)
class Unit:
    """What is quantized and written at once.

    Attributes:
        file: the shard that it goes to.
        size, written: bytes of the source and of the output.
        on_device: whether what was read goes to the device.
        read: the source's tensors; its argument says whether to put them into pinned memory.
        convert: from these, on the device or not, the output's tensors, and what tells how each weight fared.
    """

    file: str
    size: int
    written: int
    on_device: bool
    read: Callable[[bool], list[Fetched]]
    convert: Callable[[list[Fetched]], Converted]


@dataclass(eq=False)
class _Part:
    """What this rank has written of a shard."""

    writer: ShardWriter
    digests: dict[str, str] = field(default_factory=dict)
    weights: list[dict[str, Any]] = field(default_factory=list)


class Stages:
    """One rank's share of a job.

    Args:
        shards: file → its tensors, of all files that are to be written.
        directory, temporary: where they go, and what their names end with until they are whole.
        memory: bytes of the source that are held at once, unless a single unit is larger.
        finish: called with a shard and its record once all ranks have written and synced their parts of it.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        shards: Mapping[str, Mapping[str, Entry]],
        ranks: Ranks,
        staging: Staging,
        directory: Path,
        temporary: str,
        memory: int,
        finish: Callable[[str, Record], None],
    ) -> None:
        self._shards, self._ranks, self._staging, self._finish = shards, ranks, staging, finish
        self._directory, self._temporary = directory, temporary
        of_file: dict[str, list[Unit]] = {file: [] for file in shards}
        for unit in units:
            of_file[unit.file].append(unit)
        costs = {file: [unit.size + unit.written for unit in units] for file, units in of_file.items()}
        self._rounds = divide(costs, ranks.hosts)
        self._sizes = [sum(unit.size for file in owners for unit in of_file[file]) for owners in self._rounds]
        self._mine = [
            [
                unit
                for file, ranks_of_units in owners.items()
                for unit, rank in zip(of_file[file], ranks_of_units, strict=True)
                if rank == ranks.rank
            ]
            for owners in self._rounds
        ]
        self._on_device = Budget(_ON_DEVICE)
        self._unfinished = Budget(_UNFINISHED, also=self._on_device)
        self._budget = Budget(memory, also=self._unfinished)
        self._parts: dict[str, _Part] = {}  # of the round that is being written
        self._opened: set[ShardWriter] = set()

    def run(self, progress: Progress) -> None:
        """Do it; on an error, shards that are not whole are removed."""
        try:
            with (
                Behind("finish", self._budget) as finisher,
                ThreadPoolExecutor(_HASHING, "hash") as hashing,
                _one_thread_each() as reporting,
                Behind("write", self._budget) as writer,
            ):
                self._run(finisher, hashing, reporting, writer, progress)
        except BaseException:
            for opened in self._opened:
                opened.abort()
            raise

    def _run(
        self, finisher: Behind, hashing: Executor, reporting: Executor, writer: Behind, progress: Progress
    ) -> None:
        items = [(number, unit) for number, units in enumerate(self._mine) for unit in units]
        ended = 0

        def end_rounds(first: int) -> None:
            nonlocal ended
            for number in range(ended, first):
                writer.submit(partial(self._end, number, finisher))
            ended = first

        share = _Share(self._mine, self._sizes, progress)
        for (number, unit), read in read_ahead(items, self._read, lambda item: item[1].size, self._budget):
            finisher.check()
            end_rounds(number)
            tensors, tellers = unit.convert(self._staging.received(read))
            reports = [_now(tell) if self._goes(unit) else reporting.submit(tell) for tell in tellers]
            tensors = self._staging.fetch(tensors)
            del read, tellers
            if self._goes(unit):
                self._on_device.give(1)
            hashes = {name: hashing.submit(tensor_digest, tensor) for name, tensor in tensors.items()}
            writer.submit(partial(self._write, unit, tensors, hashes, reports))
            del tensors
            share.done(number, unit)
        end_rounds(len(self._rounds))

    def _read(self, item: tuple[int, Unit]) -> tuple[list[Fetched], Any]:
        unit = item[1]
        if not self._goes(unit):
            return unit.read(False), None
        fetched = unit.read(True)
        self._on_device.take(1)
        return self._staging.send(fetched)

    def _goes(self, unit: Unit) -> bool:
        return unit.on_device and self._staging.is_pinned

    def _write(
        self,
        unit: Unit,
        tensors: dict[str, Tensor],
        hashes: dict[str, Future[str]],
        reports: list[Future[WeightReport]],
    ) -> None:
        part = self._parts.get(unit.file)
        if part is None:
            writer = ShardWriter(self._directory / unit.file, self._shards[unit.file], self._temporary)
            self._opened.add(writer)
            part = self._parts[unit.file] = _Part(writer)
        for name, tensor in tensors.items():
            part.writer.write(name, tensor)
        part.digests |= {name: digest.result() for name, digest in hashes.items()}
        part.weights += [report.result().to_json() for report in reports]
        self._budget.give(unit.size)

    def _end(self, number: int, finisher: Behind) -> None:
        """In the writer's thread, after this rank's last write of a round; the next one's may begin."""
        parts, self._parts = self._parts, {}
        self._unfinished.take(1)
        finisher.submit(partial(self._finish_round, number, parts))

    def _finish_round(self, number: int, parts: dict[str, _Part]) -> None:
        for part in parts.values():
            part.writer.sync()
        own = {file: {"tensors": part.digests, "weights": part.weights} for file, part in parts.items()}
        everyone: list[dict[str, Record]] = self._ranks.agree(own)
        if self._ranks.rank > 0:  # rank 0 is about to rename them
            self._forget(parts)
        for file in self._rounds[number]:
            record: Record = {"tensors": {}, "weights": []}
            for theirs in everyone:
                if file in theirs:
                    record["tensors"] |= theirs[file]["tensors"]
                    record["weights"] += theirs[file]["weights"]
            self._finish(file, record)
        self._forget(parts)
        self._unfinished.give(1)

    def _forget(self, parts: dict[str, _Part]) -> None:
        """These are whole, and no longer removed on an error."""
        self._opened.difference_update([part.writer for part in parts.values()])


@contextlib.contextmanager
def _one_thread_each() -> Iterator[Executor]:
    """As many threads as torch uses, each of which computes by itself.

    Reports are many small operations. Torch would have all its threads meet at the end of each, which takes longer
    than the operation where the threads of other stages are in the way.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, "report", torch.set_num_threads, (1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)  # for threads that are still to come; this one kept its own number


def _now(tell: Callable[[], WeightReport]) -> Future[WeightReport]:
    """On a GPU, in the order of its stream."""
    done: Future[WeightReport] = Future()
    done.set_result(tell())
    return done


class _Share:
    """Progress of all ranks, as one of them sees it: the others are taken to be as far as this one."""

    def __init__(self, mine: Sequence[Sequence[Unit]], sizes: Sequence[int], progress: Progress) -> None:
        self._own = [sum(unit.size for unit in units) for units in mine]
        self._sizes, self._progress = sizes, progress
        self._finished = [0] * len(sizes)  # of this rank's
        self._said = 0

    def done(self, number: int, unit: Unit) -> None:
        """One of this rank's units of a round is done."""
        self._finished[number] += unit.size
        before = sum(self._sizes[:number])  # rounds without a unit of this rank among them
        own = self._own[number]
        now = before + (self._sizes[number] * self._finished[number] // own if own else 0)
        self._progress(now - self._said)
        self._said = now
