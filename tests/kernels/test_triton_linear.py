"""What follows a matmul on a GPU, bit for bit, and linear with impl="triton" within its budget.

Natively on a GPU (mark gpu), else in Triton's interpreter, where the matmul itself is torch's on the CPU.
"""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import halfbyte as hb
from halfbyte import ops
from halfbyte.kernels import _target, block_scaled, epilogue
from halfbyte.numerics import e8m0, matmul, nvfp4, swizzle

from ..check import close, equal, same_bits
from ..test_linear import (
    COMPILED,
    DTYPES,
    GROUPED,
    MX,
    OFFSETS,
    PAIRS,
    ROW,
    TENSOR,
    TILES,
    check_linear,
    expert_operands,
    grouped,
    operands,
    sums,
)
from .test_triton_kernels import DEVICE, INTERPRETING, poisoned_memory, pytestmark  # noqa: F401

needs_gpu = pytest.mark.skipif(INTERPRETING, reason="needs a GPU")


def kinds(n: int, rng: torch.Generator) -> list[Tensor | None]:
    return [None, torch.rand((), generator=rng), torch.rand(n, generator=rng)]


def special(rng: torch.Generator, *shape: int) -> Tensor:
    """Sums with what a cast may get wrong: NaN, infinity, values that overflow or become subnormal, ties."""
    total = torch.randn(shape, generator=rng) * torch.exp(12 * torch.randn(shape, generator=rng))
    flat = total.view(-1)
    nasty = [float("nan"), float("inf"), -float("inf"), 65520.0, -0.0, 1 + 2.0**-8, 1 + 3 * 2.0**-9, 3e38, 1e-40, 5e-8]
    flat[: len(nasty)] = torch.tensor(nasty)[: flat.numel()]
    return total


@pytest.mark.parametrize("shape", [(17, 40), (1, 700), (130, 8), (5, 515)], ids=str)
def test_epilogue(rng, shape: tuple[int, int]) -> None:
    """All scales with all biases at the first shape, few at the others; dtypes in turn: each is a kernel to compile."""
    rows, columns = shape
    total, bias = special(rng, rows, columns), torch.randn(columns, generator=rng)
    cases = list(itertools.product(kinds(rows, rng), kinds(columns, rng), (None, torch.float32, "as out")))
    for i, (a_scale, b_scale, of) in enumerate(cases if shape == (17, 40) else cases[::13]):
        dtype = DTYPES[(i + i // 3 + i // 9) % 3]  # every dtype with every kind of each
        given_bias = None if of is None else bias.to(dtype if of == "as out" else of)
        out = torch.empty(shape, dtype=dtype, device=DEVICE)
        given = [None if t is None else t.to(DEVICE) for t in (total, a_scale, b_scale, given_bias)]
        epilogue.epilogue(*given, out)
        equal(out.cpu(), matmul.epilogue(total, a_scale, b_scale, given_bias, dtype), f"{i} {dtype}")


def test_epilogue_accumulates_in_place_with_any_strides(rng) -> None:
    total, a_scale, start = special(rng, 9, 70), torch.rand(9, generator=rng), torch.randn(9, 70, generator=rng)
    wanted = matmul.epilogue(total, a_scale, None, None, torch.float32, start.clone())
    for buffer in (start.clone(), start.mT.contiguous().mT, torch.cat([start, start], 1)[:, :70]):
        out = buffer.to(DEVICE)
        epilogue.epilogue(total.to(DEVICE), a_scale.to(DEVICE), None, None, out, accumulate=True)
        equal(out.cpu().contiguous(), wanted)


@pytest.mark.parametrize("ends", [*OFFSETS.values(), [16], [1] * 5 + [7] * 4])
def test_epilogue_of_groups(rng, ends: list[int]) -> None:
    experts, columns = len(ends), 72
    total = torch.randn(16, columns, generator=rng).bfloat16()
    a_scale, bias = torch.rand(16, generator=rng), torch.randn(experts, columns, generator=rng)
    for shape in ((), (experts,), (experts, columns)):
        b_scale = torch.rand(shape, generator=rng)
        wanted = torch.zeros(16, columns)
        for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            part = slice(start, end)
            scale = b_scale[e] if shape else b_scale
            wanted[part] = matmul.epilogue(total[part].float(), a_scale[part], scale, bias[e], torch.float32)
        out = torch.empty(16, columns, device=DEVICE)
        offsets = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
        given = [t.to(DEVICE) for t in (total, a_scale, b_scale, bias)]
        epilogue.epilogue(*given, out, offsets=offsets)
        same_bits(out.cpu(), wanted, str(shape))


@pytest.mark.parametrize("pair", PAIRS)
def test_linear(rng, pair: str) -> None:
    for i, (m, n, k) in enumerate(((33, 33, 96), (1, 8, 32) if INTERPRETING else (1, 7, 32), (512, 768, 2048))):
        if INTERPRETING and i == 2:
            break
        x, w = operands(rng, pair, m, n, k, DEVICE)
        for j, dtype in enumerate(DTYPES if i == 0 else DTYPES[:1]):  # `test_epilogue` has the rest
            bias = None if (i + j) % 2 else torch.randn(n, generator=rng).to(DEVICE)
            check_linear(x, w, bias, dtype, "triton")
        start = torch.randn(m, n, generator=rng)
        buffer = start.clone().to(DEVICE)
        hb.linear(x, w, accumulate_into=buffer, impl="triton")
        same_bits(buffer.cpu(), start + hb.linear(x, w, out_dtype=torch.float32, impl="triton").cpu())


def test_high_precision_operand(rng) -> None:
    plain = torch.randn(24, 64, generator=rng).bfloat16().to(DEVICE)
    for fmt in (TENSOR, ROW, TILES, MX):
        q = hb.quantize(torch.randn(32, 64, generator=rng).to(DEVICE), fmt)
        check_linear(plain, q, None, torch.bfloat16, "triton")
        check_linear(q, plain, None, torch.bfloat16, "triton")


def test_transposed_views(rng) -> None:
    a, b = torch.randint(-8, 9, (48, 32), generator=rng), torch.randint(-8, 9, (48, 16), generator=rng)
    scale = 2.0 ** torch.randint(-3, 4, (32,), generator=rng)
    given = [t.bfloat16().to(DEVICE).mT for t in (a, b)]
    got = ops.scaled_matmul(*given, scale.to(DEVICE), None, out_dtype=torch.float32, impl="triton")
    same_bits(got.cpu(), (a.float().mT @ b.float()) * scale[:, None])


def test_large_results_are_made_of_runs_of_rows(rng, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = operands(rng, "row, row", 40, 24, 32, DEVICE)
    whole = hb.linear(x, w, impl="triton")
    start = torch.randn(40, 24, generator=rng)
    wanted = hb.linear(x, w, accumulate_into=start.clone().to(DEVICE), impl="triton")
    monkeypatch.setattr(epilogue, "SUMS", 24 * 7)
    equal(hb.linear(x, w, impl="triton"), whole)
    equal(hb.linear(x, w, accumulate_into=start.clone().to(DEVICE), impl="triton"), wanted)


@pytest.mark.parametrize("ends", OFFSETS)
@pytest.mark.parametrize("pair", GROUPED)
def test_grouped(rng, pair: str, ends: str) -> None:
    """torch's grouped matmul rounds Σ to bfloat16, by 2^-8 of α·Σ, that is of the result without its bias."""
    x, w = expert_operands(rng, *GROUPED[pair], DEVICE)
    offsets = torch.tensor(OFFSETS[ends], dtype=torch.int32, device=DEVICE)
    for dtype in DTYPES:
        for bias in (None, torch.randn(4, 24, generator=rng)):
            exact, error = grouped(x, w, OFFSETS[ends], bias, dtype)
            without_bias = grouped(x, w, OFFSETS[ends], None, dtype)[0]
            y = hb.grouped_linear(
                x, w, offsets, None if bias is None else bias.to(DEVICE), out_dtype=dtype, impl="triton"
            )
            equal((y.dtype, y.shape), (dtype, exact.shape))
            close(y.cpu(), exact, (error + without_bias.abs() * 2.0**-8) * (1 + 2.0**-7))


# --- GPUs with FP4 cores, as far as others can tell ------------------------------------------------------------------


def emulate_scaled_mm(
    a: Tensor, b: Tensor, scale_a: Any, recipe_a: Any, scale_b: Any, recipe_b: Any, *, swizzle_a: Any, swizzle_b: Any,
    output_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """torch.nn.functional.scaled_mm by its documentation: checks what cuBLAS would, decodes, multiplies in float64."""
    kinds, orders = torch.nn.functional.ScalingType, torch.nn.functional.SwizzleType

    def decode(codes: Tensor, scales: Any, recipe: Any, order: Any) -> Tensor:
        nv = codes.dtype == torch.float4_e2m1fn_x2
        equal(codes.dtype, torch.float4_e2m1fn_x2 if nv else torch.float8_e4m3fn)
        equal(codes.stride(1), 1, "codes lie along K")
        equal(recipe[0], kinds.BlockWise1x16 if nv else kinds.BlockWise1x32)
        equal((order[0], len(scales)), (orders.SWIZZLE_32_4_4, len(recipe)))
        equal(scales[0].dtype, torch.float8_e4m3fn if nv else torch.float8_e8m0fnu)
        rows, blocks = codes.shape[0], codes.shape[1] // (8 if nv else 32)
        plain = swizzle.unswizzle(scales[0].view(torch.uint8), rows, blocks)
        if nv:
            value = nvfp4.decode_without_tensor_scale(codes.view(torch.uint8), plain.view(torch.float8_e4m3fn)).double()
        else:
            value = codes.double() * e8m0.decode(plain).double().repeat_interleave(32, -1)
        if len(scales) == 2:
            equal((recipe[1], order[1], scales[1].dtype, scales[1].numel()),
                  (kinds.TensorWise, orders.NO_SWIZZLE, torch.float32, 1))  # fmt: skip
            value = value * scales[1].double()
        return value

    equal((b.shape[0] % 16, b.shape[1] % 16), (0, 0), "cuBLAS's alignment")
    first, second = decode(a, scale_a, recipe_a, swizzle_a), decode(b.mT, scale_b, recipe_b, swizzle_b)
    return (first @ second.mT).to(output_dtype)


@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize("pair", [p for p in PAIRS if p != "MXFP8, NVFP4"])
def test_arguments_of_the_scaled_matmul(rng, monkeypatch: pytest.MonkeyPatch, pair: str, swizzled: bool) -> None:
    calls = []

    def scaled_mm(*args: Any, **options: Any) -> Tensor:
        calls.append(options["output_dtype"])
        return emulate_scaled_mm(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", scaled_mm)
    monkeypatch.setattr(ops, "has_block_scaled_matmul", lambda *sizes: True)
    x, w = operands(rng, pair, 33, 48, 96, DEVICE)
    if swizzled:
        x, w = x.swizzle(), w.swizzle()
    for dtype in DTYPES:
        for bias in (None, torch.randn(48, generator=rng).to(DEVICE)):
            calls.clear()
            check_linear(x, w, bias, dtype, "auto")
            one_scale = pair in ("tensor", "MXFP8") or pair.startswith("4over6")
            equal(calls, [dtype if one_scale and bias is None else torch.float32])
    buffer = torch.ones(33, 48, device=DEVICE)
    hb.linear(x, w, accumulate_into=buffer)
    close(buffer.cpu() - 1, sums(x) @ sums(w).mT, 1e-5 * (1 + sums(x).abs() @ sums(w).abs().mT))


def test_where_the_scaled_matmul_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for capability, wanted in (((8, 0), False), ((9, 0), False), ((10, 0), True), ((10, 3), True), ((12, 0), True)):
        monkeypatch.setattr(_target, "_capability", lambda index, c=capability: c)
        equal(_target.has_fp4_matmul(cuda), wanted)
        equal(block_scaled.supports(cuda, 5, 48, 96), wanted)
    for rows, columns, k in ((0, 48, 96), (5, 40, 96), (5, 48, 80), (5, 0, 96), (5, 48, 0)):
        equal(block_scaled.supports(cuda, rows, columns, k), False)
    equal(_target.has_fp4_matmul(torch.device("cpu")), False)


# --- on a GPU only --------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_compiled(rng, name: str) -> None:
    x = torch.randn(32, 64, generator=rng).to(DEVICE)
    same_bits(torch.compile(COMPILED[name], fullgraph=True)(x), COMPILED[name](x))


@needs_gpu
def test_autocast_changes_nothing(rng) -> None:
    x, w = operands(rng, "row, row", 64, 64, 256, DEVICE)
    y = hb.linear(x, w, out_dtype=torch.float32)
    with torch.autocast("cuda", torch.float16):
        same_bits(hb.linear(x, w, out_dtype=torch.float32), y)


@needs_gpu
@pytest.mark.parametrize("kind", ["linear", "accumulate", "grouped"])
def test_captured_in_a_graph(rng, kind: str) -> None:
    """Nothing waits for the GPU, and a replay reads the inputs anew."""
    x, w = operands(rng, "row, tensor", 64, 128, 256, DEVICE)
    xs, ws = expert_operands(rng, ROW, TILES, DEVICE)
    offsets = torch.tensor([3, 3, 10, 16], dtype=torch.int32, device=DEVICE)
    buffer = torch.zeros(64, 128, device=DEVICE)

    def run() -> Tensor:
        if kind == "linear":
            return hb.linear(x, w)
        return hb.linear(x, w, accumulate_into=buffer) if kind == "accumulate" else hb.grouped_linear(xs, ws, offsets)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    for scale in (x.tensor_scale, xs.tensor_scale):
        scale.mul_(2)
    buffer.zero_()
    graph.replay()
    got = y.clone()
    buffer.zero_()
    same_bits(got, run())


@needs_gpu
def test_nothing_waits_for_the_gpu(rng) -> None:
    x, w = operands(rng, "row, tensor", 64, 128, 256, DEVICE)
    xs, ws = expert_operands(rng, ROW, TILES, DEVICE)
    offsets = torch.tensor([3, 3, 10, 16], dtype=torch.int32, device=DEVICE)
    bias, buffer = torch.ones(128, device=DEVICE), torch.zeros(64, 128, device=DEVICE)
    hb.linear(x, w, bias)
    torch.cuda.set_sync_debug_mode("error")
    try:
        hb.linear(x, w, bias)
        hb.linear(x, w, accumulate_into=buffer)
        hb.grouped_linear(xs, ws, offsets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
