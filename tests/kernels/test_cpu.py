"""The compiled CPU path gives the bytes of `halfbyte.numerics`."""

import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from halfbyte import NVFP4
from halfbyte.kernels.cpu import compile as cpu_compile
from halfbyte.kernels.cpu import mxfp8 as cpu_mxfp8
from halfbyte.kernels.cpu import nvfp4 as cpu
from halfbyte.kernels.cpu import source
from halfbyte.numerics import mxfp8, nvfp4

from ..check import equal, same_bits, true
from ..numerics.test_golden import ALL, format_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BASES = [((1, 16), "tensor"), ((16, 16), "tensor"), ((1, 16), "row")]
FORMATS = [NVFP4(block, scaling, hadamard=h) for block, scaling in BASES for h in (False, True)]
FORMATS += [NVFP4(block, scaling, e4m3_max=e) for block, scaling in BASES for e in (256, 288, 320)]
FORMATS += [NVFP4(block, scaling, hadamard=h, rounding="stochastic") for block, scaling in BASES for h in (False, True)]
FORMATS += [
    NVFP4(block, scaling, "four_over_six", error=error, e4m3_max=e, error_arithmetic=arithmetic)
    for block, scaling in BASES
    for error in ("mae", "mse")
    for arithmetic in ("exact", "fp16")
    for e in (256, 288, 320, 448)
]
FORMATS += [NVFP4(block, scaling, "four_over_six", hadamard=True) for block, scaling in BASES]
FEW = [f for f in FORMATS if f == NVFP4(f.block, f.scaling, f.scale_rule, f.hadamard, f.rounding)]
RANDOM = (0xFEDCBA9876543210, (1 << 40) + 7)


def same(actual: Tensor, expected: Tensor, what: str) -> None:
    """Same dtype, shape and bits, but for the payload of NaN."""
    if actual.element_size() > 1:
        true(torch.equal(actual.isnan(), expected.isnan()), f"{what}: NaN in other places")
        actual, expected = actual.nan_to_num(nan=0.0, posinf=math.inf), expected.nan_to_num(nan=0.0, posinf=math.inf)
    same_bits(actual, expected, what)


def check_nvfp4(x: Tensor, fmt: NVFP4, *, decode: bool = True, **kwargs: object) -> None:
    if fmt.rounding == "stochastic":
        kwargs = {"rng": RANDOM, **kwargs}
    before = x.clone()
    actual, expected = cpu.quantize(x, fmt, **kwargs), nvfp4.quantize(x, fmt, **kwargs)
    for name, a, e in zip(expected._fields, actual, expected, strict=True):
        same(a, e, f"{name} of {tuple(x.shape)} {x.dtype}, {fmt}, {kwargs}")
    true(all(part.is_contiguous() for part in actual), "an output is not contiguous")
    same(x, before, "the input")
    for dtype in DTYPES if decode else ():
        decoded = nvfp4.dequantize(expected.packed, expected.block_scale, expected.tensor_scale).to(dtype)
        same(cpu.dequantize(*actual[:3], dtype), decoded, f"{dtype} decoded from {fmt}")


def check_mxfp8(x: Tensor) -> None:
    actual, expected = cpu_mxfp8.quantize(x), mxfp8.quantize(x)
    for name, a, e in zip(("elements", "block_scale"), actual, expected, strict=True):
        same(a, e, f"{name} of {tuple(x.shape)} {x.dtype}")
    for dtype in DTYPES:
        same(cpu_mxfp8.dequantize(*actual, dtype), mxfp8.dequantize(*expected).to(dtype), f"decoded to {dtype}")


def nasty(rng: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    normal = torch.randn(shape, generator=rng)
    info = torch.finfo(dtype)
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, info.max, -info.max, info.tiny, info.tiny / 4])
    sprinkled = torch.where(
        torch.rand(shape, generator=rng) < 0.01, special[torch.randint(9, shape, generator=rng)], normal
    )
    out = {
        "normal": normal,
        "wide": normal * torch.exp(6 * torch.randn(shape, generator=rng)),
        "ties": torch.randint(-28, 29, shape, generator=rng) * 0.25,
        "subnormal": normal * info.tiny,
        "large": normal.clamp(-3, 3) * (info.max / 4),
        "zero": normal * -0.0,
        "some rows zero": normal * (torch.rand(*shape[:-1], 1, generator=rng) < 0.5),
        "constant": torch.full(shape, -1.7),
        "infinite": torch.where(normal > 3, math.inf, normal),
        "sprinkled": sprinkled,
    }
    return {name: x.to(dtype) for name, x in out.items()}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory comes full of 255, which is NaN in every float: what a kernel does not write shows."""

    def full(shape: tuple[int, ...], dtype: type) -> np.ndarray:
        out = np.zeros(shape, dtype)
        out.reshape(-1).view(np.uint8).fill(255)
        return out

    monkeypatch.setattr(source, "_allocate", full)


@pytest.fixture(params=[1, 3], ids=["1 thread", "3 threads"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Threads that share even little work."""
    monkeypatch.setattr(cpu_compile, "_SMALL", 1 << 10)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# --- golden vectors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "config", "count"), ALL)
def test_golden_nvfp4(golden, dtype: str, config: str, count: int) -> None:
    vectors, fmt, seen = golden(f"nvfp4_{dtype}"), format_of(config), 0
    for key in vectors:
        if not key.startswith(f"{config}/") or "/packed" not in key:
            continue
        _, name, _ = key.split("/")
        x, t = vectors[f"input/{name}"], "_t" if key.endswith("_t") else ""
        q = cpu.quantize(x.mT if t else x, fmt)
        same_bits(q.packed, vectors[key], key)
        same_bits(q.block_scale.view(torch.uint8), vectors[f"{config}/{name}/block_scale{t}"], key)
        same_bits(q.amax.reshape(-1), vectors[f"{config}/{name}/amax{t}"], key)
        seen += 1
    equal(seen, count)


def test_golden_mxfp8(golden) -> None:
    vectors = golden("mxfp8")
    inputs = [key for key in vectors if key.endswith("/x")]
    equal(len(inputs), 117)
    for key in inputs:
        elements, scale = cpu_mxfp8.quantize(vectors[key])
        same_bits(elements.view(torch.uint8), vectors[f"{key[:-1]}elements"].view(torch.uint8), key)
        same_bits(scale, vectors[f"{key[:-1]}block_scale"].view(torch.uint8), key)


# --- every format, nasty values, shapes and strides -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_every_format(rng, fmt: NVFP4, dtype: torch.dtype) -> None:
    for name, x in nasty(rng, (37, 304), dtype).items():
        # Where the transform overflows is outside the contract.
        if not (fmt.hadamard and name in ("large", "infinite", "sprinkled")):
            check_nvfp4(x, fmt, decode=name in ("wide", "sprinkled"))


@pytest.mark.parametrize("fmt", FEW, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_given_amax(rng, fmt: NVFP4, dtype: torch.dtype) -> None:
    shape = (2, 19, 48)
    for x in nasty(rng, shape, dtype).values():
        for value in (0.0, 1.0, 2.5, 1e-30, 1e-42, 3e38, math.inf, math.nan):
            if not fmt.hadamard or x.isfinite().all():
                check_nvfp4(x, fmt, decode=False, amax=torch.tensor(value))
    x = torch.randn(shape, generator=rng).to(dtype)
    check_nvfp4(x, fmt, amax=torch.rand(shape[:-1] if fmt.scaling == "row" else (), generator=rng))
    check_nvfp4(x, fmt, per_matrix=True, amax=torch.rand(shape[:-1] if fmt.scaling == "row" else (2,), generator=rng))


SHAPES = [(16,), (1, 16), (3, 16), (17, 16), (16, 48), (1, 272), (33, 256), (2, 3, 32), (2, 17, 144), (2, 3, 5, 16)]


@pytest.mark.parametrize("fmt", FEW, ids=str)
def test_shapes(rng, fmt: NVFP4) -> None:
    for shape in SHAPES:
        x = torch.randn(shape, generator=rng, dtype=torch.float32).bfloat16()
        check_nvfp4(x, fmt)
        if len(shape) > 1:
            check_nvfp4(x, fmt, per_matrix=True)


def views(rng: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    x = torch.randn(96, 160, generator=rng).to(dtype)
    y = torch.randn(4, 6, 32, 64, generator=rng).to(dtype)
    return {
        "transposed": x.mT,
        "ragged transposed": x[:, :50].mT,
        "offset columns": x[:, 32:64],
        "every other row": x[1::2],
        "every other column": x[:, ::2][:, :64],
        "every third column of the transposed": x.mT[:, ::3],
        "broadcast rows": x[:1].expand(40, -1),
        "broadcast columns": x[:, :1].expand(-1, 64),
        "broadcast matrices": x.expand(3, -1, -1),
        "permuted": y.permute(2, 0, 1, 3),
        "permuted, last too": y.permute(1, 3, 0, 2),
        "reversed": torch.randn(64, 8, 2, generator=rng).to(dtype).permute(2, 1, 0),  # row 15 lies 15 after row 0
        "sliced matrices": y[::2, 1:5, 3:20],
        "one row of a transposed": x.mT[7:8],
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", FEW, ids=str)
def test_strides(rng, fmt: NVFP4, dtype: torch.dtype) -> None:
    for x in views(rng, dtype).values():
        check_nvfp4(x, fmt, decode=False)
        check_nvfp4(x, fmt, decode=False, per_matrix=True)


@pytest.mark.parametrize("fmt", FEW, ids=str)
@pytest.mark.parametrize("shape", [(0, 16), (4, 0), (0,), (0, 3, 32), (3, 0, 32), (2, 3, 0)])
def test_empty(fmt: NVFP4, shape: tuple[int, ...]) -> None:
    check_nvfp4(torch.empty(shape), fmt)
    if len(shape) > 1:
        check_nvfp4(torch.empty(shape), fmt, per_matrix=True)


@pytest.mark.parametrize("fmt", FEW, ids=str)
def test_parts_of_rows_and_columns(rng, threads: int, fmt: NVFP4) -> None:
    for shape in [(1, 1 << 15), (2, 8208), (5, 4112), (130, 272), (3, 40, 528), (2000, 16)]:
        x = torch.randn(shape, generator=rng).bfloat16()
        check_nvfp4(x, fmt, per_matrix=len(shape) == 3)


@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (1, 100000), (7, 30000), (100000, 1), (4097, 33)])
@pytest.mark.parametrize("most", [None, 5000])
def test_parts_cover(rows: int, blocks: int, most: int | None) -> None:
    for count in (1, 2, 7):
        covered = torch.zeros(rows, blocks, dtype=torch.int32)
        for row, row_end, block, block_end in cpu_compile.parts(rows, blocks, 16, count, most=most):
            true(row < row_end and block < block_end, "an empty part")
            covered[row:row_end, block:block_end] += 1
        true(bool((covered == 1).all()), "a block belongs to no part, or to two")


# --- exhaustive -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fmt", [f for f in FEW if not f.hadamard], ids=str)
def test_every_16_bit_pattern(fmt: NVFP4, dtype: torch.dtype) -> None:
    """All patterns, with neighbours of like and of unlike size, in every lane, under several amaxes."""
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
    for position in (0, 7, 15):
        x = torch.zeros(65536 // 64, 64, 16, dtype=dtype)
        x[..., position] = patterns.view(-1, 64)
        x[..., (position + 5) % 16] = 1.0
        for amax in (None, torch.tensor(6.0), torch.tensor(2688.0), torch.tensor(1e-3)):
            check_nvfp4(x.flatten(1), fmt, decode=False, amax=amax)
    for stride in (1, 257, 4099):
        check_nvfp4(patterns.roll(stride)[torch.arange(65536) * stride % 65536].view(-1, 256), fmt, decode=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_pattern_mxfp8(dtype: torch.dtype) -> None:
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
    for position in (0, 1, 15, 16, 31):
        x = torch.zeros(65536, 32, dtype=dtype)
        x[:, position] = patterns
        x[:, (position + 9) % 32] = 1.0
        check_mxfp8(x.view(256, -1))
    check_mxfp8(patterns.view(-1, 256))


def test_elements_near_every_tie(rng) -> None:
    """All float32 within 40 steps of each E2M1 boundary, and of each E4M3 one, scaled by exactly 1."""
    steps = torch.arange(-40, 41, dtype=torch.int32)
    for boundaries in ([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 2.0**-126], [i / 1024 for i in range(1, 34)]):
        near = (torch.tensor(boundaries).view(torch.int32)[:, None] + steps).view(torch.float32).flatten()
        near = torch.cat((near, -near))
        x = torch.zeros(len(near), 32)
        x[:, 3], x[:, 20], x[:, [0, 16]] = near, near, 6.0
        for fmt in FEW[:1] + [f for f in FEW if f.rounding == "stochastic"][:1]:
            check_nvfp4(x, fmt, amax=torch.tensor(2688.0))
        x[:, 0] = 448.0
        check_mxfp8(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_every_scale_and_code(dtype: torch.dtype) -> None:
    packed = torch.arange(256, dtype=torch.int32).to(torch.uint8).repeat(256, 1)
    scale = torch.arange(256, dtype=torch.int32).to(torch.uint8)[:, None].expand(-1, 32).contiguous()
    odd_nan = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32).item()  # rounding its bits overflows
    for tensor_scale in (1.0, 0.3, 1e-30, 1e-40, 1e30, 3e38, math.inf, math.nan, odd_nan, 0.0):
        arguments = (packed, scale.view(torch.float8_e4m3fn), torch.tensor(tensor_scale))
        same(cpu.dequantize(*arguments, dtype), nvfp4.dequantize(*arguments).to(dtype), f"S_dec {tensor_scale}")
    elements, scale = packed.view(torch.float8_e4m3fn), scale[:, :8]
    same(cpu_mxfp8.dequantize(elements, scale, dtype), mxfp8.dequantize(elements, scale).to(dtype), "MXFP8")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_rounds_once(rng, dtype: torch.dtype) -> None:
    """Products with all bits of a float32, many of them next to ties of the 16-bit formats and among subnormals."""
    packed = torch.randint(256, (64, 512), generator=rng).to(torch.uint8)
    scale = torch.randint(127, (64, 64), generator=rng).to(torch.uint8).view(torch.float8_e4m3fn)
    for exponent in (-140, -30, -24, -14, 0, 6, 120):
        rows = torch.randn(64, generator=rng) * 2.0**exponent
        expected = nvfp4.dequantize(packed, scale, rows).to(dtype)
        same(cpu.dequantize(packed, scale, rows, dtype), expected, f"2^{exponent}")


def test_decode_takes_any_strides(rng) -> None:
    q = nvfp4.quantize(torch.randn(6, 4, 64, generator=rng), NVFP4(), per_matrix=True)
    for view in (lambda t: t[::2], lambda t: t[:, 1:3], lambda t: t.transpose(0, 1)):
        packed, scale = view(q.packed), view(q.block_scale)
        for s in (torch.tensor(0.7), torch.rand(packed.shape[:1], generator=rng), torch.rand(packed.shape[:2])):
            same(cpu.dequantize(packed, scale, s), nvfp4.dequantize(packed, scale, s), "decoded")
    elements, scale = mxfp8.quantize(torch.randn(6, 64, generator=rng))
    same(cpu_mxfp8.dequantize(elements[::2], scale[::2]), mxfp8.dequantize(elements[::2], scale[::2]), "decoded")


# --- MXFP8 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mxfp8(rng, threads: int, dtype: torch.dtype) -> None:
    for x in nasty(rng, (37, 608), dtype).values():
        check_mxfp8(x)
    for shape in [(32,), (1, 32), (17, 32), (3, 5, 96), (1, 1 << 15), (4000, 32), (0, 32), (3, 0)]:
        check_mxfp8(torch.randn(shape, generator=rng).to(dtype))
    for x in views(rng, dtype).values():
        check_mxfp8(x[..., : x.shape[-1] // 32 * 32])


def test_mxfp8_scales(rng) -> None:
    """Maxima around every power of two of float32, as scales and with what they do to a neighbour."""
    powers = torch.tensor([2.0**e for e in range(-149, 128)]) * torch.tensor([1.0, 1.75])[:, None]
    near = (powers.view(torch.int32).flatten()[:, None] + torch.arange(-3, 4, dtype=torch.int32)).view(torch.float32)
    near = near[near.isfinite() & (near > 0)]
    x = near[:, None] * torch.rand(len(near), 32, generator=rng)
    x[:, 9] = near
    check_mxfp8(x)


# --- stochastic rounding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [(1, 16), (16, 16)])
def test_random_bits_across_word_borders(rng, block: tuple[int, int]) -> None:
    fmt = NVFP4(block=block, rounding="stochastic")
    x = torch.randn(32, 512, generator=rng)
    for first_block in (0, 1, (1 << 30) - 5, (1 << 31) - 5, (1 << 32) + 3, 1 << 45):
        for random in ((0, 0), (1, (1 << 64) - 1), ((1 << 64) - 1, 0x80000000)):
            check_nvfp4(x, fmt, rng=random, first_block=first_block)
            check_nvfp4(x.mT, fmt, rng=random, first_block=first_block)


# --- threads, processes, cache --------------------------------------------------------------------------------------


def test_calls_from_many_threads(rng, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_compile, "_SMALL", 1 << 14)
    inputs = [torch.randn(256, 1024, generator=rng) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda x: cpu.quantize(x, NVFP4()), inputs * 4))
    for x, result in zip(inputs * 4, results, strict=True):
        for a, e in zip(result, nvfp4.quantize(x, NVFP4()), strict=True):
            same(a, e, "from a thread")


def test_an_error_in_a_helper_thread_is_raised() -> None:
    def task(row: int, *_: int) -> None:
        if row == 5:
            raise ValueError("row 5")

    with pytest.raises(ValueError, match="row 5"):
        cpu_compile.run(task, [(row, row + 1, 0, 1) for row in range(8)], 3)


FORK = """
import os, sys, torch
from halfbyte import NVFP4
from halfbyte.kernels.cpu import nvfp4
torch.set_num_threads(2)
x = torch.randn(2048, 1024)
want = nvfp4.quantize(x, NVFP4())
if not (child := os.fork()):
    got = nvfp4.quantize(x, NVFP4())
    os._exit(0 if torch.equal(got.packed, want.packed) else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="fork")
def test_works_after_a_fork() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120)
    equal(done.returncode, 0, done.stderr)


def test_compiles_without_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_place(function: object) -> None:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(cpu_compile, "_Cache", no_place)
    equal(cpu_compile.kernel(lambda x: x + 1)(1), 2)


def test_cache_depends_on_every_source() -> None:
    key = cpu.code.quantize._cache._index_key((), cpu.code.quantize.targetctx.codegen())
    equal(key[-1], cpu_compile._digest())
