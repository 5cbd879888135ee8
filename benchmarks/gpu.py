"""The GPU kernels: correctness gate, then medians, as fractions of the copy bandwidth measured in the same run.

    python benchmarks/gpu.py [--gate quick|full] [--json PATH] [--sizes 8192 16384]

Every row counts its fewest bytes: each input read once, each output written once. Caches are cold: `do_bench` clears
the L2 cache before each call. Nothing is timed unless the gate passes.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.testing import do_bench

import compiled
from halfbyte.formats import NVFP4
from halfbyte.kernels import dequantize, fake_quantize, mxfp8, quantize, swizzle, transposed
from halfbyte.numerics import mxfp8 as mxfp8_numerics
from halfbyte.numerics import nvfp4

PLAIN, ROW, SQUARE = NVFP4(), NVFP4(scaling="row"), NVFP4(block=(16, 16))
FOUR_OVER_SIX = NVFP4(scale_rule="four_over_six")
GB = 1e9


@dataclass
class Row:
    name: str
    shape: str
    microseconds: float
    bytes: int
    of_copy: float
    goal: float | None
    times_compiled: float | None


def median(fn: Callable[[], Any]) -> float:
    """Microseconds."""
    return 1e3 * float(do_bench(fn, warmup=20, rep=100, return_mode="median"))


def copy_bandwidth() -> float:
    """Bytes per second read and written by copy_ of 1 GiB."""
    source = torch.empty(1 << 29, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / (median(lambda: target.copy_(source)) * 1e-6)


# ------------------------------------------------------------------------------------------------------------- gate
def distributions(shape: tuple[int, int], g: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Inputs of each dtype: random, heavy-tailed, constant, subnormal, near ties, with NaN and infinity."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.randn(shape, generator=g, device="cuda")
        yield f"randn {dtype}", x.to(dtype)
        yield f"heavy {dtype}", (x * torch.exp(4 * torch.randn(shape, generator=g, device="cuda"))).to(dtype)
        yield f"constant {dtype}", torch.full(shape, -1.7, device="cuda", dtype=dtype)
        yield f"subnormal {dtype}", (x * 1e-38).to(dtype)
        ties = torch.randint(-28, 29, shape, generator=g, device="cuda") * 0.25
        yield f"near ties {dtype}", (ties * (1 + 1e-3 * x)).to(dtype)
        sprinkled = x.clone()
        sprinkled.view(-1)[::100_003] = float("nan")
        sprinkled.view(-1)[7::100_003] = float("inf")
        yield f"nan and inf {dtype}", sprinkled.to(dtype)
        raw = torch.randint(-(2**31), 2**31 - 1, shape, generator=g, device="cuda").to(torch.int32)
        x = raw.view(torch.float32) if dtype == torch.float32 else raw.to(torch.int16).view(dtype)
        yield f"bits {dtype}", torch.where(x.isfinite(), x, -0.0)


def same(a: Tensor, b: Tensor) -> bool:
    if a.dtype == torch.float32:
        return bool(((a == b) | (a.isnan() & b.isnan())).all())
    return torch.equal(a.view(torch.uint8), b.contiguous().view(torch.uint8))


def gate(full: bool) -> int:
    """Elements compared with the contract; exits where a byte differs."""
    g = torch.Generator(device="cuda").manual_seed(0)
    shape = (4099, 4096) if full else (515, 1040)
    elements = 0
    for _ in range(3 if full else 1):
        for name, x in distributions(shape, g):
            checks: list[tuple[str, Any, Any]] = []
            for fmt in (PLAIN, ROW, SQUARE):
                checks.append((str(fmt), quantize.quantize(x, fmt), nvfp4.quantize(x, fmt)))
            part = x[:515]
            wanted = nvfp4.quantize(part.cpu(), FOUR_OVER_SIX)
            checks.append((str(FOUR_OVER_SIX), quantize.quantize(part, FOUR_OVER_SIX), [t.cuda() for t in wanted]))
            rows = x.shape[1] // 32 * 32
            checks.append(("mxfp8", mxfp8.quantize(x[:, :rows]), mxfp8_numerics.quantize(x[:, :rows])))
            whole = x[: x.shape[0] // 16 * 16]
            checks.append(("transposed", transposed.quantize(whole, PLAIN)[0], nvfp4.quantize(whole.mT, PLAIN)))
            q = checks[0][2]
            decoded = (dequantize.dequantize(*q[:3], torch.bfloat16),), (nvfp4.dequantize(*q[:3]).bfloat16(),)
            for what, got, wanted in checks:
                if not all(same(a, b) for a, b in zip(got, wanted, strict=True)):
                    sys.exit(f"gate: {what} differs from the contract on {name}")
                elements += 2 * got[0].numel() if got[0].dtype == torch.uint8 else got[0].numel()
            a, b = decoded[0][0].float(), decoded[1][0].float()
            if not same(a, b):
                sys.exit(f"gate: dequantize differs from the contract on {name}")
    patterns = torch.arange(65536, device="cuda", dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for amax in (1e-30, 0.37, 6.0, 3e5, 3e38):
        x = torch.where(patterns.isfinite(), patterns, 0.0)[torch.randperm(65536, device="cuda")].view(-1, 16)
        a = torch.tensor(amax, device="cuda")
        got, wanted = quantize.quantize(x, PLAIN, amax=a), nvfp4.quantize(x, PLAIN, amax=a)
        if not all(same(u, v) for u, v in zip(got, wanted, strict=True)):
            sys.exit(f"gate: a bfloat16 pattern differs at amax {amax}")
    return elements


# ------------------------------------------------------------------------------------------------------------- rows
@dataclass
class Case:
    name: str
    bytes_per_element: float
    run: Callable[[Tensor, Tensor], Callable[[], Any]]  # (x, its amax) → what is timed
    goal: float | None = None
    compiled: Callable[[Tensor, Tensor], Callable[[], Any]] | None = None


def _compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(fn, fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs")


def _dequantize(x: Tensor, amax: Tensor) -> Callable[[], Any]:
    q = quantize.quantize(x, PLAIN, amax=amax)
    return lambda: dequantize.dequantize(*q[:3], torch.bfloat16)


def _mxfp8_dequantize(x: Tensor, amax: Tensor) -> Callable[[], Any]:
    q = mxfp8.quantize(x)
    return lambda: mxfp8.dequantize(*q, torch.bfloat16)


def _swizzle(x: Tensor, amax: Tensor) -> Callable[[], Any]:
    scale = quantize.quantize(x, PLAIN, amax=amax)[1]
    return lambda: swizzle.swizzle(scale)


def cases() -> list[Case]:
    given, computed = _compiled(compiled.given), _compiled(compiled.computed)
    row, four = _compiled(compiled.row), _compiled(compiled.four_over_six)
    hadamard, stochastic = NVFP4(hadamard=True), NVFP4(rounding="stochastic")
    out = 2 + 0.5625
    return [
        Case("quantize, amax given", out, lambda x, a: lambda: quantize.quantize(x, PLAIN, amax=a), 0.85,
             lambda x, a: lambda: given(x, a)),
        Case("quantize, amax computed", out, lambda x, a: lambda: quantize.quantize(x, PLAIN), 0.46,
             lambda x, a: lambda: computed(x)),
        Case("quantize, row-scaled", out, lambda x, a: lambda: quantize.quantize(x, ROW), 0.80,
             lambda x, a: lambda: row(x)),
        Case("quantize 16×16, amax given", out, lambda x, a: lambda: quantize.quantize(x, SQUARE, amax=a), 0.85),
        Case("quantize 4over6 mae, amax given", out, lambda x, a: lambda: quantize.quantize(x, FOUR_OVER_SIX, amax=a),
             None, lambda x, a: lambda: four(x, a)),
        Case("quantize, Hadamard, amax given", out, lambda x, a: lambda: quantize.quantize(x, hadamard, amax=a)),
        Case("quantize, stochastic, amax given", out,
             lambda x, a: lambda: quantize.quantize(x, stochastic, amax=a, rng=(1, 2))),
        Case("transposed, amax given", out, lambda x, a: lambda: transposed.quantize(x, PLAIN, amax=a)),
        Case("rowwise + transposed, amax given", out + 0.5625,
             lambda x, a: lambda: transposed.quantize(x, PLAIN, amax=a, rowwise=PLAIN, rowwise_amax=a), 0.70),
        Case("rowwise + transposed Hadamard", out + 0.5625,
             lambda x, a: lambda: transposed.quantize(x, hadamard, amax=a, rowwise=PLAIN, rowwise_amax=a)),
        Case("fake quantize, amax given", 4, lambda x, a: lambda: fake_quantize.fake_quantize(x, PLAIN, amax=a)),
        Case("dequantize to bf16", out, _dequantize, 0.85),
        Case("MXFP8 quantize", 3 + 1 / 32, lambda x, a: lambda: mxfp8.quantize(x), 0.85),
        Case("MXFP8 dequantize to bf16", 3 + 1 / 32, _mxfp8_dequantize, 0.85),
        Case("swizzle block scales", 0.125, _swizzle),
    ]  # fmt: skip


def time_case(case: Case, x: Tensor, amax: Tensor, bandwidth: float, with_compiled: bool) -> Row:
    us = median(case.run(x, amax))
    size = int(case.bytes_per_element * x.numel())
    ratio = None
    if with_compiled and case.compiled is not None:
        try:
            ratio = median(case.compiled(x, amax)) / us
        except RuntimeError as error:  # Inductor's own failures: the row is then without a ratio, and says why
            print(f"{case.name}: torch.compile fails: {type(error).__name__}", flush=True)
    shape = "×".join(map(str, x.shape))
    return Row(case.name, shape, us, size, size / (us * 1e-6) / bandwidth, case.goal, ratio)


def experts(bandwidth: float) -> Iterator[Row]:
    x = torch.randn(128, 1536, 2048, device="cuda").bfloat16()
    amax = x.abs().amax((1, 2)).float()
    runs = (
        ("128 experts, amax given", lambda: quantize.quantize(x, PLAIN, amax=amax, per_matrix=True), 0.88),
        ("128 experts, amax computed", lambda: quantize.quantize(x, PLAIN, per_matrix=True), 0.65),
    )
    for name, fn, goal in runs:
        us = median(fn)
        size = int(2.5625 * x.numel())
        yield Row(name, "128×1536×2048", us, size, size / (us * 1e-6) / bandwidth, goal, None)


def python_overhead() -> float:
    """Microseconds of host time per call, on a matrix too small to wait for."""
    x = torch.randn(1, 8192, device="cuda").bfloat16()
    amax = x.abs().amax().float()
    for _ in range(20):
        quantize.quantize(x, PLAIN, amax=amax)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(1000):
        quantize.quantize(x, PLAIN, amax=amax)
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed * 1e3


def environment() -> dict[str, str]:
    root = Path(__file__).parents[1]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return {
        "commit": commit.stdout.strip(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gate", choices=("quick", "full"), default="quick", help="full: over 10^9 elements")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--sizes", type=int, nargs="+", default=[8192, 16384], help="square bf16 matrices")
    parser.add_argument("--no-compiled", action="store_true", help="leave torch.compile out")
    args = parser.parse_args()
    start = time.time()
    compared = gate(args.gate == "full")
    print(f"gate passed: {compared:,} elements, formats counted apart, in {time.time() - start:.0f} s", flush=True)
    bandwidth = copy_bandwidth()
    rows: list[Row] = []
    shapes = [(size, size) for size in args.sizes] + [(64, 4096), (1, 8192)]
    for shape in shapes:
        x = torch.randn(shape, device="cuda").bfloat16()
        amax = x.abs().amax().float()
        for case in cases():
            if "transposed" in case.name and shape[0] % 16:
                continue
            rows.append(time_case(case, x, amax, bandwidth, not args.no_compiled and shape == shapes[0]))
    rows += experts(bandwidth)
    overhead = python_overhead()
    if args.json is not None:
        result = {**environment(), "copy_bytes_per_second": bandwidth, "gate_elements": compared,
                  "python_microseconds_per_call": overhead, "rows": [asdict(row) for row in rows]}  # fmt: skip
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"copy {bandwidth / GB:.0f} GB/s; Python {overhead:.1f} µs per call")
    for row in rows:
        goal = "" if row.goal is None else f"goal {row.goal:4.0%}"
        ratio = "" if row.times_compiled is None else f"{row.times_compiled:5.2f}× compiled"
        figures = f"{row.microseconds:8.1f} µs {row.of_copy:6.1%} of copy"
        print(f"{row.name:34s} {row.shape:14s} {figures} {goal:10s} {ratio}")


if __name__ == "__main__":
    main()
