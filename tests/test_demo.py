"""The demo on the shipped model: three conversions, verified, loaded, compared."""

import io
import json
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from halfbyte import CheckpointError, cli, demo
from halfbyte.checkpoint.verify import Finding, verify_structure

from .check import equal, true

pytest.importorskip("transformers")
NAMES = ["bf16", "NVFP4", "NVFP4 four_over_six", "MXFP8"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "kept"


@pytest.fixture(scope="module")
def rows(kept: Path) -> list[demo.Row]:
    """With one window of text and four new tokens, so that it takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "sample", partial(demo.sample, new_tokens=4))
        return demo.run_demo(kept, count=1)


def test_rows(rows: list[demo.Row]) -> None:
    equal([row.name for row in rows], NAMES)
    bf16, nvfp4, four_over_six, mxfp8 = rows
    true(nvfp4.bytes == four_over_six.bytes < mxfp8.bytes < bf16.bytes, "sizes")
    equal((round(nvfp4.bits_per_weight, 2), round(mxfp8.bits_per_weight, 2)), (4.5, 8.25))
    equal(bf16.relative_error, None)
    true(0.01 < mxfp8.relative_error < four_over_six.relative_error < nvfp4.relative_error < 0.12, "weight errors")
    for row in rows[1:]:
        change = row.perplexity / bf16.perplexity - 1
        true(abs(change) < 0.1 and change != 0, f"{row.name}: {change:+.2%}")
    true(bf16.perplexity < 60, f"{bf16.perplexity}: the shipped model is trained")
    true(all(row.sample.strip() for row in rows), "no text")


def test_the_checkpoints_are_kept(rows: list[demo.Row], kept: Path) -> None:
    equal(sorted(path.name for path in kept.iterdir()), ["mxfp8", "nvfp4", "nvfp4-four_over_six"])
    for path in kept.iterdir():
        equal(list(verify_structure(path)), [])


def test_the_table(rows: list[demo.Row]) -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    demo.print_demo(console, rows)
    text = console.export_text()
    for part in (*NAMES, "perplexity", f"{rows[1].perplexity:.3f}", f"{rows[1].relative_error:.2%}", demo.PROMPT):
        true(part in text, f"{part!r} is not in:\n{text}")


def test_a_place_that_exists_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.setattr(demo, "sample", lambda model, tokenizer: "")
    with pytest.raises(CheckpointError, match="already exists"):
        demo.run_demo(tmp_path / "mine", count=1)
    equal(list((tmp_path / "mine").iterdir()), [])


def test_a_result_that_does_not_verify_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "verify_source", lambda out, source: [Finding("a.weight", "is wrong")])
    monkeypatch.setattr(demo, "sample", lambda model, tokenizer: "")
    with pytest.raises(CheckpointError, match=r"a\.weight: is wrong"):
        demo.run_demo(tmp_path / "kept", count=1)


def test_the_command(monkeypatch: pytest.MonkeyPatch, rows: list[demo.Row]) -> None:
    monkeypatch.setattr(demo, "run_demo", lambda keep, update: rows)
    done = CliRunner().invoke(cli.app, ["demo", "--json"])
    equal(done.exit_code, 0, done.output)
    equal(json.loads(done.stdout), {"rows": [row.to_json() for row in rows]})
    equal(CliRunner().invoke(cli.app, ["demo"]).exit_code, 0)
