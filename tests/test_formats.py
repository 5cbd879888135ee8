import dataclasses
import itertools
from typing import Any

import pytest

from halfbyte import MXFP8, NVFP4, FormatError

from .check import equal, true

CHOICES: dict[str, tuple[Any, ...]] = {
    "block": ((1, 16), (16, 16)),
    "scaling": ("tensor", "row"),
    "scale_rule": ("amax", "four_over_six"),
    "hadamard": (False, True),
    "rounding": ("nearest", "stochastic"),
    "error": (None, "mae", "mse"),
    "e4m3_max": (None, 256, 288, 320, 448),
    "error_arithmetic": ("exact", "fp16"),
}


def has_meaning(f: dict[str, Any]) -> bool:
    if f["scaling"] == "row" and f["block"] == (16, 16):
        return False
    if f["scale_rule"] == "amax":
        return f["error"] is None and f["error_arithmetic"] == "exact"
    return f["rounding"] == "nearest"


def test_every_combination_builds_or_raises() -> None:
    counts = {True: 0, False: 0}
    for values in itertools.product(*CHOICES.values()):
        fields = dict(zip(CHOICES, values, strict=True))
        try:
            fmt = NVFP4(**fields)
        except FormatError:
            built = False
        else:
            built = True
            for name, value in fields.items():
                true(value is None or getattr(fmt, name) == value, f"{name} of {fmt} is not {value}")
        true(built == has_meaning(fields), f"{fields} {'builds' if built else 'raises'}")
        counts[built] += 1
    # amax: 3 of block and scaling, 2 hadamard, 2 rounding, 5 E; four_over_six: 3, 2, 3 error, 5, 2 arithmetic.
    equal(counts, {True: 60 + 180, False: 960 - 240})


@pytest.mark.parametrize(
    ("fields", "remedy"),
    [
        ({"scaling": "row", "block": (16, 16)}, r"one block would need 16 scales; use block=\(1, 16\)"),
        ({"rounding": "stochastic", "scale_rule": "four_over_six"}, "use scale_rule='amax'"),
        ({"error": "mae"}, "measures no error: leave error and error_arithmetic out"),
        ({"error_arithmetic": "fp16"}, "leave error and error_arithmetic out"),
        ({"block": (16, 1)}, r"block=\(16, 1\): choose one of \(1, 16\), \(16, 16\)"),
        ({"block": (1, 32)}, "choose one of"),
        ({"scaling": "block"}, "scaling='block': choose one of 'tensor', 'row'"),
        ({"scale_rule": "max"}, "scale_rule='max': choose one of 'amax', 'four_over_six'"),
        ({"hadamard": 1}, "hadamard=1: choose one of False, True"),
        ({"hadamard": None}, "hadamard=None: choose"),
        ({"rounding": "up"}, "rounding='up': choose one of 'nearest', 'stochastic'"),
        ({"scale_rule": "four_over_six", "error": "rmse"}, "error='rmse': choose one of 'mae', 'mse'"),
        ({"scale_rule": "four_over_six", "error_arithmetic": "fp8"}, "choose one of 'exact', 'fp16'"),
        ({"e4m3_max": 240}, "e4m3_max=240: choose one of 256, 288, 320, 448"),
        ({"e4m3_max": True}, "e4m3_max=True: choose"),
    ],
    ids=str,
)
def test_errors_name_the_remedy(fields: dict[str, Any], remedy: str) -> None:
    with pytest.raises(FormatError, match=remedy):
        NVFP4(**fields)


def test_defaults() -> None:
    fmt = NVFP4()
    equal(dataclasses.astuple(fmt), ((1, 16), "tensor", "amax", False, "nearest", None, 448, "exact"))
    fmt = NVFP4(scale_rule="four_over_six")
    equal(dataclasses.astuple(fmt), ((1, 16), "tensor", "four_over_six", False, "nearest", "mae", 256, "exact"))


def test_formats_are_values() -> None:
    explicit = NVFP4(scale_rule="four_over_six", error="mae", e4m3_max=256)
    equal(NVFP4(scale_rule="four_over_six"), explicit)
    equal(hash(NVFP4(scale_rule="four_over_six")), hash(explicit))
    equal(MXFP8(), MXFP8())
    true(NVFP4() != NVFP4(hadamard=True), "a field is left out of ==")
    equal(len({NVFP4(), NVFP4(), MXFP8(), MXFP8(), NVFP4(scaling="row")}), 3)


@pytest.mark.parametrize("fmt", [NVFP4(), MXFP8()], ids=repr)
def test_formats_are_frozen(fmt: NVFP4 | MXFP8) -> None:
    for name in ("block", "anything"):
        with pytest.raises((dataclasses.FrozenInstanceError, TypeError)):
            setattr(fmt, name, (16, 16))


def test_replace_checks_again() -> None:
    equal(dataclasses.replace(NVFP4(), scaling="row"), NVFP4(scaling="row"))
    with pytest.raises(FormatError, match="use block"):
        dataclasses.replace(NVFP4(block=(16, 16)), scaling="row")


def test_block_columns() -> None:
    equal([fmt.block_columns for fmt in (NVFP4(), NVFP4(block=(16, 16)), MXFP8())], [16, 16, 32])
