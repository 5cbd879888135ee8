"""One sender and its receivers: short messages over gloo, buckets over gloo or NCCL, and no wait without an end.

Messages have a group of their own, so that a partner who died is noticed at once, and a transfer on a GPU that will
never end can be given up. Process groups are made from a store, not from the default group: a trainer has one already,
and a server may have another, or none.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import SyncError, UnsupportedError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

SENDER = 0
_PACKET = 4096  # bytes of a short message with its length
_VOTE = 1024


class Link:
    """What connects rank 0, the sender, with all others; see `connect`.

    Attributes:
        rank, size: of this process in the link.
        device: where buckets are when they travel.
        timeout: seconds that anything may take.
        problem: why the link is of no use any more; None while it is.
    """

    def __init__(self, control: Any, data: Any, rank: int, size: int, device: torch.device, timeout: float) -> None:
        """control, data: process groups of the same ranks; control for CPU tensors, data for device's."""
        self.rank, self.size, self.device, self.timeout = rank, size, device, timeout
        self._control, self._data = control, data
        self.problem: str | None = None

    def say(self, message: dict[str, Any]) -> None:
        """Tell every receiver.

        Raises:
            SyncError: a partner is gone or silent, or the link has failed before; this link is of no more use.
        """
        text = json.dumps(message, separators=(",", ":")).encode()
        packet = torch.zeros(_PACKET, dtype=torch.uint8)
        packet[:8].view(torch.int64)[0] = len(text)
        short = text[: _PACKET - 8]
        packet[8 : 8 + len(short)] = torch.frombuffer(bytearray(short), dtype=torch.uint8)
        self._wait(lambda: self._control.broadcast(packet, SENDER), "a message to the receivers")
        if rest := text[len(short) :]:
            more = torch.frombuffer(bytearray(rest), dtype=torch.uint8)
            self._wait(lambda: self._control.broadcast(more, SENDER), "a message to the receivers")

    def hear(self) -> dict[str, Any]:
        """The sender's next message.

        Raises:
            SyncError: as `say`.
        """
        packet = torch.zeros(_PACKET, dtype=torch.uint8)
        self._wait(lambda: self._control.broadcast(packet, SENDER), "the sender's next message")
        size = int(packet[:8].view(torch.int64)[0])
        text = bytes(packet[8 : 8 + min(size, _PACKET - 8)].tolist())
        if size > _PACKET - 8:
            more = torch.zeros(size - (_PACKET - 8), dtype=torch.uint8)
            self._wait(lambda: self._control.broadcast(more, SENDER), "the sender's next message")
            text += more.numpy().tobytes()
        try:
            message: dict[str, Any] = json.loads(text)
        except ValueError as error:
            raise self._fail(f"a message cannot be read: {error}") from error
        return message

    def agree(self, objection: str | None, what: str) -> None:
        """Everyone says whether they go on, and hears whether all do.

        Args:
            objection: this rank's, or None.
            what: what is agreed on, for errors.

        Raises:
            SyncError: someone objects; the link may be used again. Or as `say`.
        """
        text = (objection or "").encode()[:_VOTE]
        mine = torch.zeros(_VOTE, dtype=torch.uint8)
        if text:
            mine[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        every = [torch.zeros(_VOTE, dtype=torch.uint8) for _ in range(self.size)]
        self._wait(lambda: self._control.allgather([every], [mine]), f"the others' word on {what}")
        for rank, vote in enumerate(every):
            if bool(vote.any()):
                said = vote.numpy().tobytes().rstrip(b"\0").decode(errors="replace")
                raise SyncError(said if rank == self.rank else f"rank {rank} refused: {said}")

    def broadcast(self, flat: Tensor, stream: Any = None) -> None:
        """Send flat, or as a receiver fill it. On a GPU it is only enqueued: see `settle`.

        stream: CUDA: what waits until it is done; the current one unless given. It begins after the current one.

        Raises:
            SyncError: as `say`.
        """
        if self.device.type != "cuda":
            self._wait(lambda: self._data.broadcast(flat, SENDER), "a bucket")
            return
        self._check()
        try:
            with torch.cuda.device(self.device):
                work = self._data.broadcast(flat, SENDER)
                with torch.cuda.stream(stream):
                    work.wait()  # the stream waits, not the host
        except RuntimeError as error:
            raise self._fail(f"sending a bucket: {str(error).splitlines()[0]}") from error

    def settle(self) -> None:
        """Wait until everything on the current stream is done.

        Raises:
            SyncError: it is not within the timeout: a partner died in the middle of a transfer.
        """
        self._check()
        if self.device.type != "cuda":
            return
        event = torch.cuda.current_stream(self.device).record_event()
        end = time.monotonic() + self.timeout
        while not event.query():
            if time.monotonic() > end:
                raise self._fail(f"a bucket did not arrive within {self.timeout} s")
            time.sleep(5e-5)

    def close(self) -> None:
        """Give the link up; transfers that still wait for a partner end."""
        self.problem = self.problem or "it was closed"
        for group in {id(g): g for g in (self._data, self._control)}.values():
            with suppress(RuntimeError, NotImplementedError, AttributeError):
                group.abort()
        self._data = self._control = None

    def _check(self) -> None:
        if self.problem is not None:
            raise SyncError(f"this link cannot be used any more: {self.problem}; connect again")

    def _wait(self, start: Callable[[], Any], what: str) -> None:
        self._check()
        try:
            start().wait(timedelta(seconds=self.timeout))
        except RuntimeError as error:
            raise self._fail(f"waiting for {what}: {str(error).splitlines()[0]}") from error

    def _fail(self, problem: str) -> SyncError:
        self.problem = problem
        self.close()
        return SyncError(f"{problem}; a partner is gone or slower than timeout={self.timeout} s: connect again")


def connect(
    store: Store,
    rank: int,
    size: int,
    *,
    device: torch.device | str = "cpu",
    timeout: float = 60.0,
    name: str = "halfbyte",
) -> Link:
    """Join a link: rank 0 is the sender. It takes no part in, and needs no, default process group.

    Args:
        store: the same on all ranks, such as `torch.distributed.TCPStore(host, port, is_master=rank == 0,
            wait_for_workers=False)`.
        rank, size: of this process, and their number.
        device: "cpu": buckets travel over gloo; a CUDA device: over NCCL.
        timeout: seconds that a partner may keep others waiting, here and whenever the link is used.
        name: of the link in the store; a new one, the same on all ranks, for each time that it is made anew.

    Raises:
        SyncError: not all ranks came.
        UnsupportedError: this torch has no gloo, or no NCCL.
    """
    device = torch.device(device)
    if device.type == "cuda":
        device = torch.empty(0, device=device).device  # with its index, as tensors on it have
    wanted = ("ProcessGroupGloo", "ProcessGroupNCCL")[: 1 + (device.type == "cuda")]
    if missing := [group for group in wanted if not hasattr(dist, group)]:
        raise UnsupportedError(f"this torch has no {missing[0]}, which a link over {device} needs")
    if not 0 <= rank < size or size < 2:
        raise SyncError(f"rank={rank}, size={size}: a link has a sender, rank 0, and at least one receiver")
    limit = timedelta(seconds=timeout)
    groups: list[Any] = []
    c10d: Any = dist
    try:
        store.set_timeout(limit)
        groups.append(c10d.ProcessGroupGloo(c10d.PrefixStore(f"{name}/control", store), rank, size, limit))
        if device.type == "cuda":
            options = c10d.ProcessGroupNCCL.Options()
            options._timeout = timedelta(days=1)  # its own watchdog would end the process: `settle` watches instead
            options.is_high_priority_stream = True  # a transfer that waits for room beside quantization waits often
            with torch.cuda.device(device):
                data_store = c10d.PrefixStore(f"{name}/data", store)
                groups.append(c10d.ProcessGroupNCCL(data_store, rank, size, options))
    except (RuntimeError, dist.DistError) as error:
        raise SyncError(
            f"rank {rank} of {size}: not all came to the link {name!r} within {timeout} s: {str(error).splitlines()[0]}"
        ) from error
    link = Link(groups[0], groups[-1], rank, size, device, timeout)
    if device.type == "cuda":  # NCCL makes its connections when first used
        link.agree(None, "the link")
        link.broadcast(torch.zeros(16, dtype=torch.uint8, device=device))
        link.settle()
    return link
