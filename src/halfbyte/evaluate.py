"""Perplexity, the setting of every figure here: `python -m halfbyte.evaluate MODEL TEXT [WINDOWS [ACTIVATIONS]]`.

Float32; the text tokenized once without special tokens, cut into non-overlapping windows of 511 tokens, each preceded
by the tokenizer's BOS if it has one; the mean negative log-likelihood of those 511 tokens, over the first WINDOWS
(default 16) windows. ACTIVATIONS of a quantized model: "stored" (default), "none" or "row", as `halfbyte.load` takes
them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from .checkpoint.config import is_quantized
from .checkpoint.shards import read_json
from .errors import CheckpointError

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


def main(arguments: Sequence[str]) -> None:
    """Print the perplexity of a model directory on a text file."""
    from transformers import AutoTokenizer

    path, text = Path(arguments[0]), Path(arguments[1]).read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    batches = windows(tokenizer, text, int(arguments[2]) if len(arguments) > 2 else 16)
    activations = cast("Activations", arguments[3]) if len(arguments) > 3 else "stored"
    print(f"{len(batches)} windows, perplexity {perplexity(load_float32(path, activations), batches):.4f}")


if __name__ == "__main__":
    main(sys.argv[1:])
