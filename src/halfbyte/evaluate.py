"""Perplexity, the setting of every figure here: `python -m halfbyte.evaluate MODEL TEXT [WINDOWS [ACTIVATIONS]]`.

Float32; the text tokenized once without special tokens, cut into non-overlapping windows of 511 tokens, each preceded
by the tokenizer's BOS if it has one; the mean negative log-likelihood of those 511 tokens, over the first WINDOWS
(default 16) windows. ACTIVATIONS of a quantized model: "stored" (default), "none" or "row", as `halfbyte.load` takes
them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checkpoint.config import is_quantized
from .checkpoint.shards import read_json
from .errors import CheckpointError, HalfbyteError

if TYPE_CHECKING:
    from .serving import Activations

WINDOW = 511


def windows(tokenizer: Any, text: str, count: int = 16) -> list[Tensor]:
    """Token ids, each [1, 511] or, with a BOS, [1, 512]."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    found = min(count, len(ids) // WINDOW)
    if found == 0:
        raise CheckpointError(f"the text has {len(ids)} tokens; perplexity needs at least {WINDOW}")
    return [torch.tensor([bos + ids[i * WINDOW : (i + 1) * WINDOW]]) for i in range(found)]


@torch.no_grad()
def perplexity(model: Any, batches: Sequence[Tensor]) -> float:
    """exp of the mean negative log-likelihood of every token but each window's first."""
    total, count = 0.0, 0
    for ids in batches:
        log_p = model(ids).logits[:, :-1].float().log_softmax(-1)
        nll = -log_p.gather(-1, ids[:, 1:, None])
        total += float(nll.sum())
        count += nll.numel()
    return math.exp(total / count)


def load_float32(path: Path, activations: Activations = "stored") -> Any:
    """Any model directory as a float32 model: quantized ones through `halfbyte.load`, others through transformers."""
    if is_quantized(read_json(path / "config.json")):
        from .runtime import load

        return load(path, dtype=torch.float32, activations=activations)
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM
    try:
        loaded = model.from_pretrained(path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: transformers cannot load it: {str(error).splitlines()[0]}") from error
    return loaded.eval()


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the perplexity of a model directory on a text file; what cannot be read ends with exit code 2."""
    parser = argparse.ArgumentParser("python -m halfbyte.evaluate", description="Perplexity of a model on a text.")
    parser.add_argument("model", type=Path, help="directory of a model, quantized or not")
    parser.add_argument("text", type=Path, help="UTF-8 text")
    parser.add_argument("windows", type=int, nargs="?", default=16, help="of 511 tokens, at most (16)")
    parser.add_argument("activations", nargs="?", default="stored", choices=("stored", "none", "row"))
    given = parser.parse_args(arguments)
    try:
        read_json(given.model / "config.json")  # transformers would look for a missing directory on the hub
        text = given.text.read_text(encoding="utf-8")
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(given.model, trust_remote_code=False)
        batches = windows(tokenizer, text, given.windows)
        result = perplexity(load_float32(given.model, given.activations), batches)
    except UnicodeDecodeError as error:
        parser.error(f"{given.text}: not UTF-8 text ({error})")
    except (HalfbyteError, OSError) as error:
        parser.error(str(error))
    print(f"{len(batches)} windows, perplexity {result:.4f}")


if __name__ == "__main__":
    main()
