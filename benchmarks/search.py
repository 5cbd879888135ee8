"""Scale rule `search` beside ModelOpt's sweep over all E4M3 scales, on one GPU or on the CPU, in one run.

    python benchmarks/search.py [--device cuda|cpu] [--rows 8192] [--columns 4096] [--modelopt DIR] [--json FILE]

First every rule's bytes are compared with `halfbyte.numerics`; a wrong one ends the run before anything is timed. Ours
gives packed elements and scales, ModelOpt's sweep only each block's best amax. On a GPU the caches are cold. DIR is
`modelopt/torch/kernels/quantization`, where the package is not installed: of it `common` and `gemm` are read.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte import NVFP4
from halfbyte.numerics import nvfp4

FORMATS = {
    "mse, amax given": NVFP4(scale_rule="search"),
    "mse": NVFP4(scale_rule="search"),
    "mae": NVFP4(scale_rule="search", error="mae"),
    "mse, importance": NVFP4(scale_rule="search"),
    "mse, row-scaled": NVFP4(scale_rule="search", scaling="row"),
    "mse, 16×16": NVFP4(scale_rule="search", block=(16, 16)),
    "hessian": NVFP4(scale_rule="search", error="hessian"),
    "hessian, amax given": NVFP4(scale_rule="search", error="hessian"),
}
TARGETS = {"cuda": {"mse": 50, "mse, amax given": 50, "hessian": 5}, "cpu": {"mse": 20}}


def extra(name: str, x: Tensor, g: torch.Generator) -> dict[str, Tensor]:
    out = {}
    if "amax given" in name:
        out["amax"] = x.abs().amax().float()
    if "importance" in name:
        out["importance"] = torch.rand(x.shape[1], generator=g, device=x.device)
    if "hessian" in name:  # of correlated inputs
        a = torch.randn(x.shape[1] // 16, 256, 16, generator=g, device=x.device)
        a = a + torch.randn(x.shape[1] // 16, 256, 1, generator=g, device=x.device)
        out["hessian"] = a.mT @ a / 256
    return out


def implementation(device: str) -> Callable[..., Any]:
    if device == "cpu":
        from halfbyte.kernels.cpu import nvfp4 as cpu

        return cpu.quantize
    from halfbyte.kernels import quantize

    return quantize.quantize


def inputs(shape: tuple[int, int], g: torch.Generator, device: str) -> list[Tensor]:
    x = torch.randn(shape, generator=g, device=device)
    sizes = torch.exp2(-26 * torch.rand(shape[0], shape[1] // 16, generator=g, device=device))
    few = torch.randint(-7, 8, shape, generator=g, device=device).float()
    heavy = x * torch.exp(2 * torch.randn(shape, generator=g, device=device))
    out = [x.bfloat16(), x.half(), x, heavy, heavy.bfloat16(), x * sizes.repeat_interleave(16, 1), few]
    odd = x.clone()
    odd.view(-1)[::1003] = torch.inf
    return [*out, odd, x * 2.0**-80, x * 2.0**100]


def gate(device: str, g: torch.Generator, rows: int, columns: int) -> int:
    """Elements compared with the reference."""
    run, count = implementation(device), 0
    for x in inputs((rows, columns), g, device):
        for name, fmt in FORMATS.items():
            more = extra(name, x, g)
            if "amax" in more:
                more["amax"] = more["amax"].clamp(max=3e38) * 0.9
            for got, wanted in zip(run(x, fmt, **more), nvfp4.quantize(x, fmt, **more), strict=True):
                a, b = (t.reshape(-1).view(torch.uint8) for t in (got, wanted))
                if not torch.equal(a, b):
                    raise SystemExit(f"{name}: {int((a != b).sum())} bytes of {a.numel()} differ; nothing was timed")
            count += x.numel()
    return count


def modelopt(folder: Path | None) -> types.ModuleType:
    """Its module of Triton sweeps; from a folder, by path."""
    if folder is None:
        from modelopt.torch.kernels.quantization.gemm import nvfp4_fp8_sweep

        return nvfp4_fp8_sweep
    for package in ("theirs", "theirs.common", "theirs.gemm"):
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(folder.joinpath(*package.split(".")[1:]))]
    scales = types.ModuleType("theirs.gemm.fp4_kernel")  # its scales of the 126 candidates: they are E4M3 values
    scales.compute_fp4_scales = lambda amax, *_, **__: amax / 6.0  # type: ignore[attr-defined]
    sys.modules[scales.__name__] = scales
    return importlib.import_module("theirs.gemm.nvfp4_fp8_sweep")


def sweeps(x: Tensor, h: Tensor, folder: Path | None) -> dict[str, Callable[[], object]]:
    blocks, amax = x.view(-1, 16), x.abs().amax().float()
    if x.is_cuda:
        theirs = modelopt(folder)
        return {
            "ModelOpt, mse": lambda: theirs.nvfp4_fp8_scale_sweep(blocks, amax),
            "ModelOpt, hessian": lambda: theirs.nvfp4_fp8_scale_sweep_hessian(blocks, amax, h),
        }
    from modelopt.torch.quantization.calib.mse import NVFP4MSECalibrator
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    def fake(values: Tensor, block_amax: Tensor) -> Tensor:
        """Quantize and decode by its own elementwise functions: its kernel for this needs a GPU."""
        scale = block_amax.view(-1, 1) / 6.0
        scaled = values / torch.where(scale == 0, 1.0, scale)
        return NVFP4QTensor.get_e2m1_values(values.device)[NVFP4QTensor._cast_fp4(scaled).long()] * scale

    def sweep() -> object:
        calibrator = NVFP4MSECalibrator(blocks.abs().amax(1).float(), amax, axis=0, quant_func=fake)
        calibrator.collect(blocks)
        return calibrator.compute_amax()

    return {"ModelOpt, mse": sweep}


def medians(calls: dict[str, Callable[[], object]], device: str) -> dict[str, float]:
    """Milliseconds."""
    if device == "cuda":
        from triton.testing import do_bench

        return {name: do_bench(call, warmup=30, rep=200, return_mode="median") for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(6):
        for name, call in calls.items():
            if len(times[name]) < 2 or sum(times[name]) < 20:
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(t[1:]) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--gate-rows", type=int, default=0, help="rows of each input of the comparison")
    parser.add_argument("--modelopt", type=Path)
    parser.add_argument("--json", type=Path, help="write the results to this file too")
    options = parser.parse_args()
    device = options.device
    g = torch.Generator(device=device).manual_seed(0)
    compared = gate(device, g, options.gate_rows or (520 if device == "cuda" else 40), options.columns)
    print(f"{compared:,} elements: bytes equal the reference's; timing")

    x = torch.randn(options.rows, options.columns, generator=g, device=device).bfloat16()
    run, calls = implementation(device), {}
    for name, fmt in FORMATS.items():
        more = extra(name, x, g)
        calls[name] = lambda fmt=fmt, more=more: run(x, fmt, **more)
    calls["amax rule"] = lambda: run(x, NVFP4())
    calls |= sweeps(x, extra("hessian", x, g)["hessian"], options.modelopt)
    times = medians(calls, device)
    results = {}
    for name, milliseconds in times.items():
        theirs = times.get("ModelOpt, hessian" if name.startswith("hessian") else "ModelOpt, mse")
        ratio = theirs / milliseconds if theirs and name in FORMATS else None
        results[name] = {"milliseconds": milliseconds, "times ModelOpt": ratio}
        target = TARGETS[device].get(name)
        note = (f"{ratio:9.1f}×" if ratio else "") + (f"  (target {target})" if target else "")
        print(f"{name:22} {milliseconds:10.4f} ms {note}")
    if options.json:
        where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
        record = {"device": where, "shape": [options.rows, options.columns], "compared": compared, "results": results}
        options.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
