"""Results of a calibration on disk, one layer after the other, so that it can be resumed; and read by conversion.

    OUT.partial/lock              who works here
    OUT.partial/calibration.json  the settings
    OUT.partial/layer-*           a layer that is done: tensors, then what was found, with the tensors' digests
    OUT.partial/spilled-*         activations of the layer that is being calibrated
    OUT.partial/conversion/       the output, as a conversion makes it

What is removed once all is done goes in such an order that it can be told whose it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint.files import remove_directory
from ..checkpoint.journal import comes_again, differences
from ..checkpoint.lock import LOCK, lock_directory
from ..checkpoint.manifest import FILE, format_from_json
from ..checkpoint.shards import (
    Checkpoint,
    ShardWriter,
    is_shard,
    read_json,
    tensor_digest,
    tensor_dtype,
    write_json,
)
from ..errors import CheckpointError
from ..formats import NVFP4
from ..ops import tensor_scales
from ..tensor import QuantizedTensor

SETTINGS = "calibration.json"
CONVERSION = "conversion"
SPILLED = "spilled-"
_KNOWN = rf"calibration\.json(\.tmp)?|layer-\d+\.(json|safetensors)(\.tmp)?|{CONVERSION}|{SPILLED}\w+"
INPUT_DIVISOR = 2688.0  # 6 · 448: an input scale is the maximum divided by this
KV_DIVISOR = 448.0


@contextlib.contextmanager
def working(directory: Path, *, resume: bool) -> Iterator[None]:
    """A calibration's directory, made or taken up, and locked while this is entered.

    Leaving it with an error keeps it, unless there is nothing in it yet, or the error would come again and no layer is
    done.

    Raises:
        CheckpointError: another process works there; it is there but resume is False; or it is something else.
    """
    lock = lock_directory(directory, "calibration", _KNOWN, resume=resume)
    try:
        for path in directory.glob(f"{SPILLED}*"):
            shutil.rmtree(path)
        yield
    except BaseException as error:
        if not is_interrupted(directory) or (comes_again(error) and not _layers(directory)):
            remove_directory(directory)
        raise
    finally:
        lock.release()


def is_interrupted(work: Path) -> bool:
    """Whether a directory is what an interrupted calibration leaves."""
    return (work / SETTINGS).is_file()


def is_left_over(work: Path, output: Path) -> bool:
    """Whether all that came of a directory is in an output: the job died while it removed the directory."""
    if is_interrupted(work):
        manifest = read_json(output / FILE) if (output / FILE).is_file() else {}
        return manifest.get("calibration") == read_json(work / SETTINGS)
    return {path.name for path in work.iterdir()} <= {LOCK}


def discard(work: Path) -> None:
    """Remove a directory that `working` holds."""
    for path in work.iterdir():
        if path.is_dir():
            remove_directory(path)
        elif path.name not in (SETTINGS, LOCK):
            path.unlink()
    for name in (SETTINGS, LOCK):
        (work / name).unlink(missing_ok=True)
    work.rmdir()


def begin(directory: Path, settings: dict[str, Any]) -> Store:
    """The store of a directory that is this process's own; layers that are no longer what was saved are forgotten.

    Raises:
        CheckpointError: the directory belongs to a calibration with other settings.
    """
    if not (directory / SETTINGS).exists():
        write_json(directory / SETTINGS, settings)
    Store(directory, settings)  # which refuses another job's
    found = _layers(directory)
    with ThreadPoolExecutor() as pool:
        for path, whole in zip(found, pool.map(_is_whole, found), strict=True):
            if not whole:
                path.unlink()
    return Store(directory, settings)


def _layers(directory: Path) -> list[Path]:
    return sorted(directory.glob("layer-*.json"))


def _is_whole(path: Path) -> bool:
    tensors = read_json(path)["tensors"]
    entries = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in tensors.items()}
    return is_shard(path.with_suffix(".safetensors"), entries, {n: entry["sha256"] for n, entry in tensors.items()})


class Store:
    """A directory with `calibration.json` and two files for each layer that is done, opened by one of several ranks.

    It is what `checkpoint.calibrated.Calibrated` asks for.

    Raises:
        CheckpointError: the directory belongs to a calibration with other settings.
    """

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        self.directory = directory
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        if different := differences(read_json(directory / SETTINGS), self.settings):
            raise CheckpointError(f"{directory}: cannot be resumed: {'; '.join(different)}; remove it to begin again")
        self.layers: dict[int, dict[str, Any]] = {}
        for path in _layers(directory):
            self.layers[int(path.stem.partition("-")[2])] = read_json(path)
        self._files: dict[int, Any] = {}
        self._where: dict[str, int] = {name: i for i, layer in self.layers.items() for name in layer["tensors"]}

    def save(self, layer: int, tensors: dict[str, Tensor], summary: dict[str, Any]) -> None:
        """Keep a layer's results; the .json comes last and says that they are whole, and on disk."""
        path = self._path(layer)
        entries = {name: (tensor_dtype(tensor), tuple(tensor.shape)) for name, tensor in tensors.items()}
        with ShardWriter(path, entries) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
        kept = {
            name: {"dtype": dtype, "shape": list(shape), "sha256": tensor_digest(tensors[name])}
            for name, (dtype, shape) in sorted(entries.items())
        }
        data = {**summary, "tensors": kept}
        write_json(path.with_suffix(".json"), data)
        self.layers[layer] = data
        self._where |= dict.fromkeys(kept, layer)

    def weight(self, name: str) -> QuantizedTensor | None:
        """As `Calibrated.weight`."""
        if f"{name}:packed" not in self._where:
            return None
        packed, block_scale, amax = (self._read(f"{name}:{part}") for part in ("packed", "block_scale", "amax"))
        fmt = format_from_json(self.layers[self._where[f"{name}:packed"]]["formats"][name])
        assert isinstance(fmt, NVFP4)
        return QuantizedTensor(packed, block_scale, tensor_scales(amax, fmt)[1], amax, fmt)

    def input_scale(self, module: str) -> Tensor | None:
        """As `Calibrated.input_scale`."""
        name = f"{module}:input_amax"
        return self._read(name) / INPUT_DIVISOR if name in self._where else None

    def kv_scales(self, attention: str) -> tuple[Tensor, Tensor] | None:
        """As `Calibrated.kv_scales`: at least 1, so that no precision is lost to small values."""
        if f"{attention}:k_amax" not in self._where:
            return None
        k, v = ((self._read(f"{attention}:{part}_amax") / KV_DIVISOR).clamp(min=1.0) for part in "kv")
        return k, v

    def to_json(self) -> dict[str, Any]:
        """As `Calibrated.to_json`: the settings."""
        return self.settings

    def _path(self, layer: int) -> Path:
        return self.directory / f"layer-{layer:05}.safetensors"

    def _read(self, name: str) -> Tensor:
        from safetensors import safe_open

        layer = self._where[name]
        if layer not in self._files:
            open_file: Any = safe_open
            self._files[layer] = open_file(self._path(layer), framework="pt")
        tensor: Tensor = self._files[layer].get_tensor(name)
        return tensor


def weight_tensors(name: str, q: QuantizedTensor) -> dict[str, Tensor]:
    """A weight as the store keeps it."""
    assert q.amax is not None
    return {f"{name}:packed": q.packed, f"{name}:block_scale": q.block_scale, f"{name}:amax": q.amax}


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 of a checkpoint's config and headers: which tensors it has, not what is in them."""
    tensors = {name: (info.file, info.dtype, info.shape) for name, info in sorted(checkpoint.tensors.items())}
    return hashlib.sha256(json.dumps([checkpoint.config, tensors]).encode()).hexdigest()


def source_digest(read: Callable[[str], Tensor], names: list[str]) -> str:
    """SHA-256 of some tensors' bytes."""
    return hashlib.sha256("".join(tensor_digest(read(name)) for name in sorted(names)).encode()).hexdigest()
