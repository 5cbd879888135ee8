"""Back to high precision: a plain checkpoint with the values that the quantized one decodes to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..names import natural_key
from ..tensor import QuantizedTensor
from .convert import DEFAULT_SHARD_BYTES, Progress, shard, write_index
from .schema import quantized_tensor, weight_names
from .shards import DTYPES, ShardWriter, TensorInfo, copy_companions, whole_or_nothing, write_json
from .sources import DecodedCheckpoint, open_source
from .verify import Contents

OUTPUT_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def dequantize(
    directory: Path,
    output: Path,
    *,
    dtype: str = "bfloat16",
    device: torch.device | str = "cpu",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress = lambda done: None,
) -> int:
    """Write the decoded weights as an ordinary checkpoint; returns the bytes of its tensors.

    Other tensors are copied, scales dropped; experts stay one by one. The output appears whole or not at all.

    Raises:
        CheckpointError: the source is not quantized, or not in a way that is understood (docs/sources.md); a value does
            not fit dtype; the output exists.
    """
    if dtype not in OUTPUT_DTYPES:
        raise CheckpointError(f"dtype={dtype!r}: choose one of {', '.join(OUTPUT_DTYPES)}")
    source = open_source(directory, requantize=True)
    if not isinstance(source, DecodedCheckpoint):
        raise CheckpointError(f"{directory}/config.json: no quantization_config; this is not a quantized checkpoint")
    infos = {name: source.tensors[name] for name in sorted(source.tensors, key=natural_key)}
    entries = {n: (OUTPUT_DTYPES[dtype] if info.decoded else info.dtype, info.shape) for n, info in infos.items()}
    with whole_or_nothing(output) as target:
        shards = shard(({name: entry} for name, entry in entries.items()), max_shard_bytes)
        for file, part in shards.items():
            with ShardWriter(target / file, part) as writer:
                for name, (dtype_name, _) in part.items():
                    data = source.fetch(name)(device if infos[name].decoded else "cpu").to(DTYPES[dtype_name])
                    if infos[name].decoded and not bool(data.isfinite().all()):
                        raise CheckpointError(f"{directory}: {name} has values beyond {dtype}; choose a wider --dtype")
                    writer.write(name, data)
                    progress(data.nbytes)
        total = sum(TensorInfo("", *entry).nbytes for entry in entries.values())
        if len(shards) > 1:
            write_index(target, {name: file for file, part in shards.items() for name in part}, total)
        copy_companions(directory, target)
        write_json(target / "config.json", _with_dtype(source.config, dtype))
    return total


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config with `dtype` (`torch_dtype` in older ones) replaced wherever it stands, nested configs too."""
    changed = {key: _with_dtype(value, dtype) if isinstance(value, dict) else value for key, value in config.items()}
    return changed | {key: dtype for key in ("dtype", "torch_dtype") if isinstance(config.get(key), str)}


def decode(contents: Contents, module: str, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """One weight's decoded values."""
    values: Tensor = read_weight(contents, module, device).dequantize(dtype)
    return values


def read_weight(contents: Contents, module: str, device: torch.device | str) -> QuantizedTensor:
    """One weight as it is stored."""
    tensors = {
        name: contents.checkpoint.read(name).to(device)
        for name in _parts(contents, module)
        if name in contents.checkpoint.tensors
    }
    return quantized_tensor(contents.quantization.layout, contents.formats[module], module, tensors)


def _parts(contents: Contents, module: str) -> Iterator[str]:
    names = weight_names(contents.quantization.layout, contents.formats[module])
    for part in (names.elements, names.block_scale, names.tensor_scale):
        if part is not None:
            yield f"{module}.{part}"
