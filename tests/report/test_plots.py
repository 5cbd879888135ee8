"""Geometry: everything inside its frame, over axes of few, round and different numbers."""

from decimal import Decimal

import pytest
import torch

from halfbyte.checkpoint.inspection import Row
from halfbyte.report import plots

from ..check import equal, true

INSIDE = ((plots.LEFT, plots.WIDTH - plots.RIGHT), (plots.TOP, plots.HEIGHT - plots.BOTTOM))


def row(layer: int, error: float) -> Row:
    return Row(("decoder", layer, "mlp", "up_proj", "NVFP4"), 1, 16, 9, 1, 0, 0, 0, 0, error**2, 1.0)


def inside(x: float, y: float) -> None:
    for value, (low, high) in zip((x, y), INSIDE, strict=True):
        true(low - 0.01 <= value <= high + 0.01, f"({x}, {y}) is outside {INSIDE}")


def round_numbers(ticks: tuple[plots.Tick, ...]) -> None:
    texts = [tick.text for tick in ticks]
    true(2 <= len(texts) <= 8 and len(set(texts)) == len(texts), str(texts))
    for text in texts:
        true(len(Decimal(text.strip("%")).normalize().as_tuple().digits) <= 3, f"{texts} are not round")


@pytest.mark.parametrize(
    "errors",
    [[0.0], [0.0, 0.0], [0.0953], [0.1, 0.1], [0.0901, 0.0957, 0.0933], [0.09, 1.0123, 0.095], [0.0, 0.1], [1e-9, 1.0]],
    ids=str,
)
def test_errors(errors: list[float]) -> None:
    lines = plots.error_by_layer([row(layer, error) for layer, error in enumerate(errors)])
    true(lines is not None, "no plot")
    if lines is not None:
        for point in lines.series[0].points:
            inside(point.x, point.y)
        heights = [point.y for point in lines.series[0].points]
        equal(sorted(errors), [errors[i] for i in sorted(range(len(errors)), key=lambda i: -heights[i])])
        round_numbers(lines.y)
        equal("logarithmic" in lines.names[1], max(errors) > 5 * min(errors) > 0)
        equal(plots.error_by_layer([]), None)


@pytest.mark.parametrize("layers", [1, 2, 7, 48, 126])
def test_layers(layers: int) -> None:
    lines = plots.error_by_layer([row(layer, 0.1 + layer / 1e4) for layer in range(layers)])
    true(lines is not None and len(lines.x) <= plots.TICKS + 1, "labels of the layers do not fit")


@pytest.mark.parametrize("name", ["NVFP4 mlp", "MXFP8 mlp"])
@pytest.mark.parametrize("found", [{100: 5}, {0: 1, 126: 10**6}, {127: 3}, {60: 9, 61: 99, 255: 1}], ids=str)
def test_scales(name: str, found: dict[int, int]) -> None:
    counts = torch.zeros(256, dtype=torch.int64)
    for byte, count in found.items():
        counts[byte] = count
    other = torch.zeros(256, dtype=torch.int64)
    other[90] = 1
    first, second = plots.scale_histograms({name: counts, "MXFP8 attention": other})[:2]
    equal([len(first.bars), len(second.bars)], [len(found), 1])
    equal(first.x == second.x, name.startswith("MXFP8"), "kinds of one format have one axis")
    for bar in first.bars:
        inside(bar.x, bar.y)
        inside(bar.x + bar.width, bar.y + bar.height)
    true(1 <= len(first.x) <= plots.TICKS + 1, str(first.x))
    nan = sum(count for byte, count in found.items() if byte in ((127, 255) if name.startswith("NVFP4") else (255,)))
    equal(f"{nan} are NaN" in first.summary, nan > 0, first.summary)
