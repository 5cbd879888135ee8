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
    for _ in range(2):
        run("qad_tiny", "--json", str(file), *(("--no-control", "--steps", "1") if file.exists() else ()))
    found, again = map(json.loads, file.read_text().splitlines())
    trained, untrained, plain = (found[name]["kl"] for name in ("trained", "untrained", "plain NVFP4"))
    true(trained < 0.98 * untrained < plain, str(found))
    true(abs(found["fall"] - (1 - trained / plain)) < 1e-12, str(found))
    equal(found["teacher"]["kl"], 0.0)
    true(found["control"]["kl"] < trained, str(found))
    equal([again[name] for name in ("teacher", "plain NVFP4", "untrained")],
          [found[name] for name in ("teacher", "plain NVFP4", "untrained")])  # fmt: skip
    true("control" not in again and again["options"]["steps"] == 1, str(again))


@pytest.mark.slow
def test_trainer(tmp_path: Path) -> None:
    text = run("trainer_hf", "--steps", "4", "--window", "64", "--out", str(tmp_path / "out"))
    true("exported at 4.50 bits" in text and " dB" in text, text)
