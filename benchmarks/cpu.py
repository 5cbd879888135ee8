"""The compiled CPU path beside ModelOpt and compressed-tensors, in one run.

    python benchmarks/cpu.py [--rows 4096] [--columns 4096] [--json FILE]

First every operation's bytes are compared with `halfbyte.numerics`; a wrong one ends the run before anything is timed.
Then medians: of each operation, of a copy of the input, and of what others do. The rate counts bytes of the high
precision side, read or written. Timings take turns, so that a busy machine is unkind to all alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from halfbyte import NVFP4
from halfbyte.kernels.cpu import mxfp8 as cpu_mxfp8
from halfbyte.kernels.cpu import nvfp4 as cpu
from halfbyte.numerics import mxfp8, nvfp4

FORMATS = {
    "plain": NVFP4(),
    "plain, amax given": NVFP4(),
    "plain, row-scaled": NVFP4(scaling="row"),
    "plain, 16×16": NVFP4(block=(16, 16)),
    "plain, Hadamard": NVFP4(hadamard=True),
    "plain, stochastic": NVFP4(rounding="stochastic"),
    "four_over_six": NVFP4(scale_rule="four_over_six"),
    "four_over_six, fp16 error": NVFP4(scale_rule="four_over_six", error_arithmetic="fp16"),
    "four_over_six, 16×16": NVFP4(block=(16, 16), scale_rule="four_over_six"),
    "four_over_six, row-scaled": NVFP4(scaling="row", scale_rule="four_over_six"),
}
TARGETS = {"plain": 25, "four_over_six": 8}  # times ModelOpt's rate


def arguments(name: str, fmt: NVFP4, x: Tensor) -> dict[str, object]:
    out: dict[str, object] = {}
    if name.endswith("amax given"):
        out["amax"] = x.abs().amax().float()
    if fmt.rounding == "stochastic":
        out["rng"] = (1, 2)
    return out


def check(name: str, actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, e in zip(actual, expected, strict=True):
        a_bytes, e_bytes = (t.reshape(-1).view(torch.uint8) for t in (a, e))
        if a.dtype != e.dtype or a.shape != e.shape or not torch.equal(a_bytes, e_bytes):
            raise SystemExit(f"{name}: bytes differ from the reference; nothing was timed")


def correctness(columns: int) -> None:
    """Every operation of this file, on ordinary values next to large, small and odd ones."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, columns, generator=generator) * torch.exp(3 * torch.randn(80, 1, generator=generator))
    x[3] = 0.0
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        y = x.to(dtype)
        for name, fmt in FORMATS.items():
            extra = arguments(name, fmt, y)
            for view in (y, y.mT.contiguous().mT):
                check(f"{name}, {dtype}", cpu.quantize(view, fmt, **extra), nvfp4.quantize(y, fmt, **extra))
        q, m = nvfp4.quantize(y, NVFP4()), mxfp8.quantize(y)
        check(f"MXFP8, {dtype}", cpu_mxfp8.quantize(y), m)
        check(f"dequantize NVFP4, {dtype}", (cpu.dequantize(*q[:3], dtype),), (nvfp4.dequantize(*q[:3]).to(dtype),))
        check(f"dequantize MXFP8, {dtype}", (cpu_mxfp8.dequantize(*m, dtype),), (mxfp8.dequantize(*m).to(dtype),))


def ours(x: Tensor) -> dict[str, tuple[Callable[[], object], int]]:
    """Operation → (call, bytes of its high precision side)."""
    out: dict[str, tuple[Callable[[], object], int]] = {}
    for name, fmt in FORMATS.items():
        extra = arguments(name, fmt, x)
        out[name] = (lambda fmt=fmt, extra=extra: cpu.quantize(x, fmt, **extra), x.nbytes)
    out["plain, of a transposed matrix"] = (lambda: cpu.quantize(x.mT, NVFP4()), x.nbytes)
    half, single = x.half(), x.float()
    out["plain, float16"] = (lambda: cpu.quantize(half, NVFP4()), half.nbytes)
    out["plain, float32"] = (lambda: cpu.quantize(single, NVFP4()), single.nbytes)
    out["MXFP8"] = (lambda: cpu_mxfp8.quantize(x), x.nbytes)
    q, m = cpu.quantize(x, NVFP4()), cpu_mxfp8.quantize(x)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        short, size = str(dtype).removeprefix("torch."), x.numel() * dtype.itemsize
        out[f"dequantize NVFP4 to {short}"] = (lambda dtype=dtype: cpu.dequantize(*q[:3], dtype), size)
        out[f"dequantize MXFP8 to {short}"] = (lambda dtype=dtype: cpu_mxfp8.dequantize(*m, dtype), size)
    return out


def others(x: Tensor) -> dict[str, Callable[[], object]]:
    """What else quantizes bf16 to NVFP4 on a CPU, of what is installed."""
    out: dict[str, Callable[[], object]] = {}
    try:
        from modelopt.torch.quantization.qtensor import NVFP4QTensor

        out["ModelOpt NVFP4QTensor.quantize"] = lambda: NVFP4QTensor.quantize(x, 16)
    except ImportError:
        print("nvidia-modelopt is not installed: no comparison with it")
    try:
        from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
        from compressed_tensors.quantization import QuantizationScheme
        from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
        from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

        weights = PRESET_SCHEMES["NVFP4A16"]["weights"]
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)

        def compress() -> object:
            blocks = x.unflatten(-1, (-1, 16))
            low, high = blocks.amin(-1), blocks.amax(-1)
            global_scale = generate_gparam(low.amin().float().view(1), high.amax().float().view(1))
            scale, _ = calculate_qparams(low, high, weights, global_scale)
            state = {"weight": x, "weight_scale": scale, "weight_global_scale": global_scale}
            return NVFP4PackedCompressor.compress(state, scheme)

        out["compressed-tensors NVFP4 compress"] = compress
    except ImportError:
        print("compressed-tensors is not installed: no comparison with it")
    return out


def medians(calls: dict[str, Callable[[], object]], rounds: int, seconds: float) -> dict[str, float]:
    """Median seconds of each call; slow ones get fewer rounds, two at least."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if len(times[name]) < 3 or sum(times[name]) < seconds:
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t[1:]) for name, t in times.items()}  # the first one warms up


def small_calls() -> dict[str, float]:
    """Microseconds of a whole call on inputs where the work itself is nothing."""
    out = {}
    for shape in ((1, 64), (1, 8192), (64, 4096)):
        x = torch.randn(shape).bfloat16()
        for name, call in (
            ("plain", lambda x=x: cpu.quantize(x, NVFP4())),
            ("MXFP8", lambda x=x: cpu_mxfp8.quantize(x)),
        ):
            calls = {name: lambda call=call: [call() for _ in range(100)]}
            out[f"{name} {shape[0]}×{shape[1]}"] = medians(calls, 9, 10.0)[name] * 1e4
    return out


def provenance() -> dict[str, object]:
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent)
        return done.stdout.strip()

    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    versions = {"python": platform.python_version()}
    for package in ("torch", "numba", "llvmlite", "numpy", "nvidia-modelopt", "compressed-tensors"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "commit": git("rev-parse", "HEAD"),
        "uncommitted changes": bool(git("status", "--porcelain", "--", ":/src", ":/benchmarks")),
        "cpu": model,
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096, help="divisible by 32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the results to this file too")
    options = parser.parse_args()

    correctness(options.columns)
    print("bytes equal the reference's; timing")
    x = torch.randn(options.rows, options.columns, generator=torch.Generator().manual_seed(1)).bfloat16()
    target, mine, foreign = torch.empty_like(x), ours(x), others(x)
    calls: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(x)}
    calls |= {name: call for name, (call, _) in mine.items()} | foreign
    times = medians(calls, options.rounds, 10.0)

    sizes = {name: size for name, (_, size) in mine.items()}
    rates = {name: sizes.get(name, x.nbytes) / seconds / 1e9 for name, seconds in times.items()}
    modelopt = rates.get("ModelOpt NVFP4QTensor.quantize")
    print(f"{options.rows}×{options.columns} bfloat16\n{'':36} {'ms':>9} {'GB/s':>7} {'of copy':>8} {'× ModelOpt':>11}")
    results: dict[str, dict[str, float | None]] = {}
    for name, seconds in times.items():
        encodes = name != "copy" and "dequantize" not in name
        ratio = rates[name] / modelopt if modelopt and encodes else None
        results[name] = {
            "milliseconds": seconds * 1e3,
            "gigabytes per second": rates[name],
            "of copy": rates[name] / rates["copy"],
            "times ModelOpt": ratio,
        }
        note = f"  (target {TARGETS[name]})" if name in TARGETS else ""
        shown = f"{ratio:11.1f}{note}" if ratio is not None else ""
        print(f"{name:36} {seconds * 1e3:9.2f} {rates[name]:7.2f} {rates[name] / rates['copy']:8.0%} {shown}")
    small = small_calls()
    for name, microseconds in small.items():
        print(f"whole call, {name:24} {microseconds:9.1f} µs")
    if options.json:
        record = {**provenance(), "shape": [options.rows, options.columns], "results": results, "microseconds": small}
        options.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
