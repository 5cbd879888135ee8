"""Calibration data: text in, windows of token ids out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, UnsupportedError

SHIPPED_OVERLAP = 8  # windows of the shipped text that may share a token: it is small, and does as well (docs)
SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")


@dataclass(frozen=True, eq=False)
class Windows:
    """Token ids (samples, sequence_length), int64, and what they were made from."""

    ids: Tensor
    source: str

    @property
    def digest(self) -> str:
        """SHA-256 of the token ids."""
        return hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()


def shipped() -> str:
    """The small calibration set that comes with halfbyte: the calibration text, without evaluation text.

    Topics of the evaluation text are not among its own, but some paragraphs stand in several topics: those are left
    out.
    """
    folder = Path(str(files("halfbyte"))) / "data" / "text"
    calibration, evaluation = (_read(folder / f"{name}.txt").split("\n\n") for name in ("calibration", "evaluation"))
    evaluated = {" ".join(paragraph.split()) for paragraph in evaluation}
    return "\n\n".join(p for p in calibration if " ".join(p.split()) not in evaluated)


def load_windows(
    path: Path | None, tokenizer: Any, vocabulary: int, samples: int = 64, sequence_length: int = 512
) -> Windows:
    """Cut a text, jsonl or parquet file into windows, spread evenly over all of it.

    Each window starts with the tokenizer's BOS, if it has one. Documents follow each other in one stream of tokens.
    Windows of a file do not overlap; those of the shipped text do, where it is too short for so many.

    Args:
        path: a text file, or one of records with a "text" or with "messages" for the tokenizer's chat template; None
            for the text that comes with halfbyte.
        tokenizer: as transformers' AutoTokenizer gives it.
        vocabulary: number of the model's token ids.
        samples, sequence_length: how many windows, and tokens in each, BOS included.

    Raises:
        CheckpointError: the file cannot be read, is empty or too short, or the tokenizer does not fit.
        UnsupportedError: a parquet file without pyarrow.
    """
    if samples < 1 or sequence_length < 2:
        raise CheckpointError(f"samples={samples}, sequence_length={sequence_length}: at least 1 window of 2 tokens")
    ids: list[int] = []
    for text in [shipped()] if path is None else _documents(path, tokenizer):
        ids += tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    where = "the shipped text" if path is None else str(path)
    if not ids:
        raise CheckpointError(f"{where}: there is no text in it")
    if max(ids) >= vocabulary:
        raise CheckpointError(
            f"{where}: token {max(ids)} is beyond the model's vocabulary of {vocabulary}; the tokenizer does not "
            "belong to this model"
        )
    bos = [] if getattr(tokenizer, "bos_token_id", None) is None else [int(tokenizer.bos_token_id)]
    length = sequence_length - len(bos)
    uses = SHIPPED_OVERLAP if path is None else 1
    if len(ids) < length or uses * len(ids) < samples * length:
        fit = uses * len(ids) // length if len(ids) >= length else 0
        needed = max(length, -(-samples * length // uses))
        raise CheckpointError(
            f"{where}: {len(ids)} tokens, but {samples} samples of {length} need {needed}; give more text"
            + (" with --data, " if path is None else ", ")
            + (f"or at most --samples {fit}" if fit else f"or a --sequence-length of at most {len(ids)}")
        )
    stride = (len(ids) - length) // max(samples - 1, 1)
    windows = [bos + ids[i * stride : i * stride + length] for i in range(samples)]
    return Windows(torch.tensor(windows), where)


def _documents(path: Path, tokenizer: Any) -> Iterator[str]:
    match path.suffix:
        case ".jsonl":
            for number, line in enumerate(_read(path).splitlines(), 1):
                if line.strip():
                    yield _text(_json(line, path, number), tokenizer, f"{path}, line {number}")
        case ".parquet":
            for number, row in enumerate(_parquet(path), 1):
                yield _text(row, tokenizer, f"{path}, row {number}")
        case ".txt" | ".md" | "":
            yield _read(path)
        case other:
            raise CheckpointError(f"{path}: {other} files are not read; give {', '.join(SUFFIXES)}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not readable as UTF-8 text ({error})") from error


def _json(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}, line {number}: not JSON ({error})") from error


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UnsupportedError(f"{path}: reading parquet needs pyarrow: pip install pyarrow, or give jsonl") from error
    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's errors are subclasses of these
        raise CheckpointError(f"{path}: not readable as parquet ({error})") from error
    return rows


def _text(record: Any, tokenizer: Any, where: str) -> str:
    if isinstance(record, dict):
        if isinstance(record.get("text"), str):
            return str(record["text"])
        if isinstance(record.get("messages"), list):
            return _chat(record["messages"], tokenizer, where)
    raise CheckpointError(f'{where}: needs "text" (a string) or "messages" (a list of chat messages)')


def _chat(messages: list[Any], tokenizer: Any, where: str) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise CheckpointError(f'{where}: has "messages", but the model\'s tokenizer has no chat template; give "text"')
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # templates raise what they like
        raise CheckpointError(f"{where}: the chat template refuses it ({error})") from error
