"""A conversion's side of the journal: the source it began with, shards that are finished, shards being written."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any

from torch import Tensor

from ..errors import CheckpointError, HalfbyteError
from .journal import Journal
from .result import WeightReport
from .schema import Entry
from .shards import INDEX, Checkpoint, ShardWriter, companions, is_shard


def source_files(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """By what a changed source is noticed: size and time of every file that is read or copied."""
    directory = checkpoint.directory
    names = {*checkpoint.files, *companions(directory)}
    stats = {name: (directory / name).stat() for name in sorted(names | {INDEX}) if (directory / name).exists()}
    return {
        name: {"bytes": stat.st_size, "modified": datetime.fromtimestamp(stat.st_mtime, UTC).isoformat()}
        for name, stat in stats.items()
    }


def finished_shards(journal: Journal, shards: Mapping[str, Mapping[str, Entry]]) -> set[str]:
    """Shards that need not be written again: recorded, and by their digests still what was recorded.

    Raises:
        CheckpointError: something else has taken the output's name.
    """
    where = journal.output if journal.is_renamed else journal.model
    known = [file for file in shards if file in journal.records]

    def is_whole(file: str) -> bool:
        record = journal.records[file]
        try:
            for data in record["weights"]:
                WeightReport.from_json(data)
            return is_shard(where / file, shards[file], record["tensors"])
        except (HalfbyteError, KeyError, TypeError, AttributeError):
            return False  # not a record that this version would write

    with ThreadPoolExecutor() as pool:
        finished = {file for file, whole in zip(known, pool.map(is_whole, known), strict=True) if whole}
    if journal.is_renamed and len(finished) < len(shards):
        raise CheckpointError(f"{where}: already exists, and is not what was converted; remove it")
    return finished


class RecordedShards:
    """Shards that are written one after the other, each recorded as soon as it has all its tensors."""

    def __init__(self, journal: Journal, shards: Mapping[str, Mapping[str, Entry]]) -> None:
        self._journal, self._shards = journal, shards
        self._stack = ExitStack()
        self._digests: dict[str, str] = {}
        self._weights: list[WeightReport] = []

    def write(self, file: str, tensors: Mapping[str, Tensor], reports: list[WeightReport]) -> None:
        """Write one group's tensors."""
        if not self._digests:
            self._writer = self._stack.enter_context(ShardWriter(self._journal.model / file, self._shards[file]))
        self._digests |= {name: self._writer.write(name, tensor) for name, tensor in tensors.items()}
        self._weights += reports
        if len(self._digests) == len(self._shards[file]):
            self._stack.close()
            weights = [report.to_json() for report in self._weights]
            self._journal.record(file, {"tensors": self._digests, "weights": weights})
            self._digests, self._weights = {}, []

    def close(self) -> None:
        """Give up a shard that is not whole."""
        error = CheckpointError("not whole")
        self._stack.__exit__(type(error), error, None)
