"""Quantization-aware training: the shipped model learns on, with 4-bit weights and activations, and is exported.

    python examples/qat_tiny.py [--steps 24] [--backward high_precision|dequantized|quantized] [--out DIR]

Prints the held-out perplexity in bf16, in NVFP4 before and after, and that of the exported checkpoint.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import halfbyte as hb
from halfbyte.demo import DATA
from halfbyte.evaluate import perplexity, windows
from halfbyte.nn import Watcher, convert
from halfbyte.recipe import TrainingRecipe, TransformerEngine
from halfbyte.runtime import save_quantized


def recipe_of(backward: str) -> TrainingRecipe:
    if backward == "quantized":
        return TransformerEngine(disable_2d_quantization=True, row_scaled_activation=True).recipe()
    return TrainingRecipe(activations=hb.NVFP4(scaling="row"), backward=backward, reuse_weights=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--micro-batches", type=int, default=2, help="of a step; the quantized weight serves them all")
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--backward", choices=("high_precision", "dequantized", "quantized"), default="dequantized")
    parser.add_argument("--eval-windows", type=int, default=4)
    parser.add_argument("--out", type=Path, help="a new directory for the checkpoint")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    began = time.time()
    tokenizer: Any = AutoTokenizer.from_pretrained(DATA / "tiny")
    model: Any = AutoModelForCausalLM.from_pretrained(DATA / "tiny", dtype=torch.float32)
    held_out = windows(tokenizer, (DATA / "text" / "evaluation.txt").read_text(encoding="utf-8"), args.eval_windows)
    text = (DATA / "text" / "train.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    results = {"bf16": perplexity(model.eval(), held_out)}
    recipe = recipe_of(args.backward)
    report = convert(model, recipe)
    print(f"{len(report.converted)} modules converted; {[(layer.name, layer.reason) for layer in report.left]}")
    watcher = Watcher(model)
    results["NVFP4"] = perplexity(model, held_out)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    model.train()
    for step in range(args.steps):
        for start in torch.randint(len(ids) - args.window, (args.micro_batches,)).tolist():
            batch = torch.cat([torch.tensor([tokenizer.bos_token_id]), ids[start : start + args.window]])[None]
            (model(batch, labels=batch).loss / args.micro_batches).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        counted = watcher.step()
        if step == 0:
            for name in list(counted)[:4]:
                print(f"  {name}: {counted[name]}")
    watcher.remove()
    results["trained"] = perplexity(model.eval(), held_out)
    with tempfile.TemporaryDirectory() as temporary:
        out = args.out or Path(temporary) / "out"
        save_quantized(model, DATA / "tiny", out, recipe.options())
        loaded = hb.load(out, dtype=torch.float32, activations="row")
        results["exported"] = perplexity(loaded, held_out)
    print("perplexity: " + ", ".join(f"{name} {value:.3f}" for name, value in results.items()))
    print(f"{time.time() - began:.0f} s")
    if args.json:
        args.json.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
