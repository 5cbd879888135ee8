"""Streaming safetensors: read any tensor, or part of one, and write files larger than memory.

Nothing here knows about quantization.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import operator
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from .files import TEMPORARY, check_inside, check_name, parse_json, sync_directory, write_all
from .files import companions as companions
from .files import copy_companions as copy_companions
from .files import read_json as read_json
from .files import whole_or_nothing as whole_or_nothing
from .files import write_json as write_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
Index = tuple[int | slice, ...]
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, eq=False)
class Fetched:
    """A tensor that was read, in the parts that it is stored in; decode puts it together of them, where they are."""

    parts: tuple[Tensor, ...]
    decode: Callable[[Sequence[Tensor]], Tensor] = operator.itemgetter(0)

    def __call__(self, device: torch.device | str) -> Tensor:
        """The tensor, on a device."""
        return self.decode([part.to(device) for part in self.parts])


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of a tensor; `offset` is where in the file its data begins.

    decoded: it says what the tensor decodes to instead, since it is stored in another format.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0
    decoded: bool = False

    @property
    def nbytes(self) -> int:
        """Size of its data."""
        count = 1
        for size in self.shape:
            count *= size
        return count * DTYPES[self.dtype].itemsize


class Checkpoint:
    """A Hugging Face model directory, opened for reading: its config and, lazily, its tensors.

    Attributes:
        directory: where it lies.
        config: the parsed config.json.
        tensors: name → TensorInfo, of all shards.
        metadata: the `__metadata__` of the first shard.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        if not directory.is_dir():
            raise CheckpointError(f"{directory}: no such directory")
        check_inside(directory, "config.json")
        check_inside(directory, INDEX)
        self.config = read_json(directory / "config.json")
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] | None = None
        expected = self._expected()
        for file in sorted(set(expected.values())) or [self._single()]:
            self._open(file, expected)
        missing = sorted(set(expected) - set(self.tensors))
        if missing:
            raise CheckpointError(f"{directory / INDEX}: tensor {missing[0]} is not in {expected[missing[0]]}")
        self._descriptor = functools.lru_cache(maxsize=64)(lambda file: _Descriptor(directory / file))

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def stored_bytes(self) -> int:
        """Size of all tensors on disk."""
        return self.nbytes

    @property
    def files(self) -> set[str]:
        """All that was or will be read of it."""
        return {"config.json", *(info.file for info in self.tensors.values())}

    def fetch(self, name: str, index: Index = (), *, pin: bool = False) -> Fetched:
        """Read a tensor, or part of one, now, and have it where it is needed later. pin: as of `read`."""
        return Fetched((self.read(name, index, pin=pin),))

    def fetch_group(self, wanted: Sequence[tuple[str, Index]], *, pin: bool = False) -> list[Fetched]:
        """Several of them by name and index; what they have in common is read once."""
        return [self.fetch(name, index, pin=pin) for name, index in wanted]

    def read(self, name: str, index: Index = (), *, pin: bool = False) -> Tensor:
        """A tensor, or the part of it at index (numbers, then perhaps a slice), on the CPU, in memory of its own.

        pin: in pinned memory, from which a GPU copies while others compute.

        The file is read rather than mapped: memory holds only what is asked for, and a disk that fails or a file that
        is cut short is an error here, where it would kill the process.

        Raises:
            CheckpointError: the file cannot be read (then with an OSError as its cause), or is shorter than it was.
        """
        return self._read(name, self.tensors[name], index, pin)

    def _read(self, name: str, info: TensorInfo, index: Index, pin: bool = False) -> Tensor:
        path = self.directory / info.file
        start, shape = _part(info, index)
        try:
            tensor = torch.empty(shape, dtype=DTYPES[info.dtype], pin_memory=pin)
            self._descriptor(info.file).read_into(tensor_bytes(tensor), start)
        except RuntimeError as error:  # no memory for it: the machine's fault, so that what is finished is kept
            raise CheckpointError(f"{path}: tensor {name}: {error}") from OSError(errno.ENOMEM, str(error))
        except (OSError, EOFError) as error:
            raise CheckpointError(f"{path}: tensor {name}: {error}") from error
        return tensor

    def _expected(self) -> dict[str, str]:
        """Name → file, as the index says; empty without an index."""
        path = self.directory / INDEX
        if not path.exists():
            return {}
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{path}: weight_map is missing or is not a map from tensor to file")
        for name, file in weight_map.items():
            check_name(name, str(path))
            if Path(file).name != file or file in ("", ".", "..") or "\\" in file:
                raise CheckpointError(f"{path}: tensor {name} points to {file!r}, outside the directory")
            if not file.endswith(".safetensors"):
                raise CheckpointError(f"{path}: tensor {name} is in {file!r}, which is not a safetensors file")
        return dict(weight_map)

    def _single(self) -> str:
        found = sorted(path.name for path in self.directory.glob("*.safetensors"))
        if SINGLE in found:
            return SINGLE
        if len(found) == 1:
            return found[0]
        if found:
            raise CheckpointError(
                f"{self.directory}: {len(found)} safetensors files but no {INDEX}; download the index too"
            )
        pickles = sorted(path.name for pattern in PICKLES for path in self.directory.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{self.directory / pickles[0]}: pickled weights can run code and are never loaded; "
                "save the model as safetensors first (save_pretrained does)"
            )
        raise CheckpointError(f"{self.directory}: no safetensors file; expected {SINGLE} or {INDEX}")

    def _open(self, file: str, expected: Mapping[str, str]) -> None:
        path = self.directory / file
        if not path.is_file():
            raise CheckpointError(f"{path}: shard is missing; download it again")
        check_inside(self.directory, file)
        try:
            handle: Any = safe_open(path, framework="pt")  # checks that sizes fit, and that data lies without overlap
            if self.metadata is None:
                self.metadata = handle.metadata() or {}
            with path.open("rb") as opened:
                (length,) = struct.unpack("<Q", opened.read(8))
                header = parse_json(opened.read(length), str(path))
        except (SafetensorError, OSError, struct.error) as error:
            raise CheckpointError(f"{path}: damaged or truncated ({error}); download it again") from error
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            check_name(name, str(path))
            if expected and expected.get(name) != file:
                raise CheckpointError(f"{path}: holds tensor {name}, which {INDEX} does not list here")
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            if dtype not in DTYPES:
                raise CheckpointError(f"{path}: tensor {name} is {dtype}, a type that halfbyte does not know")
            if len(shape) > 8 or max(shape, default=0) >= 1 << 48:
                raise CheckpointError(f"{path}: tensor {name}: no tensor has a shape of {str(list(shape))[:80]}")
            self.tensors[name] = TensorInfo(file, dtype, shape, 8 + length + entry["data_offsets"][0])


class _Descriptor:
    """A file open for reading until nothing refers to it any more."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def read_into(self, data: memoryview, offset: int) -> None:
        """Fill data; large reads in several threads, which together are faster than one, on a disk and from memory."""
        pieces = [(data[start : start + _PIECE], offset + start) for start in range(0, len(data), _PIECE)]
        if len(pieces) < 2:
            self._read(data, offset)
            return
        with ThreadPoolExecutor(min(_READERS, len(pieces)), "read") as pool:
            for _ in pool.map(self._read, *zip(*pieces, strict=True)):
                pass

    def _read(self, data: memoryview, offset: int) -> None:
        while len(data):
            count = os.preadv(self._file, [data], offset)  # at most 2 GiB, whatever it is asked for
            if not count:
                raise EOFError("the file is shorter than its header says; download it again")
            data, offset = data[count:], offset + count

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.close(self._file)


_PIECE = 1 << 24
_READERS = 4


def _part(info: TensorInfo, index: Index) -> tuple[int, tuple[int, ...]]:
    """Where the part of a tensor begins in the file, and its shape; such a part is in one piece."""
    start, shape, stride = info.offset, info.shape, info.nbytes
    for i in index:
        stride //= shape[0]
        if isinstance(i, int):
            start, shape = start + i * stride, shape[1:]
        else:
            first, last, step = i.indices(shape[0])
            assert (step, i) == (1, index[-1]), f"{index} is not in one piece"
            start, shape = start + first * stride, (last - first, *shape[1:])
    return start, shape


class ShardWriter:
    """One safetensors file whose tensors are known beforehand and written in any order, each once.

    As the safetensors library does, wider dtypes come first, so that every tensor is aligned. The file has a temporary
    name until it is whole and on disk. Several processes may write one file, each its own tensors; then each calls
    `sync`, and after that one of them `publish`.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], temporary: str = TEMPORARY
    ) -> None:
        self._path, self._suffix = path, temporary
        header, self._pending = shard_header(path.name, tensors)
        size = len(header) + sum(info.nbytes for info in self._pending.values())
        # Not truncated, since others may have written to it; what lay there before, all of it is written over.
        self._file = os.open(_temporary(path, temporary), os.O_WRONLY | os.O_CREAT, 0o666)
        self._is_open = True
        try:
            os.ftruncate(self._file, size)
            write_all(self._file, header)
        except BaseException:
            self.abort()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()
            return
        assert not self._pending, f"{self._path}: never written: {sorted(self._pending)}"
        self.sync()
        publish(self._path, self._suffix)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor at its place."""
        info = self._pending.pop(name)
        assert (tensor_dtype(tensor), tuple(tensor.shape)) == (info.dtype, info.shape), f"{name}: {info}"
        write_all(self._file, tensor_bytes(tensor), info.offset)

    def sync(self) -> None:
        """Wait until what was written is on disk; nothing can be written after."""
        try:
            os.fsync(self._file)
        finally:
            self._close()

    def abort(self) -> None:
        """Remove the file, if it has its temporary name still."""
        self._close()
        with contextlib.suppress(OSError):
            _temporary(self._path, self._suffix).unlink()

    def _close(self) -> None:
        if self._is_open:
            self._is_open = False
            os.close(self._file)


def publish(path: Path, temporary: str = TEMPORARY) -> None:
    """Give a file that is whole and on disk its name."""
    os.replace(_temporary(path, temporary), path)
    sync_directory(path.parent)


def _temporary(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def shard_header(file: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, dict[str, TensorInfo]]:
    """The bytes that a safetensors file with these tensors begins with, and where the tensors lie in it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    infos: dict[str, TensorInfo] = {}
    offset = 0
    for name in sorted(tensors, key=lambda n: (-DTYPES[tensors[n][0]].itemsize, n)):
        dtype, shape = tensors[name]
        infos[name] = TensorInfo(file, dtype, shape, offset)
        end = offset + infos[name].nbytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    infos = {name: TensorInfo(file, i.dtype, i.shape, start + i.offset) for name, i in infos.items()}
    return struct.pack("<Q", len(text)) + text, infos


def is_shard(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], digests: Mapping[str, str]) -> bool:
    """Whether a file is what `ShardWriter` wrote, by the digests that it returned."""
    header, infos = shard_header(path.name, tensors)
    if not path.is_file() or path.stat().st_size != len(header) + sum(info.nbytes for info in infos.values()):
        return False
    with path.open("rb") as file:
        if file.read(len(header)) != header:
            return False
        for name, info in infos.items():  # in the order in which they lie
            digest = hashlib.sha256()
            for start in range(0, info.nbytes, _HASHED):
                digest.update(file.read(min(_HASHED, info.nbytes - start)))
            if digest.hexdigest() != digests.get(name):
                return False
    return True


_HASHED = 1 << 22


def tensor_dtype(tensor: Tensor) -> str:
    """The safetensors name of a tensor's dtype."""
    return _DTYPE_NAMES[tensor.dtype]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's data, as it lies in a file."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()
