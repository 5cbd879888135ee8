"""Windows of tokens from text, jsonl and chats; and everything that is refused."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import halfbyte
from halfbyte import CheckpointError, UnsupportedError
from halfbyte.calib.data import load_windows, shipped

from ..check import equal, same_bits, true


class Letters:
    """A tokenizer of characters, with a BOS."""

    bos_token_id: int | None = 1
    chat_template: str | None = "yes"

    def __call__(self, text: str, **_: Any) -> Any:
        return SimpleNamespace(input_ids=[ord(c) for c in text])

    def apply_chat_template(self, messages: list[Any], tokenize: bool) -> str:
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


def write(where: Path, name: str, text: str) -> Path:
    (where / name).write_text(text)
    return where / name


def test_windows_are_spread_over_the_text(tmp_path: Path) -> None:
    text = "".join(chr(65 + i) for i in range(40))
    ids = load_windows(write(tmp_path, "a.txt", text), Letters(), 128, 3, 11).ids
    equal(tuple(ids.shape), (3, 11))
    equal(ids[:, 0].tolist(), [1, 1, 1])
    equal(ids[:, 1].tolist(), [65, 80, 95])
    equal(ids[2, 1:].tolist(), list(range(95, 105)))


def test_records(tmp_path: Path) -> None:
    lines = [{"text": "abc"}, {"messages": [{"role": "u", "content": "hi"}]}]
    path = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n")
    ids = load_windows(path, Letters(), 128, 1, 9).ids
    equal("".join(map(chr, ids[0, 1:].tolist())), "abc<u>hi")


def test_digest_depends_on_the_tokens(tmp_path: Path) -> None:
    a = load_windows(write(tmp_path, "a.txt", "abcdefgh"), Letters(), 128, 1, 5)
    b = load_windows(write(tmp_path, "b.txt", "abcdefgh"), Letters(), 128, 1, 5)
    c = load_windows(write(tmp_path, "c.txt", "abcdxfgh"), Letters(), 128, 2, 5)
    true(a.digest == b.digest != c.digest, "digests")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "no text"),
        ("a.txt", "abc", "3 tokens, but 2 samples of 9 need 18"),
        ("a.txt", "a" * 12, "at most --samples 1"),
        ("a.txt", "a" * 20 + "é", "belong to this model"),
        ("a.csv", "a", "not read"),
        ("a.jsonl", '{"text": "a"}\n{"prompt": "b"}\n', r"line 2: needs \"text\""),
        ("a.jsonl", '{"text": \n', "line 1: not JSON"),
    ],
)
def test_bad_data(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_windows(write(tmp_path, name, text), Letters(), 128, 2, 10)


def test_more_bad_data(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        load_windows(tmp_path / "none.txt", Letters(), 128)
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(CheckpointError, match="UTF-8"):
        load_windows(tmp_path / "b.txt", Letters(), 128)
    with pytest.raises(CheckpointError, match="at least 1 window"):
        load_windows(tmp_path / "b.txt", Letters(), 128, 0)
    plain = Letters()
    plain.chat_template = None
    path = write(tmp_path, "c.jsonl", '{"messages": []}')
    with pytest.raises(CheckpointError, match="no chat template"):
        load_windows(path, plain, 128)


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path, lines = tmp_path / "a.parquet", tmp_path / "a.jsonl"
    parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["abcd", "efgh"]}), path, row_group_size=1)
    equal(load_windows(path, Letters(), 128, 1, 9).ids[0, 1:].tolist(), [ord(c) for c in "abcdefgh"])
    talks = [[{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": "answer"}] for i in (1, 2)]
    parquet.write_table(pyarrow.table({"messages": talks}), path, compression="zstd")
    lines.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    same_bits(load_windows(path, Letters(), 128, 2, 9).ids, load_windows(lines, Letters(), 128, 2, 9).ids)
    parquet.write_table(pyarrow.table({"text": ["abcd", None]}), path)
    with pytest.raises(CheckpointError, match=r"a.parquet, row 2"):
        load_windows(path, Letters(), 128)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="not readable as parquet"):
        load_windows(path, Letters(), 128)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UnsupportedError, match="pip install pyarrow, or give jsonl"):
        load_windows(tmp_path / "a.parquet", Letters(), 128)


def test_the_shipped_set_is_not_what_is_evaluated() -> None:
    evaluation = (Path(halfbyte.__file__).parent / "data" / "text" / "evaluation.txt").read_text()
    paragraphs = {p.strip() for p in evaluation.split("\n\n")}
    text = shipped()
    equal([p for p in text.split("\n\n") if p.strip() in paragraphs], [])
    true(len(text) > 25_000, "most of it is left")
    train = (Path(halfbyte.__file__).parent / "data" / "text" / "train.txt").read_text()
    true(text[:2000] not in train, "what the tiny model was trained on")


def test_windows_of_the_shipped_text_overlap() -> None:
    """It is small: eight windows may share a token, no more."""
    characters = len(shipped())
    ids = load_windows(None, Letters(), 1 << 21, 64, characters // 8).ids
    equal(tuple(ids.shape), (64, characters // 8))
    true(bool((ids[0, 400:500] != ids[1, 400:500]).any()), "all windows are the same")
    with pytest.raises(CheckpointError, match="give more text with --data, or at most --samples 64"):
        load_windows(None, Letters(), 1 << 21, 66, characters // 8)
