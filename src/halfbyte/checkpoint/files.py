"""Files on disk: JSON read with suspicion, and writing that leaves the old state or the new one, whatever happens."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from ..errors import CheckpointError

MAX_JSON = 100_000_000
"""Bytes of a JSON file that are read at most, as the safetensors library limits its headers."""
TEMPORARY = ".tmp"
_WAITS = (0.01, 0.1, 1.0, 5.0)  # seconds
_MAX_DEPTH = 100
_CHUNK = 1 << 24


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or CheckpointError.

    Nothing is guessed: a key that is there twice is refused, and so are text that is not Unicode and more than
    `MAX_JSON` bytes. NaN and Infinity, which are no JSON but stand in configs of known models, are read as floats.
    """
    try:
        if not path.is_file():
            raise FileNotFoundError
        with path.open("rb") as file:
            data = file.read(MAX_JSON + 1)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; is {path.parent} a Hugging Face model directory?") from None
    except OSError as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if len(data) > MAX_JSON:
        raise CheckpointError(f"{path}: not readable as JSON (larger than {MAX_JSON} bytes)")
    found = parse_json(data, str(path))
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def parse_json(data: bytes, where: str) -> Any:
    """A JSON value, or CheckpointError."""
    try:
        found = json.loads(data.decode(), object_pairs_hook=_unique)
        json.dumps(found, ensure_ascii=False).encode()  # lone surrogates are no text
        _check_depth(found)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not readable as JSON ({error})") from error
    return found


def remove_directory(path: Path) -> None:
    """Remove it with all that is in it, though other ranks may be removing, or still writing, files of theirs."""
    for wait in _WAITS:
        try:
            shutil.rmtree(path)
        except FileNotFoundError:  # of it, or of something in it
            pass
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
        if not path.exists():
            return
        time.sleep(wait)
    shutil.rmtree(path)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key {twice!r} is there twice")
    return found


def _check_depth(found: Any) -> None:
    """Refuse what code that follows the structure could not follow."""
    level = [found] if isinstance(found, dict | list) else []
    for _ in range(_MAX_DEPTH):
        containers = [v for value in level for v in (value.values() if isinstance(value, dict) else value)]
        level = [value for value in containers if isinstance(value, dict | list)]
        if not level:
            return
    raise ValueError(f"nested deeper than {_MAX_DEPTH} levels")


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object the way Hugging Face does: indented, with a final newline."""
    with replacing(path) as file:
        write_all(file, (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[int]:
    """A descriptor to write a file's content to; the file appears, or changes, whole and on disk, or not at all."""
    temporary = path.with_name(path.name + TEMPORARY)
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        try:
            yield file
            os.fsync(file)
        finally:
            os.close(file)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()  # where the disk is full, this makes room
        raise
    sync_directory(path.parent)


def write_all(file: int, data: bytes | memoryview, offset: int = 0) -> None:
    """Write data at an offset, in as many pieces as the system takes."""
    rest = memoryview(data)
    while len(rest):
        written = os.pwrite(file, rest, offset)
        if not written:
            raise OSError(f"the system wrote 0 of {len(rest)} bytes")
        rest, offset = rest[written:], offset + written


def sync_directory(path: Path) -> None:
    """Make sure that what was created, renamed or removed in a directory stays so when the power fails."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextlib.contextmanager
def whole_or_nothing(directory: Path) -> Iterator[Path]:
    """A temporary sibling of a directory that does not exist yet; renamed to it at the end, removed on any error."""
    check_new(directory)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".partial", dir=directory.absolute().parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.rename(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_new(directory: Path) -> None:
    """Refuse an output directory that is there already, or whose parent is not."""
    if directory.exists() or directory.is_symlink():
        raise CheckpointError(f"{directory}: already exists; choose another output directory or remove it")
    if not directory.absolute().parent.is_dir():
        raise CheckpointError(f"{directory.absolute().parent}: no such directory to put the output in; create it first")


def companions(directory: Path) -> list[str]:
    """Paths of the files beside the weights that engines read: tokenizer, generation config, chat templates, code, …

    Weights in any form, indexes, config.json and quantization configs are not among them, nor are subdirectories, but
    for the one that transformers reads templates from.

    Raises:
        CheckpointError: one is a link to somewhere else, whose content would be copied into the output; or has a name
            that cannot be printed, or is not Unicode.
    """
    left_out = (
        ".safetensors",
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
        ".gguf",
        ".onnx",
        ".h5",
        ".msgpack",
        ".index.json",
        TEMPORARY,
    )
    rewritten = ("config.json", "hf_quant_config.json", "halfbyte.json")
    beside = (
        path.name
        for path in directory.iterdir()
        if path.is_file()
        and not path.name.startswith(".")
        and not path.name.endswith(left_out)
        and path.name not in rewritten
    )
    templates = (
        f"{path.parent.name}/{path.name}"
        for path in directory.glob("additional_chat_templates/*.jinja")
        if path.is_file()
    )
    found = sorted((*beside, *templates))
    for name in found:
        check_inside(directory, name)
    return found


def check_inside(directory: Path, name: str) -> None:
    """Refuse a file that is a link out of its directory, or whose name cannot be printed.

    The hub's cache is known, where snapshots/REVISION/ is all links into blobs/ of the same model.
    """
    if not name.isprintable():  # which what is not Unicode is not, either
        raise CheckpointError(f"{directory}: file name {name!r} cannot be printed; rename or remove the file")
    path, home = directory / name, directory.resolve()
    real = Path(os.path.realpath(path))  # resolve() raises for a link to itself, which cannot be read either
    in_cache = home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs"
    if not in_cache and not real.is_relative_to(home):
        raise CheckpointError(f"{path}: is a link out of the directory, to {real}; put the file itself there")


def copy_companions(source: Path, target: Path) -> None:
    """Copy them all."""
    for name in companions(source):
        (target / name).parent.mkdir(exist_ok=True)
        with open(source / name, "rb") as original, replacing(target / name) as copy:
            _copy(original, copy)


def _copy(source: BinaryIO, target: int) -> None:
    offset = 0
    while data := source.read(_CHUNK):
        write_all(target, data, offset)
        offset += len(data)


def check_name(name: str, where: str) -> None:
    """Refuse a tensor name that cannot be shown or used safely."""

    def refuse(what: str) -> NoReturn:
        raise CheckpointError(f"{where}: tensor name {name[:80]!r} {what}; this is no model of transformers")

    if not name or len(name) > 1000:
        refuse("is empty or longer than 1000 characters")
    if not name.isprintable():
        refuse("has characters that cannot be printed")
