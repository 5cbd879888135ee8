"""A conversion's side of the journal: the source it began with, and shards that are finished."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import HalfbyteError
from .ranks import Ranks
from .result import WeightReport
from .schema import Entry
from .shards import INDEX, Checkpoint, companions, is_shard


def source_files(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """By what a changed source is noticed: size and time of every file that is read or copied."""
    directory = checkpoint.directory
    names = {*checkpoint.files, *companions(directory)}
    stats = {name: (directory / name).stat() for name in sorted(names | {INDEX}) if (directory / name).exists()}
    return {
        name: {"bytes": stat.st_size, "modified": datetime.fromtimestamp(stat.st_mtime, UTC).isoformat()}
        for name, stat in stats.items()
    }


def finished_shards(
    where: Path, shards: Mapping[str, Mapping[str, Entry]], records: Mapping[str, Mapping[str, Any]], ranks: Ranks
) -> set[str]:
    """Shards that need not be written again: recorded, and by their digests still what was recorded.

    Every rank looks at some of them, and knows of all.
    """
    known = [file for file in shards if file in records][ranks.rank :: ranks.world]

    def is_whole(file: str) -> bool:
        record = records[file]
        try:
            for data in record["weights"]:
                WeightReport.from_json(data)
            return is_shard(where / file, shards[file], record["tensors"])
        except (HalfbyteError, KeyError, TypeError, AttributeError):
            return False  # not a record that this version would write

    with ThreadPoolExecutor() as pool:
        own = [file for file, whole in zip(known, pool.map(is_whole, known), strict=True) if whole]
    return {file for found in ranks.agree(own) for file in found}
