"""A full weight sync: weights shaped like Qwen3-30B-A3B, as one Megatron rank has them.

    PYTHONPATH=src python3 benchmarks/export.py [--layers 48] [--sample-layers 4] [--json [FILE]]
    PYTHONPATH=src python3 benchmarks/export.py --ranks 2 [--layers 48] [--json [FILE]]

One GPU: everything quantized into buckets by `Exporter.prepare`, beside one call of `halfbyte.quantize` for each
weight, which is timed on some layers and multiplied. Two: a sender and a receiver over NCCL, whose engine is a mapping
of tensors, beside a broadcast of the same buckets alone. First the bytes of three layers are compared with
`halfbyte.quantize` of each weight; if one differs nothing is timed. `--device cpu --small` only shows that it runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import halfbyte as hb
from halfbyte.checkpoint.options import Options
from halfbyte.checkpoint.shards import DTYPES, TensorInfo
from halfbyte.export import Exporter, Model, PreparedExport, Receiver, Sender, connect
from provenance import ROOT, provenance

GOAL_MILLISECONDS, GOAL_LAUNCHES, GOAL_TIMES_BROADCAST = 25.0, 400, 1.3
REPEATS = 11


class Sizes:
    """Of the model; small ones where only the code is tried."""

    def __init__(self, small: bool) -> None:
        self.hidden, self.width, self.experts = (128, 64, 4) if small else (2048, 768, 128)
        self.heads, self.groups, self.head, self.vocab = (8, 4, 16, 256) if small else (32, 4, 128, 151936)

    def config(self, layers: int) -> dict[str, Any]:
        return {
            "model_type": "qwen3_moe", "hidden_size": self.hidden, "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups, "head_dim": self.head, "num_experts": self.experts,
            "moe_intermediate_size": self.width, "tie_word_embeddings": False, "num_hidden_layers": layers,
        }  # fmt: skip

    def shapes(self, layers: int) -> dict[str, tuple[int, ...]]:
        """Hugging Face's tensors."""
        hidden, head = self.hidden, self.head
        found: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab, hidden),
            "model.norm.weight": (hidden,),
            "lm_head.weight": (self.vocab, hidden),
        }
        for i in range(layers):
            path = f"model.layers.{i}"
            rows = {"q": self.heads * head, "k": self.groups * head, "v": self.groups * head}
            found |= {f"{path}.self_attn.{part}_proj.weight": (n, hidden) for part, n in rows.items()}
            found[f"{path}.self_attn.o_proj.weight"] = (hidden, self.heads * head)
            found[f"{path}.mlp.gate.weight"] = (self.experts, hidden)
            found |= {f"{path}.self_attn.{part}_norm.weight": (head,) for part in "qk"}
            found |= {f"{path}.{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
            for e in range(self.experts):
                found |= {f"{path}.mlp.experts.{e}.{leaf}_proj.weight": (self.width, hidden) for leaf in ("gate", "up")}
                found[f"{path}.mlp.experts.{e}.down_proj.weight"] = (hidden, self.width)
        return found


def make_exporter(layers: int, small: bool) -> Exporter:
    sizes = Sizes(small)
    headers = {name: TensorInfo(name, "BF16", shape) for name, shape in sizes.shapes(layers).items()}
    return Exporter(sizes.config(layers), headers, Options(), **({"bucket_bytes": 200_000} if small else {}))


def parameters(model: Model, device: torch.device) -> dict[str, Tensor]:
    """Random, of the shapes that Megatron has them in."""
    g = torch.Generator(device).manual_seed(0)
    found = {}
    for name, parameter in model.parameters().items():
        parts = [model.shapes[hf] for hf in parameter.hf]
        shape = (sum(part[0] for part in parts), *parts[0][1:])
        found[name] = torch.randn(shape, generator=g, device=device, dtype=torch.bfloat16).mul_(0.02)
    return found


def gate(exporter: Exporter, prepared: PreparedExport, weights: dict[str, Tensor], layers: int) -> int:
    """Experts and attention of three layers, each byte; elements compared."""
    chosen = sorted({0, layers // 2, layers - 1})
    wanted: dict[str, Tensor] = {}
    names = {f"model.layers.{layer}." for layer in chosen}
    of = {hf: name for name in weights for hf in exporter.model.parameter(name).hf}
    compared = 0
    for layer in chosen:
        path = f"model.layers.{layer}"
        experts = [f"{path}.mlp.experts.{e}" for e in range(exporter.model.experts)]
        groups = [
            *[[f"{expert}.{leaf}_proj.weight" for leaf in ("gate", "up")] for expert in experts],
            *[[f"{expert}.down_proj.weight"] for expert in experts],
            [f"{path}.self_attn.{leaf}_proj.weight" for leaf in "qkv"],
            [f"{path}.self_attn.o_proj.weight"],
        ]  # fmt: skip
        for number, group in enumerate(groups):
            whole = weights[of[group[0]]]
            if len(group) == 3:  # by groups of heads
                model = exporter.model
                rows = whole.view(model.query_groups, -1, whole.shape[1])
                each = [model.shapes[name][0] // model.query_groups for name in group]
                whole = torch.cat([part.reshape(-1, whole.shape[1]) for part in rows.split(each, 1)])
            impl = "reference" if number % 32 == 0 else "auto"
            q = hb.quantize(whole, hb.NVFP4(), impl=impl)
            counts = [exporter.model.shapes[name][0] for name in group]
            for name, packed, scale in zip(group, q.packed.split(counts), q.block_scale.split(counts), strict=True):
                wanted[name] = packed
                wanted[f"{name}_scale"] = scale.view(torch.uint8)
                wanted[f"{name}_scale_2"] = q.tensor_scale.view(1).view(torch.uint8)
            compared += whole.numel()
    found = set()
    for bucket in prepared.export():
        for piece in bucket.pieces:
            if piece.name in wanted and any(piece.name.startswith(name) for name in names):
                found.add(piece.name)
                if not torch.equal(piece.tensor.reshape(-1).view(torch.uint8), wanted[piece.name].reshape(-1)):
                    raise SystemExit(f"{piece.name} differs from halfbyte.quantize; nothing was timed")
    if missing := wanted.keys() - found:
        raise SystemExit(f"{min(missing)} was not exported; nothing was timed")
    return compared


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def times(run: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> list[float]:
    """Milliseconds by the clock, after two runs."""
    found = []
    for i in range(repeats + 2):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        if i >= 2:
            found.append(1e3 * (time.perf_counter() - start))
    return found


def launches(run: Callable[[], object]) -> dict[str, float]:
    """Kernels, fills and copies of a run, and milliseconds of the GPU in them."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    events = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    other = [e for e in events if e.name.startswith(("Memcpy", "Memset"))]
    return {
        "kernels": len(events) - len(other),
        "copies_and_fills": len(other),
        "milliseconds_in_all": sum(e.device_time for e in events) / 1e3,
    }


def one_rank(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    exporter = make_exporter(options.layers, options.small)
    weights = parameters(exporter.model, device)
    start = time.perf_counter()
    held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    prepared = exporter.prepare(weights.items())
    preparing = time.perf_counter() - start
    compared = gate(exporter, prepared, weights, options.layers)
    print(f"bytes equal halfbyte.quantize's: {compared:,} weights of {options.layers} layers", flush=True)
    chosen = {item.name.full for item in exporter.plan.quantized}
    quantized = {n: t for n, t in weights.items() if not chosen.isdisjoint(exporter.model.parameter(n).hf)}
    host: list[float] = []

    def sync() -> None:
        begin = time.perf_counter()
        for bucket in prepared.export():
            if bucket.index == len(prepared.buckets) - 1:
                host.append(1e3 * (time.perf_counter() - begin))

    milliseconds = times(sync, device)
    result: dict[str, Any] = {
        "weights": sum(t.numel() for t in quantized.values()),
        "bytes_read": sum(t.nbytes for t in weights.values()),
        "bytes_made": prepared.nbytes,
        "buckets": len(prepared.buckets),
        "bucket_buffers_bytes": prepared.buffer_bytes,
        "gate_weights": compared,
        "prepare_seconds": preparing,
        "milliseconds": statistics.median(milliseconds),
        "milliseconds_of_each": milliseconds,
        "host_milliseconds": statistics.median(host[2:]),
    }
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        sync()
        result["peak_bytes_beyond_weights"] = torch.cuda.max_memory_allocated() - held
        result |= {f"launches_{name}": value for name, value in launches(sync).items()}
    sample = {n: t for n, t in quantized.items() if int(n.split(".")[2]) < options.sample_layers}

    def one_by_one() -> None:
        for tensor in sample.values():
            hb.quantize(tensor, hb.NVFP4())

    scale = len(quantized) / len(sample)
    result |= {
        "one_by_one_calls": len(quantized),
        "one_by_one_sampled_calls": len(sample),
        "one_by_one_milliseconds": statistics.median(times(one_by_one, device, 3)) * scale,
    }
    print(
        f"{result['weights'] / 1e9:.2f} G weights in {result['buckets']} buckets: {result['milliseconds']:.2f} ms "
        f"(goal {GOAL_MILLISECONDS}), {result['host_milliseconds']:.2f} ms on the host; "
        f"{result.get('launches_kernels', '?')} kernels and {result.get('launches_copies_and_fills', '?')} copies and "
        f"fills (goal {GOAL_LAUNCHES}); {len(quantized):,} calls of quantize, from {len(sample):,}: "
        f"{result['one_by_one_milliseconds']:.1f} ms"
    )
    return result


def rank_main(rank: int, options: argparse.Namespace, store: str, out: str) -> None:
    device = torch.device("cuda", rank) if options.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    exporter = make_exporter(options.layers, options.small)
    link = connect(dist.FileStore(store, 2), rank, 2, device=device, timeout=120)
    if rank == 1:
        engine = {n: torch.zeros(shape, dtype=DTYPES[t], device=device) for n, (t, shape) in exporter.entries.items()}
        receiver = Receiver(engine)
        for _ in range(REPEATS + 2):
            receiver.receive(link)
            synchronize(device)
        sums = {name: checksum(tensor) for name, tensor in engine.items() if ".0." in name}
        flats = [torch.empty(size, dtype=torch.uint8, device=device) for size in link.hear()["sizes"]]
        for _ in range(REPEATS + 2):
            broadcast_all(link, flats)
        staged = receiver.staged_bytes
        Path(out).write_text(json.dumps({"sums": sums, "staged_bytes": staged}))
        link.agree(None, "the end")
        return
    weights = parameters(exporter.model, device)
    prepared = exporter.prepare(weights.items())
    compared = gate(exporter, prepared, weights, options.layers)
    sender, version = Sender(link), iter(range(1, 1000))
    syncing = times(lambda: sender.send(prepared.export(), next(version)), device)
    sums = {
        piece.name: checksum(piece.tensor)
        for bucket in prepared.export() for piece in bucket.pieces if ".0." in piece.name
    }  # fmt: skip
    flats = [bucket.flat for bucket in prepared.buckets]
    link.say({"sizes": [len(flat) for flat in flats]})
    alone = times(lambda: broadcast_all(link, flats), device)
    link.agree(None, "the end")
    there = json.loads(Path(out).read_text())
    if there["sums"] != sums:
        raise SystemExit("what the receiver has is not what was sent; the times mean nothing")
    result = {
        "gate_weights": compared,
        "bytes_sent": sum(len(flat) for flat in flats),
        "buckets": len(flats),
        "sync_milliseconds": statistics.median(syncing),
        "broadcast_milliseconds": statistics.median(alone),
        "times_broadcast": statistics.median(syncing) / statistics.median(alone),
        "receiver_staged_bytes": there["staged_bytes"],
    }
    print(
        f"{result['bytes_sent'] / 1e9:.2f} GB: sync {result['sync_milliseconds']:.1f} ms, broadcast alone "
        f"{result['broadcast_milliseconds']:.1f} ms: {result['times_broadcast']:.2f}× (goal {GOAL_TIMES_BROADCAST})"
    )
    Path(out).write_text(json.dumps(result))


def checksum(tensor: Tensor) -> int:
    data = tensor.reshape(-1).view(torch.uint8).int()
    return int((data * (torch.arange(len(data), device=data.device) % 65521 + 1)).sum())


def broadcast_all(link: Any, flats: list[Tensor]) -> None:
    """The same buckets through the same group, with nothing in between."""
    for flat in flats:
        link.broadcast(flat)
    link.settle()


def two_ranks(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        out = str(Path(directory) / "out.json")
        torch.multiprocessing.spawn(rank_main, (options, str(Path(directory) / "store"), out), options.ranks)
        found: dict[str, Any] = json.loads(Path(out).read_text())
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--sample-layers", type=int, default=4, help="layers that are quantized one weight at a time")
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=1)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the code")
    parser.add_argument("--commit", help="what to record where there is no git")
    parser.add_argument("--json", nargs="?", type=Path, const=Path(), help="write a file; benchmarks/results/ if none")
    options = parser.parse_args()
    measured = one_rank(options) if options.ranks == 1 else two_ranks(options)
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else None
    if options.json is not None:
        result = {
            **provenance(options.commit),
            "hardware": {"gpu": gpu, "cuda": torch.version.cuda, "ranks": options.ranks},
            "layers": options.layers,
            **measured,
        }
        name = "export" if options.ranks == 1 else f"export_{options.ranks}_gpus"
        file = options.json if options.json.name else ROOT / "benchmarks" / "results" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        print(f"written: {file}")


if __name__ == "__main__":
    main()
