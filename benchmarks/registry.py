"""What a benchmark is: cases declared as data, a table of them for a kind of device, and how they are judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Shape = tuple[int, ...]
Call = Callable[[], object]
Build = Callable[[Shape], Call]  # makes the inputs, returns what is timed

LARGE = 1 << 24  # elements from which goals apply: below them launches rule


@dataclass(frozen=True)
class Case:
    """One operation on bf16 inputs. Goals are judged where the input is large."""

    name: str
    bytes_per_element: float  # each input read once, each output written once
    build: Build
    of_copy: float | None = None  # goal: fraction of the copy bandwidth, at least
    alternatives: Mapping[str, Build] = field(default_factory=dict)
    times: tuple[str, float] | None = None  # goal: so many times as fast as this alternative, at least
    at_most: tuple[str, float] | None = None  # goal: so many times the time of this other case, at most
    shape: Shape | None = None  # the only one, for a case that has its own
    rows_multiple: int = 1  # what the number of rows must be divisible by

    def shapes(self, shapes: list[Shape]) -> list[Shape]:
        if self.shape is not None:
            return [self.shape]
        return [shape for shape in shapes if shape[0] % self.rows_multiple == 0]


@dataclass(frozen=True)
class Table:
    """All cases of a kind of device, and how it is measured."""

    name: str  # of the file with its results
    cases: list[Case]
    shapes: list[Shape]
    gate: Callable[[bool], int]  # (full?) → elements compared; raises SystemExit where a byte differs
    copy: tuple[int, Call]  # bytes read and written, and the copy
    medians: Callable[[Mapping[Any, Call]], dict[Any, float]]  # seconds, caches cold
    overhead: Mapping[str, Call]  # calls on next to nothing, to be timed on the host


def judge(case: Case, shape: Shape, seconds: float, bandwidth: float, times: Mapping[Any, float]) -> dict[str, object]:
    """A row of results; times: seconds by (name, shape), of cases and alternatives."""
    size = round(case.bytes_per_element * math.prod(shape))
    of_copy = size / seconds / bandwidth
    ratios = {name: times[name, shape] / seconds for name in case.alternatives if (name, shape) in times}
    goals: dict[str, tuple[float, float | None, bool]] = {}
    if math.prod(shape) >= LARGE:
        if case.of_copy is not None:
            goals["of copy"] = (case.of_copy, of_copy, of_copy >= case.of_copy)
        if case.times is not None:
            name, wanted = case.times
            goals[f"times {name}"] = (wanted, ratios.get(name), ratios.get(name, 0.0) >= wanted)
        if case.at_most is not None and (case.at_most[0], shape) in times:
            name, wanted = case.at_most
            ratio = seconds / times[name, shape]
            goals[f"time of {name}"] = (wanted, ratio, ratio <= wanted)
    return {
        "name": case.name,
        "shape": list(shape),
        "microseconds": seconds * 1e6,
        "bytes": size,
        "of_copy": of_copy,
        "times_alternative": ratios,
        "goals": {name: {"wanted": w, "measured": m, "reached": r} for name, (w, m, r) in goals.items()},
    }
