"""What training with quantized operands costs beside bf16, in one run.

    PYTHONPATH=src python3 benchmarks/training.py --json FILE           # on a GPU: the figures of the README
    PYTHONPATH=src python3 benchmarks/training.py --small               # anywhere: that it runs

First the gate: forward and gradients of a small Linear, in each mode, against the formulas written out with the
specification; one that is off ends the run before anything is timed. Then: forward and backward of one Linear in the
three modes, on normally distributed data, and the bytes that each saves for backward; a training step of a Llama,
compiled, with row-scaled 4over6 and a high-precision backward, timed only once its first step is that of the same model
uncompiled: `LOSS`, `GRADIENT`. Medians; the Linear's variants take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import halfbyte as hb
from halfbyte.nn import Linear, convert
from halfbyte.numerics import nvfp4
from halfbyte.ops.gradient import new_state, words
from halfbyte.recipe import LayerRecipe, TrainingRecipe, TransformerEngine
from memory import saved_bytes
from provenance import provenance

ROW, SIX_ROW, SIX = hb.NVFP4(scaling="row"), hb.NVFP4(scaling="row", scale_rule="four_over_six"), hb.NVFP4(
    scale_rule="four_over_six"
)  # fmt: skip
MODES: dict[str, LayerRecipe] = {
    "high_precision": LayerRecipe(ROW),
    "dequantized": LayerRecipe(ROW, backward="dequantized"),
    "quantized": TransformerEngine(row_scaled_activation=True).recipe().to_layer(),
}
REPEATS, FIRST = 36, 8  # calls of a turn that are counted, and before them: a GPU takes some 50 ms to settle its clock
# How far a compiled step may be from the uncompiled one. The graph rounds to bfloat16 in fewer places, and an
# activation that is rounded otherwise may get another 4-bit code, so nothing is equal: the loss within a rounding of
# bfloat16; gradients of two layers, as a relative norm, by less than what quantization changes in them (on an H200 0.23
# beside 0.44: compiled norms round elsewhere, and codes flip). In more layers each changed code changes more of them.
LOSS = 2.0**-8
GRADIENT = 1.0
GOALS = {"high_precision": 1.05, "dequantized": 1.08, "quantized": 1.20, "llama high_precision": 1.10}


def decoded(x: Tensor, fmt: Any, rng: Any = None) -> Tensor:
    q = nvfp4.quantize(x, fmt, rng=rng)
    return nvfp4.dequantize(q.packed, q.block_scale, q.tensor_scale).double()


def gate(device: str) -> None:
    """Each result is within its roundings of a float64 matmul of what the specification decodes to."""
    m, n, k = 96, 128, 256
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(m, k, generator=g), torch.randn(n, k, generator=g)
    dy = torch.randn(m, n, generator=g)
    x, w, dy = (t.bfloat16() for t in (x, w, dy))
    for name, recipe in MODES.items():
        layer = Linear(k, n, False, device=device, dtype=torch.bfloat16, recipe=recipe)
        layer.load_state_dict({"weight": w})
        leaf = x.to(device, copy=True).requires_grad_()
        y = layer(leaf)
        y.backward(dy.to(device))
        x_seen, w_seen = decoded(x, recipe.activations), decoded(w, recipe.weights)
        pairs = {"y": (x_seen, w_seen.mT)}
        if recipe.backward == "quantized":
            a, b = words(new_state(0))
            pairs["dx"] = decoded(dy, recipe.gradients, a), w_seen
            gt = decoded(dy.mT.contiguous(), recipe.wgrad_gradients, b)
            pairs["dw"] = gt, decoded(x.mT.contiguous(), recipe.wgrad_activations).mT
        else:
            original = recipe.backward == "high_precision"
            pairs["dx"] = dy.double(), w.double() if original else w_seen.bfloat16().double()
            pairs["dw"] = dy.mT.double(), x.double() if original else x_seen.bfloat16().double()
        for what, got in (("y", y), ("dx", leaf.grad), ("dw", layer.weight.grad)):
            left, right = pairs[what]
            budget = left.abs() @ right.abs() * (left.shape[1] + 8) * 2.0**-24 + (left @ right).abs() * 2.0**-8
            if not bool(((got.detach().cpu().double() - left @ right).abs() <= budget + 1e-12).all()):
                raise SystemExit(f"{name}: {what} is not what the formula gives; nothing was timed")


def rotated(items: list[Any], by: int) -> list[Any]:
    """Each variant follows each other one as often: the clock that one leaves is what the next begins with."""
    by %= len(items)
    return items[by:] + items[:by]


def medians(calls: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Seconds of one call of each, the variants taking turns, after two rounds that are not counted.

    A turn is REPEATS calls back to back, as a training run makes them: nothing waits for the host between them. So much
    matmul runs into the GPU's power limit, and the clock that is left depends on the work, so FIRST calls go before.
    """
    repeats = REPEATS if device == "cuda" else 1
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 2):
        for name, call in rotated(list(calls.items()), i):
            if device == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize()
                for _ in range(FIRST if repeats > 1 else 1):
                    call()
                start.record()
                for _ in range(repeats):
                    call()
                end.record()
                torch.cuda.synchronize()
                seconds = start.elapsed_time(end) / 1e3 / repeats
            else:
                began = time.perf_counter()
                call()
                seconds = time.perf_counter() - began
            if i > 1:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def linear(tokens: int, features: int, rounds: int, device: str) -> dict[str, Any]:
    g = torch.Generator(device).manual_seed(0)
    x, dy = (torch.randn(tokens, features, generator=g, device=device).bfloat16() for _ in range(2))
    layers: dict[str, nn.Module] = {"bf16": nn.Linear(features, features, False, device, torch.bfloat16)}
    for name, recipe in MODES.items():
        layers[name] = Linear(features, features, False, device, torch.bfloat16, recipe=recipe)
    for layer in layers.values():
        nn.init.normal_(layer.weight, std=0.02, generator=g)

    def step(layer: nn.Module) -> Callable[[], None]:
        leaf = x.clone().requires_grad_()

        def call() -> None:
            leaf.grad = layer.weight.grad = None
            layer(leaf).backward(dy)

        return call

    seconds = medians({name: step(layer) for name, layer in layers.items()}, rounds, device)
    leaf = x.clone().requires_grad_()
    return {
        "shape": [tokens, features, features],
        "milliseconds": {name: 1e3 * value for name, value in seconds.items()},
        "of_bf16": {name: seconds[name] / seconds["bf16"] for name in MODES},
        "saved_bytes": {name: saved_bytes(layer, leaf) for name, layer in layers.items()},
    }


def saved_activations(tokens: int, features: int, device: str) -> dict[str, float]:
    """Bytes saved of x, as a share of bf16's: with a frozen input the weight is not saved."""
    x = torch.randn(tokens, features, device=device, dtype=torch.bfloat16)
    plain = saved_bytes(nn.Linear(features, features, False, device, torch.bfloat16), x)
    return {
        name: saved_bytes(Linear(features, features, False, device, torch.bfloat16, recipe=recipe), x) / plain
        for name, recipe in MODES.items()
    }


def first_step(run: Callable[..., Any], model: nn.Module, ids: Tensor) -> tuple[float, Tensor]:
    """Loss and gradients of one step, which is not taken: those of the first and last layers' matrices, in a row."""
    loss = run(input_ids=ids, labels=ids).loss
    loss.backward()
    layers = model.model.layers  # type: ignore[union-attr]
    parameters = [p for layer in (layers[0], layers[-1]) for p in layer.parameters() if p.dim() == 2]
    gradients = torch.cat([p.grad.float().flatten() for p in parameters])
    model.zero_grad(set_to_none=True)
    return loss.item(), gradients


def gate_llama(config: Any, recipe: TrainingRecipe, ids: Tensor, device: str, fullgraph: bool) -> dict[str, float]:
    """Two layers of full width, compiled and quantized, beside the same uncompiled, and the same in bf16."""
    model = llama_model(type(config)(**{**config.to_dict(), "num_hidden_layers": 2}), device)
    plain = first_step(model, model, ids)
    convert(model, recipe)
    wanted = first_step(model, model, ids)
    got = first_step(torch.compile(model, fullgraph=fullgraph), model, ids)
    size = float(wanted[1].norm())
    return {
        "loss": wanted[0],
        "loss_difference": abs(got[0] / wanted[0] - 1),
        "gradient_difference": float((got[1] - wanted[1]).norm()) / size,
        "gradient_difference_of_bf16": float((plain[1] - wanted[1]).norm()) / size,
    }


def llama_model(config: Any, device: str) -> Any:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    torch._dynamo.reset()
    with torch.device(device):
        return LlamaForCausalLM(config).to(torch.bfloat16).train()


def llama(small: bool, rounds: int, device: str, batch: int, window: int) -> dict[str, Any]:
    """A compiled training step, AdamW included."""
    from transformers import LlamaConfig

    sizes = (
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
        if small
        else {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 32768}
    )
    heads = {"num_attention_heads": 2 if small else 32, "num_key_value_heads": 2 if small else 8}
    config = LlamaConfig(**sizes, **heads, max_position_embeddings=window, use_cache=False)
    ids = torch.randint(0, sizes["vocab_size"], (batch, window), device=device)
    recipe = TrainingRecipe(SIX_ROW, SIX)
    fullgraph = not small
    gate = gate_llama(config, recipe, ids, device, fullgraph)
    print(f"llama of two layers: {gate}", flush=True)
    if not (gate["gradient_difference"] <= GRADIENT * gate["gradient_difference_of_bf16"]):  # NaN does not pass
        raise SystemExit("llama: gradients of the compiled step are not the uncompiled one's; nothing was timed")
    seconds: dict[str, float] = {}
    losses: dict[str, tuple[float, float]] = {}
    parameters = 0
    for name in ("bf16", "high_precision"):  # one after the other: two would not fit beside each other
        model = llama_model(config, device)
        parameters = sum(p.numel() for p in model.parameters())
        if name != "bf16":
            convert(model, recipe)
        compiled = torch.compile(model, fullgraph=fullgraph)
        wanted, got = first_step(model, model, ids)[0], first_step(compiled, model, ids)[0]
        losses[name] = wanted, got
        print(f"llama, {name}: loss of the first step {wanted:.6f}, compiled {got:.6f}", flush=True)
        if not abs(got / wanted - 1) <= LOSS:
            raise SystemExit(f"llama, {name}: the compiled step's loss is not the uncompiled one's; it was not timed")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")

        def step(compiled: Any = compiled, optimizer: Any = optimizer) -> None:
            compiled(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        seconds |= medians({name: step}, max(rounds // 4, 1), device)
        del model, optimizer, compiled, step
    return {
        "parameters": parameters,
        "tokens": batch * window,
        "gate": gate,
        "losses": losses,
        "milliseconds": {name: 1e3 * value for name, value in seconds.items()},
        "of_bf16": {"llama high_precision": seconds["high_precision"] / seconds["bf16"]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--features", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=4, help="of the Llama")
    parser.add_argument("--window", type=int, default=4096)
    parser.add_argument("--no-llama", action="store_true")
    parser.add_argument("--commit", help="what to record where there is no git")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.small:
        args.rounds, args.tokens, args.features, args.batch, args.window = 1, 64, 64, 1, 32
    gate(args.device)
    print("the gate: forward and gradients are the formulas'")
    result: dict[str, Any] = {
        **provenance(args.device, args.commit),
        "linear": linear(args.tokens, args.features, args.rounds, args.device),
        "saved_activations_of_bf16": saved_activations(args.tokens, args.features, args.device),
    }
    if not args.no_llama:
        result["llama"] = llama(args.small, args.rounds, args.device, args.batch, args.window)
    ratios = {**result["linear"]["of_bf16"], **result.get("llama", {}).get("of_bf16", {})}
    for name, ratio in ratios.items():
        print(f"{name:24} {ratio:.3f}× bf16 (goal {GOALS[name]:.2f})")
    for name, share in result["saved_activations_of_bf16"].items():
        print(f"{name:24} saves {share:.3f}× bf16's activation bytes")
    result["goals"] = {name: {"wanted": GOALS[name], "measured": ratio} for name, ratio in ratios.items()}
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
