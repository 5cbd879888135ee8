"""Reinforcement learning in 4 bits: GRPO on the shipped model, with a rollout process and a training process.

    python examples/grpo_tiny.py                                  # NVFP4, a few minutes on two cores
    python examples/grpo_tiny.py --device cuda --variants all --seeds 0 1 --parallel 7 --steps 60
    python examples/grpo_tiny.py --short                          # two steps, to see that it runs

The task is counting modulo 3: a token is right if its id is the one before plus one, modulo 3; the reward of a sample
is the share of its tokens that are. An untrained model gets a third.

The rollout process loads a checkpoint that halfbyte converted, quantizes inputs row by row, as engines do, and
generates with a KV cache. The trainer computes with `halfbyte.nn` on bf16 parameters; their float32 masters are the
optimizer's. Each step weights go over as the 4-bit codes and scales of `halfbyte.export`, and samples come back with
their log-probabilities. Advantages are relative to the samples of the same prompt; the loss is clipped by the ratio of
the trainer's probabilities to the rollout's. So what the two sides compute differently goes into the loss. It is
measured before each optimizer step, where both have the same weights: |log p(trainer) − log p(rollout)|.

Variants: bf16, and nvfp4 or 4over6 (a rule for weights) with one of three backward modes; --batch-invariant makes the
difference exactly 0. One JSON line for each step goes to OUT/VARIANT-SEED.jsonl; grpo_results.py plots them.
"""

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

import halfbyte as hb
from grpo_results import describe, read_lines, summary
from halfbyte.checkpoint.convert import convert
from halfbyte.checkpoint.options import Options
from halfbyte.demo import DATA
from halfbyte.export import Bucket, Exporter, Piece, Receiver, Sender, connect, headers
from halfbyte.invariant import batch_invariant, enable
from halfbyte.nn import convert as convert_modules
from halfbyte.recipe import TrainingRecipe, TransformerEngine

SOURCE = DATA / "tiny"
MODULUS = 3
CLIP = (0.2, 0.28)
BACKWARDS = ("high_precision", "dequantized", "quantized")
VARIANTS = ("bf16", *(f"{name}-{backward}" for name in ("nvfp4", "4over6") for backward in BACKWARDS))
TRAINER, ROLLOUT = 0, 1
TIMEOUT = 600.0  # seconds that one process may keep the other waiting, compiling its kernels included


@dataclass(frozen=True)
class Settings:
    """One run.

    Attributes:
        variant, seed: of VARIANTS; of prompts, sampling and stochastic rounding.
        steps: weight syncs, each with one batch of samples.
        prompts, group: prompts of a batch, and samples of each.
        prompt_tokens, new_tokens: lengths; <bos> is among the first.
        epochs: optimizer steps on each batch.
        lr: AdamW's.
        device: of both processes.
        dtype: of parameters and activations that are not quantized.
        batch_invariant: both sides compute what they do for a token in one fixed order, so that they agree bit for bit.
        threads: of each process.
    """

    variant: str = "nvfp4-dequantized"
    seed: int = 0
    steps: int = 60
    prompts: int = 4
    group: int = 8
    prompt_tokens: int = 8
    new_tokens: int = 12
    epochs: int = 1
    lr: float = 3e-4
    device: str = "cpu"
    dtype: torch.dtype = torch.bfloat16
    batch_invariant: bool = False
    threads: int = 1

    @property
    def name(self) -> str:
        """Of the run in logs and files."""
        return f"{self.variant}-invariant" if self.batch_invariant else self.variant


# --- The task and the algorithm


def rewards(tokens: Tensor, prompt_tokens: int) -> Tensor:
    """tokens (N, L + T) → (N,): the share of the T tokens whose id is the id before plus one, modulo 3."""
    right = tokens[:, prompt_tokens:] % MODULUS == (tokens[:, prompt_tokens - 1 : -1] + 1) % MODULUS
    return right.float().mean(1)


def advantages(reward: Tensor, group: int) -> Tensor:
    """(N,) → (N,): reward relative to the `group` samples of a prompt, which are in a row; mean 0, variance 1."""
    grouped = reward.view(-1, group)
    return ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).flatten()


def token_log_probs(logits: Tensor, tokens: Tensor, fixed_order: bool = False) -> Tensor:
    """logits (…, V), tokens (…) → (…): float32 log-probability of each token."""
    with batch_invariant() if fixed_order else contextlib.nullcontext():
        return logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def policy_loss(log_probs: Tensor, old: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
    """GRPO's clipped loss, the mean over tokens, and the share of tokens that the clip cuts off.

    log_probs, old: (N, T), of the trainer and of the rollout. advantage: (N,).
    """
    ratio = (log_probs - old).exp()
    gain = ratio * advantage[:, None]
    clipped = ratio.clamp(1 - CLIP[0], 1 + CLIP[1]) * advantage[:, None]
    return -torch.minimum(gain, clipped).mean(), (clipped < gain).float().mean()


# --- Both sides


def text_ids() -> Tensor:
    tokenizer: Any = AutoTokenizer.from_pretrained(SOURCE)
    text = (DATA / "text" / "train.txt").read_text(encoding="utf-8")
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def draw_prompts(ids: Tensor, settings: Settings, random: torch.Generator) -> Tensor:
    """(prompts · group, L): <bos> and a piece of the text, each `group` times in a row."""
    length = settings.prompt_tokens - 1
    starts = torch.randint(len(ids) - length, (settings.prompts,), generator=random).tolist()
    rows = torch.stack([torch.cat([ids.new_zeros(1), ids[s : s + length]]) for s in starts])
    return rows.repeat_interleave(settings.group, 0)


@torch.no_grad()
def generate(
    model: Any, prompts: Tensor, new_tokens: int, random: torch.Generator, fixed_order: bool = False
) -> tuple[Tensor, Tensor]:
    """Samples of the model's distribution, token by token: tokens (N, L + T), their log-probabilities (N, T)."""
    cache, tokens, log_probs = DynamicCache(config=model.config), [prompts], []
    for _ in range(new_tokens):
        logits = model(tokens[-1], past_key_values=cache, use_cache=True).logits[:, -1]
        token = torch.multinomial(logits.float().softmax(-1), 1, generator=random)
        tokens.append(token)
        log_probs.append(token_log_probs(logits, token[:, 0], fixed_order))
    return torch.cat(tokens, 1), torch.stack(log_probs, 1)


def recipe_of(variant: str, seed: int, batch_invariant: bool = False) -> TrainingRecipe | None:
    """What the trainer quantizes; None for bf16. Inputs are row-scaled: a token's codes do not depend on the batch."""
    if variant == "bf16":
        return None
    name, _, backward = variant.partition("-")
    weights = hb.NVFP4(scale_rule="four_over_six") if name == "4over6" else hb.NVFP4()
    if backward != "quantized":
        recipe = TrainingRecipe(hb.NVFP4(scaling="row"), weights, backward=backward)
    else:
        recipe = TransformerEngine(disable_2d_quantization=True, row_scaled_activation=True).recipe()
    return replace(recipe, weights=weights, reuse_weights=True, seed=seed, batch_invariant=batch_invariant)


def options_of(variant: str) -> Options | None:
    recipe = recipe_of(variant, 0)
    return None if recipe is None else recipe.options()


def load_model(settings: Settings) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(SOURCE, dtype=settings.dtype)
    return model.to(settings.device).eval()


# --- The trainer


class Trainer:
    """The model, its float32 master weights and their optimizer."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.model = load_model(settings)
        if recipe := recipe_of(settings.variant, settings.seed, settings.batch_invariant):
            convert_modules(self.model, recipe)
        elif settings.batch_invariant:
            enable(self.model)
        self.parameters = list(self.model.parameters())
        self.masters = [p.detach().float().clone().requires_grad_() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.masters, lr=settings.lr, weight_decay=0.0, betas=(0.9, 0.95))

    def log_probs(self, tokens: Tensor) -> Tensor:
        """(N, L + T) → (N, T), all in one forward pass."""
        first = self.settings.prompt_tokens
        logits = self.model(tokens[:, :-1], use_cache=False).logits[:, first - 1 :]
        return token_log_probs(logits, tokens[:, first:], self.settings.batch_invariant)

    def learn(self, tokens: Tensor, old: Tensor) -> dict[str, float]:
        """The optimizer steps of one batch; what was seen in the first, before the weights changed."""
        reward = rewards(tokens, self.settings.prompt_tokens)
        advantage = advantages(reward, self.settings.group)
        seen: dict[str, float] = {}
        for _ in range(self.settings.epochs):
            log_probs = self.log_probs(tokens)
            loss, clipped = policy_loss(log_probs, old, advantage)
            if not seen:
                difference = (log_probs.detach() - old).abs()
                seen = {
                    "reward": reward.mean().item(),
                    "difference_mean": difference.mean().item(),
                    "difference_max": difference.max().item(),
                    "entropy": -old.mean().item(),
                    "clipped": clipped.item(),
                }
            loss.backward()
            self.update()
        return seen

    @torch.no_grad()
    def update(self) -> None:
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            parameter.copy_(master)


# --- The processes


def exports(trainer: Trainer) -> Callable[[], Iterable[Any]]:
    """What makes, whenever it is called, buckets of the weights as the rollout has them: 4-bit, or as they are."""
    named, options = list(trainer.model.named_parameters()), options_of(trainer.settings.variant)
    if options is None:
        return lambda: [Bucket(0, tuple(Piece(name, parameter.detach().cpu()) for name, parameter in named))]
    return Exporter(trainer.model.config.to_dict(), headers(named), options).prepare(named).export


def train(settings: Settings, store: dist.Store, samples: Any, log: Path) -> None:
    """The training process: send weights, take samples, learn, write a line."""
    trainer = Trainer(settings)
    weights = exports(trainer)
    sender = Sender(connect(store, TRAINER, 2, timeout=TIMEOUT))
    with log.open("w", encoding="utf-8") as file:
        for step in range(settings.steps):
            began = time.perf_counter()
            sender.send(weights(), version=step)
            sent = time.perf_counter()
            version, tokens, old = samples.get()
            if version != step:
                raise RuntimeError(f"samples of version {version} came in step {step}")
            came = time.perf_counter()
            seen = trainer.learn(
                torch.from_numpy(tokens).to(settings.device), torch.from_numpy(old).to(settings.device)
            )
            seconds = {"sync": sent - began, "rollout": came - sent, "train": time.perf_counter() - came}
            line = {"variant": settings.name, "seed": settings.seed, "step": step, **seen, "seconds": seconds}
            file.write(json.dumps(line) + "\n")
            file.flush()
            if step % max(1, settings.steps // 6) == 0 or step == settings.steps - 1:
                print(describe(line), flush=True)


def roll_out(settings: Settings, store: dist.Store, samples: Any, checkpoint: Path | None) -> None:
    """The rollout process: take weights, generate, send samples."""
    if checkpoint is None:
        model = load_model(settings)
        if settings.batch_invariant:
            enable(model)
    else:
        model = hb.load(
            checkpoint, dtype=settings.dtype, device=settings.device, activations="row",
            batch_invariant=settings.batch_invariant,
        )  # fmt: skip
    receiver, link = Receiver(model), connect(store, ROLLOUT, 2, timeout=TIMEOUT)
    ids, random = text_ids(), torch.Generator().manual_seed(settings.seed)
    sampling = torch.Generator(settings.device).manual_seed(settings.seed)
    for step in range(settings.steps):
        version = receiver.receive(link, version=step)
        prompts = draw_prompts(ids, settings, random).to(settings.device)
        tokens, log_probs = generate(model, prompts, settings.new_tokens, sampling, settings.batch_invariant)
        samples.put((version, tokens.cpu().numpy(), log_probs.cpu().numpy()))


def process(rank: int, settings: Settings, directory: Path, log: Path, samples: Any) -> None:
    """What mp.spawn starts twice for each run."""
    logging.disable_progress_bar()
    torch.set_num_threads(settings.threads)
    store = dist.FileStore(str(directory / f"{settings.name}-{settings.seed}.store"), 2)
    options, checkpoint = options_of(settings.variant), directory / f"{settings.name}-{settings.seed}"
    if rank == ROLLOUT:
        store.wait(["converted"])
        roll_out(settings, store, samples, checkpoint if options else None)
        return
    if options is not None:
        convert(SOURCE, checkpoint, options)
    store.set("converted", "")
    train(settings, store, samples, log)


def run_all(runs: Sequence[Settings], out: Path, parallel: int) -> None:
    """All runs, some at a time."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        for some in [runs[i : i + parallel] for i in range(0, len(runs), parallel)]:
            contexts, queues = [], []  # a queue that its parent forgets is gone before its processes have opened it
            for settings in some:
                samples = mp.get_context("spawn").SimpleQueue()
                queues.append(samples)
                log = out / f"{settings.name}-{settings.seed}.jsonl"
                args = (settings, Path(temporary), log, samples)
                contexts.append(mp.spawn(process, args, nprocs=2, join=False))
            for context in contexts:
                while not context.join():
                    pass


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Settings()
    parser.add_argument("--variants", nargs="+", choices=(*VARIANTS, "all"), default=[default.variant], metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[default.seed])
    for name in ("steps", "prompts", "group", "new_tokens", "epochs"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(default, name))
    parser.add_argument("--lr", type=float, default=default.lr)
    parser.add_argument("--device", default=default.device)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--batch-invariant", action="store_true", help="trainer and rollout agree bit for bit")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time, of two processes each")
    parser.add_argument("--out", type=Path, default=Path("grpo-tiny"), help="directory of the lines")
    parser.add_argument("--short", action="store_true", help="two steps of a few samples")
    args = parser.parse_args()
    if args.short:
        args.steps, args.prompts, args.group, args.new_tokens = 2, 1, 4, 4
    return args


def main() -> None:
    args = parse()
    began = time.time()
    threads = max(1, (os.cpu_count() or 1) // args.parallel)
    base = Settings(
        steps=args.steps, prompts=args.prompts, group=args.group, new_tokens=args.new_tokens, epochs=args.epochs,
        lr=args.lr, device=args.device, dtype=getattr(torch, args.dtype), batch_invariant=args.batch_invariant,
        threads=threads,
    )  # fmt: skip
    variants = VARIANTS if "all" in args.variants else tuple(args.variants)
    runs = [replace(base, variant=variant, seed=seed) for seed in args.seeds for variant in variants]
    run_all(runs, args.out, args.parallel)
    for row in summary(read_lines(args.out)):
        print(json.dumps(row))
    print(f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
