"""Compiling and running: `jit`, and `run`, which spreads a kernel over threads.

Kernels are compiled on first use, run without the GIL and are cached on disk. They are spread by ordinary Python
threads rather than by numba's `prange`: its portable thread pool aborts the process when two threads call it at once,
its OpenMP one aborts a child process after a fork, and the third needs TBB.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import importlib.resources
import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import numba
from numba.core.caching import FunctionCache

F = TypeVar("F", bound=Callable[..., Any])


def _digest() -> str:
    files = sorted(importlib.resources.files(__package__).iterdir(), key=lambda file: file.name)
    return hashlib.sha256(b"".join(f.read_bytes() for f in files if f.name.endswith(".py"))).hexdigest()


class _Cache(FunctionCache):
    """numba's cache, valid for the sources of this whole package.

    numba itself looks at the one file that holds the function, and would serve old code after a change in a helper.
    """

    _sources = _digest()

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        index_key: Any = super()._index_key
        return (*index_key(sig, codegen), self._sources)

    def save_overload(self, sig: Any, data: Any) -> None:
        save: Any = super().save_overload
        with contextlib.suppress(OSError):  # a full disk costs time, not the result
            save(sig, data)


# No fast-math: nothing is contracted or reordered. Division by zero gives infinity.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": False, "boundscheck": False}
_njit: Any = numba.njit
_INNER = {**_OPTIONS, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def jit(function: F) -> F:
    """Compile a function that kernels call; it becomes a part of them."""
    return cast(F, _njit(forceinline=True, **_INNER)(function))


def jit_apart(function: F) -> F:
    """The same for a function that is long, and called rarely enough to stay one: it keeps compiling short."""
    return cast(F, _njit(**_INNER)(function))


def kernel(function: F) -> F:
    """Compile a function that Python calls, on its first call, and keep it on disk."""
    dispatcher: Any = _njit(**_OPTIONS)(function)
    cache: Any = _Cache
    with contextlib.suppress(RuntimeError):  # no folder can be written to: each process compiles again
        dispatcher._cache = cache(function)
    return cast(F, dispatcher)


# --- threads --------------------------------------------------------------------------------------------------------

Part = tuple[int, int, int, int]
"""(first row, end row, first block, end block) of a matrix of blocks."""

_SMALL = 1 << 18  # elements of a part; fewer are done before another thread has woken up
_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def _forget_pool() -> None:
    """A forked child has the pool's object but not its threads, and perhaps a locked lock."""
    global _pool, _pool_size, _lock
    _pool, _pool_size, _lock = None, 0, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def _workers(count: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    with _lock:
        if _pool is None or _pool_size < count:
            _pool, _pool_size = ThreadPoolExecutor(count, thread_name_prefix="halfbyte"), count
        return _pool


def parts(rows: int, blocks: int, block_elements: int, threads: int, *, most: int | None = None) -> list[Part]:
    """Cut a matrix of blocks by rows, and by columns too where there are few; `most`: elements of a part."""
    elements = rows * blocks * block_elements
    wanted = min(4 * threads, elements // _SMALL) if threads > 1 else 1
    if most is not None:
        wanted = min(rows, max(wanted, elements // most))
    if wanted <= 1:
        return [(0, rows, 0, blocks)]
    down = max(1, min(rows, wanted))
    across = max(1, min(blocks, wanted // down))
    row_ends = [rows * i // down for i in range(down + 1)]
    block_ends = [blocks * i // across for i in range(across + 1)]
    return [
        (row, row_end, block, block_end)
        for row, row_end in itertools.pairwise(row_ends)
        for block, block_end in itertools.pairwise(block_ends)
    ]


def run(task: Callable[[int, int, int, int], object], pieces: list[Part], threads: int) -> None:
    """Call task(*piece) for every piece, on up to `threads` threads, this one included."""
    left = collections.deque(pieces)

    def drain() -> None:
        while left:
            try:
                piece = left.popleft()
            except IndexError:  # another thread took the last one
                return
            task(*piece)

    helpers = min(threads, len(pieces)) - 1
    if helpers < 1:
        return drain()
    futures = [_workers(helpers).submit(drain) for _ in range(helpers)]
    try:
        drain()
    finally:
        # A helper that has not begun, because another caller keeps the pool busy, has nothing left to do.
        for future in futures:
            if not future.cancel():
                future.result()
