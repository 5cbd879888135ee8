"""The main job on the model that ships with the package: convert it in several ways, load each back, compare."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .checkpoint.convert import convert
from .checkpoint.plan import Options
from .checkpoint.recompute import verify_source
from .checkpoint.verify import verify_structure
from .errors import CheckpointError, UnsupportedError
from .evaluate import load_float32, perplexity, windows
from .formats import MXFP8, NVFP4, Format
from .report.console import size

DATA = Path(str(files("halfbyte"))) / "data"
PROMPT = 'The "while" statement'
FORMATS: dict[str, Format] = {
    "NVFP4": NVFP4(),
    "NVFP4 four_over_six": NVFP4(scale_rule="four_over_six"),
    "MXFP8": MXFP8(),
}


@dataclass(frozen=True)
class Row:
    """One model of the comparison; the first row is the original and has no error."""

    name: str
    bytes: int
    bits_per_weight: float
    relative_error: float | None
    perplexity: float
    sample: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def run_demo(keep: Path | None, update: Callable[[str], None] = lambda text: None, count: int = 36) -> list[Row]:
    """Convert, verify, load and evaluate; `keep` is a new directory for the checkpoints, `count` the text windows.

    Raises:
        CheckpointError: `keep` exists, or a result does not verify.
        UnsupportedError: transformers is not installed.
    """
    if keep is not None and keep.exists():
        raise CheckpointError(f"{keep}: already exists; choose another directory or remove it")
    for third_party in ("torchao", "torch.utils._pytree"):  # transformers imports them; their warnings are not ours
        logging.getLogger(third_party).setLevel(logging.ERROR)
    try:
        from transformers import AutoTokenizer
        from transformers.utils import logging as hf_logging
    except ImportError as error:
        raise UnsupportedError("the demo runs models with transformers: pip install 'halfbyte[hf]'") from error
    progress_bars: Any = hf_logging
    progress_bars.disable_progress_bar()
    source = DATA / "tiny"
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    batches = windows(tokenizer, (DATA / "text" / "evaluation.txt").read_text(encoding="utf-8"), count)
    weights = (source / "model.safetensors").stat().st_size
    update("bf16: evaluating")
    model = load_float32(source)
    rows = [Row("bf16", weights, 16.0, None, perplexity(model, batches), sample(model, tokenizer))]
    with _directory(keep) as directory:
        for name, fmt in FORMATS.items():
            output = directory / name.lower().replace(" ", "-")
            update(f"{name}: converting")
            report = convert(source, output, Options(format=fmt))
            update(f"{name}: verifying")
            for finding in (*verify_structure(output), *verify_source(output, source)):
                raise CheckpointError(f"{output}: {finding}")
            update(f"{name}: evaluating")
            model = load_float32(output)
            rows.append(
                Row(
                    name,
                    report.output_bytes,
                    report.bits_per_weight,
                    report.relative_error(),
                    perplexity(model, batches),
                    sample(model, tokenizer),
                )
            )
    return rows


@torch.no_grad()
def sample(model: Any, tokenizer: Any, new_tokens: int = 40) -> str:
    """Greedy continuation of a prompt."""
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    generated = model.generate(ids, max_new_tokens=new_tokens, do_sample=False, attention_mask=torch.ones_like(ids))
    return str(tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True))


def print_demo(console: Console, rows: list[Row]) -> None:
    """One table, and how to go on."""
    table = Table(title="A tiny Qwen3-MoE, converted, verified, loaded back", title_justify="left")
    table.add_column("model", no_wrap=True)
    for column in ("size", "bits/weight", "weight error", "perplexity"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        error = "" if row.relative_error is None else f"{row.relative_error:.2%}"
        change = "" if row is rows[0] else f" ({row.perplexity / rows[0].perplexity - 1:+.2%})"
        table.add_row(
            row.name,
            size(row.bytes),
            f"{row.bits_per_weight:.2f}",
            error,
            f"{row.perplexity:.3f}{change}",
        )
    console.print(table)
    console.print(f"What each writes after {PROMPT!r}:")
    for row in rows:
        console.print(Text.assemble((f"{row.name:>20}  ", "bold"), (" ".join(row.sample.split()), "dim")))
    console.print("Every checkpoint verified against its source, byte for byte. Next: halfbyte convert MODEL OUT_DIR")


@contextlib.contextmanager
def _directory(keep: Path | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="halfbyte-demo-") as temporary:
            yield Path(temporary)
        return
    keep.mkdir(parents=True)
    yield keep
