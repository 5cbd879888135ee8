"""Where two checkpoints differ: first tensor, block and byte, how much in decoded values, and by whose rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import names
from ..errors import CheckpointError, HalfbyteError
from ..formats import NVFP4
from ..tensor import QuantizedTensor
from .load_case import declared_for
from .measure import Original, find_original, squares
from .plan import Planned, places
from .producers import PRODUCERS, Producer
from .schema import SCALE_PARAMETERS
from .shards import Checkpoint, TensorInfo
from .sources import open_source
from .survey import CHUNK_ELEMENTS, Survey, Weight, survey

EXPLAINED = 4  # weights that are quantized again by every rule: the first that differ, one of each kind


@dataclass(frozen=True)
class Place:
    """The first byte that differs.

    Attributes:
        part: "elements", "block scales" or "tensor scale". byte: index into that tensor's data.
        row, block: of the weight, its blocks counted along a row; None for the tensor scale. matrix: of a stack.
        values: the byte in A and in B; of a tensor scale the two numbers.
    """

    part: str
    byte: int
    matrix: int | None
    row: int | None
    block: int | None
    values: tuple[str, str]

    def __str__(self) -> str:
        at = "" if self.row is None else f", row {self.row}, block {self.block}"
        at = at if self.matrix is None else f", matrix {self.matrix}{at}"
        return f"{self.part}, byte {self.byte}{at}: {self.values[0]} in A, {self.values[1]} in B"


@dataclass(frozen=True)
class Difference:
    """A tensor that is not the same in both.

    Attributes:
        what: in words, where a place says nothing: only in one, another format or shape.
        bytes, total: how many of its bytes differ, of how many; of a weight, elements and block scales.
        blocks: how many blocks hold such a byte.
        relative: ‖A − B‖ / ‖A‖ of the decoded values; largest: max |A − B|.
    """

    tensor: str
    what: str = ""
    first: Place | None = None
    bytes: int = 0
    total: int = 0
    blocks: int | None = None
    relative: float | None = None
    largest: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        first = None if self.first is None else {**vars(self.first), "values": list(self.first.values)}
        return {**vars(self), "first": first}


@dataclass(frozen=True)
class Explanation:
    """Which rules give a weight's bytes in one of the two; several where they agree on it.

    share: bytes that the best of them has right, 1.0 if all of them and the tensor scale.
    """

    tensor: str
    side: str
    producers: tuple[Producer, ...]
    share: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        rules = [{"name": p.name, "peculiar": p.peculiar, "source": p.source} for p in self.producers]
        return {"tensor": self.tensor, "side": self.side, "share": self.share, "producers": rules}


@dataclass(frozen=True)
class Diff:
    """Two checkpoints compared."""

    a: Path
    b: Path
    schemes: tuple[str, str]
    compared: int
    differences: tuple[Difference, ...]
    explanations: tuple[Explanation, ...]

    @property
    def same(self) -> bool:
        """Whether all tensors stand for the same numbers by the same bytes; layouts may differ."""
        return not self.differences

    def follows(self, side: str) -> list[str]:
        """Names of the rules that give every weight tried of "A" or "B", byte for byte."""
        tried = [e for e in self.explanations if e.side == side]
        rules = [{p.name for p in e.producers} if e.share == 1.0 else set() for e in tried]
        return [p.name for p in PRODUCERS if rules and all(p.name in names for names in rules)]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "same": self.same,
            "follows": {side: self.follows(side) for side in "AB"},
            "a": str(self.a),
            "b": str(self.b),
            "declared": list(self.schemes),
            "tensors_compared": self.compared,
            "differences": [difference.to_json() for difference in self.differences],
            "explanations": [explanation.to_json() for explanation in self.explanations],
        }


def diff(a: Path, b: Path, source: Path | None = None, progress: Callable[[int], None] = lambda done: None) -> Diff:
    """Compare two checkpoints tensor by tensor, in natural order; layouts may differ, sharding does not matter.

    Raises:
        CheckpointError: one cannot be read; the source is quantized itself.
    """
    pair = _Pair(survey(a), survey(b))
    differences = []
    for name in pair.names:
        found = pair.compare(name)
        if found is not None:
            differences.append(found)
        progress(pair.nbytes(name))
    explanations: tuple[Explanation, ...] = ()
    if source is not None:
        explanations = tuple(_explain(pair, differences, open_source(source, requantize=True)))
    schemes = tuple(_scheme(side) for side in (pair.a, pair.b))
    return Diff(a, b, (schemes[0], schemes[1]), len(pair.names), tuple(differences), explanations)


def _scheme(found: Survey) -> str:
    declared = declared_for(found, "vllm")
    return "no quantization" if declared is None else declared.scheme


@dataclass(frozen=True)
class _Pair:
    a: Survey
    b: Survey

    @cached_property
    def weights(self) -> tuple[dict[str, Weight], dict[str, Weight]]:
        """Of both sides by name."""
        first, second = ({weight.name.full: weight for weight in side.weights} for side in (self.a, self.b))
        return first, second

    @cached_property
    def plain(self) -> tuple[dict[str, TensorInfo], dict[str, TensorInfo]]:
        """What is no part of a quantized weight; input and cache scales are compared like any other tensor."""
        first, second = (_plain(side) for side in (self.a, self.b))
        return first, second

    @cached_property
    def names(self) -> list[str]:
        """All tensors of either, in natural order."""
        every = {name for part in (*self.weights, *self.plain) for name in part}
        return sorted(every, key=names.natural_key)

    def nbytes(self, name: str) -> int:
        """Roughly what comparing it has read."""
        weight, info = self.weights[0].get(name), self.plain[0].get(name)
        return weight.nbytes if weight else info.nbytes if info else 0

    def compare(self, name: str) -> Difference | None:
        """How a tensor differs, or None."""
        a, b = (side.get(name) for side in self.weights)
        if a is not None and b is not None:
            if (type(a.format), a.shape) != (type(b.format), b.shape):
                return Difference(name, f"is {_describe(a)} in A, {_describe(b)} in B")
            return self._compare_weights(a, b)
        x, y = (side.get(name) for side in self.plain)
        if x is not None and y is not None:
            if (x.dtype, x.shape) != (y.dtype, y.shape):
                return Difference(name, f"is {x.dtype} {list(x.shape)} in A, {y.dtype} {list(y.shape)} in B")
            return _compare_plain(name, self.a.checkpoint.read(name), self.b.checkpoint.read(name))
        here, there = a or x, b or y
        if here is None or there is None:
            return Difference(name, f"is only in {'B' if here is None else 'A'}")
        return Difference(name, f"is {_describe(here)} in A, {_describe(there)} in B")

    def _compare_weights(self, a: Weight, b: Weight) -> Difference | None:
        nvfp4 = isinstance(a.format, NVFP4)
        for side, found, weight in (("A", self.a, a), ("B", self.b, b)):
            if nvfp4 and found.tensor_scale(weight, 0 if len(weight.shape) == 3 else None) is None:
                return Difference(a.name.full, f"has no tensor scale in {side}, so its values are not known")
        counts = _Counts()
        for matrix, rows in self.a.chunks(a):
            counts.add(self.a.read(a, rows, matrix), self.b.read(b, rows, matrix), matrix, rows.start, a.shape)
        if counts.first is None:
            return None
        values = _Values()
        for matrix, rows in self.a.chunks(a):
            values.add(self.a.read(a, rows, matrix).dequantize(), self.b.read(b, rows, matrix).dequantize())
        return Difference(
            a.name.full,
            "",
            counts.first,
            counts.bytes,
            counts.total,
            counts.blocks,
            values.relative,
            values.largest,
        )


@dataclass
class _Values:
    """‖A − B‖², ‖A‖² and max |A − B| so far."""

    squared: float = 0.0
    norm: float = 0.0
    largest: float = 0.0

    def add(self, a: Tensor, b: Tensor) -> None:
        """Some more values."""
        difference = a.float() - b.float()
        self.squared += squares(difference)
        self.norm += squares(a.float())
        self.largest = max(self.largest, float(difference.abs().amax()))

    @property
    def relative(self) -> float | None:
        """‖A − B‖ / ‖A‖."""
        return (self.squared / self.norm) ** 0.5 if self.norm else None


def _describe(found: Weight | TensorInfo) -> str:
    if isinstance(found, Weight):
        return f"{type(found.format).__name__} {list(found.shape)}"
    return f"{found.dtype} {list(found.shape)}"


def _plain(side: Survey) -> dict[str, TensorInfo]:
    used = {
        weight.tensor(part)
        for weight in side.weights
        for part in (weight.spelling.elements, weight.spelling.block_scale, weight.spelling.tensor_scale)
    }
    return {name: info for name, info in side.checkpoint.tensors.items() if name not in used}


@dataclass
class _Counts:
    """Bytes that differ so far, and the first of them."""

    first: Place | None = None
    bytes: int = 0
    total: int = 0
    blocks: int = 0

    def add(self, a: QuantizedTensor, b: QuantizedTensor, matrix: int | None, row: int, shape: tuple[int, ...]) -> None:
        """One chunk, whose first row is `row`."""
        elements = _bytes(a.packed) != _bytes(b.packed)
        scales = _bytes(a.block_scale) != _bytes(b.block_scale)
        either = elements.unflatten(-1, (scales.shape[-1], -1)).any(-1) | scales
        self.total += elements.numel() + scales.numel()
        self.bytes += int(elements.sum()) + int(scales.sum())
        self.blocks += int(either.sum())
        if self.first is not None:
            return
        if (
            a.tensor_scale is not None
            and b.tensor_scale is not None
            and not torch.equal(a.tensor_scale, b.tensor_scale)
        ):
            values = (f"{float(a.tensor_scale):.9g}", f"{float(b.tensor_scale):.9g}")
            self.first = Place("tensor scale", 0, matrix, None, None, values)
        elif bool(either.any()):
            r, block = (int(i) for i in either.nonzero()[0])
            self.first = _first(a, b, (matrix or 0) * shape[-2] + row, r, block)
            self.first = replace(self.first, matrix=matrix, row=row + r)


def _bytes(data: Tensor) -> Tensor:
    return data.view(torch.uint8)


def _first(a: QuantizedTensor, b: QuantizedTensor, above: int, row: int, block: int) -> Place:
    """In the first block that differs: its scale, which everything in it hangs on, before its elements."""
    left, right = _bytes(a.block_scale), _bytes(b.block_scale)
    column, part = block, "block scales"
    if bool(left[row, block] == right[row, block]):
        left, right = _bytes(a.packed), _bytes(b.packed)
        width = left.shape[-1] // a.block_scale.shape[-1]
        inside = slice(block * width, (block + 1) * width)
        column, part = inside.start + int((left[row, inside] != right[row, inside]).nonzero()[0]), "elements"
    values = (f"0x{int(left[row, column]):02X}", f"0x{int(right[row, column]):02X}")
    return Place(part, (above + row) * left.shape[-1] + column, None, row, block, values)


def _compare_plain(name: str, a: Tensor, b: Tensor) -> Difference | None:
    left, right = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    if torch.equal(left, right):
        return None
    count, first = 0, -1
    for start in range(0, len(left), CHUNK_ELEMENTS):
        differ = left[start : start + CHUNK_ELEMENTS] != right[start : start + CHUNK_ELEMENTS]
        found = int(differ.sum())
        first = start + int(differ.byte().argmax()) if found and first < 0 else first
        count += found
    values = (f"0x{int(left[first]):02X}", f"0x{int(right[first]):02X}")
    part = "scale" if name.rpartition(".")[2] in SCALE_PARAMETERS else "data"
    place = Place(part, first, None, None, None, values)
    decoded = _Values()
    if a.is_floating_point() and a.numel():
        for x, y in zip(a.flatten().split(CHUNK_ELEMENTS), b.flatten().split(CHUNK_ELEMENTS), strict=True):
            decoded.add(x[None], y[None])
    return Difference(name, "", place, count, len(left), None, decoded.relative, decoded.largest)


def _explain(pair: _Pair, differences: list[Difference], source: Checkpoint) -> Iterator[Explanation]:
    """Quantize the originals of some weights that differ by every rule, and see whose bytes come out."""
    originals = places(source)
    chosen: dict[str, Weight] = {}
    for difference in differences:
        weight = pair.weights[0].get(difference.tensor) or pair.weights[1].get(difference.tensor)
        if weight is not None and isinstance(weight.format, NVFP4) and len(weight.shape) == 2 and not difference.what:
            chosen.setdefault(f"{weight.name.kind} {weight.name.leaf}", weight)
    for weight in list(chosen.values())[:EXPLAINED]:
        try:
            original = find_original(weight, source, originals)
        except HalfbyteError as error:
            raise CheckpointError(
                f"{source.directory}: {weight.name.full} {error}; is this the right --source?"
            ) from error
        amaxes = _amaxes(weight, source, original, originals)
        for side, found, weights in (("A", pair.a, pair.weights[0]), ("B", pair.b, pair.weights[1])):
            yield _whose(found, weights[weight.name.full], side, source, original, amaxes)


def _amaxes(weight: Weight, source: Checkpoint, original: Original, originals: dict[str, Planned]) -> list[Tensor]:
    """The weight's own maximum, and that of the layer which engines fuse it into."""
    own = source.read(original.tensor, original.index).abs().amax()
    name = weight.name
    members = [originals.get(f"{name.parent}.{leaf}.weight") for leaf in name.partners]
    fused = [source.read(item.source, item.index).abs().amax() for item in members if item is not None]
    together = torch.stack(fused).amax() if fused else own
    return [own] if torch.equal(own, together) else [together, own]


def _whose(
    found: Survey, weight: Weight, side: str, source: Checkpoint, original: Original, amaxes: list[Tensor]
) -> Explanation:
    """The rules that have most bytes right, on the first rows; among those, only ones with the right tensor scale."""
    matrix, rows = next(iter(found.chunks(weight)))
    x = source.read(original.tensor, original.part(matrix, rows))
    actual = found.read(weight, rows, matrix)
    shares = []
    for producer in PRODUCERS:
        made = [_share(producer.quantize(x, amax), actual) for amax in amaxes]
        shares.append((max(made), producer))
    best = max(share for share, _ in shares)
    return Explanation(weight.name.full, side, tuple(p for share, p in shares if share == best), best)


def _share(made: QuantizedTensor, actual: QuantizedTensor) -> float:
    """Bytes that are right; the tensor scale counts as one, so that only an exact one gives 1.0."""
    pairs = ((made.packed, actual.packed), (made.block_scale, actual.block_scale))
    right = sum(int((x.view(torch.uint8) == y.view(torch.uint8)).sum()) for x, y in pairs)
    if made.tensor_scale is None or actual.tensor_scale is None:
        raise CheckpointError("an NVFP4 weight without its tensor scale has no values to compare")
    right += bool(made.tensor_scale.reshape(()) == actual.tensor_scale.reshape(()))
    return right / (1 + sum(x.numel() for x, _ in pairs))
