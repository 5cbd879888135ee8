"""Quantization-aware distillation: a 4-bit student learns its own high-precision teacher's distribution.

    python examples/qad_tiny.py                                     # the shipped model, under a minute on two cores
    python examples/qad_tiny.py --steps 400 --batch 8 --window 511 --lr 1e-4 --device cuda
    python examples/qad_tiny.py --model gemma-3-270m --steps 300 --batch 8 --window 511 --device cuda --lr 1e-5

Prints the mean KL divergence to the teacher, per token of a held-out text, of plain NVFP4 (weights and activations) and
after training; beside it a student without quantization that was trained in the same way. With --out the student is
written as a checkpoint.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import halfbyte as hb
from halfbyte.demo import DATA
from halfbyte.nn import convert, distillation_loss
from halfbyte.recipe import TrainingRecipe
from halfbyte.runtime import save_quantized

RECIPE = TrainingRecipe(
    activations=hb.NVFP4(scaling="row", scale_rule="four_over_six"),
    weights=hb.NVFP4(scale_rule="four_over_six"),
    backward="dequantized",
)
PLAIN = TrainingRecipe(activations=hb.NVFP4(scaling="row"))


def tokens(tokenizer: Any, name: str, device: str) -> Tensor:
    text = (DATA / "text" / f"{name}.txt").read_text(encoding="utf-8")
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, device=device)


def with_bos(rows: Tensor, tokenizer: Any) -> Tensor:
    if tokenizer.bos_token_id is None:
        return rows
    return torch.cat([torch.full_like(rows[:, :1], tokenizer.bos_token_id), rows], dim=1)


@torch.no_grad()
def divergence(student: Any, teacher: Any, windows: Tensor) -> float:
    """Mean KL(teacher ‖ student) per token."""
    student.eval()
    losses = [distillation_loss(student(w[None]).logits, teacher(w[None]).logits).item() for w in windows]
    return sum(losses) / len(losses)


def train(student: Any, teacher: Any, ids: Tensor, tokenizer: Any, args: argparse.Namespace) -> None:
    """AdamW with warm-up and cosine decay, on random windows; the same ones for every student."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, weight_decay=0.0, betas=(0.9, 0.95))
    warmup = max(1, args.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(1, step / args.steps))))
    )
    random = torch.Generator().manual_seed(args.seed)
    student.train()
    for step in range(args.steps):
        starts = torch.randint(len(ids) - args.window, (args.batch,), generator=random).tolist()
        batch = with_bos(torch.stack([ids[s : s + args.window] for s in starts]), tokenizer)
        with torch.no_grad():
            target = teacher(batch).logits
        loss = distillation_loss(student(batch).logits, target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, args.steps // 5) == 0:
            print(f"  step {step + 1}/{args.steps}  loss {loss.item():.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DATA / "tiny")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--window", type=int, default=128, help="tokens of a training sequence")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-windows", type=int, default=4, help="of 511 tokens of the held-out text")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="a new directory for the student as a checkpoint")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_float32_matmul_precision("high")  # TF32 for what is not quantized, where there is any
    began = time.time()
    tokenizer: Any = AutoTokenizer.from_pretrained(args.model)
    teacher: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device).eval()
    ids, held_out = (tokens(tokenizer, name, args.device) for name in ("train", "evaluation"))
    windows = with_bos(held_out[: args.eval_windows * 511].view(-1, 511), tokenizer)
    student, control, plain = (copy.deepcopy(teacher) for _ in range(3))
    report = convert(student, RECIPE)
    convert(plain, PLAIN)
    results = {"plain NVFP4": divergence(plain, teacher, windows), "untrained": divergence(student, teacher, windows)}
    print(f"{len(report.converted)} modules converted, {len(report.left)} left in high precision")
    print(f"KL to the teacher: plain NVFP4 {results['plain NVFP4']:.5f}, 4over6 {results['untrained']:.5f}")
    print("the student:")
    train(student, teacher, ids, tokenizer, args)
    results["trained"] = divergence(student, teacher, windows)
    print("the control, without quantization:")
    train(control, teacher, ids, tokenizer, args)
    results["control"] = divergence(control, teacher, windows)
    results["fall"] = 1 - results["trained"] / results["plain NVFP4"]
    print(f"KL to the teacher: trained {results['trained']:.5f} ({results['fall']:.0%} below plain NVFP4's), "
          f"control {results['control']:.5f}, {time.time() - began:.0f} s")  # fmt: skip
    if args.out:
        written = save_quantized(
            student, args.model, args.out, RECIPE.options(), dtype=torch.bfloat16, device=args.device
        )
        print(f"{args.out}: {written.bits_per_weight:.2f} bits per quantized weight")
    if args.json:
        args.json.write_text(json.dumps({**results, "steps": args.steps, "seconds": time.time() - began}, indent=1))


if __name__ == "__main__":
    main()
