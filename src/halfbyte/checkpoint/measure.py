"""What a quantized weight looks like: its scale bytes and codes, and how far it is from its original."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import HalfbyteError
from ..formats import E2M1_MAX, NVFP4
from ..tensor import QuantizedTensor
from .plan import Planned, places
from .shards import Checkpoint
from .survey import Survey, Weight

_ROUNDED_DOWN = 17 / 16  # a block scale may be rounded down by half a step of E4M3: its maximum is then not clipped


@dataclass
class Measured:
    """One weight; with a source, its error too. Blocks are of 16 (NVFP4) or 32 (MXFP8) elements.

    Attributes:
        scales: counts of the block-scale bytes, int64 [256]. codes: of the magnitudes of NVFP4's codes, int64 [8].
        saturated: blocks with the largest finite scale. flushed: blocks that decode to zero, although their codes
            (or the source) are not all zero. clipped: blocks with an element beyond what their scale can hold.
        squared_error, squared_norm: Σ(decoded − original)², Σ original²; None without a source.
        problem: why it could not be measured.
    """

    weight: Weight
    tensor_scale: float | None = None
    scales: Tensor = field(default_factory=lambda: torch.zeros(256, dtype=torch.int64))
    codes: Tensor = field(default_factory=lambda: torch.zeros(8, dtype=torch.int64))
    flushed: int = 0
    clipped: int | None = None
    dead: bool = True
    squared_error: float | None = None
    squared_norm: float | None = None
    largest_error: float | None = None
    problem: str | None = None

    @property
    def blocks(self) -> int:
        """How many blocks it has."""
        return int(self.scales.sum())

    @property
    def saturated(self) -> int:
        """Blocks whose scale is the largest finite one: 448, or 2^127."""
        return int(self.scales[0x7E if isinstance(self.weight.format, NVFP4) else 0xFE])

    @property
    def bits(self) -> float:
        """Bits an element, scales included."""
        return 8 * self.weight.nbytes / max(self.weight.elements, 1)

    def to_json(self) -> dict[str, Any]:
        """Plain values; histograms are left to the sums over many weights."""
        name = self.weight.name
        return {
            "tensor": name.full,
            "layer": name.layer,
            "tower": name.tower,
            "kind": name.kind,
            "leaf": name.leaf,
            "expert": name.expert,
            "format": type(self.weight.format).__name__,
            "layout": self.weight.spelling.layout,
            "shape": list(self.weight.shape),
            "bytes": self.weight.nbytes,
            "bits": self.bits,
            "tensor_scale": self.tensor_scale if math.isfinite(self.tensor_scale or 0.0) else str(self.tensor_scale),
            "blocks": self.blocks,
            "saturated": self.saturated,
            "flushed": self.flushed,
            "clipped": self.clipped,
            "dead": self.dead,
            "relative_error": relative_error(self.squared_error, self.squared_norm),
            "snr_db": snr(self.squared_error, self.squared_norm),
            "largest_error": self.largest_error,
            "problem": self.problem,
        }


def relative_error(squared_error: float | None, squared_norm: float | None) -> float | None:
    """‖decoded − original‖ / ‖original‖; None where that is not known or has no meaning."""
    if squared_error is None or not squared_norm:
        return None
    return math.sqrt(squared_error / squared_norm)


def snr(squared_error: float | None, squared_norm: float | None) -> float | None:
    """Signal to noise in dB; None where unknown, or without noise."""
    return 10 * math.log10(squared_norm / squared_error) if squared_error and squared_norm else None


def measure(
    found: Survey,
    source: Checkpoint | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[Measured]:
    """Measure every quantized weight, some millions of elements at a time.

    Raises:
        CheckpointError: the source is quantized itself or cannot be read.
    """
    originals = {} if source is None else places(source)
    for weight in found.weights:
        result = Measured(weight)
        try:
            original = None if source is None else find_original(weight, source, originals)
            _measure(result, found, source, original, device)
            if result.squared_error is not None and not math.isfinite(
                result.squared_error + (result.squared_norm or 0.0)
            ):
                result.squared_error = result.squared_norm = result.largest_error = None
                result.problem = "it or its original has values that are NaN or infinite"
        except HalfbyteError as error:
            result.problem = str(error)
            result.dead = False
        yield result
        progress(weight.nbytes)


@dataclass(frozen=True)
class Original:
    """Where a weight's original is: a tensor of the source, or a part of one."""

    tensor: str
    index: tuple[int | slice, ...]

    def part(self, matrix: int | None, rows: slice) -> tuple[int | slice, ...]:
        """Some rows of it."""
        if not self.index:
            return (rows,) if matrix is None else (matrix, rows)
        *leading, within = self.index
        first = within.start if isinstance(within, slice) else 0
        return (*leading, slice(first + rows.start, first + rows.stop))


def find_original(weight: Weight, source: Checkpoint, originals: dict[str, Planned]) -> Original:
    """A weight in a source whose `places` are given; HalfbyteError where it is not there, or of another shape."""
    name = weight.name.full
    if (planned := originals.get(name)) is not None:
        original, shape = Original(planned.source, planned.index), planned.shape
    elif name in source.tensors:  # a stack that both have as one
        original, shape = Original(name, ()), source.tensors[name].shape
    else:
        raise HalfbyteError("is not in the source")
    if shape != weight.shape:
        raise HalfbyteError(f"decodes to {list(weight.shape)}; the source has {list(shape)}")
    return original


def _measure(
    result: Measured, found: Survey, source: Checkpoint | None, original: Original | None, device: torch.device | str
) -> None:
    weight = result.weight
    scale = found.tensor_scale(weight, 0 if len(weight.shape) == 3 else None)
    result.tensor_scale = None if scale is None else float(scale)
    for matrix, rows in found.chunks(weight):
        q = found.read(weight, rows, matrix)
        _add_bytes(result, q)
        missing = isinstance(weight.format, NVFP4) and q.tensor_scale is None
        decoded = _on(q, device).dequantize(unscaled=missing)
        result.dead &= not bool(decoded.any())
        if source is not None and original is not None and not missing:
            x = source.read(original.tensor, original.part(matrix, rows)).to(device).float()
            _add_error(result, q, decoded, x)
        else:
            _add_flushed(result, q, decoded)


def _on(q: QuantizedTensor, device: torch.device | str) -> QuantizedTensor:
    scale = None if q.tensor_scale is None else q.tensor_scale.to(device)
    return QuantizedTensor(q.packed.to(device), q.block_scale.to(device), scale, None, q.format)


def _add_bytes(result: Measured, q: QuantizedTensor) -> None:
    result.scales += torch.bincount(q.block_scale.reshape(-1).view(torch.uint8), minlength=256)
    if isinstance(q.format, NVFP4):
        pairs = torch.bincount(q.packed.reshape(-1), minlength=256).reshape(16, 16)
        codes = pairs.sum(0) + pairs.sum(1)  # low and high nibbles
        result.codes += codes[:8] + codes[8:]


def _blocks(values: Tensor, q: QuantizedTensor) -> Tensor:
    """max |value| of each block."""
    largest: Tensor = values.abs().unflatten(-1, (-1, q.format.block_columns)).amax(-1)
    return largest


def _add_flushed(result: Measured, q: QuantizedTensor, decoded: Tensor) -> None:
    if isinstance(q.format, NVFP4):
        magnitudes = (q.packed & 0x77).to(decoded.device)  # both codes without their signs
        coded = magnitudes.unflatten(-1, (-1, q.format.block_columns // 2)).amax(-1) > 0
        result.flushed += int((coded & (_blocks(decoded, q) == 0)).sum())


def _add_error(result: Measured, q: QuantizedTensor, decoded: Tensor, x: Tensor) -> None:
    largest = _blocks(x, q)
    result.flushed += int(((largest > 0) & (_blocks(decoded, q) == 0)).sum())
    if isinstance(q.format, NVFP4) and q.tensor_scale is not None:
        scale = (q.block_scale.float() * q.tensor_scale).to(largest.device)
        clipped = int((largest > E2M1_MAX * scale * _ROUNDED_DOWN).sum())
        result.clipped = (result.clipped or 0) + clipped
    difference = decoded.sub_(x)
    result.squared_error = (result.squared_error or 0.0) + squares(difference)
    result.squared_norm = (result.squared_norm or 0.0) + squares(x)
    result.largest_error = max(result.largest_error or 0.0, float(difference.abs().amax()))


def squares(matrix: Tensor) -> float:
    """Sum of squares: of a row in float32, unless that may leave its range, of rows in float64."""
    norms = torch.linalg.vector_norm(matrix, dim=-1).double()
    if not 1e-12 < float(norms.amax()) < 1e18:
        norms = torch.linalg.vector_norm(matrix, dim=-1, dtype=torch.float64)
    return float(norms.square().sum())
