"""Geometry of the report's plots: numbers to coordinates. The template draws them as SVG, and escapes their texts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..checkpoint.inspection import Row
from ..numerics.e2m1 import VALUES

WIDTH, HEIGHT = 720, 280
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 36
COLORS = 10  # as many as the template has


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
    margin = max(0.1 * (max(errors) - min(errors)), 0.01 * max(errors), 1e-12)
    low, high = max(min(errors) - margin, 0.0), max(errors) + margin  # lines, not bars: no need to start at zero
    last = max(row.place[1] or 0 for row in rows)
    names = list(dict.fromkeys(f"{row.place[2]} {row.place[3]}" for row in rows))

    def point(row: Row) -> Point:
        error, layer = row.relative_error or 0.0, row.place[1] or 0
        return Point(_x(layer / max(last, 1)), _y((error - low) / (high - low)), f"{row.label}: {error:.3%}")

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
    step = max(1, math.ceil((last + 1) / 12))
    x = tuple(Tick(_x(layer / max(last, 1)), str(layer)) for layer in range(0, last + 1, step))
    y = tuple(Tick(_y(i / 4), f"{low + (high - low) * i / 4:.3%}") for i in range(5))
    return Lines(x, y, series)


def scale_histograms(scales: Mapping[str, Tensor]) -> list[Bars]:
    """One histogram for each kind of weight: how often each block-scale byte occurs, its height logarithmic."""
    return [_scale_histogram(name, counts.tolist()) for name, counts in scales.items()]


def _scale_histogram(name: str, counts: list[int]) -> Bars:
    nvfp4 = name.startswith("NVFP4")
    present = [byte for byte, count in enumerate(counts) if count]
    first, last = (0, 127) if nvfp4 and present[-1] < 128 else (max(present[0] - 2, 0), min(present[-1] + 2, 255))
    top = math.log10(max(counts)) or 1.0
    width = (WIDTH - LEFT - RIGHT) / (last - first + 1)
    value = _e4m3 if nvfp4 else lambda byte: "NaN" if byte == 255 else f"2^{byte - 127}"

    def bar(byte: int) -> Bar:
        height = max(math.log10(counts[byte]) / top, 0.01) * (HEIGHT - TOP - BOTTOM)
        x = LEFT + (byte - first) * width
        text = f"0x{byte:02X} = {value(byte)}: {counts[byte]:,} blocks"
        return Bar(x, HEIGHT - BOTTOM - height, max(width - 0.5, 0.5), height, text)

    step = 16 if last - first > 32 else max(1, (last - first) // 8)
    x = tuple(Tick(LEFT + (byte - first + 0.5) * width, value(byte)) for byte in range(first, last + 1, step))
    y = tuple(Tick(_y(power / top), f"{10**power:,}") for power in range(math.floor(top) + 1))
    total = sum(counts)
    summary = f"{total:,} blocks, scales from {value(present[0])} to {value(present[-1])}, {counts[0]:,} of them 0x00"
    return Bars(name, x, y, tuple(bar(byte) for byte in present), summary)


def code_histograms(codes: Mapping[str, Tensor]) -> list[Bars]:
    """One histogram for each kind of NVFP4 weight: the share of each magnitude."""
    return [_code_histogram(name, counts.tolist()) for name, counts in codes.items()]


def _code_histogram(name: str, counts: list[int]) -> Bars:
    total = sum(counts)
    top = _nice(max(counts) / total)
    width = (WIDTH - LEFT - RIGHT) / 8
    magnitudes = [f"{value:g}" for value in VALUES[:8]]
    bars = []
    for i, (magnitude, count) in enumerate(zip(magnitudes, counts, strict=True)):
        height = count / total / top * (HEIGHT - TOP - BOTTOM)
        text = f"±{magnitude}: {count / total:.2%}"
        bars.append(Bar(LEFT + i * width + 4, HEIGHT - BOTTOM - height, width - 8, height, text))
    x = tuple(Tick(LEFT + (i + 0.5) * width, magnitude) for i, magnitude in enumerate(magnitudes))
    y = tuple(Tick(_y(i / 4), f"{top * i / 4:.0%}") for i in range(5))
    return Bars(name, x, y, tuple(bars), f"{counts[7] / total:.2%} at ±6, {counts[0] / total:.2%} zero")


def _e4m3(byte: int) -> str:
    """What an E4M3 byte stands for."""
    sign, exponent, mantissa = byte >> 7, (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return "NaN"
    value = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return f"{-value if sign else value:.4g}"


def _x(share: float) -> float:
    return LEFT + 8 + share * (WIDTH - LEFT - RIGHT - 16)


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _nice(value: float) -> float:
    """The next of 1, 2, 4, 10 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 1.2, 1.6, 2, 4, 6, 8, 10) if value <= step * power * (1 + 1e-9))
