"""The engine around new weights: what is called, in which order, and what serves where a call fails."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from halfbyte import SyncError
from halfbyte.export import Sender, update_engine

from ..check import equal, true
from .links import Damaged
from .test_transport import Both, buckets, flip


class Engine:
    """Writes down what it is asked for."""

    def __init__(self, fails_at: str | None = None) -> None:
        self.calls: list[str] = []
        self.fails_at = fails_at

    def __getattr__(self, name: str) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            self.calls.append(name)
            if name == self.fails_at:
                raise RuntimeError(f"{name} failed")

        return call


def test_the_order_around_a_receiver() -> None:
    both, engine = Both(), Engine()
    equal(both.sync(2, serving=engine), [None, 2])
    equal(engine.calls, ["pause", "flush_cache", "set_version", "resume"])
    both.sync(3, lambda: Sender(Damaged.of(both.links[0], flip)).send(buckets(3), 3), serving=engine)
    equal(len(engine.calls), 4, "calls after a sync that failed")


def test_the_order_of_an_engine() -> None:
    engine = Engine()
    update_engine(engine, buckets(1), 1)
    loads = len(list(buckets(1)))
    wanted = ["pause", "flush_cache", "start_update", *["load"] * loads, "finish_update", "set_version", "resume"]
    equal(engine.calls, wanted)
    for step in ("pause", "flush_cache", "start_update", "load", "finish_update", "set_version"):
        engine = Engine(step)
        with pytest.raises(SyncError, match=rf"version 1 was not loaded \({step} failed\); the old version serves on"):
            update_engine(engine, buckets(1), 1)
        equal(engine.calls[-1], "resume", step)
        equal(engine.calls.count("abort_update"), int(step not in ("pause", "flush_cache")), step)


def test_an_engine_that_fails_does_not_keep_the_others_waiting() -> None:
    both, began = Both(), time.monotonic()
    done = both.sync(2, serving=Engine("resume"))
    true("the engine around version 2 failed (RuntimeError: resume failed)" in str(done[1]), str(done))
    equal([link.problem for link in both.links], [None, None])
    true(time.monotonic() - began < 20, "somebody waited")
    equal(both.sync(3), [None, 3], "the next one")


@pytest.mark.parametrize("step", ["pause", "flush_cache"])
def test_an_engine_that_fails_before_anything_is_written_serves_on(step: str) -> None:
    both, engine = Both(), Engine(step)
    done = both.sync(2, serving=engine)
    true(f"(RuntimeError: {step} failed)" in str(done[1]), str(done))
    equal(engine.calls[-1], "resume")
    both.serves(1)
    equal(both.sync(3), [None, 3], "the next one")
    both.serves(3)
