"""Results of a calibration on disk, one layer after the other, so that it can be resumed; and read by conversion."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint.journal import differences
from ..checkpoint.manifest import format_from_json
from ..checkpoint.shards import Checkpoint, read_json, tensor_digest, write_json
from ..errors import CheckpointError
from ..formats import NVFP4
from ..ops import tensor_scales
from ..tensor import QuantizedTensor

SETTINGS = "calibration.json"
INPUT_DIVISOR = 2688.0  # 6 · 448: an input scale is the maximum divided by this
KV_DIVISOR = 448.0


class Store:
    """A directory with `calibration.json` and two files for each layer that is done.

    It is what `checkpoint.calibrated.Calibrated` asks for.

    Raises:
        CheckpointError: the directory belongs to a calibration with other settings.
    """

    def __init__(self, directory: Path, settings: dict[str, Any], *, resume: bool) -> None:
        self.directory = directory
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        if directory.exists():
            if not resume:
                raise CheckpointError(
                    f"{directory}: left by a calibration that was interrupted; go on with --resume, or remove it"
                )
            before = read_json(directory / SETTINGS)
            if different := differences(before, self.settings):
                raise CheckpointError(
                    f"{directory}: cannot be resumed: {'; '.join(different)}; remove it to begin again"
                )
        else:
            directory.mkdir()
            write_json(directory / SETTINGS, self.settings)
        self.layers: dict[int, dict[str, Any]] = {}
        for path in sorted(directory.glob("layer-*.json")):
            self.layers[int(path.stem.partition("-")[2])] = read_json(path)
        self._files: dict[int, Any] = {}
        self._where: dict[str, int] = {name: i for i, layer in self.layers.items() for name in layer["tensors"]}

    def save(self, layer: int, tensors: dict[str, Tensor], summary: dict[str, Any]) -> None:
        """Keep a layer's results; the .json comes last and says that they are whole."""
        path = self._path(layer)
        temporary = path.with_suffix(".partial")
        save_file(
            {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
            temporary,
        )
        temporary.rename(path)
        data = {**summary, "tensors": sorted(tensors)}
        write_json(temporary, data)
        temporary.rename(path.with_suffix(".json"))
        self.layers[layer] = data
        self._where |= dict.fromkeys(data["tensors"], layer)

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
