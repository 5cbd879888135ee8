"""A sync between two GPUs over NCCL; run with `-m multigpu`."""

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from halfbyte import SyncError
from halfbyte.export import Receiver, Sender, connect

from ..check import equal, same_bits, true
from . import ranks
from .links import Damaged, exporter, stepped

pytestmark = [
    pytest.mark.multigpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]
MODEL = ranks.moe()


def on(device: str, step: int) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in stepped(MODEL, step).items()}


def send(path: str, dies: bool) -> None:
    """Versions 1 and 2 of a prepared export, 3 of a plain one, 4 damaged, 5; or death in the middle of the second."""
    torch.cuda.set_device(0)
    link = connect(dist.FileStore(path, 2), 0, 2, device="cuda:0", timeout=60.0 if not dies else 20.0)
    one, parameters, sender = exporter(MODEL), on("cuda:0", 1), Sender(link)
    prepared = one.prepare(parameters.items())
    sender.send(prepared.export(), 1)
    for name, tensor in on("cuda:0", 2).items():
        parameters[name].copy_(tensor)
    if dies:
        link.say({"what": "start", "version": 2, "delta": None})
        link.agree(None, "the start of a sync")
        for bucket in prepared.export():
            link.say({"what": "bucket", "layout": bucket.layout.digest})
            if bucket.index == 1:
                os._exit(9)  # the receiver's GPU waits for this bucket
            link.broadcast(bucket.flat)
    sender.send(prepared.export(), 2)
    sender.send(one.export(on("cuda:0", 3).items()), 3)

    def flip(index: int, flat: torch.Tensor) -> torch.Tensor:
        flat[7] ^= 16
        return flat

    try:
        Sender(Damaged.of(link, flip)).send(one.export(on("cuda:0", 4).items()), 4)
    except SyncError:
        sender.send(prepared.export(), 5)
    link.close()


def process(path: str, dies: bool) -> Any:
    child = multiprocessing.get_context("spawn").Process(target=send, args=(path, dies))
    child.start()
    return child


def test_versions_over_nccl(tmp_path: Path) -> None:
    child = process(str(tmp_path / "store"), False)
    torch.cuda.set_device(1)
    engine = exporter(MODEL).export_all(on("cuda:1", 0).items())
    addresses = {name: tensor.data_ptr() for name, tensor in engine.items()}
    receiver = Receiver(engine)
    link = connect(dist.FileStore(str(tmp_path / "store"), 2), 1, 2, device="cuda:1", timeout=60.0)
    for version, step in ((1, 1), (2, 2), (3, 3), (4, None), (5, 2)):
        if step is None:
            with pytest.raises(SyncError, match="checksum is another; version 3 serves on"):
                receiver.receive(link)
            step, version = 3, 3
        else:
            equal(receiver.receive(link), version)
        equal(receiver.version, version)
        for name, tensor in exporter(MODEL).export_all(on("cuda:1", step).items()).items():
            same_bits(engine[name], tensor, f"{name} of version {version}")
    equal({name: tensor.data_ptr() for name, tensor in engine.items()}, addresses)
    child.join(60)
    equal(child.exitcode, 0)


def test_a_sender_killed_while_a_bucket_travels(tmp_path: Path) -> None:
    """The GPU's transfer never ends by itself: it is given up, and the old version goes on serving."""
    child = process(str(tmp_path / "store"), True)
    torch.cuda.set_device(1)
    engine = exporter(MODEL).export_all(on("cuda:1", 0).items())
    receiver = Receiver(engine)
    link = connect(dist.FileStore(str(tmp_path / "store"), 2), 1, 2, device="cuda:1", timeout=20.0)
    equal(receiver.receive(link), 1)
    start = time.monotonic()
    with pytest.raises(SyncError, match="a partner is gone"):
        receiver.receive(link)
    true(time.monotonic() - start < 60, "it waited longer than twice the timeout")
    child.join(60)
    equal(child.exitcode, 9)
    torch.cuda.synchronize(1)
    equal(receiver.version, 1)
    for name, tensor in exporter(MODEL).export_all(on("cuda:1", 1).items()).items():
        same_bits(engine[name], tensor, name)


def receive_and_die(path: str) -> None:
    """Version 1, and all of version 2 but its last bucket."""
    torch.cuda.set_device(1)
    receiver = Receiver(exporter(MODEL).export_all(on("cuda:1", 0).items()))
    link = connect(dist.FileStore(path, 2), 1, 2, device="cuda:1", timeout=20.0)
    receiver.receive(link)
    link.hear()
    link.agree(None, "the start of a sync")
    for i in range(len(receiver._staging)):
        link.hear()
        if i == len(receiver._staging) - 1:
            time.sleep(1.0)  # the sender's GPU is at it, and its host has nothing left to say about buckets
            os._exit(9)
        link.broadcast(receiver._staging[i])


def test_a_receiver_killed_while_the_last_bucket_travels(tmp_path: Path) -> None:
    """The sender's GPU would wait forever; the sender does not, and its parameters are as they were."""
    child = multiprocessing.get_context("spawn").Process(target=receive_and_die, args=(str(tmp_path / "store"),))
    child.start()
    torch.cuda.set_device(0)
    link = connect(dist.FileStore(str(tmp_path / "store"), 2), 0, 2, device="cuda:0", timeout=20.0)
    parameters, sender = on("cuda:0", 1), Sender(link)
    prepared = exporter(MODEL).prepare(parameters.items())
    true(len(prepared.buckets) > 2, "nothing to cut in the middle")
    sender.send(prepared.export(), 1)
    start = time.monotonic()
    with pytest.raises(SyncError, match="a partner is gone"):
        sender.send(prepared.export(), 2)
    true(time.monotonic() - start < 60, "it waited longer than twice the timeout")
    child.join(60)
    equal(child.exitcode, 9)
    torch.cuda.synchronize(0)
    wanted = exporter(MODEL).export_all(parameters.items())
    for bucket in prepared.export():
        for name, tensor in bucket.tensors.items():
            same_bits(tensor, wanted[name], name)
