"""What README.md, SECURITY.md, docs/ and --help show: commands parse, links lead somewhere, and Python runs."""

import ast
import functools
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command

import halfbyte as hb
from halfbyte.checkpoint.convert import convert
from halfbyte.checkpoint.options import Options
from halfbyte.cli import app
from halfbyte.demo import DATA
from halfbyte.evaluate import load_float32
from halfbyte.nn import read_rules
from halfbyte.recipe import load_recipe

from .check import equal, true

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS: Any = get_command(app)
OTHERS_OPTIONS = {"--nproc-per-node"}  # torchrun's


def pages(function: Any) -> Any:
    return pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)(function)


@functools.cache
def programs() -> str:
    """All that could take an option that a page names."""
    files = [p for folder in ("src", "examples", "benchmarks") for p in (ROOT / folder).rglob("*.py")]
    return "".join(path.read_text() for path in files)


def blocks(page: Path, language: str) -> list[str]:
    return [match["text"] for match in BLOCK.finditer(page.read_text()) if match["language"] == language]


def spans(page: Path) -> list[str]:
    """Inline code; a line's end in it is a space."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", BLOCK.sub("", page.read_text()))]


def command_lines(page: Path) -> Iterator[str]:
    """Whole commands: lines of blocks, fenced or indented."""
    indented = re.findall(r"^ {4}(\S.*)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    for line in [*"".join(blocks(page, "")).splitlines(), *indented]:
        if re.match(r"(torchrun .*-m )?halfbyte ", line):
            yield re.split(r"\s{2,}#| > ", line)[0]


def parses(line: str) -> None:
    """The command exists and takes these options and arguments; nothing is run."""
    name, *arguments = shlex.split(line.partition("halfbyte ")[2])
    true(name in COMMANDS.commands, f"{line}: no such command")
    COMMANDS.commands[name].make_context(name, arguments)


@pages
def test_commands(page: Path) -> None:
    for line in command_lines(page):
        parses(line)


def test_there_are_commands() -> None:
    true(sum(len(list(command_lines(page))) for page in PAGES) > 20, "commands are found")


@pytest.mark.parametrize("name", COMMANDS.commands)
def test_examples_of_help(name: str) -> None:
    examples = re.findall(r"`([^`]+)`", COMMANDS.commands[name].epilog)
    true(examples, f"{name} has examples")
    for line in examples:
        parses(line.partition(" > ")[0])


@pages
def test_options(page: Path) -> None:
    for span in spans(page):
        command = re.match(r"halfbyte (\w+)", span)
        known = OTHERS_OPTIONS | (
            {o for p in COMMANDS.commands[command[1]].params for o in p.opts} if command else set()
        )
        for option in re.findall(r"(?<!\S)--[a-z][\w-]*", span):
            said = option in known if command else option in programs() or option[2:].replace("-", "_") in programs()
            true(said or option in known, f"{page.name}: {span}: no such option as {option}")


def slug(heading: str) -> str:
    """As GitHub makes a heading's anchor."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pages
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text())):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        to = (page.parent / file).resolve() if file else page
        true(to.exists(), f"{page.name}: {target}: no such file")
        if anchor:
            text = BLOCK.sub("", to.read_text())
            anchors = {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
            anchors |= set(re.findall(r'<a (?:id|name)="([^"]+)">', text))
            true(anchor in anchors, f"{page.name}: {target}: no such anchor")


@pages
def test_files(page: Path) -> None:
    for span in spans(page):
        for name in re.findall(r"(?:^|(?<=\s))(?:benchmarks|examples|src|docs|results)/[\w./-]+\.\w+$", span):
            places = (ROOT / name, ROOT / "benchmarks" / name)
            true(any(place.exists() for place in places), f"{page.name}: {span}: no such file")


def resolve(dotted: str) -> None:
    """A module, or an attribute of one."""
    module, _, name = dotted.rpartition(".")
    try:
        importlib.import_module(dotted)
    except ImportError:
        true(module and hasattr(importlib.import_module(module), name), f"no such name as {dotted}")


@pages
def test_python_names_what_there_is(page: Path) -> None:
    for text in blocks(page, "python"):
        for node in ast.walk(ast.parse(text.replace("…", "..."))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("halfbyte"):
                for alias in node.names:
                    resolve(f"{node.module}.{alias.name}")
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in ("hb", "halfbyte")
            ):
                resolve(f"halfbyte.{node.attr}")


def run(page: str, i: int, names: dict[str, Any], smaller: tuple[str, str] = ("", "")) -> dict[str, Any]:
    text = blocks(ROOT / page, "python")[i].replace(*smaller) if smaller[0] else blocks(ROOT / page, "python")[i]
    exec(compile(text, f"{page}, block {i}", "exec"), names)
    return names


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with the shipped model converted to out."""
    monkeypatch.chdir(tmp_path)
    convert(DATA / "tiny", tmp_path / "out", Options())
    return tmp_path / "out"


def test_quickstart(out: Path) -> None:
    names = run("README.md", 0, {}, ("4096", "64"))
    equal((names["q"].packed.shape, names["y"].shape), (torch.Size([64, 32]), torch.Size([64, 64])))
    equal(type(names["model"]).__name__, "Qwen3MoeForCausalLM")


def test_tensor(rng: torch.Generator) -> None:
    names = run("docs/tensor.md", 0, {"hb": hb, "x": torch.randn(32, 64, generator=rng), "fmt": hb.NVFP4()})
    equal(names["q"].shape, torch.Size([32, 64]))


def test_yaml(tmp_path: Path) -> None:
    for page, read in (("docs/recipes.md", load_recipe), ("docs/training.md", read_rules)):
        (text,) = blocks(ROOT / page, "yaml")
        file = tmp_path / "mine.yaml"
        file.write_text(text)
        true(read(str(file)), f"{page}: is read")


def test_training(out: Path) -> None:
    model = load_float32(DATA / "tiny")
    before = [type(module) for module in model.modules()]
    out.rename(out.parent / "another")
    names = run("docs/training.md", 0, {"model": model, "source_dir": DATA / "tiny"})
    true(names["report"].converted, "something was converted")
    equal([type(module) for module in model.modules()], before)
    true((out / "config.json").exists(), "the checkpoint is there")


def test_live_export(out: Path) -> None:
    """The exporter's block, the one that plans once, and a delta of two versions."""
    out.rename(out.parent / "rollout")
    model = hb.load("rollout", activations="none")  # its weights are as good as any
    sent: dict[str, torch.Tensor] = {}
    names = run("docs/rl.md", 0, {"model": model, "send": sent.update})
    prepared = run("docs/rl.md", 4, names)["prepared"]
    again = {name: tensor.clone() for bucket in prepared.export() for name, tensor in bucket.tensors.items()}
    equal(set(again), set(sent))
    names = run("docs/rl.md", 6, {"previous": sent, "current": again})
    equal(set(names["current"]), set(sent))


def test_rollout_as_the_trainer(out: Path) -> None:
    out.rename(out.parent / "rollout")
    from transformers import AutoModelForCausalLM

    trainer = AutoModelForCausalLM.from_pretrained(DATA / "tiny", dtype=torch.bfloat16)
    ids = torch.arange(5, 17)[None]
    names = run("docs/rl.md", 7, {"trainer": trainer, "logits": torch.zeros(1, 12, 8), "ids": ids % 8})
    with torch.no_grad():
        equal(names["rollout"](ids).logits, names["trainer"].eval()(ids).logits)
