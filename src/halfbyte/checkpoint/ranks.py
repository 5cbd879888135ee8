"""The processes that carry out one job together: which of them does what, and how all end when one fails.

They agree at points that all of them pass in the same order. A rank that fails passes one more, with its error instead
of a value; then every other rank raises that error, and nothing is exchanged any more.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..errors import CheckpointError, HalfbyteError, UnsupportedError
from .journal import comes_again

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for another that is alive; one that died is noticed at once."""
_LEAVING = timedelta(seconds=30)


@dataclass(eq=False)
class Ranks:
    """This process among those that do one job; by default the only one.

    Attributes:
        rank: this process's number.
        hosts: for each rank the machine that it runs on.
        failed: the rank whose error ended the job, once one has.
    """

    rank: int = 0
    hosts: tuple[str, ...] = ("",)
    failed: int | None = None
    _group: Any = None
    _told: bool = False
    _left: bool = False

    @classmethod
    def current(cls) -> Ranks:
        """All ranks of torch.distributed, each of which must call this; a single one where that is not in use."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        hosts: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(hosts, socket.gethostname(), group=group)
        return cls(dist.get_rank(), tuple(hosts), _group=group)

    @property
    def world(self) -> int:
        """How many there are."""
        return len(self.hosts)

    def agree(self, value: Any = None) -> list[Any]:
        """Every rank's value, on all; waits for all of them.

        Raises:
            CheckpointError: another rank has failed, with its error; or has gone without a word.
        """
        if self.world == 1:
            return [value]
        values = self._exchange({"value": value})
        for rank, answer in enumerate(values):
            if "error" in answer:
                self._told, self.failed = True, rank
                error = CheckpointError(f"rank {rank}: {answer['error']}")
                raise error from (OSError("of another rank") if answer["may_pass"] else None)
        return [answer["value"] for answer in values]

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """What is raised within is raised by `agree` on the others. Signals are not: a launcher sends them to all."""
        try:
            yield
        except Exception as error:
            if self.world > 1 and not self._told:
                self._told = True
                with contextlib.suppress(CheckpointError):
                    answers = self._exchange({"error": _message(error), "may_pass": not comes_again(error)})
                    self.failed = next(rank for rank, answer in enumerate(answers) if "error" in answer)
            raise

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Work of each rank by itself; if it fails on one, nobody gets beyond it."""
        with self.telling():
            yield
        self.agree()

    @contextlib.contextmanager
    def leaving(self) -> Iterator[None]:
        """A job whose failure all know of ends on all at once: no launcher kills a rank that is still tidying up."""
        try:
            yield
        except Exception:
            if self._told and not self._left:
                self._left = True
                with contextlib.suppress(RuntimeError):
                    dist.monitored_barrier(self._group, timeout=_LEAVING)
            raise

    @property
    def speaks(self) -> bool:
        """Whether this process prints errors: rank 0 and the rank that failed, where that is known."""
        return self.failed is None or self.rank in (0, self.failed)

    def _exchange(self, own: dict[str, Any]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = [{}] * self.world
        try:
            dist.all_gather_object(found, own, group=self._group)
            return found
        except RuntimeError as error:
            why = OSError(str(error))
        # Only a dead rank's neighbours notice. Leaving at once tells theirs.
        self._told = self._left = True
        group, self._group = self._group, None
        dist.destroy_process_group(group)
        raise CheckpointError("another rank has died, or did not answer in time") from why


def join(device: str) -> tuple[str, int]:
    """Under torchrun, join the other processes; returns this one's device and rank.

    "cuda" becomes the GPU of this rank's number on its machine.

    Raises:
        UnsupportedError: there is no such GPU.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched():
        return device, 0
    if torch.device(device).type == "cuda":
        number, there = dist.get_node_local_rank(), torch.cuda.device_count()
        if number >= there:
            raise UnsupportedError(
                f"rank {number} of this machine has no GPU, of {there}; use --nproc-per-node {there}"
            )
        device = f"cuda:{number}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=TIMEOUT)
    return device, dist.get_rank()


def part() -> None:
    """Leave what `join` joined, once all is done."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def share_cores(ranks: Ranks) -> None:
    """Let the ranks of each machine compute on all its cores; torchrun leaves each one thread."""
    if ranks.world > 1 and torch.get_num_threads() == 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // ranks.hosts.count(ranks.hosts[ranks.rank])))


def divide(shards: Mapping[str, Sequence[int]], hosts: Sequence[str]) -> list[dict[str, list[int]]]:
    """Who does what: rounds, in each of which every machine writes one shard, its ranks together.

    One file is never written by two machines, since not every shared file system puts such writes together rightly.

    Args:
        shards: file → what each of its groups costs.
        hosts: of each rank.

    Returns:
        rounds of file → for each of its groups the rank that does it.
    """
    teams = [[rank for rank, host in enumerate(hosts) if host == team] for team in dict.fromkeys(hosts)]
    loads = [0] * len(hosts)
    rest = iter(shards.items())
    rounds = []
    while batch := list(itertools.islice(rest, len(teams))):
        rounds.append({file: deal(costs, team, loads) for team, (file, costs) in zip(teams, batch, strict=False)})
    return rounds


def deal(costs: Sequence[int], ranks: Sequence[int], loads: list[int]) -> list[int]:
    """The rank for each of some things: the costliest first, each to whoever has least by `loads`, which grow."""
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[i] = min(ranks, key=lambda rank: (loads[rank], rank))
        loads[owners[i]] += costs[i]
    return owners


def _message(error: Exception) -> str:
    if isinstance(error, HalfbyteError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or 'input or output'}: {error.strerror or error}"
    return f"{type(error).__name__}: {error}"
