"""The signatures by which others hand weights on.

Sources: `quantize_params` of miles and slime (backends/megatron_utils/megatron_to_hf); the metadata of vLLM's and
SGLang's update_weights_from_distributed; SGLang's FlattenedTensorBucket; 2026.
"""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import names
from ..checkpoint.config import Quantization, read_quantization
from ..checkpoint.exclusion import RULES, engine_layer
from ..checkpoint.manifest import FILE as MANIFEST
from ..checkpoint.manifest import read_manifest
from ..checkpoint.options import Options
from ..checkpoint.schema import weight_tensors
from ..checkpoint.shards import DTYPES
from ..checkpoint.weights import CONSTANT_INPUT_SCALE, WeightGroup, quantize_groups
from ..errors import CheckpointError, SyncError
from ..formats import MXFP8, Format
from ..names import Name
from ..policy import Policy
from .pieces import as_bytes, whole_tensors
from .planned import FlatBucket

Named = tuple[str, Tensor]


def quantize_params(
    args: Any, megatron_name: str, converted_named_params: Sequence[Named], quantization_config: dict[str, Any] | None
) -> list[Named]:
    """Quantize what one Megatron parameter was converted to, as miles and slime call it, parameter by parameter.

    What is quantized is what quantization_config says; by which rule, the halfbyte.json beside it in
    args.hf_checkpoint, or without one the standard rule. `Exporter` does all parameters in few launches, and what this
    cannot: fused layers that are several parameters.

    Args:
        args: the trainer's. Read: hf_checkpoint, num_layers, and what it says of layers in high precision, which must
            agree with the config: extra_high_precision_layers_megatron, first_last_layers_bf16 with
            num_layers_at_start_in_bf16 and num_layers_at_end_in_bf16; swiglu=False: MLPs have no gate.
        megatron_name: the parameter.
        converted_named_params: (Hugging Face name, tensor) of all that it holds, whole.
        quantization_config: config.json's, in either of halfbyte's layouts; None: nothing is quantized.

    Returns:
        (name, tensor) as the checkpoint has them; what is not quantized comes back as it is.

    Raises:
        CheckpointError: half of a gate and up pair, or any part of a fused layer, is missing or there twice; args and
            config disagree; input scales were measured; a weight contains NaN or inf, or does not fit the format.
    """
    if quantization_config is None:
        return list(converted_named_params)
    directory = str(getattr(args, "hf_checkpoint", "") or "")
    config = _config(json.dumps(quantization_config, sort_keys=True), directory)
    layers = getattr(args, "num_layers", None)
    parsed = [names.parse(name, layers) for name, _ in converted_named_params]
    tensors = dict(converted_named_params)
    if len(tensors) < len(parsed):
        twice = next(name.full for i, name in enumerate(parsed) if name.full in {n.full for n in parsed[:i]})
        raise CheckpointError(f"{twice}: is there twice in what {megatron_name} was converted to")
    chosen = {n.full: fmt for n in parsed if (fmt := config.format_of(n, tensors[n.full], parsed, layers)) is not None}
    if chosen and (reason := _high_precision(args, megatron_name, parsed[0])):
        raise CheckpointError(
            f"{megatron_name}: {reason} leaves it in high precision, but the engine's quantization_config does not "
            "exclude it; convert the checkpoint with the same options"
        )
    groups: defaultdict[str, list[Name]] = defaultdict(list)
    for name in parsed:
        if name.full in chosen:
            groups[name.fused or name.module].append(name)
    for members in groups.values():
        _check_whole(members, chosen[members[0].full], megatron_name, getattr(args, "swiglu", True) is not False)
    made = [WeightGroup(chosen[m[0].full], [tensors[n.full] for n in m], [n.full for n in m]) for m in groups.values()]
    done: dict[str, dict[str, Tensor]] = {}
    for members, quantized in zip(groups.values(), quantize_groups(made), strict=True):
        for name, q in zip(members, quantized, strict=True):
            one = torch.full((), CONSTANT_INPUT_SCALE, device=q.device) if config.quantization.activations else None
            done[name.full] = weight_tensors(config.quantization.layout, name.module, q, one)
    return [new for name, tensor in converted_named_params for new in done.get(name, {name: tensor}).items()]


class _Config:
    """A quantization_config with what halfbyte.json adds to it."""

    def __init__(self, quantization: Quantization, options: Options | None) -> None:
        self.quantization, self.options = quantization, options
        if options is not None and options.activations == "calibrated":
            raise CheckpointError(
                "the checkpoint's input scales were measured and age as the weights change; for live weights convert "
                "with --activations constant, or use Exporter(input_scale=…)"
            )

    def format_of(self, name: Name, tensor: Tensor, siblings: Sequence[Name], layers: int | None) -> Format | None:
        """What a tensor is quantized to, by the config's list of exclusions, which must agree with the policy."""
        if name.parameter != "weight" or tensor.dim() != 2 or name.kind in ("embedding", "norm", "conv"):
            return None
        layer, members = engine_layer(name, {sibling.module for sibling in siblings})
        rules = RULES[self.quantization.layout]
        said = {engine: rule(layer, members, self.quantization.ignore) for engine, rule in rules.items()}
        if len(set(said.values())) > 1:
            raise CheckpointError(f"{name.module}: engines disagree on whether the ignore list excludes it: {said}")
        excluded = any(said.values())
        if self.options is not None and layers is not None:
            decision = self.options.policy.decide(name, layers)
            if decision.quantize is excluded:
                raise CheckpointError(
                    f"{name.module}: {MANIFEST} {'quantizes' if excluded else 'excludes'} it ({decision.reason}), "
                    "quantization_config does not: take both from one checkpoint"
                )
        elif name.kind in ("router", "indexer") or (name.tower == "other" and name.kind != "lm_head"):
            return None
        if excluded:
            return None
        fmt = self.quantization.format_of(name.module)
        if fmt is None:
            raise CheckpointError(f"{name.module}: no config group names it, nor does the ignore list")
        if self.options is not None and type(wanted := self.options.format_of(name)) is type(fmt):
            fmt = wanted
        if tensor.shape[1] % fmt.block_columns:
            raise CheckpointError(
                f"{name.full}: shape {list(tensor.shape)}; the last dimension must be divisible by {fmt.block_columns}"
            )
        return fmt


@functools.lru_cache(maxsize=8)
def _config(text: str, directory: str) -> _Config:
    quantization = read_quantization({"quantization_config": json.loads(text)}, directory or "quantization_config")
    manifest = read_manifest(Path(directory)) if directory else None
    return _Config(quantization, manifest[0] if manifest else None)


def _high_precision(args: Any, megatron_name: str, name: Name) -> str | None:
    """Why args would leave a parameter alone, or None."""
    for text in getattr(args, "extra_high_precision_layers_megatron", None) or ():
        if names.plain_megatron(text) in names.plain_megatron(megatron_name):
            return f"extra_high_precision_layers_megatron {text}"
    if not getattr(args, "first_last_layers_bf16", False) or getattr(args, "num_layers", None) is None:
        return None
    ends = Policy(
        num_layers_at_start_in_bf16=int(getattr(args, "num_layers_at_start_in_bf16", 0)),
        num_layers_at_end_in_bf16=int(getattr(args, "num_layers_at_end_in_bf16", 0)),
        include_mtp=True,
    )
    decision = ends.decide(name, int(args.num_layers))
    return None if decision.quantize else f"first_last_layers_bf16 ({decision.reason})"


def _check_whole(members: list[Name], fmt: Format, megatron_name: str, is_gated: bool) -> None:
    """All parts of the layer that engines fuse, where they share a scale."""
    there, name = {member.leaf for member in members}, members[0]
    if isinstance(fmt, MXFP8) or name.fused is None:
        return
    missing = [leaf for leaf in name.partners if leaf not in there]
    is_plain_mlp = name.fused.rpartition(".")[2] in names.PAIRS and there == {name.partners[-1]}
    if missing and "linear_q_proj" not in megatron_name and not (is_plain_mlp and not is_gated):
        raise CheckpointError(
            f"{megatron_name}: {' and '.join(sorted(there))} came without {' and '.join(missing)}, with which engines "
            "fuse them under one tensor scale; give them in one call, or use halfbyte.export.Exporter"
        )


def metadata(tensors: Iterable[Named]) -> tuple[list[str], list[str], list[list[int]]]:
    """(names, dtypes, shapes), dtypes such as "uint8", as update_weights_from_distributed takes them."""
    rows = [(name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for name, tensor in tensors]
    return [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]


def broadcast(tensors: Iterable[Named], group: Any, source: int = 0) -> None:
    """Broadcast one tensor after the other, as engines receive those that `metadata` announced; wait for all.

    Float8 travels as uint8, which gloo can do too; the bytes that arrive are the same.

    Args:
        tensors: in the order of their metadata.
        group: of torch.distributed, in which this is rank `source`.
        source: rank in the group.

    Raises:
        SyncError: the group failed; what the engine has got is not whole.
    """
    options = torch.distributed.BroadcastOptions()
    options.rootRank = source
    try:
        sent = [tensor.detach().contiguous() for _, tensor in tensors]
        bytes_only = [tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor for tensor in sent]
        for work in [group.broadcast([tensor], options) for tensor in bytes_only]:
            work.wait()
    except RuntimeError as error:
        raise SyncError(f"a broadcast to the engine failed: {str(error).splitlines()[0]}; sync everything") from error


class Flat(NamedTuple):
    """Where a tensor lies in a flattened bucket: bytes start_idx to end_idx, numel of them."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    start_idx: int
    end_idx: int
    numel: int


def flatten(tensors: Iterable[Named] | FlatBucket) -> tuple[Tensor, list[Flat]]:
    """One (n,) uint8 tensor of all bytes, and where each tensor lies in it; a `FlatBucket`'s own memory, not copied.

    Raises:
        CheckpointError: there are none, they lie on several devices, or some are parts.
    """
    if isinstance(tensors, FlatBucket):
        whole_tensors(tensors.pieces)
        slots = tensors.layout.slots
        flats = [
            Flat(s.name, torch.Size(s.shape), DTYPES[s.dtype], s.offset, s.offset + s.nbytes, s.nbytes) for s in slots
        ]
        return tensors.flat[: tensors.nbytes], flats
    parts = [(name, tensor, as_bytes(tensor)) for name, tensor in tensors]
    if len({data.device for _, _, data in parts}) != 1:
        raise CheckpointError(f"{len(parts)} tensors on several devices, or none at all: a bucket is on one")
    places, end = [], 0
    for name, tensor, data in parts:
        places.append(Flat(name, tensor.shape, tensor.dtype, end, end + len(data), len(data)))
        end += len(data)
    return torch.cat([data for _, _, data in parts]), places


def unflatten(flat: Tensor, places: Iterable[Any]) -> dict[str, Tensor]:
    """The inverse; tensors share flat's memory where their dtype allows it at that place.

    Raises:
        CheckpointError: flat ends before its last tensor does.
    """
    found: dict[str, Tensor] = {}
    for place in places:
        data = flat[place.start_idx : place.end_idx]
        size = place.dtype.itemsize
        if len(data) != place.numel or len(data) != torch.Size(place.shape).numel() * size:
            raise CheckpointError(f"{place.name}: the bucket holds {len(data)} of its bytes; it is truncated")
        data = data if (flat.storage_offset() + place.start_idx) % size == 0 else data.clone()
        found[place.name] = data.view(place.dtype).reshape(place.shape)
    return found
