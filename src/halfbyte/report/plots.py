"""Geometry of the report's plots: numbers to coordinates. The template draws them as SVG, and escapes their texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..checkpoint.inspection import Row
from ..numerics.e2m1 import VALUES

WIDTH, HEIGHT = 560, 280
LEFT, RIGHT, TOP, BOTTOM = 68, 12, 36, 50
COLORS = 10  # as many as the template has
TICKS = 6  # so many labels fit side by side on a phone


@dataclass(frozen=True)
class Tick:
    """A grid line at a coordinate, and what it says."""

    at: float
    text: str


@dataclass(frozen=True)
class Point:
    """A marker, and what it says when pointed at."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Series:
    """One kind of weight over the layers."""

    name: str
    color: int
    points: tuple[Point, ...]

    @property
    def path(self) -> str:
        """Points as an SVG polyline."""
        return " ".join(f"{point.x:.1f},{point.y:.1f}" for point in self.points)


@dataclass(frozen=True)
class Lines:
    """Lines over layers."""

    names: tuple[str, str]  # of the axes, x and y
    x: tuple[Tick, ...]
    y: tuple[Tick, ...]
    series: tuple[Series, ...]


@dataclass(frozen=True)
class Bar:
    """A bar of a histogram, and what it says."""

    x: float
    y: float
    width: float
    height: float
    text: str


@dataclass(frozen=True)
class Bars:
    """A histogram."""

    name: str
    names: tuple[str, str]  # of the axes, x and y
    x: tuple[Tick, ...]
    y: tuple[Tick, ...]
    bars: tuple[Bar, ...]
    summary: str


def error_by_layer(layers: Sequence[Row]) -> Lines | None:
    """Relative error of each place over the decoder's layers; None where no error is known."""
    rows = [
        row
        for row in layers
        if row.relative_error is not None and row.place[1] is not None and row.place[0] == "decoder"
    ]
    if not rows:
        return None
    errors = [row.relative_error or 0.0 for row in rows]
    log = max(errors) > 5 * min(errors) > 0  # else an outlier presses all others flat
    ticks, share = _log_axis(min(errors), max(errors)) if log else _axis(min(errors), max(errors))
    last = max(row.place[1] or 0 for row in rows)
    names = list(dict.fromkeys(f"{row.place[2]} {row.place[3]}" for row in rows))

    def point(row: Row) -> Point:
        error, layer = row.relative_error or 0.0, row.place[1] or 0
        return Point(_x(layer / max(last, 1)), _y(share(error)), f"{row.label}: {error:.3%}")

    def key(row: Row) -> int:
        return row.place[1] or 0

    series = tuple(
        Series(
            name,
            i % COLORS,
            tuple(point(r) for r in sorted((r for r in rows if f"{r.place[2]} {r.place[3]}" == name), key=key)),
        )
        for i, name in enumerate(names)
    )
    step = round(_round_up(max((last + 1) / TICKS, 1)))
    x = tuple(Tick(_x(layer / max(last, 1)), str(layer)) for layer in range(0, last + 1, step))
    y = tuple(Tick(_y(share(tick)), f"{100 * tick:.10g}%") for tick in ticks)
    return Lines(("layer", "relative error" + (", logarithmic" if log else "")), x, y, series)


def scale_histograms(scales: Mapping[str, Tensor]) -> list[Bars]:
    """One histogram for each kind of weight: how often each block-scale byte occurs, its height logarithmic.

    Those of one format have one x axis, so that kinds can be compared.
    """
    bars = []
    for fmt in dict.fromkeys(name.split()[0] for name in scales):
        kinds = {name: counts.tolist() for name, counts in scales.items() if name.split()[0] == fmt}
        present = [byte for counts in kinds.values() for byte, count in enumerate(counts) if count]
        first, last = max(min(present) - 2, 0), min(max(present) + 2, 255)
        if fmt == "NVFP4" and max(present) < 128:
            first, last = min(first, 127 - 16), 127  # how far it is to 448 is worth seeing
        bars += [_scale_histogram(name, kinds[name], first, last) for name in kinds]
    return bars


def _scale_histogram(name: str, counts: list[int], first: int, last: int) -> Bars:
    nvfp4 = name.startswith("NVFP4")
    value = _e4m3 if nvfp4 else _e8m0
    present = [byte for byte, count in enumerate(counts) if count]
    top = math.log10(max(counts)) or 1.0
    width = (WIDTH - LEFT - RIGHT) / (last - first + 1)

    def bar(byte: int) -> Bar:
        height = max(math.log10(counts[byte]) / top, 0.01) * (HEIGHT - TOP - BOTTOM)
        x = LEFT + (byte - first) * width
        text = f"0x{byte:02X} = {value(byte)}: {counts[byte]:,} blocks"
        return Bar(x, HEIGHT - BOTTOM - height, max(width - 0.5, 0.5), height, text)

    unit = 8 if nvfp4 else 1  # E4M3 doubles every 8 bytes
    step = unit * math.ceil((last - first + 1) / unit / TICKS)
    marked = range(math.ceil(first / step) * step, last + 1, step)
    x = tuple(Tick(LEFT + (byte - first + 0.5) * width, value(byte)) for byte in marked)
    y = tuple(Tick(_y(power / top), _short(10**power)) for power in range(math.floor(top) + 1))
    low, high = value(present[0]), value(max((byte for byte in present if value(byte) != "NaN"), default=present[-1]))
    nan = sum(count for byte, count in enumerate(counts) if value(byte) == "NaN")
    spread = f"all scales {low}" if low == high else f"scales from {low} to {high}"
    summary = f"{sum(counts):,} blocks, {spread}" + (f", {counts[0]:,} are 0" if nvfp4 and counts[0] else "")
    summary += f", {nan:,} are NaN" if nan else ""
    return Bars(name, ("block scale", "blocks, logarithmic"), x, y, tuple(map(bar, present)), summary)


def code_histograms(codes: Mapping[str, Tensor]) -> list[Bars]:
    """One histogram for each kind of NVFP4 weight: the share of each magnitude."""
    return [_code_histogram(name, counts.tolist()) for name, counts in codes.items()]


def _code_histogram(name: str, counts: list[int]) -> Bars:
    total = sum(counts)
    ticks, share = _axis(0.0, max(counts) / total)
    width = (WIDTH - LEFT - RIGHT) / 8
    magnitudes = [f"{value:g}" for value in VALUES[:8]]
    bars = []
    for i, (magnitude, count) in enumerate(zip(magnitudes, counts, strict=True)):
        height = share(count / total) * (HEIGHT - TOP - BOTTOM)
        text = f"±{magnitude}: {count / total:.2%}"
        bars.append(Bar(LEFT + i * width + 4, HEIGHT - BOTTOM - height, width - 8, height, text))
    x = tuple(Tick(LEFT + (i + 0.5) * width, magnitude) for i, magnitude in enumerate(magnitudes))
    y = tuple(Tick(_y(share(tick)), f"{100 * tick:.10g}%") for tick in ticks)
    summary = f"{counts[7] / total:.2%} at ±6, {counts[0] / total:.2%} zero"
    return Bars(name, ("magnitude", "share of elements"), x, y, tuple(bars), summary)


def _e4m3(byte: int) -> str:
    """What an E4M3 byte stands for."""
    sign, exponent, mantissa = byte >> 7, (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return "NaN"
    value = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return f"{-value if sign else value:.4g}"


def _e8m0(byte: int) -> str:
    """What an E8M0 byte stands for."""
    return "NaN" if byte == 255 else f"2^{byte - 127}"


def _short(count: int) -> str:
    """A power of ten in at most four characters."""
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count // unit}{name}"
    return str(count)


def _x(share: float) -> float:
    return LEFT + 8 + share * (WIDTH - LEFT - RIGHT - 16)


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _axis(low: float, high: float) -> tuple[list[float], Callable[[float], float]]:
    """Round values around low … high, and where a value lies on an axis over them, 0 … 1."""
    high = high or 0.01
    step = _round_up((high - low) / 4 or high / 100)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    ticks = [i * step for i in range(first, last + 1)]
    return ticks, lambda value: (value / step - first) / (last - first)


def _log_axis(low: float, high: float) -> tuple[list[float], Callable[[float], float]]:
    """The same, logarithmic; low is positive."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = [digit * 10.0**power for power in powers for digit in ((1, 2, 5) if high < 1000 * low else (1,))]
    first = max(step for step in steps if step <= low)
    ticks = [step for step in steps if first <= step < high] + [next(step for step in steps if step >= high)]
    return ticks[:: math.ceil(len(ticks) / 8)], lambda value: math.log(value / first) / math.log(ticks[-1] / first)


def _round_up(value: float) -> float:
    """The next of 1, 2, 5, 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(digit * power for digit in (1, 2, 5, 10) if value <= digit * power * (1 + 1e-9))
