"""What each recipe costs in quality: perplexity, and KL to the high-precision model, against bits per weight.

    PYTHONPATH=src python3 benchmarks/quality.py --model DIR [--recipes NAME …] [--tokens N] [--json FILE] [--plot PNG]

Every recipe makes a checkpoint, which is verified against its source and decoded a second time, by a table, before
anything is measured. Models are evaluated in float32: weights only ("none"); with the inputs of quantized layers
quantized as well, each token by itself ("row"); and under the calibrated input scales, where the recipe has them
("stored"). Perplexity is that of `halfbyte.evaluate` on the evaluation text's first windows. KL and the paired
intervals are over all windows of --texts, or the first --tokens tokens of them: the mean over tokens of the difference
in negative log-likelihood from the high-precision model, with 95 % of the normal distribution, windows as the
independent units. Calibration is `halfbyte calibrate`'s default: 64 samples of 512 tokens of `calibration.txt`, which
shares no topic with the other texts, nor a paragraph with the evaluation text. --plot needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from halfbyte.calib.calibrate import calibrate, model_windows
from halfbyte.calib.options import Calibration
from halfbyte.checkpoint.convert import Report, convert
from halfbyte.checkpoint.dequantize import decode
from halfbyte.checkpoint.recompute import verify_source
from halfbyte.checkpoint.verify import open_quantized, verify_structure
from halfbyte.errors import CheckpointError
from halfbyte.evaluate import WINDOW, windows
from halfbyte.recipe import Recipe, builtin_recipes
from halfbyte.runtime import load
from provenance import provenance

TEXT = Path(str(files("halfbyte"))) / "data" / "text"
PLAIN = {"none": "nvfp4-w4a16", "row": "nvfp4-w4a16", "stored": "nvfp4"}  # activations → whose gap is to be closed
LABELS = {
    "none": ("weights only", "o"),
    "row": ("and activations, row-scaled", "s"),
    "stored": ("and activations, calibrated scales", "^"),
}


@dataclass(frozen=True)
class Row:
    """One recipe under one treatment of activations."""

    recipe: str
    activations: str  # "none", "row" or "stored"
    bits_per_weight: float
    seconds: float  # to make the checkpoint
    perplexity: float  # of the evaluation text's first windows
    perplexity_all: float  # of all tokens
    kl: float  # mean over tokens, nats
    nll_difference: float  # mean over all tokens, nats, from the high-precision model
    nll_interval: float  # half of its 95 % confidence interval
    tokens: int
    gap_closed: float | None = None  # of the perplexity gap of the plain format, same activations

    def __str__(self) -> str:
        closed = "" if self.gap_closed is None else f"{self.gap_closed:8.1%}"
        return (
            f"{self.recipe:36s} {self.activations:7s}{self.bits_per_weight:7.3f}{self.perplexity:9.3f}"
            f"{self.perplexity_all:9.3f}{self.kl:9.4f}{self.nll_difference:+9.4f} ±{self.nll_interval:.4f}"
            f"{self.seconds:8.1f}{closed}"
        )


HEADER = (
    f"{'recipe':36s} {'inputs':7s}{'bits':>7s}{'ppl':>9s}{'ppl all':>9s}{'KL':>9s}{'Δ nll':>9s}  95 % {'s':>9s}  closes"
)


@torch.no_grad()
def compare(
    models: Mapping[str, Any], reference: Any, ids: Tensor, batch: int, device: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Negative log-likelihoods of tokens, and KL(reference ‖ model) at each: (windows, 511) on the CPU, by model."""
    parts: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in models}
    for some in ids.split(batch):
        some = some.to(device)
        log_r = reference(some).logits[:, :-1].float().log_softmax(-1)
        for name, model in models.items():
            log_p = log_r if model is reference else model(some).logits[:, :-1].float().log_softmax(-1)
            parts[name][0].append(-log_p.gather(-1, some[:, 1:, None])[..., 0].cpu())
            parts[name][1].append((log_r.exp() * (log_r - log_p)).sum(-1).cpu())
    return {name: (torch.cat(nll), torch.cat(kl)) for name, (nll, kl) in parts.items()}


def perplexity(nll: Tensor) -> float:
    return math.exp(nll.double().mean())


def interval(nll: Tensor, baseline: Tensor) -> tuple[float, float]:
    """Mean difference over all tokens, and half of its 95 % interval; windows (rows) are the independent units."""
    differences = (nll - baseline).double().mean(1)
    half = 1.96 * float(differences.std()) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return float(differences.mean()), half


def make(source: Path, out: Path, recipe: Recipe, options: argparse.Namespace) -> Report:
    if not recipe.needs_data:
        return convert(source, out, recipe.options("modelopt"), device=options.device)
    report, _ = calibrate(
        source,
        out,
        recipe.options("modelopt"),
        Calibration.of(recipe, every_expert=True),
        model_windows(source, None, options.samples, options.length),
        device=options.device,
    )
    assert report is not None  # there is one rank
    return report


def gate(out: Path, source: Path, device: str) -> int:
    """Verify a checkpoint, and compare what its weights decode to with a decoder that shares no code; their number."""
    for finding in (*verify_structure(out), *verify_source(out, source, device)):
        raise SystemExit(f"{out.name}: {finding}")
    contents = open_quantized(out)
    for name in contents.quantized:
        read = {part: contents.checkpoint.read(f"{name.module}.{part}") for part in ("weight", "weight_scale")}
        if read["weight"].dtype == torch.uint8:
            tensor_scale = contents.checkpoint.read(f"{name.module}.weight_scale_2")
            wanted = table_nvfp4(read["weight"], read["weight_scale"], tensor_scale)
        else:
            wanted = table_mxfp8(read["weight"], read["weight_scale"])
        got = decode(contents, name.module, torch.float32, device).cpu()
        if not torch.equal(got, wanted):
            raise SystemExit(f"{out.name}: {name.module} decodes to other values on {device} than by the table")
    return len(contents.quantized)


def table_nvfp4(packed: Tensor, scale: Tensor, tensor_scale: Tensor) -> Tensor:
    """(N, K/2) bytes, (N, K/16) E4M3 and () float32 → (N, K) float32."""
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    table = torch.tensor([[low, high] for high in signed(magnitudes) for low in signed(magnitudes)])
    elements = table[packed.int()].flatten(-2)
    return elements * (scale.float() * tensor_scale).repeat_interleave(16, -1)


def table_mxfp8(elements: Tensor, scale: Tensor) -> Tensor:
    """(N, K) E4M3 and (N, K/32) biased exponents → (N, K) float32."""
    return torch.ldexp(elements.float(), scale.int().repeat_interleave(32, -1) - 127)


def signed(magnitudes: Sequence[float]) -> list[float]:
    return [*magnitudes, *(-m for m in magnitudes)]


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Rows as they are done, the high-precision model first."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = [(TEXT / f"{name}.txt").read_text(encoding="utf-8") for name in options.texts]
    every = [w for text in texts for w in windows(tokenizer, text, 10**6)]
    ids = torch.cat(every[: max(1, math.ceil(options.tokens / WINDOW))])
    tokens, first = len(ids) * WINDOW, options.windows
    reference: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(options.device).eval()
    baseline = compare({"": reference}, reference, ids, options.batch, options.device)[""][0]
    yield Row(
        "(high precision)", "none", 16.0, 0.0, perplexity(baseline[:first]), perplexity(baseline), 0, 0, 0, tokens
    )
    known = builtin_recipes()
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.recipes:
            out, start = Path(temporary) / name, time.monotonic()
            try:
                report = make(options.model, out, known[name], options)
            except CheckpointError as error:
                if "nothing to quantize" not in str(error):
                    raise
                print(f"{name}: selects nothing of this model")  # recipes for experts, say, and a dense model
                continue
            seconds = time.monotonic() - start
            count = gate(out, options.model, options.device)
            made = time.monotonic()
            treatments = ["none", "row", *(["stored"] if known[name].activations == "calibrated" else [])]
            models = {
                how: load(out, dtype=torch.float32, device=options.device, activations=how)  # type: ignore[arg-type]
                for how in treatments
            }
            loaded = time.monotonic()
            for how, (nll, kl) in compare(models, reference, ids, options.batch, options.device).items():
                yield Row(
                    name, how, report.bits_per_weight, seconds, perplexity(nll[:first]), perplexity(nll),
                    float(kl.double().mean()), *interval(nll, baseline), tokens,
                )  # fmt: skip
            del models
            print(
                f"{name}: {count} weights verified and decoded alike; seconds to make {seconds:.1f}, to prove "
                f"{made - start - seconds:.1f}, to load {loaded - made:.1f}, to run {time.monotonic() - loaded:.1f}",
                flush=True,
            )


def with_gaps(rows: Sequence[Row]) -> list[Row]:
    """Rows with the share of the plain format's perplexity gap that each closes."""
    best = rows[0].perplexity
    plain = {row.activations: row.perplexity for row in rows if row.recipe == PLAIN[row.activations]}
    return [
        replace(row, gap_closed=(plain[row.activations] - row.perplexity) / (plain[row.activations] - best))
        if row is not rows[0] and row.activations in plain
        else row
        for row in rows
    ]


def plot(rows: Sequence[Row], path: Path) -> None:
    """Perplexity of each recipe, in a line of its own, ordered by bits per weight, which most recipes share."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    best: dict[str, tuple[float, float]] = {}  # recipe → bits, least perplexity
    for row in rows[1:]:
        best[row.recipe] = row.bits_per_weight, min(row.perplexity, best.get(row.recipe, (0.0, math.inf))[1])
    lines = {recipe: i for i, recipe in enumerate(sorted(best, key=best.__getitem__))}
    figure, axes = pyplot.subplots(figsize=(8, 1.8 + 0.3 * len(lines)))
    for activations, (label, marker) in LABELS.items():
        chosen = [row for row in rows[1:] if row.activations == activations]
        axes.scatter(
            [row.perplexity for row in chosen], [lines[row.recipe] for row in chosen], marker=marker, label=label
        )
    axes.axvline(rows[0].perplexity, linestyle="--", color="gray", label="high precision")
    axes.set_yticks(range(len(lines)), [f"{recipe}, {best[recipe][0]:.2f} bits" for recipe in lines], fontsize=8)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.grid(axis="y", alpha=0.3)
    axes.set_xlabel("perplexity")
    figure.legend(loc="outside upper center", ncols=4, fontsize=8)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    cuda = torch.cuda.is_available()
    known = sorted(builtin_recipes())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", default=known, choices=known, metavar="NAME")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--texts", nargs="+", default=["evaluation", "train"], help="evaluation comes first")
    parser.add_argument("--tokens", type=int, default=10**9, help="of all texts, at most; default: all of them")
    parser.add_argument("--windows", type=int, default=16, help="windows of the perplexity that is compared")
    parser.add_argument("--batch", type=int, help="windows at once; default: 8 on a GPU, else 1")
    parser.add_argument("--samples", type=int, default=64, help="of calibration")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--commit", help="what to record where there is no git")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    options.batch = options.batch or (8 if options.device.startswith("cuda") else 1)
    rows = []
    for row in measure(options):
        rows.append(row)
        print(row, flush=True)
    rows = with_gaps(rows)
    print(f"\n{rows[0].tokens} tokens\n{HEADER}", *rows, sep="\n")
    if options.json:
        about = {"model": options.model.name, **provenance(options.device, options.commit)}
        about |= {
            "texts": options.texts,
            "windows": options.windows,
            "samples": options.samples,
            "length": options.length,
        }
        options.json.write_text(json.dumps(about | {"rows": [asdict(row) for row in rows]}, indent=2) + "\n")
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
