"""Quantization-aware distillation: a 4-bit student learns its own high-precision teacher's distribution.

    python examples/qad_tiny.py                                     # the shipped model, under a minute on two cores
    python examples/qad_tiny.py --steps 400 --batch 16 --window 511 --lr 1e-3 --eval-windows 36 --device cuda
    python examples/qad_tiny.py --model gemma-3-270m --steps 300 --batch 8 --window 511 --device cuda --lr 1e-5

Prints the mean KL divergence to the teacher, per token of a held-out text, of plain NVFP4 (weights and activations, a
scale for each tensor), of the student's own formats before training, and after it; beside it a student without
quantization that was trained on the same batches in the same way. --json adds a line with all figures and options to
a file, so that a sweep is one file. With --out the student is written as a checkpoint.
"""

import argparse
import copy
import json
import math
import time
from dataclasses import dataclass
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
from halfbyte.recipe.training import DEFAULT_GRADIENTS
from halfbyte.runtime import save_quantized

PLAIN = TrainingRecipe()  # what the built-in recipe `nvfp4` quantizes
RULES = ("amax", "four_over_six", "search")


def recipe_of(args: argparse.Namespace) -> TrainingRecipe:
    """The student's."""

    def chosen(rule: str, **values: Any) -> hb.NVFP4:
        options = {} if rule == "amax" else {"error": args.error}
        return hb.NVFP4(scale_rule=rule, e4m3_max=args.e4m3_max, **options, **values)

    return TrainingRecipe(
        activations=chosen(args.activation_rule, scaling=args.scaling),
        weights=chosen(args.weight_rule, block=(args.weight_block, 16)),
        gradients=DEFAULT_GRADIENTS if args.backward == "quantized" else None,
        hadamard=args.backward == "quantized",
        backward=args.backward,
        seed=args.seed,
    )


def tokens(tokenizer: Any, name: str, device: str) -> Tensor:
    text = (DATA / "text" / f"{name}.txt").read_text(encoding="utf-8")
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, device=device)


def with_bos(rows: Tensor, tokenizer: Any) -> Tensor:
    if tokenizer.bos_token_id is None:
        return rows
    return torch.cat([torch.full_like(rows[:, :1], tokenizer.bos_token_id), rows], dim=1)


@torch.no_grad()
def evaluate(models: dict[str, Any], teacher: Any, windows: Tensor) -> dict[str, dict[str, float]]:
    """For each model the mean KL(teacher ‖ model) per token, and its perplexity; the teacher runs once per window."""
    sums = {name: [0.0, 0.0] for name in models}
    for model in models.values():
        model.eval()
    for window in windows:
        target = teacher(window[None]).logits
        for name, model in models.items():
            logits = target if model is teacher else model(window[None]).logits
            sums[name][0] += distillation_loss(logits, target).item()
            sums[name][1] += torch.nn.functional.cross_entropy(logits[0, :-1].float(), window[1:]).item()
    count = len(windows)
    return {name: {"kl": kl / count, "perplexity": math.exp(nll / count)} for name, (kl, nll) in sums.items()}


def factor(step: int, args: argparse.Namespace) -> float:
    """Of the learning rate: warm-up, then the schedule down to --final-lr."""
    warmup = max(1, round(args.warmup * args.steps))
    if step < warmup:
        return (step + 1) / warmup
    along = (step - warmup) / max(1, args.steps - warmup)
    falls = {"constant": 1.0, "linear": 1 - along, "cosine": 0.5 * (1 + math.cos(math.pi * along))}
    return args.final_lr + (1 - args.final_lr) * falls[args.schedule]


@dataclass
class Learner:
    """A model in training, with its optimizer and schedule."""

    model: Any
    args: argparse.Namespace

    def __post_init__(self) -> None:
        args = self.args
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), args.lr, tuple(args.betas), args.eps, args.weight_decay, fused=args.device != "cpu"
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: factor(step, args))
        self.run = torch.compile(self.model) if args.compile else self.model
        self.model.train()

    def learn(self, batch: Tensor, target: Tensor) -> Tensor:
        loss = distillation_loss(self.run(batch).logits, target, temperature=self.args.temperature)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip)
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()


def train(models: dict[str, Any], teacher: Any, ids: Tensor, tokenizer: Any, args: argparse.Namespace) -> None:
    """Random windows; all models see the same, and the teacher looks at each batch once for all of them."""
    learners = {name: Learner(model, args) for name, model in models.items()}
    random = torch.Generator().manual_seed(args.seed)
    every = max(1, args.steps // 5)
    for step in range(args.steps):
        starts = torch.randint(len(ids) - args.window, (args.batch,), generator=random).tolist()
        batch = with_bos(torch.stack([ids[s : s + args.window] for s in starts]), tokenizer)
        with torch.no_grad():
            target = teacher(batch).logits
        losses = {name: learner.learn(batch, target) for name, learner in learners.items()}
        if (step + 1) % every == 0:
            shown = ", ".join(f"{name} {loss.item():.5f}" for name, loss in losses.items())
            print(f"  step {step + 1}/{args.steps}  loss of the {shown}", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DATA / "tiny")
    parser.add_argument("--scaling", choices=("tensor", "row"), default="row", help="of the student's activations")
    parser.add_argument("--activation-rule", choices=RULES, default="four_over_six")
    parser.add_argument("--weight-rule", choices=RULES, default="four_over_six")
    parser.add_argument("--weight-block", type=int, choices=(1, 16), default=1, help="rows of a block")
    parser.add_argument("--error", choices=("mae", "mse"), help="that four_over_six and search minimize")
    parser.add_argument("--e4m3-max", type=int, choices=(256, 288, 320, 448), help="default: the rule's own")
    parser.add_argument("--backward", choices=("high_precision", "dequantized", "quantized"), default="dequantized")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=2, help="windows of a step")
    parser.add_argument("--window", type=int, default=128, help="tokens of a training window")
    parser.add_argument("--lr", type=float, default=1e-5, help="after warm-up")
    parser.add_argument("--schedule", choices=("cosine", "linear", "constant"), default="cosine")
    parser.add_argument("--warmup", type=float, default=0.1, help="share of the steps")
    parser.add_argument("--final-lr", type=float, default=0.0, help="share of --lr that the schedule ends at")
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.95))
    parser.add_argument("--eps", type=float, default=1e-8, help="of AdamW: more leaves the small gradients small")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the loss in training; KL is reported at 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--no-control", action="store_true", help="leave out the student without quantization")
    parser.add_argument("--eval-windows", type=int, default=4, help="of 511 tokens of the held-out text")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="a new directory for the student as a checkpoint")
    parser.add_argument("--json", type=Path, help="a file to which one line is added")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    recipe = recipe_of(args)
    logging.disable_progress_bar()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")  # TF32 for what is not quantized, where there is any
    began = time.time()
    tokenizer: Any = AutoTokenizer.from_pretrained(args.model)
    teacher: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device).eval()
    ids, held_out = (tokens(tokenizer, name, args.device) for name in ("train", "evaluation"))
    count = min(args.eval_windows, len(held_out) // 511)
    windows = with_bos(held_out[: count * 511].view(-1, 511), tokenizer)
    student, plain = copy.deepcopy(teacher), copy.deepcopy(teacher)
    report = convert(student, recipe)
    convert(plain, PLAIN)
    before = {"teacher": teacher, "plain NVFP4": plain, "untrained": student}
    results = evaluate(before, teacher, windows)
    del plain, before
    print(f"{len(report.converted)} modules converted, {len(report.left)} left in high precision")
    models = {"student": student} if args.no_control else {"student": student, "control": copy.deepcopy(teacher)}
    train(models, teacher, ids, tokenizer, args)
    after = evaluate(models, teacher, windows)
    results |= {"trained": after.pop("student"), **after}
    for name, values in results.items():
        fall = 1 - values["kl"] / results["plain NVFP4"]["kl"]
        print(f"{name:12} KL to the teacher {values['kl']:.5f} ({fall:.1%} below plain NVFP4's), "
              f"perplexity {values['perplexity']:.4f}")  # fmt: skip
    fall = 1 - results["trained"]["kl"] / results["plain NVFP4"]["kl"]
    seconds = time.time() - began
    print(f"{count} windows, {seconds:.0f} s")
    if args.out:
        written = save_quantized(
            student, args.model, args.out, recipe.options(), dtype=torch.bfloat16, device=args.device
        )
        print(f"{args.out}: {written.bits_per_weight:.2f} bits per quantized weight")
    if args.json:
        options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        line = {"fall": fall, **results, "seconds": seconds, "windows": count, "options": options}
        with args.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
