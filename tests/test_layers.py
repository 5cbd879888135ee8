"""Dependencies point one way, as docs/architecture.md draws them; and tests hold under `python -O`."""

import ast
from pathlib import Path
from typing import NamedTuple

import pytest

import halfbyte

from .check import equal, true

SOURCE = Path(halfbyte.__file__).parent
TESTS = Path(__file__).parent

BASE = {"formats", "errors"}
# Part of the package → the parts that it may import. What is not listed is bound by the rules below only.
ALLOWED = {
    "errors": set(),
    "formats": {"errors"},
    "numerics": BASE,
    "kernels": BASE,
    "ops": BASE | {"numerics", "kernels"},
    "tensor": BASE | {"ops"},
    "functional": BASE | {"ops", "tensor"},
    "linear": BASE | {"ops", "tensor"},
    "names": set(),
    "experts": set(),
    "invariant": BASE | {"ops", "experts"},
    "served": BASE | {"ops", "tensor"},
    "version": set(),
    "policy": BASE | {"names"},
    "checkpoint": BASE | {"ops", "tensor", "functional", "policy", "names", "version"},
    "recipe": BASE | {"policy", "names", "checkpoint"},
    "calib": BASE | {"ops", "tensor", "functional", "policy", "names", "version", "checkpoint", "recipe"},
    "nn": BASE | {"ops", "policy", "names", "recipe", "experts", "invariant"},
    "report": BASE | {"numerics", "version", "checkpoint", "recipe", "calib"},
    "export": BASE | {"ops", "tensor", "functional", "policy", "names", "version", "checkpoint"},
}


class Import(NamedTuple):
    part: str  # of halfbyte: "ops", "numerics", …; "" is the root itself
    lazy: bool  # inside a function


def read_imports(source: str, package: tuple[str, ...]) -> list[Import]:
    """The parts of halfbyte that a module of `package` (a path below halfbyte) imports."""
    found = []

    def visit(node: ast.AST, lazy: bool) -> None:
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            stem = list(("halfbyte", *package)[: len(package) + 2 - node.level]) if node.level else []
            stem += node.module.split(".") if node.module else []
            targets = [".".join([*stem, alias.name]) for alias in node.names]
        for target in targets:
            parts = [*target.split("."), ""]
            if parts[0] == "halfbyte":
                known = (SOURCE / parts[1]).is_dir() or (SOURCE / f"{parts[1]}.py").is_file() or parts[1] in ALLOWED
                found.append(Import(parts[1] if known else "", lazy))
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, lazy)

    visit(ast.parse(source), False)
    return found


def all_imports() -> list[tuple[str, str, Import]]:
    """(file, its part, import) for everything in the package; imports within a part are left out."""
    out = []
    for file in sorted(SOURCE.rglob("*.py")):
        place = file.relative_to(SOURCE)
        part = place.parts[0].removesuffix(".py")
        out += [(str(place), part, i) for i in read_imports(file.read_text(), place.parts[:-1]) if i.part != part]
    return out


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_layers(part: str) -> None:
    wrong = [f"{file} imports {i.part or 'halfbyte'}" for file, p, i in all_imports() if p == part]
    wrong = [w for w in wrong if w.split(" imports ")[1] not in ALLOWED[part]]
    equal(wrong, [])


def test_only_ops_imports_kernels_and_lazily() -> None:
    equal([f"{file}: {i}" for file, p, i in all_imports() if i.part == "kernels" and (p != "ops" or not i.lazy)], [])


def test_nothing_imports_cli() -> None:
    equal([file for file, p, i in all_imports() if i.part == "cli" and p != "__main__"], [])


def test_only_runtime_joins_checkpoint_and_nn() -> None:
    uses: dict[str, set[str]] = {}
    for file, _, i in all_imports():
        uses.setdefault(file, set()).add(i.part)
    both = [file for file, parts in uses.items() if {"checkpoint", "nn"} <= parts]
    equal([file for file in both if file not in ("runtime.py", "cli.py", "__init__.py")], [])
    equal([file for file, parts in uses.items() if file.startswith("nn/") and parts & {"checkpoint", "export"}], [])


def test_read_imports_sees_every_spelling() -> None:
    def parts(source: str, *package: str) -> list[tuple[str, bool]]:
        return [tuple(i) for i in read_imports(source, package)]

    equal(parts("from . import ops\nfrom .formats import NVFP4"), [("ops", False), ("formats", False)])
    equal(
        parts("from ..formats import NVFP4\nfrom . import e2m1", "numerics"), [("formats", False), ("numerics", False)]
    )
    equal(parts("import halfbyte.kernels.quantize as q\nimport torch, os.path"), [("kernels", False)])
    equal(parts("from halfbyte import ops, NVFP4\nimport halfbyte"), [("ops", False), ("", False), ("", False)])
    equal(parts("def f():\n    from .kernels import cpu"), [("kernels", True)])
    equal(parts("if True:\n    from ..kernels import cpu", "nn"), [("kernels", False)])
    equal(parts("from .. import __version__", "checkpoint"), [("", False)])


def test_the_package_is_read() -> None:
    true(("tensor/__init__.py", "tensor", Import("ops", False)) in all_imports(), "no imports found")


def bare_asserts(source: str) -> list[int]:
    return [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)]


def test_tests_compare_with_functions() -> None:
    """`python -O` drops assert statements; tests/check.py raises."""
    files = {str(file.relative_to(TESTS)): file.read_text() for file in TESTS.rglob("*.py")}
    true(len(files) > 15, f"looking in the wrong place: {TESTS}")
    equal({name: lines for name, source in files.items() if (lines := bare_asserts(source))}, {})
    equal(bare_asserts("x = 1\nassert x == 1, 'x'\n"), [2])
