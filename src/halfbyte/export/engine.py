"""What an engine does around new weights, and the order in which it must."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from torch import Tensor

from ..errors import SyncError
from .exporter import Bucket
from .planned import FlatBucket


class Serving(Protocol):
    """An engine around a model whose weights someone else writes; see `Receiver.receive`."""

    def pause(self) -> None:
        """Take no more requests, and finish or stop those that run."""

    def flush_cache(self) -> None:
        """Forget what was computed with the old weights: KV and prefix caches."""

    def set_version(self, version: int) -> None:
        """What serves from now on."""

    def resume(self) -> None:
        """Take requests again."""


class Engine(Serving, Protocol):
    """An engine that loads weights itself, such as vLLM or SGLang behind its own calls; see `update_engine`."""

    def start_update(self) -> None:
        """Make ready for weights in their layout on disk."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take a bucket. A prepared one's memory lasts until this returns; to the end if it was prepared with keep."""

    def finish_update(self) -> None:
        """All buckets are there: bring the weights into the layout that kernels want, at unchanged addresses."""

    def abort_update(self) -> None:
        """Throw away what came since `start_update`, so that the old weights can serve; raise if that cannot be."""


def update_engine(engine: Engine, buckets: Iterable[Bucket | FlatBucket], version: int) -> None:
    """pause → flush_cache → start_update → load each bucket → finish_update → set_version → resume.

    Requests must not run while weights change, and what was cached with old weights must go before any new one is
    computed with; the version is set once the weights are whole, and before the first request sees them.

    Raises:
        SyncError: something failed in between. The engine aborted the update and serves its old version; if it could
            not abort, that error is raised instead, and the engine stays paused.
    """
    has_begun = False
    try:
        engine.pause()
        engine.flush_cache()
        has_begun = True
        engine.start_update()
        for bucket in buckets:
            engine.load(bucket.tensors)
        engine.finish_update()
        engine.set_version(version)
    except BaseException as error:
        if has_begun:
            engine.abort_update()
        engine.resume()
        raise SyncError(f"version {version} was not loaded ({error}); the old version serves on") from error
    engine.resume()
