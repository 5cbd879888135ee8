"""A quantized source, read as the high-precision model that it decodes to."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...ops import blocks
from ..config import without_quantization
from ..files import check_inside, read_json
from ..plan import text_config
from ..shards import DTYPES, Checkpoint, Fetched, Index, TensorInfo
from .declared import HF_QUANT_CONFIG, Declared, read_declared
from .encodings import Stored, find_encoded

_Read = Callable[[str, tuple[int, ...], int, int, bool], Tensor]


def open_source(directory: Path, *, requantize: bool = False) -> Checkpoint:
    """A model directory as something to quantize: as it is, or decoded where its config says that it is encoded.

    requantize: take NVFP4 too, whose values were rounded to four bits before.

    Raises:
        CheckpointError: it cannot be read; it is encoded in a way that is not understood, or not as its config says;
            it is NVFP4 already.
    """
    if not (directory / "config.json").is_file():
        return Checkpoint(directory)  # which says what is wrong
    check_inside(directory, "config.json")
    check_inside(directory, HF_QUANT_CONFIG)
    declared = read_declared(directory, read_json(directory / "config.json"))
    if declared is None:
        return Checkpoint(directory)
    if declared.is_nvfp4 and not requantize:
        raise CheckpointError(
            f"{directory}/config.json: the model is quantized already, to {declared.what}; convert the high-precision "
            "original, or give --requantize to `halfbyte convert` to decode these four bits and round them once more"
        )
    return DecodedCheckpoint(directory, declared)


class DecodedCheckpoint(Checkpoint):
    """A Checkpoint whose tensors are what the stored ones decode to, under the names of the high-precision model.

    Decoded weights are float32, or bfloat16 where that is exact. The config has no quantization any more.

    Attributes:
        declared: how its weights are stored.
        left_out: number of tensors that the decoded model has no use for, by what they are.
    """

    def __init__(self, directory: Path, declared: Declared) -> None:
        super().__init__(directory)
        self.declared = declared
        self._on_disk = self.tensors
        found = find_encoded(declared, self._on_disk, text_config(self.config), directory)
        self._stored = found.stored
        self.left_out = dict(sorted(Counter(found.left_out.values()).items()))
        gone = found.used | set(found.left_out)
        plain = {name: info for name, info in self._on_disk.items() if name not in gone}
        if twice := sorted(plain.keys() & self._stored):
            raise CheckpointError(f"{directory}: {twice[0]} is there twice, encoded and not; remove one")
        self.tensors = plain | {name: self._info(stored) for name, stored in self._stored.items()}
        self.config = without_quantization(self.config)

    @property
    def stored_bytes(self) -> int:
        """Size of all tensors on disk."""
        return sum(info.nbytes for info in self._on_disk.values())

    @property
    def files(self) -> set[str]:
        """All that was or will be read of it."""
        beside = {HF_QUANT_CONFIG} if (self.directory / HF_QUANT_CONFIG).exists() else set()
        return {"config.json", *beside, *(info.file for info in self._on_disk.values())}

    def read(self, name: str, index: Index = (), *, pin: bool = False) -> Tensor:
        """As `Checkpoint.read`; decoded."""
        return self.fetch(name, index)("cpu") if name in self._stored else super().read(name, index, pin=pin)

    def fetch(self, name: str, index: Index = (), *, pin: bool = False) -> Fetched:
        """As `Checkpoint.fetch`; what is read is the encoded tensor, which is decoded where it is needed.

        Raises:
            CheckpointError: also where a scale is negative, infinite or NaN.
        """
        return self._fetch(name, index, pin, self._reader())

    def fetch_group(self, wanted: Sequence[tuple[str, Index]], *, pin: bool = False) -> list[Fetched]:
        """As `Checkpoint.fetch_group`: rows of two of them may alternate in one tensor."""
        read = self._reader()
        return [self._fetch(name, index, pin, read) for name, index in wanted]

    def _reader(self) -> _Read:
        """Rows of stored tensors, each read once."""

        @functools.cache
        def read(tensor: str, matrix: tuple[int, ...], start: int, stop: int, pin: bool) -> Tensor:
            return self._read(tensor, self._on_disk[tensor], (*matrix, slice(start, stop)), pin)

        return read

    def _fetch(self, name: str, index: Index, pin: bool, read: _Read) -> Fetched:
        stored = self._stored.get(name)
        if stored is None:
            return super().fetch(name, index, pin=pin)
        matrix = tuple(i for i in index if isinstance(i, int))
        part = next((i for i in index if isinstance(i, slice)), slice(None))
        if len(stored.shape) == 3 and not matrix:
            numbers = range(*part.indices(stored.shape[0]))
            return stack([self._matrix(name, stored, (i,), slice(None), pin, read) for i in numbers])
        return self._matrix(name, stored, (*stored.index, *matrix), part, pin, read)

    def _matrix(
        self, name: str, stored: Stored, matrix: tuple[int, ...], part: slice, pin: bool, read: _Read
    ) -> Fetched:
        """Rows of one matrix; what is read are whole blocks."""
        count = stored.shape[len(stored.shape) - 2 if len(stored.shape) > 1 else 0]
        start, stop, _ = part.indices(count)
        first, step = stored.first, stored.step
        if stored.scale is None:
            rows = read(stored.elements, matrix, start * step, stop * step, pin)
            return Fetched((rows,), lambda parts: parts[0][first::step].contiguous())
        height = stored.block[0] if stored.grid[0] > 1 else 1  # under a single row of blocks, any row is a beginning
        top, bottom = start // height * height, min(-(-stop // height) * height, count)
        elements = read(stored.elements, matrix, top * step, bottom * step, pin)
        scale = self._scale(name, stored, matrix, top // height, -(-bottom // height), read)
        dtype = DTYPES[self.tensors[name].dtype]

        def decode(parts: Sequence[Tensor]) -> Tensor:
            encoded, factors = parts
            encoded = encoded[first::step].flatten(1).contiguous()  # gpt-oss's blocks are a dimension of their own
            return blocks.decode(encoded, factors, stored.block)[start - top : stop - top].to(dtype)

        return Fetched((elements, scale), decode)

    def _scale(self, name: str, stored: Stored, matrix: tuple[int, ...], start: int, stop: int, read: _Read) -> Tensor:
        """Rows of the block scales, float32 (rows, ⌈K/n⌉): what multiplies."""
        assert stored.scale is not None
        info = self._on_disk[stored.scale]
        if stored.grid[0] == 1:
            start, stop = 0, 1
        if len(info.shape) == len(matrix) + 2 and info.shape[-2:] == stored.grid:
            step = stored.step
            scale = read(stored.scale, matrix, start * step, stop * step, False)[stored.first :: step]
        else:
            whole = self._read(stored.scale, info, ()).reshape(-1, *stored.grid)
            scale = whole[matrix[0] if matrix else 0, start:stop]
        values = [blocks.decode_scale(scale)]
        if stored.tensor_scale is not None:
            other = self._read(stored.tensor_scale, self._on_disk[stored.tensor_scale], ()).float().reshape(-1)
            other = other[matrix[0] if matrix else 0]
            values += [other, 1.0 / other if stored.divides else other]
            values[0] = values[0] * values[2]
        if not all(bool(((value >= 0) & (value < torch.inf)).all()) for value in values):
            raise CheckpointError(
                f"{self.directory / info.file}: tensor {stored.scale}: {name} has a scale that is negative, infinite "
                "or NaN; download the model again"
            )
        return values[0]

    def _info(self, stored: Stored) -> TensorInfo:
        info = self._on_disk[stored.elements]
        if stored.scale is None:
            return TensorInfo(info.file, info.dtype, stored.shape)
        is_mxfp4 = info.dtype == "U8" and stored.tensor_scale is None
        return TensorInfo(info.file, "BF16" if is_mxfp4 else "F32", stored.shape, decoded=True)


def stack(each: Sequence[Fetched]) -> Fetched:
    """Matrices of one shape as one tensor."""
    sizes = [len(one.parts) for one in each]

    def decode(parts: Sequence[Tensor]) -> Tensor:
        left = iter(parts)
        return torch.stack([one.decode(list(islice(left, size))) for one, size in zip(each, sizes, strict=True)])

    return Fetched(tuple(part for one in each for part in one.parts), decode)
