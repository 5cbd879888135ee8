"""Deltas: only changed bytes, whole or not at all."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from halfbyte import CheckpointError
from halfbyte.export import Exporter, apply_delta, headers, make_delta
from halfbyte.export.delta import Change, digest

from ..check import equal, same_bits, true
from . import ranks

Tensors = dict[str, Tensor]


def two_versions() -> tuple[Tensors, Tensors]:
    """A model exported, and exported again after a small step of one layer."""
    model = ranks.dense()
    exporter = Exporter(model.config, headers(model.tensors.items()))
    base = exporter.export_all(model.tensors.items())
    name = "model.layers.1.mlp.down_proj.weight"
    stepped = model.tensors[name].clone()
    stepped[:, :16] += 0.01
    return base, exporter.export_all((model.tensors | {name: stepped}).items())


def test_the_result_is_the_new_version() -> None:
    base, new = two_versions()
    before = {name: tensor.clone() for name, tensor in base.items()}
    delta = make_delta(base, new)
    true(
        {name.rpartition(".")[0] for name in delta.changes} == {"model.layers.1.mlp.down_proj"},
        f"{list(delta.changes)}",
    )
    size = sum(tensor.nbytes for tensor in new.values())
    true(0 < delta.nbytes < size / 20, f"{delta.nbytes} of {size} bytes")
    found = apply_delta(base, delta)
    equal(list(found), list(base))
    for name, tensor in new.items():
        same_bits(found[name], tensor, name)
        same_bits(base[name], before[name], f"{name} of the base")
    equal((delta.base, delta.result), (digest(base), digest(new)))


def test_nothing_changed() -> None:
    base, _ = two_versions()
    delta = make_delta(base, base)
    equal((len(delta.changes), delta.nbytes, delta.base), (0, 0, delta.result))
    equal(list(apply_delta(base, delta)), list(base))


def test_what_changed_everywhere_travels_without_positions() -> None:
    base, new = {"a": torch.zeros(64)}, {"a": torch.full((64,), 1.7)}
    change = make_delta(base, new).changes["a"]
    equal(change.positions, None)
    same_bits(apply_delta(base, make_delta(base, new))["a"], new["a"])


def test_bytes_decide_and_not_values() -> None:
    base, new = {"a": torch.tensor([0.0, float("nan")])}, {"a": torch.tensor([-0.0, float("nan")])}
    same_bits(apply_delta(base, make_delta(base, new))["a"], new["a"])
    equal(len(make_delta(base, new).changes["a"].values), 1)


def test_a_wrong_base_is_refused() -> None:
    base, new = two_versions()
    delta = make_delta(base, new)
    for other in (new, {**base, "more": torch.ones(1)}, dict(list(base.items())[1:])):
        with pytest.raises(CheckpointError, match=r"is for version .* ask for a full export"):
            apply_delta(other, delta)


def test_damage_is_refused() -> None:
    base, new = two_versions()
    delta = make_delta(base, new)
    name, change = next((n, c) for n, c in delta.changes.items() if c.positions is not None)

    def damaged(**fields: object) -> None:
        changes = {**delta.changes, name: replace(change, **fields)}
        with pytest.raises(CheckpointError, match="damaged"):
            apply_delta(base, replace(delta, changes=changes))

    if change.positions is None:
        raise AssertionError("chosen to have positions")
    flipped = change.values.clone()
    flipped[0] ^= 1
    damaged(values=flipped)
    damaged(values=change.values[:-1])
    damaged(positions=torch.full_like(change.positions, 1 << 30))
    damaged(positions=torch.full_like(change.positions, -1))
    damaged(positions=None)
    damaged(shape=(1, *change.shape))
    damaged(dtype="F32")
    with pytest.raises(CheckpointError, match="the delta is damaged"):
        apply_delta(base, replace(delta, changes={n: c for n, c in delta.changes.items() if n != name}))
    with pytest.raises(CheckpointError, match="does not fit this tensor"):
        apply_delta(
            base, replace(delta, changes={"other": Change("U8", (1,), None, torch.zeros(1, dtype=torch.uint8))})
        )


@pytest.mark.parametrize("new", [{"b": torch.ones(1)}, {"a": torch.ones(2)}, {"a": torch.ones(1).half()}])
def test_other_tensors_need_a_full_export(new: Tensors) -> None:
    with pytest.raises(CheckpointError, match="export all"):
        make_delta({"a": torch.ones(1)}, new)
