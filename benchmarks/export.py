"""A full sync's quantization: weights shaped like Qwen3-30B-A3B, as one Megatron rank has them, through `Exporter`.

    PYTHONPATH=src python3 benchmarks/export.py [--layers 48] [--per-tensor]

First one layer is compared with `halfbyte.quantize` of each weight; if a byte differs nothing is timed. Then the GPU's
time in kernels, the wall clock, kernel launches, and the memory beyond the weights; `--per-tensor` times one call of
`halfbyte.quantize` for each weight beside it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import halfbyte as hb
from halfbyte.checkpoint.options import Options
from halfbyte.checkpoint.shards import TensorInfo
from halfbyte.export import Exporter, Model

HIDDEN, WIDTH, EXPERTS, HEADS, GROUPS, HEAD, VOCAB = 2048, 768, 128, 32, 4, 128, 151936
CONFIG = {
    "model_type": "qwen3_moe", "hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS,
    "head_dim": HEAD, "num_experts": EXPERTS, "moe_intermediate_size": WIDTH, "tie_word_embeddings": False,
}  # fmt: skip


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    found = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    for i in range(layers):
        path = f"model.layers.{i}"
        rows = {"q": HEADS * HEAD, "k": GROUPS * HEAD, "v": GROUPS * HEAD}
        found |= {f"{path}.self_attn.{part}_proj.weight": (n, HIDDEN) for part, n in rows.items()}
        found |= {
            f"{path}.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD),
            f"{path}.mlp.gate.weight": (EXPERTS, HIDDEN),
        }
        found |= {f"{path}.self_attn.{part}_norm.weight": (HEAD,) for part in "qk"}
        found |= {f"{path}.{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
        for e in range(EXPERTS):
            found |= {f"{path}.mlp.experts.{e}.{leaf}_proj.weight": (WIDTH, HIDDEN) for leaf in ("gate", "up")}
            found[f"{path}.mlp.experts.{e}.down_proj.weight"] = (HIDDEN, WIDTH)
    return found


def parameters(model: Model) -> dict[str, Tensor]:
    """Random, on the GPU, of the shapes that Megatron has them in."""
    g = torch.Generator("cuda").manual_seed(0)
    found = {}
    for name, parameter in model.parameters().items():
        parts = [model.shapes[hf] for hf in parameter.hf]
        shape = (sum(part[0] for part in parts), *parts[0][1:])
        found[name] = torch.randn(shape, generator=g, device="cuda", dtype=torch.bfloat16) * 0.02
    return found


def gate(exporter: Exporter, weights: dict[str, Tensor]) -> None:
    """fc1 and fc2 of one expert, each byte."""
    found = {
        p.name: p.tensor
        for bucket in exporter.export(weights.items())
        for p in bucket.pieces
        if ".0.mlp.experts.5." in p.name
    }
    path = "decoder.layers.0.mlp.experts"
    fc1 = hb.quantize(weights[f"{path}.linear_fc1.weight5"], hb.NVFP4(), impl="reference")
    fc2 = hb.quantize(weights[f"{path}.linear_fc2.weight5"], hb.NVFP4(), impl="reference")
    hf = "model.layers.0.mlp.experts.5"
    pairs = [(found[f"{hf}.down_proj.weight"], fc2.packed), (found[f"{hf}.down_proj.weight_scale"], fc2.block_scale)]
    for leaf, rows in (("gate_proj", slice(0, WIDTH)), ("up_proj", slice(WIDTH, None))):
        pairs += [
            (found[f"{hf}.{leaf}.weight"], fc1.packed[rows]),
            (found[f"{hf}.{leaf}.weight_scale"], fc1.block_scale[rows]),
        ]
    if not all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs):
        raise SystemExit("the export differs from halfbyte.quantize; nothing was timed")


def measure(what: str, run: Callable[[], object], weights: int) -> None:
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    run()
    torch.cuda.synchronize()
    wall = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    kernels = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(event.device_time for event in kernels) / 1000
    print(
        f"{what}: {weights / 1e9:.1f} G weights, {busy:.1f} ms in kernels, {wall * 1000:.0f} ms by the clock, "
        f"{len(kernels)} launches and copies, {peak / 2**20:.0f} MiB beyond the weights"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--per-tensor", action="store_true")
    arguments = parser.parse_args()
    config = CONFIG | {"num_hidden_layers": arguments.layers}
    headers = {name: TensorInfo(name, "BF16", shape) for name, shape in shapes(arguments.layers).items()}
    exporter = Exporter(config, headers, Options())
    weights = parameters(exporter.model)
    gate(exporter, weights)
    chosen = {item.name.full for item in exporter.plan.quantized}
    quantized = [t for name, t in weights.items() if not chosen.isdisjoint(exporter.model.parameter(name).hf)]
    count = sum(tensor.numel() for tensor in quantized)

    def export() -> None:
        for bucket in exporter.export(weights.items()):
            del bucket

    def one_by_one() -> None:
        for tensor in quantized:
            hb.quantize(tensor, hb.NVFP4())

    measure("Exporter", export, count)
    if arguments.per_tensor:
        measure(f"{len(quantized)} calls of quantize", one_by_one, count)


if __name__ == "__main__":
    main()
