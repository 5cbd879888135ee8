"""Two processes compute what one does: shards quantized under a common maximum, and FSDP2."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ..check import equal, true

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What rank 0 of two processes reports."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    store = tmp_path_factory.mktemp("store") / "store"
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(store)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=400) for process in processes]
    for process, (_, error) in zip(processes, outputs, strict=True):
        equal(process.returncode, 0, error[-3000:])
    return json.loads(outputs[0][0].splitlines()[-1])


def test_shards_equal_the_whole_byte_for_byte(results: dict[str, Any]) -> None:
    shards = results["shards"]
    true(len(shards) == 27 and all(shards.values()), str(shards))


def test_half_of_a_layer(results: dict[str, Any]) -> None:
    """Sums in another order: 2^-24 each. Another scale would change every twentieth code, 10^-2 of the result."""
    layers = results["layers"]
    true(len(layers) == 30 and all(layers.values()), str(layers))


@pytest.mark.parametrize("backward", ["high_precision", "dequantized", "quantized"])
def test_fsdp2_equals_one_process(results: dict[str, Any], backward: str) -> None:
    """Losses of five steps, float32: only the order of sums over ranks differs.

    A gradient's last bit may differ, and a code of the next step's weights with it: one step of a weight's grid, of
    thousands that a loss depends on.
    """
    single, sharded = results[backward]["single"], results[backward]["sharded"]
    equal(len(single), 5)
    true(single[-1] < 0.9 * single[0], f"it learns: {single}")
    true(abs(sharded[0] - single[0]) <= 1e-6 * single[0], f"first {sharded[0]} instead of {single[0]}")
    for a, b in zip(sharded, single, strict=True):
        true(abs(a - b) <= 1e-3 * b, f"{sharded} instead of {single}")
