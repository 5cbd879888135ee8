"""What each recipe costs in quality: perplexity, and KL to the high-precision model, against bits per weight.

    PYTHONPATH=src python3 benchmarks/quality.py --model DIR [--recipes NAME] [--device cuda] [--json FILE] [--plot PNG]

--plot needs matplotlib.

Every recipe makes a checkpoint, verified, of which two models are evaluated in float32: one that quantizes weights
only, and one whose quantized layers also quantize their inputs, row-scaled (each token by itself). Perplexity is
that of `halfbyte.evaluate` on the evaluation text's first windows. KL and the paired intervals are over all of
--texts: the mean over tokens of the difference in negative log-likelihood from the high-precision model, with 95 % of
the normal distribution, windows as the independent units. Calibration uses the shipped text without what is evaluated;
64 samples of 512 tokens need more than its `calibration.txt` has, so part of `train.txt` is in it: the figures on
--texts evaluation are those of text that nothing was calibrated on.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from halfbyte.calib.calibrate import calibrate, model_windows
from halfbyte.calib.options import Calibration
from halfbyte.checkpoint.convert import convert
from halfbyte.checkpoint.verify import verify_structure
from halfbyte.evaluate import windows
from halfbyte.recipe import builtin_recipes
from halfbyte.runtime import load

TEXT = Path(str(files("halfbyte"))) / "data" / "text"


@dataclass(frozen=True)
class Row:
    """One recipe under one treatment of activations."""

    recipe: str
    activations: str  # "none" or "row"
    bits_per_weight: float
    seconds: float  # to make the checkpoint
    perplexity: float  # of the evaluation text's first windows
    perplexity_all: float  # of all windows of all texts
    kl: float  # mean over tokens, nats
    nll_difference: float  # mean over tokens of all texts, nats, from the high-precision model
    nll_interval: float  # half of its 95 % confidence interval
    tokens: int
    gap_closed: float | None = None  # of the perplexity gap of `nvfp4-w4a16`, same activations


@torch.no_grad()
def compare(model: Any, reference: Any, batches: Sequence[Tensor], device: str) -> tuple[list[Tensor], list[Tensor]]:
    """Per window: negative log-likelihoods of its tokens, and KL(reference ‖ model) at each; float32 on the CPU."""
    nlls, kls = [], []
    for ids in batches:
        ids = ids.to(device)
        log_p = model(ids).logits[:, :-1].float().log_softmax(-1)
        log_r = reference(ids).logits[:, :-1].float().log_softmax(-1)
        nlls.append(-log_p.gather(-1, ids[:, 1:, None]).flatten().cpu())
        kls.append((log_r.exp() * (log_r - log_p)).sum(-1).flatten().cpu())
    return nlls, kls


def perplexity(nlls: Sequence[Tensor]) -> float:
    return math.exp(torch.cat(list(nlls)).double().mean())


def interval(nlls: Sequence[Tensor], baseline: Sequence[Tensor]) -> tuple[float, float]:
    """Mean difference over all tokens, and half of its 95 % interval; windows are the independent units."""
    differences = torch.stack([(a - b).double().mean() for a, b in zip(nlls, baseline, strict=True)])
    half = 1.96 * float(differences.std()) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return float(differences.mean()), half


def checkpoints(
    source: Path, recipes: Sequence[str], device: str, samples: int, length: int, where: Path
) -> Iterator[tuple[str, Path, float, float]]:
    """Each recipe's name, checkpoint, bits per weight, and the seconds that it took."""
    known = builtin_recipes()
    for name in recipes:
        out = where / name
        start = time.monotonic()
        if known[name].needs_data:
            report, _ = calibrate(
                source,
                out,
                known[name].options("modelopt"),
                Calibration.of(known[name], every_expert=True),
                model_windows(source, None, samples, length),
                device=device,
            )
            assert report is not None  # there is one rank
        else:
            report = convert(source, out, known[name].options("modelopt"), device=device)
        seconds = time.monotonic() - start
        for finding in verify_structure(out):
            raise SystemExit(f"{out}: {finding}")
        yield name, out, report.bits_per_weight, seconds


def measure(options: argparse.Namespace) -> list[Row]:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = [(TEXT / f"{name}.txt").read_text(encoding="utf-8") for name in options.texts]
    batches = [w for text in texts for w in windows(tokenizer, text, 10**6)]
    reference: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(options.device).eval()
    baseline, _ = compare(reference, reference, batches, options.device)
    first, tokens = options.windows, sum(len(nll) for nll in baseline)
    rows = [
        Row("(high precision)", "none", 16.0, 0.0, perplexity(baseline[:first]), perplexity(baseline), 0, 0, 0, tokens)
    ]
    print(f"{len(batches)} windows, {tokens} tokens; {rows[0].perplexity:.3f} on the first {first}")
    with tempfile.TemporaryDirectory() as temporary:
        made = checkpoints(
            options.model, options.recipes, options.device, options.samples, options.length, Path(temporary)
        )
        for name, out, bits, seconds in made:
            for activations in ("none", "row"):
                model = load(out, dtype=torch.float32, device=options.device, activations=activations)
                nlls, kls = compare(model, reference, batches, options.device)
                row = Row(
                    name, activations, bits, seconds, perplexity(nlls[:first]), perplexity(nlls),
                    float(torch.cat(kls).double().mean()), *interval(nlls, baseline), tokens,
                )  # fmt: skip
                rows.append(row)
                print(
                    f"{name:32s} {activations:5s} {bits:6.3f} bits  perplexity {row.perplexity:.3f}  all "
                    f"{row.perplexity_all:.3f}  KL {row.kl:.4f}  Δ {row.nll_difference:+.4f} ± {row.nll_interval:.4f}  "
                    f"{seconds:.1f} s",
                    flush=True,
                )
                del model
    return with_gaps(rows)


def with_gaps(rows: Sequence[Row]) -> list[Row]:
    """Rows with the share of the plain format's perplexity gap that each closes."""
    best = rows[0].perplexity
    plain = {row.activations: row.perplexity for row in rows if row.recipe == "nvfp4-w4a16"}
    return [
        Row(
            **{**asdict(row), "gap_closed": (plain[row.activations] - row.perplexity) / (plain[row.activations] - best)}
        )
        if row is not rows[0] and row.activations in plain
        else row
        for row in rows
    ]


def plot(rows: Sequence[Row], path: Path) -> None:
    """Perplexity against bits per weight, one mark for each recipe and treatment of activations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for activations, marker in (("none", "o"), ("row", "s")):
        chosen = [row for row in rows[1:] if row.activations == activations]
        label = "weights only" if activations == "none" else "weights and row-scaled activations"
        axes.scatter(
            [row.bits_per_weight for row in chosen], [row.perplexity for row in chosen], marker=marker, label=label
        )
        for row in chosen:
            axes.annotate(
                row.recipe, (row.bits_per_weight, row.perplexity), fontsize=7, xytext=(4, 2), textcoords="offset points"
            )
    axes.axhline(rows[0].perplexity, linestyle="--", color="gray", label="high precision")
    axes.set_xlabel("bits per quantized weight")
    axes.set_ylabel("perplexity")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", default=sorted(builtin_recipes()))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--texts", nargs="+", default=["evaluation", "train"], help="evaluation comes first")
    parser.add_argument("--windows", type=int, default=16, help="windows of the perplexity that is compared")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    rows = measure(options)
    for row in rows[1:]:
        if row.gap_closed is not None:
            print(f"{row.recipe:32s} {row.activations:5s} closes {row.gap_closed:6.1%} of plain's gap")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
