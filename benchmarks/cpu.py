"""The compiled CPU path beside ModelOpt and compressed-tensors."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import halfbyte as hb
import search
from halfbyte.numerics import mxfp8, nvfp4
from registry import Build, Call, Case, Shape, Table

PLAIN, MX = hb.NVFP4(), hb.MXFP8()
FORMATS = {
    "plain": PLAIN,
    "plain, row-scaled": hb.NVFP4(scaling="row"),
    "plain, 16×16": hb.NVFP4(block=(16, 16)),
    "plain, Hadamard": hb.NVFP4(hadamard=True),
    "plain, stochastic": hb.NVFP4(rounding="stochastic"),
    "four_over_six": hb.NVFP4(scale_rule="four_over_six"),
    "four_over_six, fp16 error": hb.NVFP4(scale_rule="four_over_six", error_arithmetic="fp16"),
    "four_over_six, 16×16": hb.NVFP4(block=(16, 16), scale_rule="four_over_six"),
    "four_over_six, row-scaled": hb.NVFP4(scaling="row", scale_rule="four_over_six"),
}
GOALS = {"plain": 25.0, "four_over_six": 8.0}  # times ModelOpt's speed
SHAPES = [(4096, 4096), (64, 4096), (1, 8192)]
OUT = 2 + 0.5625  # bytes per element: bf16 on one side, NVFP4 on the other
MODELOPT, COMPRESSED = "ModelOpt", "compressed-tensors"


def words(fmt: hb.NVFP4) -> tuple[int, int] | None:
    return (1, 2) if fmt.rounding == "stochastic" else None


# --- gate -----------------------------------------------------------------------------------------------------------


def check(name: str, actual: Any, expected: Any) -> int:
    for a, e in zip(actual, expected, strict=True):
        a_bytes, e_bytes = (t.reshape(-1).view(torch.uint8) for t in (a, e))
        if a.dtype != e.dtype or a.shape != e.shape or not torch.equal(a_bytes, e_bytes):
            raise SystemExit(f"{name}: bytes differ from the contract; nothing was timed")
    return int(expected[0].numel())


def gate(full: bool) -> int:
    """Every operation of this file, on ordinary values next to large, small and odd ones."""
    generator = torch.Generator().manual_seed(0)
    shape = (1040, 4096) if full else (80, 1024)
    x = torch.randn(shape, generator=generator) * torch.exp(3 * torch.randn(shape[0], 1, generator=generator))
    x[3] = 0.0
    compared = 0
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        y = x.to(dtype)
        for name, fmt in FORMATS.items():
            for amax in (None, y.abs().amax().float() / 2):
                wanted = nvfp4.quantize(y, fmt, amax=amax, rng=words(fmt))
                for view in (y, y.mT.contiguous().mT):
                    q = hb.quantize(view, fmt, amax=amax, rng=words(fmt), impl="cpu")
                    compared += check(f"{name}, {dtype}", (q.packed, q.block_scale, q.tensor_scale, q.amax), wanted)
        q, m = hb.quantize(y, PLAIN), hb.quantize(y, MX)
        wanted = mxfp8.quantize(y)
        compared += check(f"MXFP8, {dtype}", (m.packed, m.block_scale), wanted)
        decoded = nvfp4.dequantize(q.packed, q.block_scale, q.tensor_scale, dtype)
        compared += check(
            f"dequantize NVFP4, {dtype}", (q.dequantize(dtype), hb.fake_quantize(y, PLAIN)), (decoded,) * 2
        )
        compared += check(f"dequantize MXFP8, {dtype}", (m.dequantize(dtype),), (mxfp8.dequantize(*wanted, dtype),))
    return compared + search.gate("cpu", full)


# --- cases ----------------------------------------------------------------------------------------------------------


@functools.cache
def inputs(shape: Shape) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()


def modelopt(shape: Shape) -> Call:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    x = inputs(shape)
    return lambda: NVFP4QTensor.quantize(x, 16)


def compressed_tensors(shape: Shape) -> Call:
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    weights = PRESET_SCHEMES["NVFP4A16"]["weights"]
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    x = inputs(shape)

    def compress() -> object:
        blocks = x.unflatten(-1, (-1, 16))
        low, high = blocks.amin(-1), blocks.amax(-1)
        global_scale = generate_gparam(low.amin().float().view(1), high.amax().float().view(1))
        scale, _ = calculate_qparams(low, high, weights, global_scale)
        state = {"weight": x, "weight_scale": scale, "weight_global_scale": global_scale}
        return NVFP4PackedCompressor.compress(state, scheme)

    return compress


def quantizing(fmt: hb.NVFP4 | hb.MXFP8, given: bool = False, transposed: bool = False) -> Build:
    def build(shape: Shape) -> Call:
        x = inputs(shape)
        options: dict[str, Any] = {} if isinstance(fmt, hb.MXFP8) else {"rng": words(fmt)}
        if given:
            options["amax"] = x.abs().amax().float()
        view = x.mT if transposed else x
        return lambda: hb.quantize(view, fmt, **options)

    return build


def decoding(fmt: hb.NVFP4 | hb.MXFP8, dtype: torch.dtype) -> Build:
    def build(shape: Shape) -> Call:
        q = hb.quantize(inputs(shape), fmt)
        return lambda: q.dequantize(dtype)

    return build


def many(shape: Shape) -> Call:
    xs = list(inputs(shape))
    return lambda: hb.quantize_many(xs, PLAIN)


def cases() -> list[Case]:
    others = {MODELOPT: modelopt, COMPRESSED: compressed_tensors}
    result = []
    for name, fmt in FORMATS.items():
        goal = (MODELOPT, GOALS[name]) if name in GOALS else None
        result.append(Case(name, OUT, quantizing(fmt), alternatives=others if goal else {}, times=goal))
    return [
        *result,
        Case("plain, amax given", OUT, quantizing(PLAIN, given=True)),
        Case("plain, of a transposed matrix", OUT, quantizing(PLAIN, transposed=True), rows_multiple=16),
        Case("rowwise + transposed", OUT + 0.5625, lambda s: functools.partial(hb.quantize_transpose, inputs(s), PLAIN),
             rows_multiple=16),
        Case("fake quantize", 4, lambda s: functools.partial(hb.fake_quantize, inputs(s), PLAIN)),
        Case("16 experts, amax computed", OUT, many, shape=(16, 768, 1024)),
        Case("MXFP8", 3 + 1 / 32, quantizing(MX)),
        Case("dequantize NVFP4 to bfloat16", OUT, decoding(PLAIN, torch.bfloat16)),
        Case("dequantize NVFP4 to float32", OUT + 2, decoding(PLAIN, torch.float32)),
        Case("dequantize MXFP8 to bfloat16", 3 + 1 / 32, decoding(MX, torch.bfloat16)),
        *search.cases("cpu"),
    ]  # fmt: skip


# --- measuring ------------------------------------------------------------------------------------------------------


def medians(calls: Mapping[Any, Call], rounds: int = 15, seconds: float = 10.0) -> dict[Any, float]:
    """Median seconds of each call. They take turns, so that a busy machine is unkind to all alike."""
    times: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if len(times[name]) < 3 or sum(times[name]) < seconds:
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t[1:]) for name, t in times.items()}  # the first one warms up


def table() -> Table:
    source = torch.ones(1 << 26, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    x = torch.randn(1, 64).bfloat16()
    amax, q = x.abs().amax().float(), hb.quantize(x, PLAIN)
    return Table(
        name="cpu",
        cases=cases(),
        shapes=SHAPES,
        gate=gate,
        copy=(2 * source.nbytes, lambda: target.copy_(source)),
        medians=medians,
        overhead={
            "quantize": lambda: hb.quantize(x, PLAIN),
            "quantize, amax given": lambda: hb.quantize(x, PLAIN, amax=amax),
            "quantize MXFP8": lambda: hb.quantize(x, MX),
            "dequantize": lambda: q.dequantize(torch.bfloat16),
            "fake quantize": lambda: hb.fake_quantize(x, PLAIN),
        },
    )
