"""Fixtures for all tests: the golden vectors, and random numbers that every test has to itself."""

import functools
import inspect
import os
import signal
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, torch.Tensor]]:
    """golden(name): the tensors of golden/<name>.safetensors."""
    return functools.cache(lambda name: load_file(GOLDEN / f"{name}.safetensors"))


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    """A generator seeded by the test's own node id: no test depends on another, or on the order."""
    nodeid = request.node.nodeid.partition("@")[0]  # pytest-xdist appends the group
    return torch.Generator().manual_seed(zlib.crc32(nodeid.encode()))


def pytest_configure() -> None:
    """Several processes share the cores; each with threads for all of them, they would mostly wait for one another.

    A job in the background ignores Ctrl-C, and so would the processes that are tested for it.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        torch.set_num_threads(max(torch.get_num_threads() // workers, 1))
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # of the processes that tests start
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # processes, each of which imports torch


LONGEST = ("test_kernels_in_the_interpreter", "tests/export/test_gpu", "test_triton_gptq", "test_triton_transposed")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest tests first, so that none is left to one process while the others are done.

    The kernels' tests of one function share kernels: under --dist loadgroup one process compiles them, once.
    A test that expects an error is marked, for the run without assert statements.
    """
    expects_error = functools.cache(lambda function: "raises(" in inspect.getsource(function))
    for item in items:
        if isinstance(item, pytest.Function) and expects_error(item.function):
            item.add_marker(pytest.mark.refusal)
    items.sort(key=lambda item: not any(name in item.nodeid for name in LONGEST))
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            if item.get_closest_marker("gpu") and item.nodeid.startswith("tests/kernels/"):
                item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("[")[0]))
