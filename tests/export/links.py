"""Links between threads of one process, and processes that die."""

import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from halfbyte.checkpoint.options import Options
from halfbyte.export import Exporter, Link, Sender, connect, headers

from ..checkpoint.models import Model, Tensors
from . import ranks

BUCKET_BYTES = 40_000


def exporter(model: Model, **options: Any) -> Exporter:
    return Exporter(model.config, headers(model.tensors.items()), Options(**options), bucket_bytes=BUCKET_BYTES)


def stepped(model: Model, step: int) -> Tensors:
    """A model's tensors after so many steps."""
    g = torch.Generator().manual_seed(step)
    return {n: t + (0.1 * torch.randn(t.shape, generator=g)).to(t.dtype) for n, t in model.tensors.items()}


def links(size: int = 2, timeout: float = 20.0) -> list[Link]:
    """One for each rank."""
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory) / "store")
        return together(
            *[lambda r=r: connect(dist.FileStore(path, size), r, size, timeout=timeout) for r in range(size)]
        )


def together(*calls: Callable[[], Any]) -> list[Any]:
    """What they return, or raise, each in a thread of its own."""
    results: list[Any] = [None] * len(calls)

    def run(i: int) -> None:
        try:
            results[i] = calls[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if any(thread.is_alive() for thread in threads):
        raise AssertionError("someone waits without end")
    return results


class Damaged(Link):
    """A link whose buckets arrive otherwise than they were sent."""

    damage: Callable[[int, Tensor], Tensor] = staticmethod(lambda index, flat: flat)

    @staticmethod
    def of(link: Link, damage: Callable[[int, Tensor], Tensor]) -> "Damaged":
        """link with damage(index of the bucket, flat) to be sent instead."""
        found = Damaged(link._control, link._data, link.rank, link.size, link.device, link.timeout)
        found.damage, found.index = damage, 0
        return found

    index: int

    def broadcast(self, flat: Tensor) -> None:
        super().broadcast(self.damage(self.index, flat.clone()))
        self.index += 1


def die_while_sending(path: str) -> None:
    """A process that ends in its second sync, after the first bucket."""
    link = connect(dist.FileStore(path, 2), 0, 2, timeout=20.0)
    sender, model = Sender(link), ranks.dense()
    one = exporter(model)
    sender.send(one.export(stepped(model, 1).items()), 1)
    for bucket in one.export(stepped(model, 2).items()):
        if bucket.index == 1:
            import os

            os._exit(9)
        if bucket.index == 0:
            sender._begin(2, None)
        layout, flat = sender._flatten(bucket)
        link.say({"what": "bucket", "layout": layout.digest})
        link.broadcast(flat)


def die_while_receiving(path: str, size: int) -> None:
    """A process, rank 1, that ends when the second bucket comes."""
    import os

    from halfbyte.export import Receiver

    link = connect(dist.FileStore(path, size), 1, size, timeout=20.0)
    model = ranks.dense()
    receive, count = link.broadcast, [0]

    def broadcast(flat: Tensor) -> None:
        count[0] += 1
        if count[0] == 2:
            os._exit(9)
        receive(flat)

    link.broadcast = broadcast  # type: ignore[method-assign]
    Receiver(exporter(model).export_all(model.tensors.items())).receive(link)
