"""A conversion's working directory: one job at a time, nothing lost when it dies, and a result that appears whole.

    OUT.partial/lock            who works here
    OUT.partial/journal.jsonl   the settings, then a line for every shard that is finished
    OUT.partial/model/          the output; renamed to OUT at the very end

A shard is in the journal only once it is whole and on disk; the config comes last, so that `model/` is not a model
before it is all of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..errors import CheckpointError, HalfbyteError
from .files import TEMPORARY, check_new, parse_json, remove_directory, replacing, sync_directory, write_all
from .lock import LOCK, lock_directory

JOURNAL = "journal.jsonl"
MODEL = "model"
_GO_ON = "go on with --resume"
_KNOWN = rf"{MODEL}|{re.escape(JOURNAL)}({re.escape(TEMPORARY)})?"


class Journal:
    """The working directory, locked while this is entered.

    Leaving it with an error keeps what is finished, unless the error is one that will come again: something wrong with
    the source or the options. Then nothing is left behind.

    Attributes:
        model: where the output's files go.
        records: shard → what `record` was given for it, by this run or the ones before.

    Raises:
        CheckpointError: another process works there; it is there but resume is False; or with resume, it was left by
            a job with another source, other options or another version (the difference is named).
    """

    def __init__(self, work: Path, output: Path, settings: dict[str, Any], *, resume: bool) -> None:
        self.work, self.output, self.model = work, output, work / MODEL
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.records: dict[str, dict[str, Any]] = {}
        self._size = 0
        if not (resume and work.is_dir()):
            check_new(output)
        with said(work):
            self._lock = lock_directory(work, "conversion", _KNOWN, resume=resume)
            try:
                self._read()
            except BaseException:
                self._lock.release()
                raise

    @property
    def is_renamed(self) -> bool:
        """Whether a job died after the output got its name: then there is nothing more to write."""
        return bool(self.records) and not self.model.is_dir() and self.output.is_dir()

    def record(self, file: str, data: dict[str, Any]) -> None:
        """Note that a shard is finished; it must be on disk by now."""
        line = json.dumps({**data, "file": file}, ensure_ascii=False).encode() + b"\n"
        journal = os.open(self.work / JOURNAL, os.O_WRONLY)
        try:
            write_all(journal, line, self._size)
            os.fsync(journal)
        finally:
            os.close(journal)
        self._size += len(line)
        self.records[file] = data

    def finish(self) -> None:
        """Give the output its name, and remove the rest."""
        if not self.is_renamed:
            try:
                check_new(self.output)
            except CheckpointError as error:  # it came while this was made, which is not lost for that
                raise error from FileExistsError(str(self.output))
            self._remove_temporary()
            sync_directory(self.model)
            self.model.rename(self.output)
            sync_directory(self.output.absolute().parent)
        self._remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None and comes_again(error):
                self._remove()
        finally:
            self._lock.release()
        if error is not None:
            with said(self.work):
                raise error

    def _read(self) -> None:
        path = self.work / JOURNAL
        lines = _lines(path) if path.exists() else []
        if lines:
            if different := differences(lines[0], self._settings):
                raise CheckpointError(
                    f"{self.work}: cannot be resumed: {'; '.join(different[:5])}; remove it to begin again"
                )
            self.records = {line.pop("file"): line for line in lines[1:]}
            self._size = _whole(path)
            os.truncate(path, self._size)  # a line that was cut short
        elif self.output.exists():
            self._remove()
            check_new(self.output)
        else:
            if self.model.exists():
                raise CheckpointError(f"{self.work}: has no {JOURNAL} to resume from; remove it to begin again")
            with replacing(path) as file:
                write_all(file, line := json.dumps(self._settings, ensure_ascii=False).encode() + b"\n")
            self._size = len(line)
        if not self.is_renamed:
            check_new(self.output)
            self.model.mkdir(exist_ok=True)
            self._remove_temporary()

    def _remove_temporary(self) -> None:
        """What a job that died left unfinished; one of its ranks may even have done so after this job began."""
        for path in self.model.iterdir():
            if path.name.endswith(TEMPORARY):
                path.unlink()

    def _remove(self) -> None:
        remove_directory(self.model)
        for name in (JOURNAL, JOURNAL + TEMPORARY, LOCK):
            (self.work / name).unlink(missing_ok=True)
        self.work.rmdir()


def working_directory(output: Path) -> Path:
    """Where a conversion works, until it is renamed to its output."""
    return output.parent / f"{output.name}.partial"


@contextlib.contextmanager
def said(work: Path) -> Iterator[None]:
    """Where the disk fails, say what can be done about it."""
    try:
        yield
    except (OSError, CheckpointError) as error:
        if comes_again(error) or str(error).endswith(_GO_ON):
            raise
        what = str(error)
        if isinstance(error, OSError):
            what = f"{error.filename or work}: {error.strerror or error}"
        raise CheckpointError(f"{what}; {kept(work)}" if work.is_dir() else what) from error


def comes_again(error: BaseException) -> bool:
    """Whether trying again is of no use: something is wrong with the source or the options, not with the machine."""
    return isinstance(error, HalfbyteError) and not isinstance(error.__cause__, OSError)


def kept(work: Path) -> str:
    """Where an interrupted job can be taken up."""
    return f"what is finished is kept in {work}: {_GO_ON}"


def is_interrupted(work: Path) -> bool:
    """Whether a directory is what an interrupted conversion leaves."""
    return (work / JOURNAL).is_file()


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal, each an object; the first is the settings."""
    data = path.read_bytes()[: _whole(path)]
    lines = [parse_json(line, str(path)) for line in data.splitlines()]
    good = all(isinstance(line, dict) for line in lines) and all(isinstance(i.get("file"), str) for i in lines[1:])
    if not good:
        raise CheckpointError(f"{path}: is not a journal; remove {path.parent} to begin again")
    return lines


def _whole(path: Path) -> int:
    return path.read_bytes().rfind(b"\n") + 1


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """Where two JSON values differ, in words."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for key in sorted({*before, *now}):
            found += differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
        return found
    return [] if before == now else [f"{path} was {before!r}, now is {now!r}"]
