"""How long a GPU takes for a call whose caches are cold."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

FLUSHED = 1 << 29  # bytes: ten times an H200's L2, and 0.15 ms in which the host gets ahead of the GPU
BUDGET, LEAST, MOST = 0.1, 10, 500  # seconds of calls, and how many


@functools.cache
def _flushed() -> Tensor:
    return torch.empty(FLUSHED, dtype=torch.int8, device="cuda")


def cold_median(call: Callable[[], object]) -> float:
    """Seconds on the GPU, median.

    Triton's do_bench clears the cache in half the time; where Python needs longer than that for a call, the GPU
    waits for it between the two events, and what is measured is Python.
    """
    for _ in range(3):  # compilation, autotuning
        call()
    estimate = statistics.median(_times(call, 5))
    return statistics.median(_times(call, max(LEAST, min(MOST, int(BUDGET / estimate)))))


def _times(call: Callable[[], object], repeats: int) -> list[float]:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        _flushed().zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [1e-3 * start.elapsed_time(end) for start, end in events]
