"""Reading ahead and writing behind: threads that keep the order, and hold a bounded number of bytes between them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

_WINDOW = 64  # items that wait to be read, by number


class Budget:
    """Bytes that may be in memory at once; a single item may be larger, but is alone then."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used, self._closed = limit, 0, False
        self._changed = threading.Condition()

    def take(self, size: int) -> None:
        """Wait until there is room."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._used or self._used + size <= self._limit)
            self._used += size

    def give(self, size: int) -> None:
        """Make room again."""
        with self._changed:
            self._used -= size
            self._changed.notify_all()

    def close(self) -> None:
        """Let everyone who waits go on: the work is over."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def read_ahead(
    items: Sequence[T], read: Callable[[T], R], size: Callable[[T], int], budget: Budget
) -> Iterator[tuple[T, R]]:
    """Each item with what `read` gives for it, in order; the next ones are read meanwhile, as the budget allows."""
    with ThreadPoolExecutor(1, "read") as pool:

        def task(item: T) -> R:
            budget.take(size(item))
            return read(item)

        pending: deque[tuple[T, Future[R]]] = deque()
        rest = iter(items)
        try:
            while True:
                for item in rest:
                    pending.append((item, pool.submit(task, item)))
                    if len(pending) >= _WINDOW:
                        break
                if not pending:
                    return
                yield _next(pending)  # nothing here refers to it, so that whoever takes it decides how long it lives
        finally:
            budget.close()
            pool.shutdown(cancel_futures=True)


def _next(pending: deque[tuple[T, Future[R]]]) -> tuple[T, R]:
    item, future = pending.popleft()
    return item, future.result()


class WriteBehind:
    """A thread that carries out tasks in order; after one has failed, no other is begun.

    `submit` and leaving raise what a task raised; leaving waits for all of them, or, with an error, for the one that
    is running. A task that fails closes the budget, so that nobody waits for the others to make room.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._pool = ThreadPoolExecutor(1, "write")
        self._pending: deque[Future[None]] = deque()
        self._failed = False

    def __enter__(self) -> WriteBehind:
        return self

    def submit(self, task: Callable[[], None]) -> None:
        """Have a task done, some time."""
        self._pending.append(self._pool.submit(self._run, task))
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()

    def _run(self, task: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            task()
        except BaseException:
            self._failed = True
            self._budget.close()
            raise

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._failed = True
        self._pool.shutdown(cancel_futures=kind is not None)
        while kind is None and self._pending:
            self._pending.popleft().result()
