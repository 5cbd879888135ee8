"""Runs `test_triton_*.py` in Triton's interpreter, in a process of its own: Triton decides at decoration."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..check import true

pytest.importorskip("triton")


FILES = [file.name for file in sorted(Path(__file__).parent.glob("test_triton_*.py")) if file != Path(__file__)]


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_kernels_in_the_interpreter(file: str) -> None:
    root = Path(__file__).parents[2]
    optimize = ["-O"] if sys.flags.optimize else []
    # The interpreter is numpy: it warns where floats overflow or are NaN, as the nasty inputs make them.
    command = [
        sys.executable, *optimize, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
        "-W", "ignore::RuntimeWarning", "-W", "ignore::DeprecationWarning",
        str(Path(__file__).with_name(file)),
    ]  # fmt: skip
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=900)
    true(done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:])
