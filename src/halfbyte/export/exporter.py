"""Live weights of a trainer as the tensors that a quantized checkpoint of them would hold, bucket by bucket.

Pure: parameters in, tensors out, no files and no communication but through `reduce`. The plan is a conversion's own
(`checkpoint.plan`), and so is the function that quantizes a group (`checkpoint.weights`); what is new here is that
weights come in any order, under Megatron's names or Hugging Face's, whole or as a rank's shards.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .. import ops
from ..checkpoint.convert import kv_scales, output_entries
from ..checkpoint.options import Options
from ..checkpoint.plan import Headers, Plan, Planned, make_plan
from ..checkpoint.schema import Entry, Layout, weight_names, weight_tensors
from ..checkpoint.shards import Checkpoint, TensorInfo, tensor_dtype
from ..checkpoint.weights import CONSTANT_INPUT_SCALE, WeightGroup, quantize_groups
from ..errors import CheckpointError
from ..formats import NVFP4, Format
from ..tensor import QuantizedTensor
from .collect import Collector, Ready
from .megatron import Model
from .pieces import Piece, merge, whole_tensors
from .placement import Placement
from .planned import PreparedExport
from .shards import to_pieces

BUCKET_BYTES = 512 << 20
InputScale = Literal["omit", "ones"]
Engine = Literal["vllm", "sglang", "tensorrt-llm"]
Reduce = Callable[[Tensor, bool], Tensor]
"""reduce(maxima, expert) → their maximum over the ranks that hold parts of the same weights: the tensor-parallel group,
or for expert=True the expert-tensor-parallel group. maxima: float32 (n,), the same n and order on all of them."""


@dataclass(frozen=True, eq=False)
class Bucket:
    """Ready tensors, or this rank's parts of them; never a part of a fused group without the others."""

    index: int
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        """Of all data."""
        return sum(piece.tensor.nbytes for piece in self.pieces)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Name → tensor, where this rank has all of each.

        Raises:
            CheckpointError: some are parts; `merge` joins those of all ranks.
        """
        return whole_tensors(self.pieces)


class Exporter:
    """Exports one model's weights, again and again.

    Attributes:
        plan: what becomes of every tensor, and why.
        entries: name → (dtype, shape) of all that an export of every rank yields together.
        bucket_bytes, placement: as given.
        sources: Hugging Face parameter → what the plan makes of it.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, TensorInfo],
        options: Options | None = None,
        *,
        placement: Placement | None = None,
        input_scale: InputScale | None = None,
        engine: Engine | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        reduce: Reduce | None = None,
        directory: Path = Path("model"),
    ) -> None:
        """
        Args:
            config: the model's config.json, without a quantization.
            tensors: Hugging Face name → dtype and shape of the whole model; see `headers` and `like`.
            options: what to quantize to, and by which policy.
            placement: of this rank, for Megatron's parameters.
            input_scale: static input scales of NVFP4 weights: leave them out, or send ones; by default what
                options.activations and the engine ask for.
            engine: who receives the tensors.
            bucket_bytes: when a bucket is full, of what is cut an equal share of each rank counted; a single larger
                group makes a larger one.
            reduce: see `Reduce`; needed where weights come in parts.
            directory: what errors call the model.

        Raises:
            CheckpointError: as a conversion's plan; or input scales that cannot be had without data.
        """
        self._options = _with_input_scales(options or Options(), input_scale, engine)
        self._source = Headers(directory, dict(config), dict(tensors))
        self.plan: Plan = make_plan(self._source, self._options)
        self._kv = kv_scales(self.plan, self._options)
        self._kv_with = _kv_scales_with(self.plan, self._kv)
        self.entries: dict[str, Entry] = {}
        for group in output_entries(self.plan, self._options):
            self.entries |= group
        self.bucket_bytes = bucket_bytes
        self.placement = placement or Placement()
        self._reduce: dict[bool, Callable[[Tensor], Tensor]] = {}
        if reduce is not None:
            self._reduce = {expert: functools.partial(_reduced, reduce, expert) for expert in (False, True)}
        self.sources: dict[str, list[Planned]] = {}
        for item in self.plan:
            self.sources.setdefault(item.source, []).append(item)

    @classmethod
    def like(cls, source: Path, options: Options | None = None, **arguments: Any) -> Exporter:
        """For a model whose high-precision checkpoint is in a directory: only headers and config are read."""
        checkpoint = Checkpoint(source)
        return cls(checkpoint.config, checkpoint.tensors, options, directory=source, **arguments)

    @functools.cached_property
    def model(self) -> Model:
        """What Megatron's parameters are understood by."""
        return Model.of(self._source.config, {item.name.full: item.shape for item in self.plan})

    def export(self, named: Iterable[tuple[str, Tensor] | Piece]) -> Iterator[Bucket]:
        """Buckets of what comes in, in that order; a group as soon as it is complete.

        Args:
            named: parameters: Hugging Face name and whole tensor; or Megatron's global name (`global_name`) and this
                rank's shard; or `Piece`s of Hugging Face tensors. Ranks that share weights give them in one order.
                Tensors are referred to until their bucket has been yielded, never changed.

        Raises:
            CheckpointError: a name is unknown, comes twice, or has another shape or dtype than planned; a fused group
                is incomplete at the end, or on a single rank anything is; a weight contains NaN or inf. What was
                yielded before must then be thrown away.
        """
        collected = self.collector()
        index = 0
        for entry in named:
            name = entry.name if isinstance(entry, Piece) else entry[0]
            collected.add(name, self.pieces_of(entry))
            if collected.ready_bytes >= self.bucket_bytes:
                yield Bucket(index, tuple(self._finish(collected.take())))
                index += 1
        collected.check_complete()
        if collected.ready:
            yield Bucket(index, tuple(self._finish(collected.take())))

    def export_all(self, named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Everything at once, on a rank that has the whole model: name → tensor, as a checkpoint holds them."""
        pieces = (piece for bucket in self.export(named) for piece in bucket.pieces)
        return merge(pieces, self.entries)

    def prepare(self, named: Iterable[tuple[str, Tensor] | Piece], *, keep: bool = False) -> PreparedExport:
        """An export of these parameters that is planned now, and repeated by `PreparedExport.export` at little cost.

        The parameter objects are kept; their data may change, and may move. Where a trainer replaces the objects
        themselves, prepare anew.

        Args:
            named: as `export`; all on one device.
            keep: every bucket in memory of its own, instead of two for all; see `planned`.

        Raises:
            CheckpointError: as `export`; parameters are on several devices.
        """
        return PreparedExport(self, named, keep=keep)

    def collector(self) -> Collector:
        """What sorts this rank's parameters into groups, once."""
        return Collector(self.plan, self.placement)

    @property
    def layout(self) -> Layout:
        """Whose names tensors get."""
        return self._options.layout

    @property
    def sends_input_scales(self) -> bool:
        """Whether there are any."""
        return self._options.activations != "none"

    def kv_scales_with(self, ready: Ready) -> Iterator[tuple[str, Tensor]]:
        """The cache's scales that go into the bucket of a group."""
        for name in self._kv_with.get(ready.items[0].name.full, ()):
            yield name, self._kv[name]

    def pieces_of(self, entry: tuple[str, Tensor] | Piece) -> list[Piece]:
        """Pieces of planned tensors, by the names that those have in the output."""
        name, tensor = (entry.name, entry.tensor) if isinstance(entry, Piece) else entry
        if hasattr(tensor, "to_local"):
            raise CheckpointError(
                f"{name}: is a DTensor, of which a part is here; give that, as Piece(name, x.to_local(), dim, start)"
            )
        if isinstance(entry, Piece):
            return [replace(entry, tensor=tensor.detach())]
        if name not in self.sources:
            return to_pieces(self.model, name, tensor, self.placement)
        tensor = tensor.detach()
        expected = self._source.tensors[name].shape
        if tuple(tensor.shape) != expected:
            raise CheckpointError(
                f"{name}: has shape {list(tensor.shape)}, planned is {list(expected)}; give a part as a Piece"
            )
        items = self.sources[name]
        return [Piece(item.name.full, tensor[item.index] if item.index else tensor) for item in items]

    def _finish(self, groups: list[Ready]) -> Iterator[Piece]:
        """Quantize what is to be, all groups together, and name everything as the layout does."""
        chosen = [ready for ready in groups if ready.format is not None]
        done = iter(quantize_groups([self.weight_group(ready) for ready in chosen])) if chosen else iter(())
        results = [next(done) if ready.format is not None else [] for ready in groups]
        scales = self._encode_scales(results)
        ones = self._input_scale(results)
        for ready, quantized in zip(groups, results, strict=True):
            if ready.format is None:
                yield from ready.pieces
            else:
                for piece, q in zip(ready.pieces, quantized, strict=True):
                    yield from self._named(piece, q, ones, scales.get(id(q)))
            for name, scale in self.kv_scales_with(ready):
                yield Piece(name, scale.to(ready.pieces[0].tensor.device))

    def weight_group(self, ready: Ready) -> WeightGroup:
        """What is quantized together, of a group that is to be."""
        assert ready.format is not None
        names, tensors = [piece.name for piece in ready.pieces], [piece.tensor for piece in ready.pieces]
        cut = next((piece for piece in ready.pieces if piece.dim is not None), None)
        if cut is None:
            return WeightGroup(ready.format, tensors, names)
        if not self._reduce:
            raise CheckpointError(
                f"{cut.name}: this rank has a part of it, and its maximum is needed over all of it: give reduce"
            )
        return WeightGroup(ready.format, tensors, names, reduce=self._reduce[cut.expert])

    def _encode_scales(self, results: list[list[QuantizedTensor]]) -> dict[int, Tensor]:
        """S_enc of each result, for the layout that stores those, computed together."""
        if self._options.layout == "modelopt":
            return {}
        found: dict[int, Tensor] = {}
        by_format: defaultdict[Format, list[QuantizedTensor]] = defaultdict(list)
        for q in (q for quantized in results for q in quantized):
            by_format[q.format].append(q)
        for fmt, quantized in by_format.items():
            if isinstance(fmt, NVFP4):
                amaxes = torch.stack([q.amax for q in quantized if q.amax is not None])
                found |= zip(map(id, quantized), ops.tensor_scales(amaxes, fmt)[0], strict=True)
        return found

    def _input_scale(self, results: list[list[QuantizedTensor]]) -> Tensor | None:
        """One 1.0 for all that is in the bucket: a layout's divisor of it is 1.0 too."""
        first = next((q for quantized in results for q in quantized), None)
        if not self.sends_input_scales or first is None:
            return None
        return torch.full((), CONSTANT_INPUT_SCALE, device=first.device)

    def _named(self, piece: Piece, q: QuantizedTensor, ones: Tensor | None, scale: Tensor | None) -> Iterator[Piece]:
        """A quantized piece's tensors; elements and block scales are parts where it is."""
        module = piece.name.removesuffix(".weight")
        names = weight_names(self._options.layout, q.format)
        elements_per_column = {names.elements: 2 if isinstance(q.format, NVFP4) else 1}
        per = elements_per_column | {names.block_scale: q.format.block_columns}
        for name, tensor in weight_tensors(self._options.layout, module, q, ones, scale).items():
            ratio = per.get(name.rpartition(".")[2])
            if ratio is None:
                yield Piece(name, tensor, expert=piece.expert)
            else:
                start = piece.start // ratio if piece.dim == 1 else piece.start
                yield Piece(name, tensor, piece.dim, start, piece.expert)


def _kv_scales_with(plan: Plan, scales: Iterable[str]) -> dict[str, list[str]]:
    """First weight of the group that makes an attention's keys → names of its cache's scales."""
    by_attention: defaultdict[str, list[str]] = defaultdict(list)
    for name in scales:
        by_attention[name.rpartition(".")[0].removesuffix(".k_proj").removesuffix(".v_proj")].append(name)
    keys = {"k_proj", "kv_b_proj", "qkv_proj"}
    groups = [g for g in plan.groups if any(i.linear and i.name.leaf in keys for i in g)]
    return {group[0].name.full: by_attention.pop(group[0].name.parent, []) for group in groups}


def _reduced(reduce: Reduce, expert: bool, maxima: Tensor) -> Tensor:
    return reduce(maxima, expert)


def _with_input_scales(options: Options, input_scale: InputScale | None, engine: Engine | None) -> Options:
    """Options with activations "none" where no input scales are sent, "constant" where ones are."""
    if engine not in (None, "vllm", "sglang", "tensorrt-llm"):
        raise CheckpointError(f"engine={engine!r}: choose 'vllm', 'sglang' or 'tensorrt-llm'")
    if input_scale not in (None, "omit", "ones"):
        raise CheckpointError(f"input_scale={input_scale!r}: choose 'omit' or 'ones'")
    if options.kv_cache == "fp8_calibrated" or options.needs_data == "error='hessian'":
        raise CheckpointError(f"{options.needs_data or 'kv_cache'} needs calibration data, which a live export has not")
    has_nvfp4 = any(isinstance(fmt, NVFP4) for fmt in options.formats)
    if input_scale is not None:
        return replace(options, activations="constant" if input_scale == "ones" and has_nvfp4 else "none")
    if options.activations == "calibrated":
        raise CheckpointError(
            "activations='calibrated': measured input scales age as the weights change; choose input_scale='ones', or "
            "'omit' to leave those that the engine has"
        )
    if options.activations == "none" and has_nvfp4 and options.layout == "modelopt" and engine not in (None, "vllm"):
        return replace(options, activations="constant")  # they do not load W4A16 in this layout: what runs is W4A4
    return options


def headers(named: Iterable[tuple[str, Tensor]]) -> dict[str, TensorInfo]:
    """What `Exporter` wants to know of a model, from its Hugging Face parameters; meta tensors will do."""
    return {name: TensorInfo(name, tensor_dtype(tensor), tuple(tensor.shape)) for name, tensor in named}
