"""Megatron's shards and Hugging Face's tensors: one cut into the other, by the table in `rules`.

A rank's part of a Hugging Face tensor is always contiguous along one dimension, whatever Megatron fused and
interleaved; so a rank can quantize what it has, and parts only need to be laid side by side afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from ..errors import CheckpointError, FormatError
from .megatron import Model, Parameter
from .pieces import Piece
from .placement import Placement

VOCABULARY_MULTIPLE = 128  # per rank; Megatron's make_vocab_size_divisible_by
_TRANSPOSED = ("grouped_fc1", "grouped_fc2")


def to_pieces(model: Model, name: str, tensor: Tensor, placement: Placement) -> list[Piece]:
    """What a rank's parameter holds of which Hugging Face tensors; views of it, but for q, k and v.

    Args:
        model: see `Model.of`.
        name: the parameter's global name (`global_name`).
        tensor: as this rank has it: its shard, or the whole where tensor parallelism does not cut it.
        placement: of this rank.

    Raises:
        CheckpointError: the parameter is unknown, or its shape is neither that of the whole nor of a shard.
    """
    tensor = tensor.detach()
    if order := ordering(model, name, tensor, placement):
        tensor = tensor.index_select(order[0], order[1].to(tensor.device))
    return ordered_pieces(model, name, tensor, placement)


def ordering(model: Model, name: str, tensor: Tensor, placement: Placement) -> tuple[int, Tensor] | None:
    """(dimension, indices) by which a parameter is put in order before its parts are views of it; None: they are."""
    parameter = model.parameter(name)
    if parameter.rule.how == "swap":
        columns = torch.arange(tensor.shape[1])
        return 1, columns.roll(-(tensor.shape[1] // 2))
    if parameter.rule.how == "qkv":
        _, rank, _ = _cut(model, parameter, _parts(model, parameter), tensor, placement)
        return 0, torch.cat([rows for rows, _ in _rows_of_qkv(model, parameter, len(tensor), rank)])
    return None


def ordered_pieces(model: Model, name: str, tensor: Tensor, placement: Placement) -> list[Piece]:
    """`to_pieces` of a parameter that is in order; views of it all."""
    parameter = model.parameter(name)
    how = parameter.rule.how
    if how in ("experts", *_TRANSPOSED):
        return _of_experts(model, parameter, tensor, placement)
    if how == "copies":
        return [piece for hf in parameter.hf for piece in _rows_of_vocabulary(model, hf, tensor, placement, name)]
    parts = _parts(model, parameter)
    cut, rank, size = _cut(model, parameter, parts, tensor, placement)
    if how == "qkv":
        return _of_qkv(model, parameter, tensor, rank, size)
    dim = None if size == 1 else cut
    if how == "halves" and size == 1:
        return [Piece(parameter.hf[0], tensor, expert=parameter.is_expert)]
    pieces, begin = [], 0
    for hf, start, rows in parts:
        local = rows // size if cut == 0 else rows
        part = tensor if len(parts) == 1 else tensor.narrow(0, begin, local)
        begin += local
        at = 0 if dim is None else rank * part.shape[dim]
        pieces.append(Piece(hf, part, dim, at + start, parameter.is_expert))
    return pieces


def to_megatron(
    model: Model, tensors: Mapping[str, Tensor], placement: Placement, spec: Literal["te", "local"] = "te"
) -> dict[str, Tensor]:
    """The inverse, for a rank without pipeline parallelism: every parameter that it has, by its global name.

    Raises:
        FormatError: the sizes cannot be dealt out evenly.
    """
    found: dict[str, Tensor] = {}
    experts = {f".{e}." for e in placement.local_experts(model.experts)} if model.experts else set()
    for name, parameter in model.parameters(spec).items():
        hf = parameter.hf
        if parameter.is_expert and not any(f"experts{expert}" in hf[0] for expert in experts):
            continue
        parts = [tensors[part] for part in hf]
        rank, size = placement.tensor(parameter.is_expert)
        found[name] = _cut_for(model, parameter, parts, rank, size)
    return found


def _cut_for(model: Model, parameter: Parameter, parts: list[Tensor], rank: int, size: int) -> Tensor:
    how, cut = parameter.rule.how, parameter.rule.cut
    first = parts[0]
    if how == "copies":
        padding = -len(first) % (VOCABULARY_MULTIPLE * size)
        parts = [torch.nn.functional.pad(first, (0, 0, 0, padding))]
    elif how == "swap":
        half = first.shape[1] // 2
        parts = [torch.cat((first[:, half:], first[:, :half]), 1)]
    elif how == "halves":
        parts = list(first.chunk(2))
    if cut is None:
        return torch.cat(parts)
    for part in parts if how != "qkv" else [torch.cat(parts)]:
        if part.shape[cut] % size:
            raise FormatError(f"{parameter.name}: dimension {cut} of {list(part.shape)} is not divisible by {size}")
    if how != "qkv":
        return torch.cat([part.chunk(size, cut)[rank] for part in parts], cut if len(parts) == 1 else 0)
    by_group = torch.cat([part.reshape(model.query_groups, -1, *part.shape[1:]) for part in parts], 1).flatten(0, 1)
    return by_group.chunk(size)[rank]


def _parts(model: Model, parameter: Parameter) -> list[tuple[str, int, int]]:
    """(Hugging Face name, first row, rows) of what lies above each other in the whole parameter."""
    if parameter.rule.how == "halves":
        (hf,) = parameter.hf
        half = model.shapes[hf][0] // 2
        return [(hf, 0, half), (hf, half, half)]
    return [(hf, 0, model.shapes[hf][0]) for hf in parameter.hf]


def _cut(
    model: Model, parameter: Parameter, parts: list[tuple[str, int, int]], tensor: Tensor, placement: Placement
) -> tuple[int, int, int]:
    """(dimension, rank, size) by which a parameter is cut: size 1 where it is whole. Its shape tells."""
    if not parts:
        return 0, 0, 1
    whole = (sum(rows for _, _, rows in parts), *model.shapes[parts[0][0]][1:])
    rank, size = placement.tensor(parameter.is_expert)
    if tuple(tensor.shape) == whole:
        return parameter.rule.cut or 0, 0, 1
    cut = parameter.rule.cut or 0  # what is not cut by Transformer Engine's layers, others cut by rows: MLA's down
    expected = list(whole)
    if cut < len(whole):
        expected[cut] //= size
    uneven = parts if cut == 0 and parameter.rule.how != "qkv" else []
    if list(tensor.shape) != expected or any(rows % size for _, _, rows in uneven) or whole[cut] % size:
        parallel = f"rank {rank} of {size}"
        raise CheckpointError(
            f"{parameter.name}: has shape {list(tensor.shape)}; whole it is {list(whole)}, on {parallel} {expected}: "
            "check the placement"
        )
    return cut, rank, size


def _of_qkv(model: Model, parameter: Parameter, tensor: Tensor, rank: int, size: int) -> list[Piece]:
    """q, k and v of a linear_qkv in order."""
    places = _rows_of_qkv(model, parameter, len(tensor), rank)
    parts = tensor.split([len(rows) for rows, _ in places])
    dim = None if size == 1 else 0
    return [Piece(hf, part, dim, s) for hf, part, (_, s) in zip(parameter.hf, parts, places, strict=True)]


def _rows_of_qkv(model: Model, parameter: Parameter, count: int, rank: int) -> list[tuple[Tensor, int]]:
    """Of q, k and v: which of a rank's rows they are, and where those begin in the whole.

    linear_qkv has for each group of query heads their rows, then its key's, then its value's; cut anywhere: ranks
    beyond the number of groups split one between them, without regard to what is what. Whatever a rank has of q, of k
    or of v is contiguous in it.
    """
    groups, (q, k, v) = model.query_groups, (model.shapes[hf][0] for hf in parameter.hf)
    if (q, k, v) != (model.heads * model.head_dim, groups * model.head_dim, groups * model.head_dim):
        raise CheckpointError(
            f"{parameter.name}: q, k and v have {q}, {k} and {v} rows; by the config {model.heads} heads in {groups} "
            f"groups of size {model.head_dim}: pass its parts by their HF names"
        )
    places = torch.arange(q + k + v).unflatten(0, (groups, -1)).split([q // groups, k // groups, v // groups], 1)
    begin = rank * count
    found = []
    for part in places:  # rows of q, k or v in the whole parameter, in their own order
        rows = part.flatten()
        here = (rows >= begin) & (rows < begin + count)
        found.append((rows[here] - begin, int((rows < begin).sum())))
    return found


def _rows_of_vocabulary(model: Model, hf: str, tensor: Tensor, placement: Placement, name: str) -> list[Piece]:
    """The embedding or output layer, whose rows Megatron pads so that they can be dealt out."""
    rows, columns = model.shapes[hf]
    if tensor.dim() != 2 or tensor.shape[1] != columns or len(tensor) * placement.tp_size < rows:
        raise CheckpointError(
            f"{name}: has shape {list(tensor.shape)} on one of {placement.tp_size} ranks, but {hf} is "
            f"{[rows, columns]}: check the placement"
        )
    if placement.tp_size == 1:
        return [Piece(hf, tensor[:rows])]
    start = min(placement.tp_rank * len(tensor), rows)
    return [Piece(hf, tensor[: rows - start], 0, start)]


def _of_experts(model: Model, parameter: Parameter, tensor: Tensor, placement: Placement) -> list[Piece]:
    """All of a rank's experts in one parameter."""
    experts = placement.local_experts(model.experts)
    how = parameter.rule.how
    if how in _TRANSPOSED:  # GroupedMLP keeps [H, E·2I] and [E·I, H], and reads them as [E, H, 2I] and [E, I, H]
        hidden = model.shapes[parameter.hf[0].replace("{e}", "0")][1 if how == "grouped_fc1" else 0]
        shape = (len(experts), hidden, -1) if how == "grouped_fc1" else (len(experts), -1, hidden)
        if tensor.dim() != 2 or tensor.shape[0 if how == "grouped_fc1" else 1] != hidden:
            raise CheckpointError(f"{parameter.name}: has shape {list(tensor.shape)}; one dimension should be {hidden}")
        tensor = tensor.reshape(shape).mT
    if tensor.dim() != 3 or len(tensor) != len(experts):
        raise CheckpointError(
            f"{parameter.name}: has shape {list(tensor.shape)}; the first of 3 dimensions should be the {len(experts)} "
            "experts of this rank: check the placement"
        )
    cut = parameter.rule.cut or 0
    pieces = []
    for i, expert in enumerate(experts):
        hf = tuple(name.replace("{e}", str(expert)) for name in parameter.hf)
        parts = [(name, 0, model.shapes[name][0]) for name in hf]
        _, rank, size = _cut(model, parameter, parts, tensor[i], placement)
        for part, (name, _, _) in zip(tensor[i].chunk(len(hf)), parts, strict=True):
            dim = None if size == 1 else cut
            pieces.append(Piece(name, part, dim, rank * part.shape[cut] if dim is not None else 0, True))
    return pieces
