"""What importing halfbyte does, and what it leaves alone."""

import ast
import subprocess
import sys
from pathlib import Path

import halfbyte

from .check import equal, true

SOURCE = Path(halfbyte.__file__).parent

PUBLIC = [  # in the order that ruff sorts it (RUF022)
    "MXFP8",
    "NVFP4",
    "CheckpointError",
    "FormatError",
    "HalfbyteError",
    "Policy",
    "QuantizedTensor",
    "ShapeError",
    "SyncError",
    "UnsupportedError",
    "__version__",
    "fake_quantize",
    "fake_quantize_unscaled",
    "grouped_linear",
    "linear",
    "load",
    "quantize",
    "quantize_many",
    "quantize_transpose",
    "swizzle",
    "unswizzle",
]

IMPORT = """
import logging, sys, warnings
import torch

def refuse(*args, **kwargs):
    raise RuntimeError("importing halfbyte initialises CUDA")

torch.cuda._lazy_init = refuse
modules, loggers, filters = set(sys.modules), dict(logging.root.manager.loggerDict), list(warnings.filters)
handlers, level = list(logging.root.handlers), logging.root.level
import halfbyte

def check(condition, message):
    if not condition:
        raise RuntimeError(message)

check(not torch.cuda.is_initialized(), "CUDA is initialised")
new = {name.partition(".")[0] for name in set(sys.modules) - modules}
heavy = new & {"triton", "numba", "transformers", "typer", "rich", "pydantic", "huggingface_hub", "safetensors"}
check(not heavy, f"imports {heavy}")
check(logging.root.handlers == handlers and logging.root.level == level, "changes the root logger")
ours = set(logging.root.manager.loggerDict) - set(loggers)
check(not any(getattr(logging.root.manager.loggerDict[name], "handlers", []) for name in ours), "adds handlers")
check(warnings.filters == filters, "changes the warning filters")
print("done")
"""


def test_import_has_no_effects() -> None:
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", IMPORT], capture_output=True, text=True)
    equal((done.returncode, done.stdout), (0, "done\n"), done.stderr)


def test_public_names() -> None:
    equal(halfbyte.__all__, PUBLIC)
    offered = set(dir(halfbyte))  # by completion
    true(offered >= set(PUBLIC) and not offered & {"Any", "TYPE_CHECKING"}, f"{sorted(offered)}")
    for name in PUBLIC:
        true(hasattr(halfbyte, name), f"{name} is in __all__ only")


def reads_environment(source: str) -> list[int]:
    """Lines that touch os.environ, os.environb, os.getenv or os.getenvb, however imported."""
    names = {"environ", "environb", "getenv", "getenvb"}
    lines = []
    for node in ast.walk(ast.parse(source)):
        attribute = isinstance(node, ast.Attribute) and node.attr in names
        imported = isinstance(node, ast.ImportFrom) and node.module == "os" and any(a.name in names for a in node.names)
        if attribute or imported:
            lines.append(node.lineno)
    return sorted(lines)


def test_no_line_reads_the_environment() -> None:
    files = list(SOURCE.rglob("*.py"))
    true(len(files) >= 10, f"looking in the wrong place: {SOURCE}")
    equal({str(f.relative_to(SOURCE)): lines for f in files if (lines := reads_environment(f.read_text()))}, {})


def test_reads_environment_finds_them() -> None:
    equal(reads_environment("import os\nos.environ['A']\nx = os.getenv\n"), [2, 3])
    equal(reads_environment("from os import path, environb\nimport os as o\no.getenvb(b'A')"), [1, 3])
    equal(reads_environment("import os\nos.path.join('environ')"), [])


def test_version() -> None:
    true(halfbyte.__version__.count(".") == 2, halfbyte.__version__)
