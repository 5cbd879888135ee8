"""Versions of a model's weights over gloo: the new one whole, or the old one as it was."""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import halfbyte
from halfbyte import MXFP8, CheckpointError, SyncError
from halfbyte.export import Exporter, Receiver, Sender, connect, headers, in_buckets, make_delta
from halfbyte.export.layout import SEAL_BYTES, Layout, pack, place, salt_of

from ..check import equal, same_bits, true
from . import ranks
from .links import Damaged, die_while_receiving, die_while_sending, exporter, links, stepped, together

Tensors = dict[str, Tensor]
MODEL = ranks.dense()
TINY = Path(halfbyte.__file__).parent / "data" / "tiny"


def exported(step: int, **options: Any) -> Tensors:
    """What an engine has of a version."""
    found = exporter(MODEL, **options).export_all(stepped(MODEL, step).items())
    return {name: tensor.clone() for name, tensor in found.items()}


def buckets(step: int, **options: Any) -> Any:
    return exporter(MODEL, **options).export(stepped(MODEL, step).items())


class Both:
    """A sender and a receiver whose engine has version 1."""

    def __init__(self, **options: Any) -> None:
        self.engine = exported(1, **options)
        self.addresses = {name: tensor.data_ptr() for name, tensor in self.engine.items()}
        self.receiver = Receiver(self.engine)
        self.links = links()
        self.sender = Sender(self.links[0])
        self.options = options
        equal(self.sync(1), [None, 1], "the first sync")

    def sync(self, step: int, send: Callable[[], Any] | None = None, **expected: Any) -> list[Any]:
        every = send or (lambda: self.sender.send(buckets(step, **self.options), step))
        return together(every, lambda: self.receiver.receive(self.links[1], **expected))

    def serves(self, step: int) -> None:
        wanted = exported(step, **self.options)
        equal(self.receiver.version, step)
        for name, tensor in self.engine.items():
            equal(tensor.data_ptr(), self.addresses[name], f"address of {name}")
            same_bits(tensor, wanted[name], name)


@pytest.mark.parametrize(
    "options", [{}, {"layout": "compressed-tensors"}, {"format": MXFP8()}], ids=["", "ct", "mxfp8"]
)
def test_an_engines_tensors(options: dict[str, Any]) -> None:
    both = Both(**options)
    equal(both.sync(2), [None, 2])
    both.serves(2)
    size = sum(tensor.nbytes for tensor in both.engine.values())
    true(size <= both.receiver.staged_bytes < size + 100_000, f"{both.receiver.staged_bytes} bytes staged for {size}")
    prepared = exporter(MODEL, **options).prepare((parameters := stepped(MODEL, 3)).items())
    equal(both.sync(3, lambda: both.sender.send(prepared.export(), 3)), [None, 3])
    both.serves(3)
    for name, tensor in stepped(MODEL, 4).items():
        parameters[name].copy_(tensor)
    equal(both.sync(4, lambda: both.sender.send(prepared.export(), 4)), [None, 4])
    both.serves(4)
    equal(both.sync(5, lambda: both.sender.send(in_buckets(exported(5, **options)), 5)), [None, 5])
    both.serves(5)


def flip(index: int, flat: Tensor) -> Tensor:
    if index == 1:
        flat[len(flat) // 3] ^= 4
    return flat


def truncate(index: int, flat: Tensor) -> Tensor:
    return flat[: len(flat) // 2] if index == 1 else flat


def flip_seal(index: int, flat: Tensor) -> Tensor:
    flat[-16] ^= 1
    return flat


class Old:
    """The first bucket in place of the second, and the last of the version before in place of the first."""

    kept: Tensor | None = None

    def __call__(self, index: int, flat: Tensor) -> Tensor:
        if index == 0:
            self.kept = flat.clone()
        return (
            self.kept if index == 1 and self.kept is not None and len(self.kept) == len(flat) else flat ^ (index == 1)
        )


@pytest.mark.parametrize("damage", [flip, truncate, flip_seal, Old()], ids=["flipped", "truncated", "seal", "another"])
def test_damage(damage: Callable[[int, Tensor], Tensor]) -> None:
    both = Both()
    sender = Sender(Damaged.of(both.links[0], damage))
    found = both.sync(2, lambda: sender.send(buckets(2), 2))
    for error in found:
        true(isinstance(error, SyncError) and "checksum is another; version 1 serves on" in str(error), repr(error))
    both.serves(1)
    equal(both.sync(3), [None, 3], "the same link afterwards")
    both.serves(3)


def test_a_bucket_of_another_version_is_not_taken() -> None:
    true(salt_of(1, 0) not in (salt_of(2, 0), salt_of(1, 1)), "salts")
    both = Both()
    held: list[Tensor] = []
    recording = Sender(Damaged.of(both.links[0], lambda i, flat: held.append(flat.clone()) or flat))
    equal(both.sync(2, lambda: recording.send(buckets(2), 2)), [None, 2])
    replaying = Sender(Damaged.of(both.links[0], lambda i, flat: held[i]))
    found = both.sync(3, lambda: replaying.send(buckets(3), 3))
    true(all(isinstance(error, SyncError) and "bucket 0 of version 3" in str(error) for error in found), f"{found}")
    both.serves(2)


@pytest.mark.parametrize(
    ("version", "wanted", "message"),
    [
        (1, None, "version 1 is not newer than 1, which serves on"),
        (0, None, "version 0 is not newer than 1"),
        (5, 4, "version 5 came, wanted is 4; version 1 serves on"),
    ],
)
def test_wrong_version(version: int, wanted: int | None, message: str) -> None:
    both = Both()
    sender, receiver = both.sync(2, lambda: both.sender.send(buckets(2), version), version=wanted)
    true(isinstance(receiver, SyncError) and message in str(receiver), repr(receiver))
    true(isinstance(sender, SyncError) and f"rank 1 refused: {message}" in str(sender), repr(sender))
    both.serves(1)
    equal(both.sync(6), [None, 6])


def test_an_export_that_fails() -> None:
    """NaN in the last layer is found when most has been sent."""
    both = Both()
    bad = stepped(MODEL, 2)
    bad["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    for made in (exporter(MODEL).export(bad.items()), exporter(MODEL).prepare(bad.items()).export()):
        sender, receiver = both.sync(2, lambda made=made: both.sender.send(made, 2))
        true(isinstance(sender, CheckpointError) and "down_proj.weight: contains NaN" in str(sender), repr(sender))
        true(isinstance(receiver, SyncError) and "the sender gave up: CheckpointError" in str(receiver), repr(receiver))
        both.serves(1)
    equal(both.sync(2), [None, 2])
    both.serves(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight: the engine has no such tensor"),
        (lambda t: t.update(more=torch.ones(1)), "more and 0 others of the running model are not covered"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"model.norm.weight: the engine has torch.float32"),
    ],
)
def test_another_model(change: Callable[[Tensors], Any], message: str) -> None:
    engine = exported(1)
    change(engine)
    before = {name: tensor.clone() for name, tensor in engine.items()}
    pair, receiver = links(), Receiver(engine, version=1)
    for error in together(lambda: Sender(pair[0]).send(buckets(2), 2), lambda: receiver.receive(pair[1])):
        true(isinstance(error, SyncError) and message in str(error), repr(error))
    equal(receiver.version, 1)
    for name, tensor in engine.items():
        same_bits(tensor, before[name], name)


def test_tied_weights_that_come_under_both_names() -> None:
    """As some checkpoints hold them; the engine has one tensor."""
    both, names = MODEL.plus({"lm_head.weight": MODEL.tensors["model.embed_tokens.weight"].clone()}), Tensors()
    one = Exporter(both.config, headers(both.tensors.items()), bucket_bytes=40_000)
    names.update({name: tensor.clone() for name, tensor in one.export_all(both.tensors.items()).items()})
    names["lm_head.weight"] = names["model.embed_tokens.weight"]
    new = {name: tensor * 2 for name, tensor in both.tensors.items()}
    pair, receiver = links(), Receiver(names)
    done = together(lambda: Sender(pair[0]).send(one.export(new.items()), 1), lambda: receiver.receive(pair[1]))
    equal(done, [None, 1])
    same_bits(names["lm_head.weight"], new["lm_head.weight"])


def test_two_receivers_take_it_both_or_not_at_all() -> None:
    engines = [exported(1), exported(1)]
    receivers = [Receiver(engines[0], version=1), Receiver(engines[1], version=1)]
    every = links(3)
    sender = Sender(every[0])

    def sync(version: int, wanted: int | None) -> list[Any]:
        first = lambda: receivers[0].receive(every[1])  # noqa: E731
        second = lambda: receivers[1].receive(every[2], version=wanted)  # noqa: E731
        return together(lambda: sender.send(buckets(version), version), first, second)

    true(all(isinstance(error, SyncError) for error in sync(2, 3)), "the second refuses")
    equal([receiver.version for receiver in receivers], [1, 1])
    same_bits(engines[0]["model.norm.weight"], exported(1)["model.norm.weight"])
    equal(sync(3, 3), [None, 3, 3])
    for engine in engines:
        same_bits(engine["model.norm.weight"], exported(3)["model.norm.weight"])


def test_a_partner_who_never_comes(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(SyncError, match=r"rank 1 of 2: not all came to the link 'halfbyte' within 1\.0 s"):
        connect(dist.FileStore(str(tmp_path / "store"), 2), 1, 2, timeout=1.0)
    true(time.monotonic() - start < 15, "it waited longer")


def test_a_partner_who_falls_silent() -> None:
    pair = links(timeout=1.0)
    engine = exported(1)
    receiver = Receiver(engine, version=1)
    with pytest.raises(SyncError, match=r"a partner is gone or slower than timeout=1.0 s: connect again"):
        receiver.receive(pair[1])
    with pytest.raises(SyncError, match="this link cannot be used any more"):
        receiver.receive(pair[1])
    with pytest.raises(SyncError, match="connect again"):
        Sender(pair[0]).send(buckets(2), 2)
    equal(receiver.version, 1)
    same_bits(engine["model.norm.weight"], exported(1)["model.norm.weight"])
    again = links()
    equal(together(lambda: Sender(again[0]).send(buckets(2), 2), lambda: receiver.receive(again[1])), [None, 2])


def test_a_killed_sender(tmp_path: Path) -> None:
    path = str(tmp_path / "store")
    child = multiprocessing.get_context("spawn").Process(target=die_while_sending, args=(path,))
    child.start()
    engine = exported(0)
    receiver = Receiver(engine)
    link = connect(dist.FileStore(path, 2), 1, 2, timeout=40.0)
    equal(receiver.receive(link), 1)
    with pytest.raises(SyncError, match="a partner is gone"):
        receiver.receive(link)
    child.join(30)
    equal(child.exitcode, 9)
    equal(receiver.version, 1)
    for name, tensor in exported(1).items():
        same_bits(engine[name], tensor, name)


def test_a_killed_receiver(tmp_path: Path) -> None:
    """Another one stays with its old weights too, and the sender hears of it."""
    path = str(tmp_path / "store")
    child = multiprocessing.get_context("spawn").Process(target=die_while_receiving, args=(path, 3))
    child.start()
    engine = exported(0)
    receiver = Receiver(engine, version=0)
    send = lambda: Sender(connect(dist.FileStore(path, 3), 0, 3, timeout=40.0)).send(buckets(1), 1)  # noqa: E731
    receive = lambda: receiver.receive(connect(dist.FileStore(path, 3), 2, 3, timeout=40.0))  # noqa: E731
    for error in together(send, receive):
        true(isinstance(error, SyncError) and "a partner is gone" in str(error), repr(error))
    child.join(30)
    equal(child.exitcode, 9)
    equal(receiver.version, 0)
    for name, tensor in exported(0).items():
        same_bits(engine[name], tensor, name)


def test_deltas() -> None:
    both = Both()
    delta = make_delta(exported(1), exported(2))
    some = stepped(MODEL, 2)
    some["model.norm.weight"] = some["model.norm.weight"] + 1
    last = exporter(MODEL).export_all(some.items())
    equal(both.sync(2, lambda: both.sender.send_delta(delta, 2, 1)), [None, 2])
    both.serves(2)
    small = make_delta(exported(2), last)
    true(0 < small.nbytes < 2000, f"{small.nbytes} bytes")
    equal(both.sync(3, lambda: both.sender.send_delta(small, 3, 2)), [None, 3])
    same_bits(both.engine["model.norm.weight"], last["model.norm.weight"])
    for send, message in [
        (lambda: both.sender.send_delta(small, 4, 2), "this delta is for version 2; here is 3"),
        (lambda: both.sender.send_delta(small, 4, 3), "this delta is for version"),
    ]:
        for error in both.sync(4, send):
            true(isinstance(error, SyncError) and message in str(error), repr(error))
        equal(both.receiver.version, 3)
        same_bits(both.engine["model.norm.weight"], last["model.norm.weight"])
    back = make_delta(last, exported(2))
    damaged = Sender(Damaged.of(both.links[0], lambda i, flat: flat ^ (torch.arange(len(flat)) == 5)))
    for error in both.sync(4, lambda: damaged.send_delta(back, 4, 3)):
        true(isinstance(error, SyncError) and "checksum is another" in str(error), repr(error))
    equal(both.sync(4, lambda: both.sender.send_delta(back, 4, 3)), [None, 4])
    same_bits(both.engine["model.norm.weight"], exported(2)["model.norm.weight"])


def test_no_delta_after_a_sync_that_broke_off() -> None:
    """What was staged is partly overwritten then."""
    both = Both()
    both.sync(2, lambda: Sender(Damaged.of(both.links[0], flip)).send(buckets(2), 2))
    delta = make_delta(exported(1), exported(2))
    for error in both.sync(2, lambda: both.sender.send_delta(delta, 2, 1)):
        true("whose bytes are not staged any more: send everything" in str(error), repr(error))
    both.serves(1)


def test_writing_that_fails_serves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    both = Both()

    def fail() -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(both.receiver._write[1], "copy", fail)
    for error in both.sync(2):
        true(isinstance(error, SyncError) and "the model must not serve until a full sync" in str(error), repr(error))
    equal(both.receiver.version, None)
    monkeypatch.undo()
    equal(both.sync(2), [None, 2], "a full sync")
    both.serves(2)


def test_a_matrix_and_its_transpose_are_two() -> None:
    """They have one address and, if square, one shape."""
    a = torch.arange(64.0).view(8, 8)
    for tensors in ({"t": a.t(), "a": a}, {"a": a, "t": a.t()}):
        (bucket,) = in_buckets(tensors)
        layout = place(bucket.pieces)
        flat = torch.zeros(layout.nbytes + SEAL_BYTES, dtype=torch.uint8)
        pack(bucket.pieces, layout, flat)
        found = {piece.name: piece.tensor for piece in layout.views(flat)}
        same_bits(found["a"], a)
        same_bits(found["t"], a.t().contiguous())


def test_layouts_are_read_with_suspicion() -> None:
    layout = place(next(iter(buckets(1))).pieces)
    equal(Layout.parse(layout.text), layout)
    for text in ("", "[]", "{}", layout.text.replace("U8", "U9", 1), '{"nbytes":15,"slots":[]}',
                 '{"nbytes":16,"slots":[["a","F32",[5],0,null,0]]}', '{"nbytes":16,"slots":[["a","F32",[1],2,null,0]]}',
                 '{"nbytes":16,"slots":[["a","F32",[-1],0,null,0]]}'):  # fmt: skip
        with pytest.raises(SyncError, match="layout"):
            Layout.parse(text)


def test_headers_of_a_model_give_the_same_layouts_each_time() -> None:
    """So that a receiver has to be told of them once."""
    one = Exporter(MODEL.config, headers(MODEL.tensors.items()), bucket_bytes=40_000)
    first, second = ([place(b.pieces).digest for b in one.export(stepped(MODEL, s).items())] for s in (1, 2))
    equal(first, second)
