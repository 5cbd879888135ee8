"""Streaming safetensors: read any tensor, or part of one, and write files larger than memory.

Nothing here knows about quantization.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError

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
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of a tensor."""

    file: str
    dtype: str
    shape: tuple[int, ...]

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
        self.config = read_json(directory / "config.json")
        self._files: dict[str, Any] = {}  # handles of safetensors, which has no types
        self.tensors: dict[str, TensorInfo] = {}
        expected = self._expected()
        for file in sorted(set(expected.values())) or [self._single()]:
            self._open(file, expected)
        missing = sorted(set(expected) - set(self.tensors))
        if missing:
            raise CheckpointError(f"{directory / INDEX}: tensor {missing[0]} is not in {expected[missing[0]]}")
        first = next(iter(self._files.values()), None)
        self.metadata: dict[str, str] = (first.metadata() or {}) if first is not None else {}

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, name: str, index: tuple[int | slice, ...] = ()) -> Tensor:
        """A tensor, or the part of it at index, on the CPU; the file is mapped, not copied."""
        file = self._files[self.tensors[name].file]
        try:
            tensor: Tensor = file.get_slice(name)[index] if index else file.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{self.directory / self.tensors[name].file}: tensor {name}: {error}") from error
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
        try:
            handle: Any = safe_open(path, framework="pt")
            names = list(handle.keys())
            infos = {name: handle.get_slice(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: damaged or truncated ({error}); download it again") from error
        self._files[file] = handle
        for name, info in infos.items():
            if expected and expected.get(name) != file:
                raise CheckpointError(f"{path}: holds tensor {name}, which {INDEX} does not list here")
            dtype = info.get_dtype()
            if dtype not in DTYPES:
                raise CheckpointError(f"{path}: tensor {name} is {dtype}, a type that halfbyte does not know")
            self.tensors[name] = TensorInfo(file, dtype, tuple(info.get_shape()))


class ShardWriter:
    """One safetensors file whose tensors are known beforehand and written in any order, each once.

    As the safetensors library does, wider dtypes come first, so that every tensor is aligned.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        self._path = path
        self._pending: dict[str, tuple[int, TensorInfo]] = {}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in sorted(tensors, key=lambda n: (-DTYPES[tensors[n][0]].itemsize, n)):
            info = TensorInfo(path.name, *tensors[name])
            header[name] = {
                "dtype": info.dtype,
                "shape": list(info.shape),
                "data_offsets": [offset, offset + info.nbytes],
            }
            self._pending[name] = (offset, info)
            offset += info.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._file = open(path, "wb")  # noqa: SIM115 - closed in __exit__
        self._file.write(struct.pack("<Q", len(text)) + text)
        self._file.truncate(self._start + offset)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        if kind is None:
            assert not self._pending, f"{self._path}: never written: {sorted(self._pending)}"

    def write(self, name: str, tensor: Tensor) -> str:
        """Write a tensor at its place; returns the SHA-256 of its bytes."""
        offset, info = self._pending.pop(name)
        assert (tensor_dtype(tensor), tuple(tensor.shape)) == (info.dtype, info.shape), f"{name}: {info}"
        data = tensor_bytes(tensor)
        self._file.seek(self._start + offset)
        self._file.write(data)
        return hashlib.sha256(data).hexdigest()


def tensor_dtype(tensor: Tensor) -> str:
    """The safetensors name of a tensor's dtype."""
    return _DTYPE_NAMES[tensor.dtype]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's data, as it lies in a file."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or CheckpointError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; is {path.parent} a Hugging Face model directory?") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object the way Hugging Face does: indented, with a final newline."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def whole_or_nothing(directory: Path) -> Iterator[Path]:
    """A temporary sibling of a directory that does not exist yet; renamed to it at the end, removed on any error."""
    if directory.exists() or directory.is_symlink():
        raise CheckpointError(f"{directory}: already exists; choose another output directory or remove it")
    if not directory.absolute().parent.is_dir():
        raise CheckpointError(f"{directory.absolute().parent}: no such directory to put the output in; create it first")
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".partial", dir=directory.absolute().parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.rename(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def companions(directory: Path) -> list[str]:
    """Paths of the files beside the weights that engines read: tokenizer, generation config, chat templates, code, …

    Weights in any form, indexes, config.json and quantization configs are not among them, nor are subdirectories, but
    for the one that transformers reads templates from.
    """
    left_out = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".index.json")
    rewritten = ("config.json", "hf_quant_config.json", "halfbyte.json")
    beside = (
        path.name
        for path in directory.iterdir()
        if path.is_file()
        and not path.name.startswith(".")
        and not path.name.endswith(left_out)
        and path.name not in rewritten
    )
    templates = (f"{path.parent.name}/{path.name}" for path in directory.glob("additional_chat_templates/*.jinja"))
    return sorted((*beside, *templates))


def copy_companions(source: Path, target: Path) -> None:
    """Copy them all."""
    for name in companions(source):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)
