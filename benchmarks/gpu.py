"""The Triton kernels, through the public functions, beside torch.compile of the formulas."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import compiled
import halfbyte as hb
import search
from halfbyte import ops
from halfbyte.numerics import mxfp8, nvfp4, swizzle
from registry import Build, Call, Case, Shape, Table
from timing import cold_median

PLAIN, ROW, SQUARE = hb.NVFP4(), hb.NVFP4(scaling="row"), hb.NVFP4(block=(16, 16))
FOUR_OVER_SIX = hb.NVFP4(scale_rule="four_over_six")
HADAMARD, STOCHASTIC = hb.NVFP4(hadamard=True), hb.NVFP4(rounding="stochastic")
STOCHASTIC_HADAMARD = hb.NVFP4(hadamard=True, rounding="stochastic")
MX = hb.MXFP8()
SHAPES = [(8192, 8192), (16384, 16384), (64, 4096), (1, 8192)]
EXPERTS = (128, 1536, 2048)
OUT = 2 + 0.5625  # bytes per element: bf16 on one side, NVFP4 on the other
COMPILED = "torch.compile"
MATMUL, SQUARE_MATMUL = "torch bf16 matmul", (8192, 8192)


# --- gate -----------------------------------------------------------------------------------------------------------


def distributions(shape: Shape, g: torch.Generator) -> Iterator[tuple[str, Tensor]]:
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


def check(what: str, actual: Any, expected: Any) -> int:
    """Elements of the first tensor; NaN has no one pattern in float32."""
    for a, e in zip(actual, expected, strict=True):
        if a.dtype.itemsize > 1:
            good = a.dtype == e.dtype and bool(((a == e) | (a.isnan() & e.isnan())).all())
        else:
            good = a.dtype == e.dtype and torch.equal(a.view(torch.uint8), e.contiguous().view(torch.uint8))
        if not good:
            raise SystemExit(f"{what} differs from the contract; nothing was timed")
    return (2 if expected[0].dtype == torch.uint8 else 1) * int(expected[0].numel())


def parts(q: hb.QuantizedTensor) -> tuple[Tensor, ...]:
    return tuple(t for t in (q.packed, q.block_scale, q.tensor_scale, q.amax) if t is not None)


def gate(full: bool) -> int:
    g = torch.Generator(device="cuda").manual_seed(0)
    shape = (4099, 4096) if full else (515, 1056)
    compared = 0
    for _ in range(3 if full else 1):
        for name, x in distributions(shape, g):
            for fmt in (PLAIN, ROW, SQUARE):
                wanted = nvfp4.quantize(x, fmt)
                compared += check(f"{fmt} of {name}", parts(hb.quantize(x, fmt)), wanted)
                q, values = ops.quantize_with_values(x, fmt)
                exact = nvfp4.decode_without_tensor_scale(*wanted[:2]).to(x.dtype)
                compared += check(f"{fmt} with values of {name}", (*q, values), (*wanted, exact))
            part = x[:515]
            wanted = [t.cuda() for t in nvfp4.quantize(part.cpu(), FOUR_OVER_SIX)]
            compared += check(f"{FOUR_OVER_SIX} of {name}", parts(hb.quantize(part, FOUR_OVER_SIX)), wanted)
            compared += check(f"MXFP8 of {name}", parts(hb.quantize(x, MX)), mxfp8.quantize(x))
            whole = x[: x.shape[0] // 16 * 16]
            rows, columns = hb.quantize_transpose(whole, PLAIN)
            compared += check(f"rowwise of {name}", parts(rows), nvfp4.quantize(whole, PLAIN))
            compared += check(f"transposed of {name}", parts(columns), nvfp4.quantize(whole.mT, PLAIN))
            got = hb.fake_quantize_unscaled(whole.mT, STOCHASTIC, rng=(1, 2))
            wanted = nvfp4.quantize(whole.mT, STOCHASTIC, rng=(1, 2))
            wanted = nvfp4.decode_without_tensor_scale(*wanted[:2]).to(x.dtype), wanted.tensor_scale
            compared += check(f"values of the transposed of {name}", got, wanted)
            for q, one in zip(hb.quantize_many([part, whole], PLAIN), (part, whole), strict=True):
                compared += check(f"quantize_many of {name}", parts(q), nvfp4.quantize(one, PLAIN))
            wanted = nvfp4.dequantize(*nvfp4.quantize(x, PLAIN)[:3], torch.bfloat16)
            compared += check(f"dequantize of {name}", (hb.quantize(x, PLAIN).dequantize(torch.bfloat16),), (wanted,))
            wanted = nvfp4.dequantize(*nvfp4.quantize(x, PLAIN)[:3], x.dtype)
            compared += check(f"fake_quantize of {name}", (hb.fake_quantize(x, PLAIN),), (wanted,))
            scale = rows.block_scale
            compared += check(f"swizzle of {name}", (hb.swizzle(scale),), (swizzle.swizzle(scale),))
    compared += gate_matmul(g)
    patterns = torch.arange(65536, device="cuda", dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for value in (1e-30, 0.37, 6.0, 3e5, 3e38):
        x = torch.where(patterns.isfinite(), patterns, 0.0)[torch.randperm(65536, device="cuda")].view(-1, 16)
        amax = torch.tensor(value, device="cuda")
        wanted = nvfp4.quantize(x, PLAIN, amax=amax)
        compared += check(f"a bfloat16 pattern at amax {value}", parts(hb.quantize(x, PLAIN, amax=amax)), wanted)
    return compared + search.gate("cuda", full)


def gate_matmul(g: torch.Generator) -> int:
    """Every element of linear within (K + 2)·2^-24·Σ|x·w|, and one rounding to bf16, of float64."""
    compared = 0
    for fmt in (PLAIN, ROW):
        x, w = (torch.randn((rows, 1056), generator=g, device="cuda") for rows in (515, 768))
        xq, wq = hb.quantize(x, fmt), hb.quantize(w, fmt)
        xv, wv = (q.dequantize(unscaled=True).double() * q.tensor_scale.double().reshape(-1, 1) for q in (xq, wq))
        exact, magnitude = xv @ wv.mT, xv.abs() @ wv.abs().mT
        bound = (x.shape[1] + 2) * 2.0**-24 * magnitude + 2.0**-8 * exact.abs()
        if not bool(((hb.linear(xq, wq).double() - exact).abs() <= bound).all()):
            raise SystemExit(f"linear of {fmt} is beyond its budget; nothing was timed")
        compared += exact.numel()
    return compared


# --- cases ----------------------------------------------------------------------------------------------------------


@functools.cache
def inputs(shape: Shape) -> tuple[Tensor, Tensor]:
    """x, and its maximum or those of its matrices."""
    x = torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).bfloat16()
    return x, x.abs().amax((-2, -1)).float()


def quantizing(fmt: hb.NVFP4 | hb.MXFP8, given: bool = False, **options: Any) -> Build:
    def build(shape: Shape) -> Call:
        x, amax = inputs(shape)
        amaxes = {"amax": amax} if given else {}
        return lambda: hb.quantize(x, fmt, **amaxes, **options)

    return build


def transposing(fmt: hb.NVFP4, both: bool) -> Build:
    """fmt is of the transposed one."""

    def build(shape: Shape) -> Call:
        x, amax = inputs(shape)
        if both:
            return lambda: hb.quantize_transpose(x, PLAIN, fmt, amax=amax, transposed_amax=amax)
        return lambda: hb.quantize(x.mT, fmt, amax=amax)

    return build


def decoding(fmt: hb.NVFP4 | hb.MXFP8) -> Build:
    def build(shape: Shape) -> Call:
        q = hb.quantize(inputs(shape)[0], fmt)
        return lambda: q.dequantize(torch.bfloat16)

    return build


def faking(shape: Shape) -> Call:
    x, amax = inputs(shape)
    return lambda: hb.fake_quantize(x, PLAIN, amax=amax)


def multiplying(fmt: hb.NVFP4, accumulate: bool = False) -> Build:
    """q·s values, as a training step has them, times their like: (M, K) · (K, K)ᵀ."""

    def build(shape: Shape) -> Call:
        x, _ = inputs(shape)
        a, a_scale = hb.fake_quantize_unscaled(x, fmt)
        b, b_scale = hb.fake_quantize_unscaled(x.flip(0)[: shape[1]], PLAIN)
        buffer = torch.zeros((len(a), len(b)), device="cuda") if accumulate else None
        return lambda: ops.scaled_matmul(a, b, a_scale, b_scale, accumulate_into=buffer)

    return build


def bf16_matmul(shape: Shape) -> Call:
    x, _ = inputs(shape)
    w = x.flip(0)[: shape[1]].contiguous()
    return lambda: x @ w.mT


def with_values(fmt: hb.NVFP4, given: bool = False) -> Build:
    def build(shape: Shape) -> Call:
        x, amax = inputs(shape)
        return lambda: ops.quantize_with_values(x, fmt, amax=amax if given else None)

    return build


def transposed_values(shape: Shape) -> Call:
    """The operand of a weight's gradient."""
    x, amax = inputs(shape)
    return lambda: hb.fake_quantize_unscaled(x.mT, STOCHASTIC_HADAMARD, amax=amax, rng=(1, 2))


def swizzling(shape: Shape) -> Call:
    scale = hb.quantize(inputs(shape)[0], PLAIN).block_scale
    return lambda: hb.swizzle(scale)


def listing(given: bool) -> Build:
    def build(shape: Shape) -> Call:
        x, amax = inputs(shape)
        xs, amaxes = list(x), amax if given else None
        return lambda: hb.quantize_many(xs, PLAIN, amax=amaxes)

    return build


def compiling(function: Callable[..., Any], given: bool) -> Mapping[str, Build]:
    """The formulas of compiled.py, for large inputs only: compiling takes a while."""

    def build(shape: Shape) -> Call:
        x, amax = inputs(shape)
        run = torch.compile(function, fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs")
        return (lambda: run(x, amax)) if given else (lambda: run(x))

    return {f"{COMPILED} {function.__name__}": build}


def cases() -> list[Case]:
    times = f"{COMPILED} computed", 2.5
    matmuls = {MATMUL: bf16_matmul}
    return [
        Case("quantize, amax given", OUT, quantizing(PLAIN, True), 0.85, compiling(compiled.given, True)),
        Case("quantize, amax computed", OUT, quantizing(PLAIN), 0.46, compiling(compiled.computed, False), times),
        Case("quantize, row-scaled", OUT, quantizing(ROW), 0.80, compiling(compiled.row, False),
             (f"{COMPILED} row", 4.0)),
        Case("quantize 16×16, amax given", OUT, quantizing(SQUARE, True), 0.85),
        Case("quantize 4over6 mae, amax given", OUT, quantizing(FOUR_OVER_SIX, True), None,
             compiling(compiled.four_over_six, True), at_most=("quantize, amax given", 1.5)),
        Case("quantize, Hadamard, amax given", OUT, quantizing(HADAMARD, True)),
        Case("quantize, stochastic, amax given", OUT, quantizing(STOCHASTIC, True, rng=(1, 2))),
        Case("transposed, amax given", OUT, transposing(PLAIN, False), rows_multiple=16),
        Case("rowwise + transposed, amax given", OUT + 0.5625, transposing(PLAIN, True), 0.70, rows_multiple=16),
        Case("rowwise + transposed Hadamard", OUT + 0.5625, transposing(HADAMARD, True), rows_multiple=16),
        Case("fake quantize, amax given", 4, faking),
        Case("quantize with q·s, row-scaled", OUT + 2, with_values(ROW), 0.75),
        Case("quantize with q·s 16×16, amax given", OUT + 2, with_values(SQUARE, True)),
        Case("q·s transposed, Hadamard stochastic", 4, transposed_values, rows_multiple=16),
        Case("dequantize to bf16", OUT, decoding(PLAIN), 0.85),
        Case("matmul of q·s, row-scaled", 6, multiplying(ROW), None, matmuls, (MATMUL, 0.95), shape=SQUARE_MATMUL),
        Case("matmul of q·s, tensor-scaled", 6, multiplying(PLAIN), None, matmuls, (MATMUL, 0.95), shape=SQUARE_MATMUL),
        Case("matmul of q·s, accumulating", 12, multiplying(PLAIN, True), None, matmuls, shape=SQUARE_MATMUL),
        Case("MXFP8 quantize", 3 + 1 / 32, quantizing(MX), 0.85),
        Case("MXFP8 dequantize to bf16", 3 + 1 / 32, decoding(MX), 0.85),
        Case("swizzle block scales", 0.125, swizzling),
        Case("128 experts, stacked, amax given", OUT, quantizing(PLAIN, True, per_matrix=True), 0.88, shape=EXPERTS),
        Case("128 experts, stacked, amax computed", OUT, quantizing(PLAIN, per_matrix=True), 0.65, shape=EXPERTS),
        Case("128 experts, a list, amax given", OUT, listing(True), 0.88, shape=EXPERTS),
        Case("128 experts, a list, amax computed", OUT, listing(False), 0.65, shape=EXPERTS),
        *search.cases("cuda"),
    ]  # fmt: skip


# --- measuring ------------------------------------------------------------------------------------------------------


def medians(calls: Mapping[Any, Call]) -> dict[Any, float]:
    """Median seconds of each call, the L2 cache cleared before each run; without those that do not compile."""
    times = {}
    for name, call in calls.items():
        try:
            times[name] = cold_median(call)
        except RuntimeError as error:
            if COMPILED not in str(name):
                raise
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
    return times


def table() -> Table:
    source = torch.empty(1 << 29, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    x, amax = inputs((1, 8192))
    q = hb.quantize(x, PLAIN)
    more = inputs((64, 4096))[0]
    return Table(
        name=torch.cuda.get_device_name().split()[-1].lower(),
        cases=cases(),
        shapes=SHAPES,
        gate=gate,
        copy=(2 * source.nbytes, lambda: target.copy_(source)),
        medians=medians,
        overhead={
            "quantize": lambda: hb.quantize(x, PLAIN),
            "quantize 64×4096": lambda: hb.quantize(more, PLAIN),
            "quantize, amax given": lambda: hb.quantize(x, PLAIN, amax=amax),
            "quantize, row-scaled": lambda: hb.quantize(x, ROW),
            "quantize MXFP8": lambda: hb.quantize(x, MX),
            "dequantize": lambda: q.dequantize(torch.bfloat16),
            "fake quantize": lambda: hb.fake_quantize(x, PLAIN, amax=amax),
            "torch's own x + x": lambda: x + x,  # a yardstick for the host
        },
    )
