"""What a results file says of the run that made it: commit, hardware, versions."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import halfbyte

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "triton", "numba", "llvmlite", "numpy", "transformers", "nvidia-modelopt", "compressed-tensors")


def provenance(device: str, commit: str | None = None) -> dict[str, object]:
    """commit: what to record where there is no git; whether it had changes is then unknown."""
    return {
        "commit": commit or _git("rev-parse", "HEAD") or "unknown",
        "uncommitted_changes": None if commit else bool(_git("status", "--porcelain", "--", ":/src", ":/benchmarks")),
        "versions": versions(),
        "hardware": hardware(device),
    }


def versions() -> dict[str, str]:
    """Python's, and those of the packages that are installed."""
    found = {"python": platform.python_version(), "halfbyte": halfbyte.__version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware(device: str) -> dict[str, object]:
    """What the run's device is; a CPU by its model, and the threads that torch has."""
    if torch.device(device).type == "cuda":
        return {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return {"cpu": _cpu_model(), "threads": torch.get_num_threads()}


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return platform.processor()
    lines = [line for line in text.splitlines() if line.startswith("model name")]
    return lines[0].partition(":")[2].strip() if lines else platform.processor()


def _git(*words: str) -> str:
    try:
        return subprocess.run(["git", *words], capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip()
    except FileNotFoundError:
        return ""
