"""The Triton kernels against the contract, byte for byte.

On a GPU these run natively (mark gpu). Without one they run in Triton's interpreter, in a process of its own that
`test_triton_interpreter.py` starts. The contract is always evaluated on the CPU.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from halfbyte.formats import NVFP4
from halfbyte.kernels import _target, dequantize, fake_quantize, mxfp8, quantize, swizzle
from halfbyte.numerics import mxfp8 as mxfp8_numerics
from halfbyte.numerics import nvfp4
from halfbyte.numerics import swizzle as swizzle_numerics

from ..check import equal, same_bits, true

INTERPRETING = _target.INTERPRETING
DEVICE = "cpu" if INTERPRETING else "cuda"
RUNS = INTERPRETING or (torch.cuda.is_available() and _target.runs_on(torch.device("cuda")))
pytestmark = [
    *([] if INTERPRETING else [pytest.mark.gpu]),
    pytest.mark.skipif(not RUNS, reason="needs an NVIDIA GPU from sm_80 on, or Triton's interpreter"),
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SMALL = quantize.SMALL
RNG = (12345678901234567890, (1 << 40) + 7)
ERRORS = [("mae", "exact", 256), ("mse", "exact", 448), ("mae", "fp16", 320), ("mse", "fp16", 288)]
FORMATS = [
    *(
        NVFP4(block=block, hadamard=hadamard, rounding=rounding)
        for block in ((1, 16), (16, 16))
        for hadamard in (False, True)
        for rounding in ("nearest", "stochastic")
    ),
    NVFP4(e4m3_max=288),
    *(
        NVFP4(block=block, scale_rule="four_over_six", error=error, error_arithmetic=arithmetic, e4m3_max=e)
        for block in ((1, 16), (16, 16))
        for error, arithmetic, e in ERRORS
    ),
    NVFP4(scale_rule="four_over_six", hadamard=True),
    NVFP4(scaling="row"),
    NVFP4(scaling="row", scale_rule="four_over_six"),
    NVFP4(scaling="row", hadamard=True, rounding="stochastic"),
]
KERNELS = (NVFP4(), NVFP4(block=(16, 16)), NVFP4(scaling="row"))  # one format for each
# How elements are found does not depend on the rule, only on what comes first: a maximum, a transform, a comparison.
STRIDED = [
    *KERNELS,
    NVFP4(hadamard=True),
    NVFP4(block=(16, 16), hadamard=True, rounding="stochastic"),
    NVFP4(scale_rule="four_over_six"),
    NVFP4(block=(16, 16), scale_rule="four_over_six", error="mse"),
]
KINDS = ("randn", "bits", "finite", "nan", "wide", "tie", "zero", "tiny", "huge", "constant")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty gives bytes 0xAA, so that what a kernel forgets to write shows."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        result = empty(*args, **kwargs)
        if result.numel():
            result.view(-1).view(torch.uint8).fill_(0xAA)
        return result

    monkeypatch.setattr(torch, "empty", poisoned)


def check(actual: Any, expected: Any, what: str) -> None:
    for name, a, e in zip(("packed", "block_scale", "tensor_scale", "amax"), actual, expected, strict=True):
        (equal if a.is_floating_point() and a.element_size() > 1 else same_bits)(a.cpu(), e, f"{what}: {name}")


def random_words(fmt: NVFP4) -> tuple[int, int] | None:
    return RNG if fmt.rounding == "stochastic" else None


def kinds_for(fmt: NVFP4) -> Iterator[str]:
    """The transform's overflow, and what it makes of NaN, is outside the contract."""
    return (kind for kind in KINDS if not (fmt.hadamard and kind in ("bits", "finite", "nan", "huge")))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_quantize_equals_the_contract(fmt: NVFP4, make: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (19, 32) if INTERPRETING else (83, 1040)
    for i, kind in enumerate(kinds_for(fmt)):
        monkeypatch.setattr(quantize, "SMALL", SMALL if i // 2 % 2 else 0)  # whether one program takes what is small
        if INTERPRETING and fmt != NVFP4() and (i + FORMATS.index(fmt)) % 2:
            continue  # half of the inputs for each format: the interpreter is slow
        for dtype in (DTYPES[i % 3],) if INTERPRETING else DTYPES:
            x = make(kind, dtype, shape)
            given: list[Tensor | None] = [None, torch.tensor(2.5)]
            for amax in given if i < 3 else given[:1]:
                wanted = nvfp4.quantize(x, fmt, amax=amax, rng=random_words(fmt), first_block=5)
                on_device = None if amax is None else amax.to(DEVICE)
                got = quantize.quantize(x.to(DEVICE), fmt, amax=on_device, rng=random_words(fmt), first_block=5)
                check(got, wanted, f"{kind} {dtype} amax={amax}")


@pytest.mark.parametrize("error", ["mae", "mse"])
def test_four_over_six_where_only_the_smaller_scale_is_zero(error: str, make: Callable[..., Tensor]) -> None:
    x, amax = make("tie", torch.bfloat16, (64, 48)), torch.tensor(1.5e6)
    fmt = NVFP4(scale_rule="four_over_six", error=error)
    check(quantize.quantize(x.to(DEVICE), fmt, amax=amax.to(DEVICE)), nvfp4.quantize(x, fmt, amax=amax), error)


@pytest.mark.parametrize("fmt", STRIDED[:1] if INTERPRETING else STRIDED, ids=str)
def test_any_strides_without_a_copy(fmt: NVFP4, make: Callable[..., Tensor]) -> None:
    for dtype, kind in (
        (torch.bfloat16, "tiny"),
        (torch.bfloat16, "wide"),
        *(((torch.float16, "wide"), (torch.float32, "wide")) if fmt in KERNELS else ()),
    ):
        base = make(kind, dtype, (48, 80))
        views = (base.mT[:, :48], base[3:40:2, 16:64], base[:, ::2][:, :32], base.view(4, 12, 80).mT[:, :, :0])
        for view in views if fmt in KERNELS else views[:1]:  # a kernel for each kind of stride
            wanted = nvfp4.quantize(view, fmt, rng=random_words(fmt))
            moved = base.to(DEVICE).as_strided(view.shape, view.stride(), view.storage_offset())
            check(quantize.quantize(moved, fmt, rng=random_words(fmt)), wanted, f"{dtype} {view.stride()}")


@pytest.mark.parametrize("fmt", FORMATS[::2] if INTERPRETING else FORMATS, ids=str)
def test_stacked_matrices(fmt: NVFP4, make: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    x = make("wide", torch.bfloat16, (3, 20, 32) if INTERPRETING else (5, 83, 96))
    if fmt.scaling == "row":
        given = x.abs().amax(-1).float() * 0.7
    else:
        given = torch.linspace(0.5, 5, x.shape[0])
    for amax, small in ((None, 0), (given, 0), *([(None, SMALL)] if fmt in KERNELS else [])):
        monkeypatch.setattr(quantize, "SMALL", small)
        wanted = nvfp4.quantize(x, fmt, amax=amax, per_matrix=True, rng=random_words(fmt))
        on_device = None if amax is None else amax.to(DEVICE)
        got = quantize.quantize(x.to(DEVICE), fmt, amax=on_device, per_matrix=True, rng=random_words(fmt))
        check(got, wanted, f"amax={amax is not None}, {small}")


@pytest.mark.parametrize("shape", [(0, 32), (3, 0), (0, 4, 16), (2, 0, 16)], ids=str)
def test_empty_inputs(shape: tuple[int, ...]) -> None:
    for fmt in (NVFP4(), NVFP4(scaling="row"), NVFP4(block=(16, 16))):
        for per_matrix in (False, True):
            x = torch.zeros(shape)
            wanted = nvfp4.quantize(x, fmt, per_matrix=per_matrix)
            check(quantize.quantize(x.to(DEVICE), fmt, per_matrix=per_matrix), wanted, str(fmt))


@pytest.mark.parametrize("kind", KINDS)
def test_mxfp8(kind: str, make: Callable[..., Tensor]) -> None:
    for dtype in DTYPES:
        x = make(kind, dtype, (9, 96) if INTERPRETING else (83, 1056))
        elements, scale = mxfp8.quantize(x.to(DEVICE))
        wanted = mxfp8_numerics.quantize(x)
        same_bits(elements.cpu(), wanted[0], f"elements {dtype}")
        same_bits(scale.cpu(), wanted[1], f"scale {dtype}")
        for out in DTYPES:
            equal(mxfp8.dequantize(elements, scale, out).cpu(), mxfp8_numerics.dequantize(*wanted).to(out), f"{out}")
    strided = make(kind, torch.bfloat16, (64, 40)).mT
    same_bits(mxfp8.quantize(strided.to(DEVICE))[0].cpu(), mxfp8_numerics.quantize(strided)[0], "transposed")


@pytest.mark.parametrize("kind", ["bits", "wide", "nan"])
def test_dequantize(kind: str, make: Callable[..., Tensor]) -> None:
    for fmt, per_matrix in ((NVFP4(), False), (NVFP4(scaling="row"), False), (NVFP4(), True)):
        q = nvfp4.quantize(make(kind, torch.float32, (3, 21, 48)), fmt, per_matrix=per_matrix)
        packed, scale, tensor_scale = (t.to(DEVICE) for t in q[:3])
        for dtype in DTYPES:
            wanted = nvfp4.dequantize(*q[:3]).to(dtype)
            equal(dequantize.dequantize(packed, scale, tensor_scale, dtype).cpu(), wanted, f"{fmt} {dtype}")
            wanted = nvfp4.decode_without_tensor_scale(*q[:2]).to(dtype)
            equal(dequantize.dequantize(packed, scale, None, dtype).cpu(), wanted, f"exact {dtype}")


def test_dequantize_decodes_every_code_and_scale() -> None:
    packed = torch.arange(256, dtype=torch.uint8).repeat(256, 1)  # each row: every byte, under one scale
    scale = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 32).contiguous().view(torch.float8_e4m3fn)
    got = dequantize.dequantize(packed.to(DEVICE), scale.to(DEVICE), None, torch.bfloat16)
    equal(got.cpu(), nvfp4.decode_without_tensor_scale(packed, scale).bfloat16())


@pytest.mark.parametrize(
    "fmt", [NVFP4(), NVFP4(block=(16, 16)), NVFP4(scaling="row"), NVFP4(scale_rule="four_over_six")], ids=str
)
def test_fake_quantize(fmt: NVFP4, make: Callable[..., Tensor]) -> None:
    for dtype in DTYPES if fmt == NVFP4() else DTYPES[:1]:
        for kind in ("wide", "nan"):
            x = make(kind, dtype, (21, 48))
            q = nvfp4.quantize(x, fmt)
            decoded, tensor_scale = fake_quantize.fake_quantize(x.to(DEVICE), fmt)
            equal(decoded.cpu(), nvfp4.dequantize(*q[:3]).to(dtype), "decoded")
            equal(tensor_scale.cpu(), q.tensor_scale, "tensor scale")
            exact, tensor_scale = fake_quantize.fake_quantize(x.to(DEVICE), fmt, unscaled=True)
            equal(exact.cpu(), nvfp4.decode_without_tensor_scale(*q[:2]).to(dtype), "exact")
            equal(tensor_scale.cpu(), q.tensor_scale, "tensor scale")
    _, tensor_scale = fake_quantize.fake_quantize(torch.zeros((0, 32), device=DEVICE), fmt)
    equal(tensor_scale.cpu(), nvfp4.quantize(torch.zeros(0, 32), fmt).tensor_scale)


@pytest.mark.parametrize("shape", [(128, 4), (130, 7), (1, 1), (0, 4), (257, 12), (3, 130, 5), (2, 0, 4)], ids=str)
def test_swizzle(shape: tuple[int, ...]) -> None:
    scale = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    swizzled = swizzle.swizzle(scale.to(DEVICE))
    same_bits(swizzled.cpu(), swizzle_numerics.swizzle(scale))
    same_bits(swizzle.unswizzle(swizzled, *shape[-2:]).cpu(), scale)
    strided = swizzle.swizzle(scale.to(DEVICE).mT)
    same_bits(strided.cpu(), swizzle_numerics.swizzle(scale.mT))


@pytest.mark.parametrize("error", ["mae", "mse"])
@pytest.mark.parametrize("block", [(1, 16), (16, 16)], ids=str)
def test_four_over_six_on_the_brink(error: Any, block: Any) -> None:
    """Blocks of which half is multiplied by the last factor that keeps the choice, and by the next float."""
    g = torch.Generator().manual_seed(7)
    square = block == (16, 16)
    rows, columns = (16, 24) if square else (48 if INTERPRETING else 512, 1)
    for amax in (1e-13, 5.5, 30.0) if INTERPRETING else (1e-31, 1e-13, 1e-3, 0.37, 5.5, 30.0, 1e13, 1e29):
        for e4m3_max in (256,) if INTERPRETING else (256, 448):
            fmt = NVFP4(scale_rule="four_over_six", error=error, e4m3_max=e4m3_max, block=block)
            a = torch.tensor(amax)
            base = torch.randn(rows, columns, 16, generator=g).clamp(-2.1, 2.1) * (amax / 4)
            base[..., 15] = 0.55 * amax
            base = base[:1].repeat(rows, 1, 1) if square else base  # sums of many unlike rows all choose the same

            def wanted(factor: Tensor, fmt: NVFP4 = fmt, a: Tensor = a, base: Tensor = base) -> tuple[Tensor, Any]:
                x = torch.cat((base[..., :8] * factor[..., None], base[..., 8:]), -1).flatten(1)
                return x, nvfp4.quantize(x, fmt, amax=a)

            def scale(factor: Tensor) -> Tensor:
                return wanted(factor)[1].block_scale.view(torch.uint8)[: len(factor)]

            low = torch.full((1 if square else rows, columns), 0.3)
            high = torch.ones_like(low)
            first = scale(low)
            if 1e-12 < amax < 1e12:
                true((scale(high) != first).any(), "some blocks have a brink")
            for _ in range(24):
                bits = (low.view(torch.int32) + high.view(torch.int32)) // 2
                middle = bits.view(torch.float32)
                same = scale(middle) == first
                low, high = torch.where(same, middle, low), torch.where(same, high, middle)
            for factor in (low, high):
                x, expected = wanted(factor)
                got = quantize.quantize(x.to(DEVICE), fmt, amax=a.to(DEVICE))
                check(got, expected, f"amax={amax} E={e4m3_max}")


@pytest.mark.parametrize("error", ["mae", "mse"])
def test_four_over_six_under_any_amax(error: str, make: Callable[..., Tensor]) -> None:
    for block in ((1, 16), (16, 16)):
        fmt = NVFP4(scale_rule="four_over_six", error=error, block=block)
        for i, exponent in enumerate(range(-38, 39, 38 if INTERPRETING else 2)):
            a = torch.tensor(10.0**exponent)
            for factor in (0.1, 0.5, 3.0):  # of the largest elements: A may be too small, and far too large
                x = make("randn", DTYPES[i % 3], (19, 32) if INTERPRETING else (83, 1040)).float() * (a * factor)
                x = x.clamp(-torch.finfo(DTYPES[i % 3]).max, torch.finfo(DTYPES[i % 3]).max).to(DTYPES[i % 3])
                x[3, :16] = x[3, :16] * 1e-4
                check(quantize.quantize(x.to(DEVICE), fmt, amax=a.to(DEVICE)), nvfp4.quantize(x, fmt, amax=a), f"{a}")


@pytest.mark.skipif(INTERPRETING, reason="16 million elements")
def test_four_over_six_of_a_large_matrix(make: Callable[..., Tensor]) -> None:
    """Programs that take several tiles, and a last one that is not full."""
    fmt = NVFP4(scale_rule="four_over_six")
    x = make("randn", torch.bfloat16, (4101, 4096 + 16))
    x[::17, 5] = float("nan")
    a = torch.tensor(4.0)
    got = quantize.quantize(x.to(DEVICE), fmt, amax=a.to(DEVICE))
    for part in (slice(0, 64), slice(-64, None)):
        wanted = nvfp4.quantize(x[part], fmt, amax=a)
        same_bits(got[0][part].cpu(), wanted.packed)
        same_bits(got[1][part].cpu(), wanted.block_scale)


@pytest.mark.skipif(INTERPRETING, reason="too many elements for the interpreter")
def test_every_bfloat16_under_many_scales() -> None:
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = patterns[patterns.isfinite()]
    order = torch.Generator().manual_seed(0)
    for amax in (None, 1e-30, 0.37, 6.0, 448.0, 3e5, 1e20, 3e38):
        for _ in range(8):
            x = finite[torch.randperm(finite.numel(), generator=order)]
            x = x if amax is None else torch.where(x.abs() > 4 * amax, x * 0, x)
            x = x.view(-1, 32)
            a = None if amax is None else torch.tensor(amax)
            wanted = nvfp4.quantize(x, NVFP4(), amax=a)
            got = quantize.quantize(x.to(DEVICE), NVFP4(), amax=None if a is None else a.to(DEVICE))
            check(got, wanted, f"amax={amax}")


@pytest.mark.skipif(INTERPRETING, reason="a row of 32,768 columns")
@pytest.mark.parametrize("columns", [16, 4112, 14336, 32768, 65536])
def test_rows_of_many_lengths(columns: int, make: Callable[..., Tensor]) -> None:
    for fmt in (NVFP4(scaling="row"), NVFP4(scaling="row", scale_rule="four_over_six")):
        x = make("wide", torch.bfloat16, (5, columns))
        check(quantize.quantize(x.to(DEVICE), fmt), nvfp4.quantize(x, fmt), f"{columns}")


@pytest.mark.skipif(INTERPRETING, reason="CUDA only")
def test_graph_capture_and_beyond_2_31_elements() -> None:
    x = torch.randn(512, 512, device=DEVICE, dtype=torch.bfloat16)
    wanted = nvfp4.quantize(x.cpu(), NVFP4())
    quantize.quantize(x, NVFP4())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = quantize.quantize(x, NVFP4())
    graph.replay()
    check(got, wanted, "graph")
    big = torch.zeros(65537, 32768, device=DEVICE, dtype=torch.bfloat16)  # 2^31 + 2^15 elements
    big[-16:] = torch.randn(16, 32768, device=DEVICE, dtype=torch.bfloat16)
    tail = nvfp4.quantize(big[-16:].cpu(), NVFP4())
    got = quantize.quantize(big, NVFP4())
    same_bits(got[0][-16:].cpu(), tail.packed)
    same_bits(got[1][-16:].cpu(), tail.block_scale)


@pytest.mark.skipif(INTERPRETING, reason="what is launched again is CUDA only")
def test_launched_again_with_other_addresses_numbers_and_words() -> None:
    g = torch.Generator().manual_seed(3)
    flat = torch.randn(40 * 96 + 64, generator=g).bfloat16()
    for rounding in ("nearest", "stochastic"):
        fmt = NVFP4(rounding=rounding)
        amaxes = torch.tensor([1.0, 2.5, 3.0, 4.0, 2.0])
        for _ in range(2):
            for rows, columns, shift in ((40, 96, 0), (40, 96, 2), (40, 96, 8), (40, 96, 1), (16, 16, 0), (1, 3840, 4)):
                x = flat[shift : shift + rows * columns].view(rows, columns)
                moved = flat.to(DEVICE)[shift : shift + rows * columns].view(rows, columns)
                for i, amax in enumerate((None, *amaxes)):
                    words = (2**63 + i, shift) if rounding == "stochastic" else None
                    on_device = None if amax is None else amaxes.to(DEVICE)[i - 1]  # four bytes aligned
                    got = quantize.quantize(moved, fmt, amax=on_device, rng=words, first_block=i if words else 0)
                    wanted = nvfp4.quantize(x, fmt, amax=amax, rng=words, first_block=i if words else 0)
                    check(got, wanted, f"{rounding} {rows}×{columns} + {shift}, {amax}")


@pytest.mark.multigpu
@pytest.mark.skipif(INTERPRETING or torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_gpu_that_is_not_the_current_one() -> None:
    x = torch.randn(96, 1040, generator=torch.Generator().manual_seed(3)).bfloat16()
    for _ in range(2):
        for device in ("cuda:1", "cuda:0"):
            check(quantize.quantize(x.to(device), NVFP4()), nvfp4.quantize(x, NVFP4()), device)
