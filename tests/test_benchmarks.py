"""The benchmark command runs and writes what it measured; whether anything is fast is not tested."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .check import equal, true

ROOT = Path(__file__).parents[1]


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks"), "--device", "cpu", "--no-alternatives", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_cpu_table(tmp_path: Path) -> None:
    file = tmp_path / "results" / "cpu.json"
    done = run(
        "--shapes", "32x64", "1x64", "--only", "plain", "--note", "a test", "--commit", "abc", "--json", str(file)
    )
    equal(done.returncode, 0, done.stderr)
    true("bytes equal the contract's" in done.stdout, done.stdout)
    result = json.loads(file.read_text())
    equal((result["commit"], result["note"]), ("abc", "a test"))
    true({"python", "torch", "numba"} <= set(result["versions"]), "versions")
    rows = {(row["name"], tuple(row["shape"])): row for row in result["rows"]}
    true(("plain", (32, 64)) in rows and ("plain", (1, 64)) in rows, "both shapes")
    true(("plain, of a transposed matrix", (1, 64)) not in rows, "one row has no blocks of 16 below each other")
    equal(rows["plain", (32, 64)]["bytes"], 32 * 64 * 41 // 16)
    equal(rows["plain", (32, 64)]["goals"], {}, "no goals where launches rule")
    true(all(microseconds > 0 for microseconds in result["python_microseconds"].values()), "overhead")


def test_unknown_cases() -> None:
    done = run("--only", "nothing")
    equal(done.returncode, 1)
    true("--only nothing: choose from plain, " in done.stderr, done.stderr)


def test_tables_in_documents_are_those_of_the_results() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "readme.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    equal(done.returncode, 0, done.stderr)


def test_training(tmp_path: Path) -> None:
    file = tmp_path / "training.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "training.py"), "--small", "--no-llama", "--device", "cpu"]
    done = subprocess.run([*command, "--json", str(file)], capture_output=True, text=True, timeout=300, check=False)
    equal(done.returncode, 0, done.stderr[-2000:])
    true("the gate: forward and gradients are the formulas'" in done.stdout, done.stdout)
    result = json.loads(file.read_text())
    equal(set(result["linear"]["milliseconds"]), {"bf16", "high_precision", "dequantized", "quantized"})
    true(result["saved_activations_of_bf16"]["dequantized"] <= 0.32, "4 bytes per row beside 64 columns")


def test_export(tmp_path: Path) -> None:
    file = tmp_path / "export.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "export.py"), "--small", "--device", "cpu", "--layers", "2"]
    command += ["--sample-layers", "1", "--json", str(file)]
    for ranks in ("1", "2"):
        done = subprocess.run([*command, "--ranks", ranks], capture_output=True, text=True, timeout=300, check=False)
        equal(done.returncode, 0, done.stderr[-2000:])
        result = json.loads(file.read_text())
        true(result["gate_weights"] > 100_000, "the gate")
        true({"commit", "versions", "hardware"} <= set(result), "where it comes from")
    true(result["bytes_sent"] == result["receiver_staged_bytes"] > 0, f"{result}")


@pytest.mark.slow
def test_batch_invariance(tmp_path: Path) -> None:
    """Trainer and rollout are compared in full; nothing is timed on a CPU."""
    file = tmp_path / "invariant.json"
    command = [
        sys.executable, str(ROOT / "benchmarks" / "invariant.py"), "--device", "cpu", "--small", "--commit", "abc",
        "--json", str(file),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    equal(done.returncode, 0, done.stderr[-2000:])
    result = json.loads(file.read_text())
    equal((result["commit"], result["hardware"], result["without_humming"]), ("abc", "CPU", "it needs a GPU"))
    for found in result["log_probabilities"].values():
        for how in ("W4A4", "weights"):
            equal(found[f"{how}, batch-invariant"], {"mean": 0.0, "max": 0.0}, how)
            true(found[how]["mean"] > 0, f"{how}: equal without batch invariance too")
