"""Reading ahead and working behind: threads that keep the order, and hold a bounded number of bytes between them."""

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
    """Bytes that may be in memory at once; a single item may be larger, but is alone then.

    Or of something else that is counted. Closing it lets everyone who waits go on, since the work is over; `also` is
    closed with it.
    """

    def __init__(self, limit: int, also: Budget | None = None) -> None:
        self._limit, self._used, self._closed, self._also = limit, 0, False, also
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
        """Let everyone who waits go on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._also is not None:
            self._also.close()


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


class Behind:
    """A thread that carries out tasks in order; after one has failed, no other is begun.

    `check`, `submit` and leaving raise what a task raised; leaving waits for all of them, or, with an error, for the
    one that is running. A task that fails closes the budget, so that nobody waits for the others to make room.
    """

    def __init__(self, name: str, budget: Budget) -> None:
        self._budget = budget
        self._pool = ThreadPoolExecutor(1, name)
        self._error: BaseException | None = None
        self._stopped = False

    def __enter__(self) -> Behind:
        return self

    def check(self) -> None:
        """Raise what a task raised."""
        if self._error is not None:
            raise self._error

    def submit(self, task: Callable[[], None]) -> None:
        """Have a task done, some time."""
        self.check()
        self._pool.submit(self._run, task)

    def _run(self, task: Callable[[], None]) -> None:
        if self._stopped:
            return
        try:
            task()
        except BaseException as error:
            self._error, self._stopped = error, True
            self._budget.close()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._stopped = True
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            self.check()
