"""The encoded weights of a source: which of its tensors make up each, and what none of them needs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ..schema import FOREIGN_PARAMETERS
from ..shards import TensorInfo
from .declared import STACKS, Block, Declared, Encoding

_EXPONENT_DTYPES = ("U8", "F8_E8M0")
_SCALE_DTYPES = ("F32", "BF16", "F16")
_INPUT_SCALES = frozenset({"input_scale", "activation_scale", "input_global_scale"})
_KV_SCALES = frozenset({"k_scale", "v_scale", "kv_scale", "q_scale", "output_scale"})
_LOOKS_FOREIGN = re.compile(
    r"^(?:qweight|qzeros|g_idx|.*_(?:scales?|scale_inv|scale_2|blocks|zero_point|packed|g_idx))$"
)


@dataclass(frozen=True)
class Stored:
    """Where a tensor of the decoded model lies.

    Attributes:
        shape: decoded.
        elements, index: the tensor, and which matrix of it.
        first, step: row r is its row first + step·r.
        scale: the tensor of block scales; None where nothing is encoded.
        block, grid: elements under one scale, and how many such blocks there are.
        tensor_scale, divides: NVFP4's other scale.
    """

    shape: tuple[int, ...]
    elements: str
    index: tuple[int, ...] = ()
    first: int = 0
    step: int = 1
    scale: str | None = None
    block: tuple[int, int] = (1, 1)
    grid: tuple[int, int] = (1, 1)
    tensor_scale: str | None = None
    divides: bool = False


@dataclass
class Found:
    """What a source holds.

    Attributes:
        stored: name in the decoded model → where it lies; names that are not here are tensors as they are.
        used: tensors that make those up.
        left_out: tensor that the decoded model has no use for → what it is.
    """

    stored: dict[str, Stored] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    left_out: dict[str, str] = field(default_factory=dict)


def find_encoded(declared: Declared, tensors: dict[str, TensorInfo], config: dict[str, Any], directory: Path) -> Found:
    """Sort a source's tensors.

    config: the language model's.

    Raises:
        CheckpointError: a weight or a scale is not what the config declares, or lacks the other.
    """
    found = Found()
    for name in tensors:
        possible = [encoding for encoding in declared.encodings if _is_elements(name, encoding, tensors)]
        for encoding in possible:
            if encoding.elements == STACKS:
                _add_stack(found, name, tensors, config, directory)
                break
            if (made := _stored(name, encoding, tensors)) is not None:
                _add(found, _weight_name(name, encoding), made)
                break
        else:
            if possible:
                where = f"{directory / tensors[name].file}: tensor {name}"
                raise CheckpointError(f"{where}: {_misfit(name, possible[0], declared, tensors)}")
    for name, info in tensors.items():
        if name not in found.used:
            _check_rest(name, info, declared, tensors, found, directory)
    if not any(stored.scale for stored in found.stored.values()):
        raise CheckpointError(
            f"{directory}/config.json: the model is quantized already, it says, as {declared.what}; but no weight is "
            "stored so. Download it again, or remove quantization_config if that is wrong"
        )
    return found


def _add(found: Found, name: str, stored: Stored) -> None:
    found.stored[name] = stored
    found.used |= {t for t in (stored.elements, stored.scale, stored.tensor_scale) if t is not None}


def _is_elements(name: str, encoding: Encoding, tensors: dict[str, TensorInfo]) -> bool:
    """A Linear's weight, or a stack of experts, which is a parameter of its own."""
    module, _, parameter = name.rpartition(".")
    if encoding.elements == STACKS:
        return name.endswith("_blocks")
    is_stack = encoding.elements == "weight" and module.endswith("experts") and len(tensors[name].shape) == 3
    return tensors[name].dtype == encoding.dtype and (parameter == encoding.elements or is_stack)


def _beside(name: str, parameter: str) -> str:
    """The name of another parameter of the same weight."""
    module, _, own = name.rpartition(".")
    stacked = own not in ("weight", "weight_packed")
    return f"{name}{parameter.removeprefix('weight')}" if stacked else f"{module}.{parameter}"


def _weight_name(name: str, encoding: Encoding) -> str:
    return f"{name.removesuffix(encoding.elements)}weight" if name.endswith(f".{encoding.elements}") else name


def _stored(name: str, encoding: Encoding, tensors: dict[str, TensorInfo]) -> Stored | None:
    """How a weight is stored if this is its encoding, or None."""
    info = tensors[name]
    if len(info.shape) not in (2, 3) or 0 in info.shape:
        return None
    *stack, rows, columns = info.shape
    columns *= 2 if info.dtype == "U8" else 1
    block, grid = _grid(encoding.block, rows, columns)
    dtypes = {None: _SCALE_DTYPES + _EXPONENT_DTYPES, True: _EXPONENT_DTYPES, False: _SCALE_DTYPES}[encoding.exponents]
    if encoding.tensor_scale:
        dtypes = ("F8_E4M3",)
    for parameter in encoding.scales:
        scale = _beside(name, parameter)
        if scale not in tensors or tensors[scale].dtype not in dtypes:
            continue
        if not _same_but_ones(tensors[scale].shape, (*stack, *grid)):
            continue
        other = _beside(name, encoding.tensor_scale) if encoding.tensor_scale else None
        if other is not None and (other not in tensors or math.prod(tensors[other].shape) != math.prod(stack)):
            continue
        shape = (*stack, rows, columns)
        return Stored(shape, name, scale=scale, block=block, grid=grid, tensor_scale=other, divides=encoding.divides)
    return None


def _grid(block: Block, rows: int, columns: int) -> tuple[tuple[int, int], tuple[int, int]]:
    size = (block[0] or rows, block[1] or columns)
    return size, (-(-rows // size[0]), -(-columns // size[1]))


def _same_but_ones(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """[], [1] and [1, 1] are one scale; [N] and [N, 1] are one per row."""
    return [n for n in shape if n != 1] == [n for n in wanted if n != 1]


def _add_stack(
    found: Found, name: str, tensors: dict[str, TensorInfo], config: dict[str, Any], directory: Path
) -> None:
    """gpt-oss's experts, [E, rows, K/32, 16] bytes: rows of gate and up alternate; biases do too."""
    where = f"{directory / tensors[name].file}: tensor {name}"
    stack = name.removesuffix("_blocks")
    experts, _, leaf = stack.rpartition(".")
    if config.get("model_type") != "gpt_oss" or leaf not in ("gate_up_proj", "down_proj"):
        raise CheckpointError(
            f"{where}: how {config.get('model_type')!r} stacks its experts is not known (transposed? interleaved?); "
            "convert the high-precision original"
        )
    hidden, width = config.get("hidden_size"), config.get("intermediate_size")
    if not isinstance(hidden, int) or not isinstance(width, int):
        raise CheckpointError(f"{where}: config.json lacks hidden_size or intermediate_size to check its shape by")
    rows, columns = (2 * width, hidden) if leaf == "gate_up_proj" else (hidden, width)
    shape = tensors[name].shape
    count = shape[0] if shape else 0
    bias = f"{stack}_bias"
    wanted = {name: ("U8", (count, rows, columns // 32, 16)), f"{stack}_scales": ("U8", (count, rows, columns // 32))}
    if bias in tensors:
        wanted[bias] = (tensors[bias].dtype, (count, rows))
    for tensor, (dtype, expected) in wanted.items():
        info = tensors.get(tensor)
        if info is None:
            raise CheckpointError(f"{where}: {tensor} is missing; download the model again")
        if (info.dtype, info.shape) != (dtype, expected) or columns % 32 or 0 in expected:
            raise CheckpointError(
                f"{directory / info.file}: tensor {tensor}: is {info.dtype} {list(info.shape)}, but by config.json "
                f"{dtype} {list(expected)}"
            )
    parts = {"gate_proj": (0, 2), "up_proj": (1, 2)} if leaf == "gate_up_proj" else {"down_proj": (0, 1)}
    for expert in range(count):
        for part, (first, step) in parts.items():
            module = f"{experts}.{expert}.{part}"
            size = (rows // step, columns)
            place = {"index": (expert,), "first": first, "step": step}
            encoded = {"scale": f"{stack}_scales", "block": (1, 32), "grid": (rows, columns // 32)}
            _add(found, f"{module}.weight", Stored(size, name, **place, **encoded))  # type: ignore[arg-type]
            if bias in tensors:
                _add(found, f"{module}.bias", Stored(size[:1], bias, **place))  # type: ignore[arg-type]


def _check_rest(
    name: str, info: TensorInfo, declared: Declared, tensors: dict[str, TensorInfo], found: Found, directory: Path
) -> None:
    """Of tensors that no weight uses: leave out what only engines that keep the format need, refuse what is strange."""
    where = f"{directory / info.file}: tensor {name}"
    module, _, parameter = name.rpartition(".")
    if parameter in _KV_SCALES:
        found.left_out[name] = "KV-cache scales"
    elif parameter in _INPUT_SCALES and f"{module}.weight" in found.stored:
        found.left_out[name] = "input scales"
    elif parameter in FOREIGN_PARAMETERS or _LOOKS_FOREIGN.match(parameter):
        raise CheckpointError(
            f"{where}: belongs to a quantized weight, but not to one of {declared.what}: the config and the tensors "
            f"disagree. {_hint(name, tensors)}"
        )
    elif info.dtype in ("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "I32") and len(info.shape) >= 2:
        raise CheckpointError(
            f"{where}: is {info.dtype} {list(info.shape)}, but not stored as {declared.what}: {_hint(name, tensors)}"
        )


def _misfit(name: str, encoding: Encoding, declared: Declared, tensors: dict[str, TensorInfo]) -> str:
    """Why elements cannot be decoded as what the config declares."""
    what = f"the config says {declared.what}, but"
    scales = [_beside(name, parameter) for parameter in encoding.scales]
    scale = next((found for found in scales if found in tensors), None)
    other = _beside(name, encoding.tensor_scale) if encoding.tensor_scale else None
    if scale is None or (other is not None and other not in tensors):
        return f"{what} {scales[0] if scale is None else other} is missing. {_hint(name, tensors)}"
    info = tensors[name]
    columns = info.shape[-1] * (2 if info.dtype == "U8" else 1) if info.shape else 0
    grid = _grid(encoding.block, info.shape[-2], columns)[1] if len(info.shape) > 1 and 0 not in info.shape else ()
    fits = f"; expected {[*info.shape[:-2], *grid]} of {'E8M0' if encoding.exponents else 'its scales'}"
    return f"{what} {scale} is {tensors[scale].dtype} {list(tensors[scale].shape)}{fits}. {_hint(name, tensors)}"


def _hint(name: str, tensors: dict[str, TensorInfo]) -> str:
    """What is beside a tensor that does not fit."""
    module = name.rpartition(".")[0]
    beside = [f"{t.rpartition('.')[2]} {i.dtype} {list(i.shape)}" for t, i in _siblings(module, tensors)]
    return f"Found {', '.join(sorted(beside)[:6])}; convert the high-precision original"


def _siblings(module: str, tensors: dict[str, TensorInfo]) -> Iterator[tuple[str, TensorInfo]]:
    return ((name, info) for name, info in tensors.items() if name.rpartition(".")[0] == module)
