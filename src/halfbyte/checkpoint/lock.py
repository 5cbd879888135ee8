"""A lock file: one process at a time, gone with the process that holds it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import socket
from pathlib import Path

from ..errors import CheckpointError

LOCK = "lock"
_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)


class Lock:
    """Held from creation to `release`, or to the end of the process, however it ends.

    The system's lock decides. On a file system that has none, the file's content does: the process and machine that
    wrote it, taken over where that process is known to be dead.

    Raises:
        CheckpointError: another process holds it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            _acquire(self._file, path)
            if not _is_at(self._file, path):  # whoever held it has just finished, and removed it
                raise CheckpointError(f"{path.parent}: another process has just finished here")
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        except BaseException:
            os.close(self._file)
            raise

    def release(self) -> None:
        """Let others in; the file stays if it is still there."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, 0)
        os.close(self._file)

    @staticmethod
    def check(path: Path) -> None:
        """Raise if somebody holds it."""
        try:
            file = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        except FileNotFoundError:
            return
        try:
            _acquire(file, path)
        finally:
            os.close(file)


def lock_directory(work: Path, what: str, known: str, *, resume: bool) -> Lock:
    """Make a working directory and lock it; with resume, take one that is there.

    Args:
        what: the kind of job, in a word.
        known: a regular expression for the names, beside the lock's, that such a job leaves in it.

    Raises:
        CheckpointError: another process works there; it is there but resume is False; or it is something else.
    """
    if work.is_symlink():
        raise CheckpointError(f"{work}: is a link; remove it")
    try:
        work.mkdir()
    except FileExistsError:
        if not work.is_dir():
            raise CheckpointError(f"{work}: is not a directory; remove it") from None
        if not resume:
            Lock.check(work / LOCK)
            raise CheckpointError(
                f"{work}: left by a job that was interrupted; go on with --resume, or remove it"
            ) from None
        strange = sorted(p.name for p in work.iterdir() if p.name != LOCK and not re.fullmatch(known, p.name))
        if strange:
            raise CheckpointError(
                f"{work}: holds {strange[0]}, which no interrupted {what} leaves; remove the directory, "
                "or choose another output"
            ) from None
    return Lock(work / LOCK)


def _acquire(file: int, path: Path) -> None:
    try:
        import fcntl  # not on Windows

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    except ImportError:
        pass
    except BlockingIOError:
        raise CheckpointError(
            f"{path.parent}: {_name(_holder(file))} is writing here; wait for it, or stop it"
        ) from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    holder = _holder(file)
    if holder is not None and not _is_dead(*holder):
        raise CheckpointError(
            f"{path.parent}: {_name(holder)} is writing here, or died; this file system has no locks that would tell. "
            f"If it is dead, remove {path}"
        )


def _holder(file: int) -> tuple[int, str] | None:
    """(process, machine) as the file says, or None if it is empty or says nothing that can be read."""
    try:
        data = json.loads(os.pread(file, 1000, 0))
        return int(data["pid"]), str(data["host"])
    except (ValueError, TypeError, KeyError):
        return None


def _name(holder: tuple[int, str] | None) -> str:
    return "another process" if holder is None else f"process {holder[0]} on {holder[1]}"


def _is_dead(pid: int, host: str) -> bool:
    """False where that cannot be known: of a process on another machine."""
    if host != socket.gethostname() or os.name != "posix":
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _is_at(file: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    found = os.fstat(file)
    return (found.st_dev, found.st_ino) == (there.st_dev, there.st_ino)
