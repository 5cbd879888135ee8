"""What the tests compare with. Functions that raise, because `python -O` drops assert statements."""

from typing import Any

import torch
from torch import Tensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def true(condition: object, message: str) -> None:
    if not bool(condition):
        raise AssertionError(message)


def equal(actual: Any, expected: Any, what: str = "values") -> None:
    """Same dtype, shape and values: NaN equals NaN, 0 equals -0. Anything but tensors is compared with ==."""
    if isinstance(actual, Tensor) and isinstance(expected, Tensor):
        _same_kind(actual, expected, what)
        a, b = actual.double(), expected.double()
        _all((a == b) | (a.isnan() & b.isnan()), actual, expected, what)
    else:
        true(type(actual) is type(expected) and actual == expected, f"{what}: {actual!r} instead of {expected!r}")


def same_bits(actual: Tensor, expected: Tensor, what: str = "bits") -> None:
    """Same dtype, shape and bits."""
    _same_kind(actual, expected, what)
    bits = _BITS[actual.element_size()]
    _all(actual.contiguous().view(bits) == expected.contiguous().view(bits), actual, expected, what)


def close(actual: Tensor, expected: Tensor, within: Tensor | float, what: str = "values") -> None:
    """|actual - expected| ≤ within, elementwise and in float64; NaN never is."""
    true(actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    distance = (actual.double() - expected.double()).abs()
    _all(distance <= torch.as_tensor(within, dtype=torch.float64), actual, expected, what)


def _same_kind(actual: Tensor, expected: Tensor, what: str) -> None:
    true(actual.dtype == expected.dtype, f"{what}: {actual.dtype} instead of {expected.dtype}")
    true(actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")


def _all(good: Tensor, actual: Tensor, expected: Tensor, what: str) -> None:
    if not bool(good.all()):
        first = tuple((~good).nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int((~good).sum())} of {good.numel()} differ, "
            f"first at {first}: {actual[first].item()!r} instead of {expected[first].item()!r}"
        )
