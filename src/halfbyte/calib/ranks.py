"""The same result on any number of processes: samples are split, statistics are put together in one fixed order.

Samples form eight spans, however many ranks there are; a rank takes neighbouring spans. Within a span sums grow sample
by sample, and the spans' sums are added first to last, so that every addition is the one that a single process does.
Floating point never sees another order.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..checkpoint import ranks as job
from ..errors import CheckpointError, UnsupportedError

SPANS = 8


@dataclass(frozen=True)
class Ranks:
    """This process among those that calibrate together.

    Attributes:
        job: the same ranks as those that convert what was calibrated.
    """

    rank: int = 0
    world: int = 1
    job: job.Ranks = field(default_factory=job.Ranks)

    @classmethod
    def current(cls) -> Ranks:
        """As torch.distributed has it, called by all ranks; a single one where that is not in use.

        Raises:
            UnsupportedError: there are more than eight.
        """
        if not dist.is_available() or not dist.is_initialized():
            return cls()
        if dist.get_world_size() > SPANS:
            raise UnsupportedError(f"{dist.get_world_size()} ranks: calibration splits samples over at most {SPANS}")
        return cls(dist.get_rank(), dist.get_world_size(), job.Ranks.current())

    def owner(self, span: int) -> int:
        """The rank that runs a span."""
        return span * self.world // SPANS

    def sum_spans(self, own: dict[int, Tensor], like: Tensor) -> Tensor:
        """The sum over all spans, first to last, on every rank.

        own: span → this rank's sum, of those of its spans that have samples. like: a tensor of the same shape.
        """
        total = torch.zeros_like(like)
        for span in range(SPANS):
            own_part = own.get(span)  # fewer samples than spans leave some of these without any
            part = torch.zeros_like(like) if own_part is None else own_part
            if self.world > 1:
                with _noticing():
                    dist.broadcast(part, self.owner(span))
            total += part
        return total

    def maximum(self, x: Tensor) -> Tensor:
        """Elementwise maximum over ranks."""
        if self.world > 1:
            with _noticing():
                dist.all_reduce(x, dist.ReduceOp.MAX)
        return x

    def total(self, counts: Tensor) -> Tensor:
        """Elementwise sum of integers over ranks."""
        if self.world > 1:
            with _noticing():
                dist.all_reduce(counts)
        return counts

    def object(self, value: Any, owner: int) -> Any:
        """One rank's value, on all; on the others its tensors are on the CPU, whichever GPU they come from."""
        if self.world == 1:
            return value
        buffer = io.BytesIO()  # torch.save, because torch's own pickling of objects does not know float8
        torch.save(value, buffer)
        values = [buffer.getvalue()]
        with _noticing():
            dist.broadcast_object_list(values, owner)
        return torch.load(io.BytesIO(values[0]), weights_only=False, map_location="cpu")

    def together(self) -> AbstractContextManager[None]:
        """Work of each rank by itself; if it fails on one, all raise its error after it."""
        return self.job.together()


@contextmanager
def _noticing() -> Iterator[None]:
    """A rank that has gone is no error of the source's: what is finished is kept."""
    try:
        yield
    except RuntimeError as error:
        raise CheckpointError("another rank has died, or did not answer in time") from OSError(str(error))
