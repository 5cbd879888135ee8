"""Batch invariance: what trainer and rollout differ by without it, and what it costs.

    PYTHONPATH=src python3 benchmarks/invariant.py [--device cpu] [--small] [--parts others] [--json FILE]

First the gate: rows of matmuls must be the same bits for every count of rows, and within their budget of float64; and a
rollout's log-probabilities, decoded token by token, those of the trainer's full sequences. Then:

log-probabilities: the mean and largest |trainer − rollout| of tokens of the evaluation text, for the shipped model (a
trained Qwen3-MoE) and for a random Llama; the trainer runs full sequences, the rollout decodes two at a time. Of the
Llama also for a rollout whose Linears are another engine's, humming-kernels (W4A16), where that is installed.

speed, on a GPU: matmuls of Llama-2-7B's sizes, experts of Qwen3-30B-A3B's, attention and log_softmax, beside the
ordinary ones. Median microseconds with a cold L2 cache.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import halfbyte as hb
from halfbyte import ops, runtime
from halfbyte.checkpoint.dequantize import read_weight
from halfbyte.checkpoint.verify import open_quantized
from halfbyte.invariant import batch_invariant
from halfbyte.nn import convert
from halfbyte.ops import invariant
from halfbyte.recipe import TrainingRecipe
from provenance import provenance
from timing import cold_median

DATA = Path(hb.__file__).parent / "data"
PARTS = ["log-probabilities", "matmuls", "others"]
ROW, PLAIN = hb.NVFP4(scaling="row"), hb.NVFP4()
SHAPES = {"q, k, v": (12288, 4096), "o": (4096, 4096), "gate, up": (22016, 4096), "down": (4096, 11008)}
ROWS = (1, 16, 256, 4096)
EXPERTS = (128, 1536, 2048)


class Humming(nn.Module):
    """A Linear of humming-kernels' W4A16, from bytes as a ModelOpt checkpoint has them."""

    def __init__(self, q: hb.QuantizedTensor, batch_invariant: bool = False) -> None:
        from humming.layer import HummingLayer

        super().__init__()
        n, k = q.shape
        config = {"quant_method": "modelopt", "quant_algo": "nvfp4"}
        self.layer = HummingLayer(shape_n=n, shape_k=k, weight_config=config, torch_dtype=torch.bfloat16).cuda()
        self.layer.load_from_tensors(
            {"weight": q.packed, "weight_scale": q.block_scale, "weight_scale_2": q.tensor_scale.reshape(1)}
        )
        self.layer.transform()
        self.options = {"compute_config": {"use_batch_invariant": True}} if batch_invariant else {}

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x.reshape(-1, x.shape[-1]), **self.options)
        return y.view(*x.shape[:-1], -1)


def humming() -> str | None:
    """Why humming-kernels is left out, or None."""
    try:
        q = hb.quantize(torch.randn(1024, 1024, device="cuda"), PLAIN)
        x = torch.randn(16, 1024, device="cuda").bfloat16()
        exact = x.double() @ q.dequantize(torch.float32).double().mT
        error = float((Humming(q)(x).double() - exact).norm() / exact.norm())
    except ImportError as missing:
        return f"not installed: {missing}"
    except Exception as failure:  # it compiles kernels as it goes, with a compiler that may be missing
        return f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"
    return None if error < 0.01 else f"its product is off by {error:.1%}"


# --- gate -----------------------------------------------------------------------------------------------------------


def gate(device: str, small: bool) -> int:
    """Rows of linear, for many counts of them; returns the elements compared."""
    g = torch.Generator(device).manual_seed(0)
    most, n, k = (70, 48, 160) if small else (4100, 768, 1056)
    x, w = (torch.randn(rows, k, generator=g, device=device) for rows in (most, n))
    xq, wq = hb.quantize(x, ROW), hb.quantize(w, PLAIN)
    whole = hb.linear(xq, wq, batch_invariant=True, out_dtype=torch.float32)
    xv, wv = (q.dequantize(unscaled=True).double() * q.tensor_scale.double().reshape(-1, 1) for q in (xq, wq))
    budget = (k + 2) * 2.0**-24 * (1 + 2.0**-10) * (xv.abs() @ wv.abs().mT)
    if not bool(((whole.double() - xv @ wv.mT).abs() <= budget).all()):
        raise SystemExit("linear with batch_invariant is beyond its budget; nothing was measured")
    compared = 0
    for m in (1, 2, 3, 17, 33, 64, 65, 100, 128, 129, 256, 300, 1024, 4096):
        for start in {0, most - m} if m <= most else ():
            part = hb.linear(hb.quantize(x[start : start + m], ROW), wq, batch_invariant=True, out_dtype=torch.float32)
            if not torch.equal(part, whole[start : start + m]):
                raise SystemExit(f"linear of {m} rows differs from those rows of {most}; nothing was measured")
            compared += part.numel()
    return compared


# --- log-probabilities ----------------------------------------------------------------------------------------------


def sequences(vocabulary: int, count: int, length: int) -> Tensor:
    ids = AutoTokenizer.from_pretrained(DATA / "tiny")((DATA / "text" / "evaluation.txt").read_text(), verbose=False)
    return torch.tensor(ids.input_ids[: count * length]).view(count, length) % vocabulary


def log_probs(logits: Tensor, ids: Tensor, fixed: bool) -> Tensor:
    logits = logits[:, :-1].float()
    if not fixed:
        return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])
    with batch_invariant():
        return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])


@torch.no_grad()
def decode(model: Any, ids: Tensor) -> Tensor:
    """Logits of the sequences, two at a time, token by token."""
    out = []
    for pair in ids.split(2):
        cache, steps = None, []
        for token in pair.split(1, 1):
            result = model(token, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            steps.append(result.logits)
        out.append(torch.cat(steps, 1))
    return torch.cat(out)


def other_engine(model: Any, path: Path) -> None:
    """The checkpoint's Linears as humming's, in place."""
    contents = open_quantized(path)
    modules = dict(model.named_modules())
    for name in contents.quantized:
        owner, _, leaf = name.module.rpartition(".")
        setattr(modules[owner], leaf, Humming(read_weight(contents, name.module, "cuda")))


def difference(a: Tensor, b: Tensor) -> dict[str, float]:
    distance = (a.double() - b.double()).abs()
    return {"mean": float(distance.mean()), "max": float(distance.max())}


def compare(name: str, source: Path, ids: Tensor, device: str, engine: bool) -> dict[str, dict[str, float]]:
    """|trainer − rollout| by how both compute."""
    found: dict[str, dict[str, float]] = {}
    bf16 = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).to(device).train()
    with torch.no_grad():
        wanted = log_probs(bf16(ids).logits, ids, False)
    found["bf16"] = difference(wanted, log_probs(decode(bf16.eval(), ids), ids, False))
    for what, activations, row in (("W4A4", ROW, "row"), ("weights", None, "none")):
        for fixed in (False, True):
            recipe = TrainingRecipe(activations, PLAIN, batch_invariant=fixed)
            trainer = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).train()
            convert(trainer, recipe)
            with tempfile.TemporaryDirectory() as temporary:
                out = Path(temporary) / "out"
                runtime.save_quantized(trainer, source, out, recipe.options())
                rollout = hb.load(out, device=device, activations=row, batch_invariant=fixed)
                with torch.no_grad():
                    wanted = log_probs(trainer.to(device)(ids).logits, ids, fixed)
                key = f"{what}, batch-invariant" if fixed else what
                found[key] = difference(wanted, log_probs(decode(rollout, ids), ids, fixed))
                if fixed and found[key]["max"]:
                    raise SystemExit(f"{name}, {key}: trainer and rollout differ by {found[key]}; nothing is reported")
                if fixed and not activations and engine and name == "llama":
                    other = hb.load(out, device=device, activations="none")
                    other_engine(other, out)
                    found["weights, rollout by humming"] = difference(wanted, log_probs(decode(other, ids), ids, True))
    for key, value in found.items():
        print(f"{name:6s} {key:28s} mean {value['mean']:.3g}  max {value['max']:.3g}")
    return found


def differences(device: str, small: bool, engine: bool) -> dict[str, Any]:
    length = 12 if small else 128
    size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 256} if small else {
        "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "vocab_size": 768
    }  # fmt: skip
    config = LlamaConfig(**size, num_attention_heads=8, num_key_value_heads=4)
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(Path(temporary) / "llama")
        for name, source in (("tiny", DATA / "tiny"), ("llama", Path(temporary) / "llama")):
            ids = sequences(768 if name == "tiny" else config.vocab_size, 3 if small else 8, length).to(device)
            found[name] = compare(name, source, ids, device, engine)
    return found


# --- speed ----------------------------------------------------------------------------------------------------------


def median(call: Callable[[], object]) -> float:
    """Microseconds."""
    return 1e6 * cold_median(call)


def matmuls(engine: bool) -> list[dict[str, Any]]:
    rows = []
    g = torch.Generator("cuda").manual_seed(0)
    for name, (n, k) in SHAPES.items():
        w = (torch.randn(n, k, generator=g, device="cuda") * 0.02).bfloat16()
        wq = hb.quantize(w, PLAIN)
        b, b_scale = hb.fake_quantize_unscaled(w, PLAIN)
        engines = {"humming W4A16": Humming(wq), "humming, batch-invariant": Humming(wq, True)} if engine else {}
        for m in ROWS:
            x = torch.randn(m, k, generator=g, device="cuda").bfloat16()
            a, a_scale = hb.fake_quantize_unscaled(x, ROW)

            operands = a, b, a_scale, b_scale

            def multiply(fixed: bool, operands: tuple[Tensor, ...] = operands) -> Tensor:
                return ops.scaled_matmul(*operands, batch_invariant=fixed)

            times = {
                "ordinary": median(lambda: multiply(False)),
                "batch-invariant": median(lambda: multiply(True)),
                "torch bf16": median(lambda x=x, w=w: x @ w.mT),
            }
            for title, layer in engines.items():
                exact = x.double() @ wq.dequantize(torch.float32).double().mT
                if not float((layer(x).double() - exact).norm() / exact.norm()) < 0.01:
                    raise SystemExit(f"{title} of {m}×{n}×{k} is not the product; nothing is reported")
                times[title] = median(lambda x=x, layer=layer: layer(x))
            rows.append(report(f"{name} {m}×{n}×{k}", times))
    return rows


def others() -> list[dict[str, Any]]:
    """Experts, attention, log_softmax."""
    rows = []
    g = torch.Generator("cuda").manual_seed(0)
    experts, n, k = EXPERTS
    w = torch.randn(EXPERTS, generator=g, device="cuda").bfloat16()
    b, b_scale = hb.fake_quantize_unscaled(w, PLAIN, per_matrix=True)
    for tokens in (16, 4096):
        t = tokens * 8
        x = torch.randn(t, k, generator=g, device="cuda").bfloat16()
        a, a_scale = hb.fake_quantize_unscaled(x, ROW)
        expert = torch.randint(experts, (t,), generator=g, device="cuda")
        offsets = torch.bincount(expert, minlength=experts).cumsum(0).int()

        def multiply(fixed: bool, a: Tensor = a, s: Tensor = a_scale, offsets: Tensor = offsets) -> Tensor:
            return ops.scaled_grouped_matmul(a, b, offsets, s, b_scale, batch_invariant=fixed)

        times = {"ordinary": median(lambda: multiply(False)), "batch-invariant": median(lambda: multiply(True))}
        rows.append(report(f"{experts} experts {t}×{n}×{k}", times))
    for batch, queries, keys in ((1, 4096, 4096), (16, 1, 2048), (64, 1, 2048), (1, 1, 32768)):
        q = torch.randn(batch, 32, queries, 128, generator=g, device="cuda").bfloat16()
        key, value = (torch.randn(batch, 8, keys, 128, generator=g, device="cuda").bfloat16() for _ in range(2))
        mask = torch.ones(queries, keys, dtype=torch.bool, device="cuda").tril(keys - queries)
        mask = mask.expand(batch, 1, queries, keys).contiguous()
        bounds = invariant.key_bounds(mask)
        found = invariant.attention(q, key, value, mask, scaling=0.1, bounds=bounds)
        wanted = F.scaled_dot_product_attention(q, key, value, attn_mask=mask, scale=0.1, enable_gqa=True)
        if not float((found - wanted).float().norm() / wanted.float().norm()) < 0.01:
            raise SystemExit("attention is not torch's; nothing is timed")

        def ordinary(q: Tensor = q, key: Tensor = key, value: Tensor = value, causal: bool = queries > 1) -> Tensor:
            return F.scaled_dot_product_attention(q, key, value, is_causal=causal, scale=0.1, enable_gqa=True)

        def fixed(q: Tensor = q, k: Tensor = key, v: Tensor = value, m: Tensor = mask, b: Any = bounds) -> Tensor:
            return invariant.attention(q, k, v, m, scaling=0.1, bounds=b)

        times = {"ordinary": median(ordinary), "batch-invariant": median(fixed)}
        rows.append(report(f"attention {batch}×{queries} over {keys}", times))
    logits = torch.randn(4096, 32000, generator=g, device="cuda")
    times = {
        "ordinary": median(lambda: logits.log_softmax(-1)),
        "batch-invariant": median(lambda: invariant.log_softmax(logits)),
    }
    rows.append(report("log_softmax 4096×32000", times))
    return rows


def report(name: str, times: dict[str, float]) -> dict[str, Any]:
    ratio = times["batch-invariant"] / times["ordinary"]
    print(f"{name:32s} {ratio:6.2f}× ordinary  " + "  ".join(f"{k} {v:.1f} µs" for k, v in times.items()), flush=True)
    return {"name": name, "microseconds": times, "of_ordinary": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure; all take minutes")
    parser.add_argument("--commit", help="what to record where there is no git")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    on_gpu = options.device == "cuda"
    without = "it needs a GPU" if not on_gpu else humming() if options.parts != ["others"] else "it has no part in this"
    if without:
        print(f"without humming-kernels, {without}")
    engine = without is None
    result: dict[str, Any] = provenance(options.device, options.commit)
    result["without_humming"] = without
    result["gate_elements"] = gate(options.device, options.small)
    print(f"the gate: {result['gate_elements']} results do not depend on how many rows there are")
    if "log-probabilities" in options.parts:
        result["log_probabilities"] = differences(options.device, options.small, engine)
    if on_gpu and not options.small:
        result["speed"] = [
            *(matmuls(engine) if "matmuls" in options.parts else []),
            *(others() if "others" in options.parts else []),
        ]
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
