"""Observers: collect any number of times, compute, reset, again."""

import pytest
import torch

from halfbyte import FormatError, ShapeError
from halfbyte.calib.observers import AmaxObserver, HessianObserver, ObserverOptions
from halfbyte.calib.ranks import Ranks

from ..check import close, equal, true


def test_amax(rng: torch.Generator) -> None:
    observer = AmaxObserver("m")
    for _ in range(2):
        for x in (torch.tensor([1.0, -3.0]), torch.zeros(0), torch.tensor([[2.0]])):
            observer.collect(x)
        equal(observer.compute(), torch.tensor(3.0))
        equal(observer.compute(), torch.tensor(3.0))
        observer.reset()
    with pytest.raises(ShapeError, match="m: nothing"):
        observer.compute()


def test_percentile_and_headroom() -> None:
    x = torch.arange(1, 1001).float()
    observer = AmaxObserver("m", ObserverOptions("percentile", percentile=99.0, headroom=2.0))
    observer.collect(-x)
    equal(observer.compute(), torch.tensor(1980.0))
    observer.collect(x / 10)
    equal(observer.compute(), torch.tensor(1980.0))
    observer = AmaxObserver("m", ObserverOptions(headroom=1.5))
    observer.collect(x)
    equal(observer.compute(), torch.tensor(1500.0))


def test_hessian(rng: torch.Generator) -> None:
    x = torch.randn(3, 20, 32, generator=rng)
    observer = HessianObserver("m", 32)
    for _ in range(2):
        for part in x:
            observer.collect(part)
        tokens = x.reshape(-1, 32).double()
        expected = tokens.T @ tokens / 60
        close(observer.compute(), expected, 1e-5)
        equal(observer.tokens, 60)
        blocks = observer.blocks()
        equal(tuple(blocks.shape), (2, 16, 16))
        equal(blocks[1], observer.compute()[16:, 16:].contiguous())
        observer.reset()
    with pytest.raises(ShapeError, match="m: nothing"):
        observer.compute()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_names_the_module(bad: float) -> None:
    x = torch.ones(4, 16)
    x[2, 3] = bad
    for observer in (AmaxObserver("layers.3.q_proj"), HessianObserver("layers.3.q_proj", 16)):
        with pytest.raises(ShapeError, match=r"layers\.3\.q_proj: its inputs contain NaN or inf"):
            observer.collect(x)
    with pytest.raises(ShapeError, match="expected 16"):
        HessianObserver("m", 16).collect(torch.ones(2, 8))


def test_options_are_checked() -> None:
    for options in ({"method": "mean"}, {"percentile": 0.0}, {"headroom": -1.0}):
        with pytest.raises(FormatError):
            ObserverOptions(**options)  # type: ignore[arg-type]
    true(ObserverOptions().method == "max", "default")


def test_spans_without_samples_add_nothing(rng: torch.Generator) -> None:
    first, second = torch.randn(2, 4, 4, generator=rng)
    equal(Ranks().sum_spans({0: first, 5: second}, first), first + second)
