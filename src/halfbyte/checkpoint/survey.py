"""What a quantized checkpoint holds, whoever made it: read off its tensors, because its config may be wrong.

`verify` is strict about what halfbyte writes; here nothing is refused that can be read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import names
from ..errors import CheckpointError, HalfbyteError
from ..formats import MXFP8, NVFP4, Format
from ..names import Name
from ..tensor import QuantizedTensor
from .plan import decoder_layers
from .schema import FOREIGN_PARAMETERS
from .shards import Checkpoint, TensorInfo, read_json

SIDECAR = "hf_quant_config.json"


@dataclass(frozen=True)
class Spelling:
    """One way to name the tensors of a quantized weight, after the module's name."""

    layout: str
    format: Format
    elements: str
    block_scale: str
    tensor_scale: str | None = None
    input_scale: str | None = None
    divisor: bool = False


# In the order in which they are tried. Source: ModelOpt's unified export, compressed-tensors'
# NVFP4PackedCompressor, and transformers' FineGrainedFP8 for quant_method "mxfp8".
SPELLINGS = (
    Spelling(
        "compressed-tensors",
        NVFP4(),
        ".weight_packed",
        ".weight_scale",
        ".weight_global_scale",
        ".input_global_scale",
        divisor=True,
    ),
    Spelling("modelopt", NVFP4(), ".weight", ".weight_scale", ".weight_scale_2", ".input_scale"),
    Spelling(
        "modelopt", NVFP4(), "", "_weight_scale", "_weight_scale_2", "_input_scale"
    ),  # stacked experts, as gpt-oss's
    Spelling("mxfp8", MXFP8(), ".weight", ".weight_scale_inv"),
    Spelling("modelopt", MXFP8(), ".weight", ".weight_scale"),
)
_ELEMENTS = {NVFP4: ("U8",), MXFP8: ("F8_E4M3",)}
_BLOCK_SCALES = {NVFP4: ("F8_E4M3",), MXFP8: ("U8", "F8_E8M0")}
CHUNK_ELEMENTS = 1 << 24  # decoded at a time, so that memory does not grow with the weight


@dataclass(frozen=True)
class Weight:
    """One quantized weight.

    Attributes:
        name: as its high-precision original is called: "….weight".
        shape: decoded; three numbers for stacked experts.
        nbytes: of its elements and scales.
    """

    name: Name
    spelling: Spelling
    shape: tuple[int, ...]
    nbytes: int

    @property
    def path(self) -> str:
        """What the spelling's suffixes are appended to."""
        return self.name.full if self.spelling.elements == "" else self.name.module

    @property
    def elements(self) -> int:
        """How many numbers it stands for."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def format(self) -> Format:
        """NVFP4 or MXFP8; no rule shows on disk."""
        return self.spelling.format

    def tensor(self, suffix: str | None) -> str:
        """Full name of one of its tensors."""
        return f"{self.path}{suffix}"


@dataclass(frozen=True)
class Survey:
    """A checkpoint's tensors sorted.

    Attributes:
        declared: quantization_config of config.json, or None.
        sidecar: hf_quant_config.json, or None.
        weights: quantized, in natural order.
        kept: matrices of the model in high precision, embeddings and norms left out.
        unknown: tensors in few bits that belong to no format read here, and why.
    """

    checkpoint: Checkpoint
    declared: dict[str, Any] | None
    sidecar: dict[str, Any] | None
    weights: tuple[Weight, ...]
    kept: tuple[Name, ...]
    unknown: dict[str, str]

    def read(self, weight: Weight, rows: slice | None = None, matrix: int | None = None) -> QuantizedTensor:
        """A weight, or some rows of one matrix of it.

        Raises:
            CheckpointError: a tensor scale has a shape that says nothing of which matrix it is for.
        """
        index = () if rows is None else ((rows,) if matrix is None else (matrix, rows))
        spelling = weight.spelling
        packed = self.checkpoint.read(weight.tensor(spelling.elements), index)
        scale = self.checkpoint.read(weight.tensor(spelling.block_scale), index)
        if scale.dtype == torch.float8_e8m0fnu:
            scale = scale.view(torch.uint8)
        return QuantizedTensor(packed, scale, self.tensor_scale(weight, matrix), None, weight.format)

    def tensor_scale(self, weight: Weight, matrix: int | None = None) -> Tensor | None:
        """S_dec, float32 []; None for MXFP8 and where it is missing."""
        suffix = weight.spelling.tensor_scale
        if suffix is None or weight.tensor(suffix) not in self.checkpoint.tensors:
            return None
        scale = self.checkpoint.read(weight.tensor(suffix)).float().flatten()
        if scale.numel() != 1:
            if matrix is None or scale.numel() != weight.shape[0]:
                raise CheckpointError(f"{weight.tensor(suffix)}: {scale.numel()} values for one matrix; expected 1")
            scale = scale[matrix : matrix + 1]
        return (1.0 / scale if weight.spelling.divisor else scale).reshape(())

    def chunks(self, weight: Weight) -> Iterator[tuple[int | None, slice]]:
        """(matrix, rows) of parts that fit into little memory."""
        columns = weight.shape[-1]
        step = max(16, CHUNK_ELEMENTS // max(columns, 1) // 16 * 16)  # whole blocks of 16×16
        for matrix in range(weight.shape[0]) if len(weight.shape) == 3 else (None,):
            for first in range(0, weight.shape[-2], step):
                yield matrix, slice(first, min(first + step, weight.shape[-2]))


def survey(directory: Path) -> Survey:
    """Sort a checkpoint's tensors by names, dtypes and shapes; no tensor is read.

    Raises:
        CheckpointError: config, index or a shard cannot be read.
    """
    checkpoint = Checkpoint(directory)
    layers = _layers(checkpoint)
    weights, used = [], set()
    for tensor in checkpoint.tensors:
        if (found := _weight(checkpoint, tensor, layers)) is not None:
            weights.append(found)
            used |= {found.tensor(part) for part in (found.spelling.elements, found.spelling.block_scale)}
    kept, unknown = [], {}
    for tensor, info in checkpoint.tensors.items():
        if tensor in used:
            continue
        name = names.parse(tensor, layers)
        if info.dtype in ("BF16", "F16", "F32") and _is_linear(name, info):
            kept.append(name)
        elif reason := _unknown(name, info, checkpoint):
            unknown[tensor] = reason
    declared = checkpoint.config.get("quantization_config")
    sidecar = directory / SIDECAR
    return Survey(
        checkpoint,
        declared if isinstance(declared, dict) else None,
        read_json(sidecar) if sidecar.exists() else None,
        tuple(sorted(weights, key=lambda weight: names.natural_key(weight.name.full))),
        tuple(sorted(kept, key=lambda name: names.natural_key(name.full))),
        unknown,
    )


def _layers(checkpoint: Checkpoint) -> int | None:
    try:
        return decoder_layers(checkpoint)
    except HalfbyteError:
        return None


def _weight(checkpoint: Checkpoint, tensor: str, layers: int | None) -> Weight | None:
    """The weight whose elements a tensor is, or None."""
    info = checkpoint.tensors[tensor]
    for spelling in SPELLINGS:
        if info.dtype not in _ELEMENTS[type(spelling.format)] or not tensor.endswith(spelling.elements):
            continue
        path = tensor.removesuffix(spelling.elements) if spelling.elements else tensor
        scale = checkpoint.tensors.get(f"{path}{spelling.block_scale}")
        if scale is None or scale.dtype not in _BLOCK_SCALES[type(spelling.format)]:
            continue
        columns = info.shape[-1] * (2 if isinstance(spelling.format, NVFP4) else 1) if info.shape else 0
        shape = (*info.shape[:-1], columns)
        if (
            len(shape) not in (2, 3)
            or 0 in shape
            or scale.shape != (*shape[:-1], columns // spelling.format.block_columns)
        ):
            continue
        parts = (spelling.elements, spelling.block_scale, spelling.tensor_scale)
        sizes = (checkpoint.tensors.get(f"{path}{part}") for part in parts if part is not None)
        name = names.parse(tensor if spelling.elements == "" else f"{path}.weight", layers)
        return Weight(name, spelling, shape, sum(part.nbytes for part in sizes if part is not None))
    return None


def _is_linear(name: Name, info: TensorInfo) -> bool:
    """Whether a high-precision tensor is a Linear's weight, or a stack of experts'."""
    if name.parameter == "weight":
        return len(info.shape) == 2 and name.kind not in ("embedding", "norm", "conv")
    return len(info.shape) == 3 and name.leaf == "experts"


def _unknown(name: Name, info: TensorInfo, checkpoint: Checkpoint) -> str | None:
    if name.parameter in ("weight", "weight_packed") and info.dtype in ("U8", "I8", "F8_E4M3", "F8_E5M2", "I32"):
        scales = [
            f"{parameter} {found.dtype} {list(found.shape)}"
            for parameter in sorted(FOREIGN_PARAMETERS)
            if (found := checkpoint.tensors.get(f"{name.module}.{parameter}")) and parameter != name.parameter
        ]
        return f"{info.dtype} {list(info.shape)} with {', '.join(scales) or 'no scales'}: neither NVFP4 nor MXFP8"
    if name.parameter in ("qweight", "weight_blocks", "gate_up_proj_blocks", "down_proj_blocks"):
        return f"{info.dtype} {list(info.shape)}: another tool's format, neither NVFP4 nor MXFP8"
    return None
