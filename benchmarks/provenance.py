"""What a file of results says of where it comes from."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "torch", "triton", "numba", "llvmlite", "numpy", "nvidia-modelopt", "compressed-tensors", "transformers",
    "humming-kernels",
)  # fmt: skip


def provenance(commit: str | None) -> dict[str, object]:
    def git(*words: str) -> str:
        try:
            return subprocess.run(["git", *words], capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip()
        except FileNotFoundError:
            return ""

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    changed = bool(git("status", "--porcelain", "--", ":/src", ":/benchmarks"))
    return {
        "commit": commit or git("rev-parse", "HEAD") or "unknown",
        "uncommitted_changes": None if commit else changed,
        "versions": versions,
    }
