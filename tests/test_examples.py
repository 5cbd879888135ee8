"""The examples run on the shipped model, learn something, and export it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .check import equal, true

ROOT = Path(__file__).parents[1]


def run(name: str, *options: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    equal(done.returncode, 0, done.stderr[-3000:])
    return done.stdout


@pytest.mark.parametrize("backward", ["dequantized", pytest.param("quantized", marks=pytest.mark.slow)])
def test_qat(tmp_path: Path, backward: str) -> None:
    """What is exported is what was trained: the checkpoint's perplexity is the trained model's."""
    file = tmp_path / "qat.json"
    options = ("--steps", "2", "--window", "64", "--eval-windows", "1", "--backward", backward)
    text = run("qat_tiny", *options, "--json", str(file), "--out", str(tmp_path / "out"))
    true("27 modules converted" in text and "snr_db" in text, text)
    found = json.loads(file.read_text())
    true(1.005 < found["NVFP4"] / found["bf16"] < 1.3, str(found))
    true(abs(found["exported"] / found["trained"] - 1) < 0.01, str(found))
    true((tmp_path / "out" / "halfbyte.json").is_file(), "the checkpoint")


@pytest.mark.slow
def test_qad(tmp_path: Path) -> None:
    file = tmp_path / "qad.json"
    run("qad_tiny", "--json", str(file))
    found = json.loads(file.read_text())
    true(found["trained"] < 0.98 * found["untrained"] < found["plain NVFP4"], str(found))


@pytest.mark.slow
def test_trainer(tmp_path: Path) -> None:
    text = run("trainer_hf", "--steps", "4", "--window", "64", "--out", str(tmp_path / "out"))
    true("exported at 4.50 bits" in text and " dB" in text, text)
