"""Fixtures for all tests: the golden vectors, and random numbers that every test has to itself."""

import functools
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
    return torch.Generator().manual_seed(zlib.crc32(request.node.nodeid.encode()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first, so that none is left to one process while the others are done."""
    items.sort(key=lambda item: "test_kernels_in_the_interpreter" not in item.nodeid)
