import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from halfbyte import NVFP4
from halfbyte.numerics import nvfp4

from ..check import equal, same_bits
from . import oracle

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHARING = [((1, 16), "tensor"), ((16, 16), "tensor"), ((1, 16), "row")]
E4M3_MAX = (256, 288, 320, 448)

AMAX = [
    NVFP4(block=block, scaling=scaling, e4m3_max=e, hadamard=hadamard, rounding=rounding)
    for (block, scaling), e, hadamard, rounding in itertools.product(
        SHARING, E4M3_MAX, (False, True), ("nearest", "stochastic")
    )
]
FOUR_OVER_SIX = [
    NVFP4(block, scaling, "four_over_six", hadamard, "nearest", error, e, arithmetic)
    for (block, scaling), e, hadamard, error, arithmetic in itertools.product(
        SHARING, E4M3_MAX, (False, True), ("mae", "mse"), ("exact", "fp16")
    )
]
FEW = [AMAX[0], NVFP4(block=(16, 16), scale_rule="four_over_six"), NVFP4(scaling="row", hadamard=True)]


def name(fmt: NVFP4) -> str:
    measure = f"-{fmt.error}-{fmt.error_arithmetic}" if fmt.error else ""
    extras = ("-hadamard" if fmt.hadamard else "") + ("-stochastic" if fmt.rounding == "stochastic" else "")
    return f"{fmt.scaling}-{fmt.block[0]}x16-{fmt.scale_rule}-{fmt.e4m3_max}{measure}{extras}"


def draw(fmt: NVFP4) -> tuple[int, int] | None:
    return (1234567890123, 42) if fmt.rounding == "stochastic" else None


def inputs(rng: torch.Generator, dtype: torch.dtype) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """Ordinary and nasty matrices (M, K), some with an amax from outside."""
    info = torch.finfo(dtype)
    randn = lambda *shape: torch.randn(*shape, generator=rng)  # noqa: E731
    randint = lambda low, high, *shape: torch.randint(low, high, shape, generator=rng).float()  # noqa: E731
    one_row, holes, ties, tiny = randn(1, 48), randn(3, 32), randint(-24, 25, 3, 32) / 4, randn(2, 32) * info.tiny
    holes[1, 16:] = 0
    ties[:, ::16] = 6.0  # amax 6: e is about 1, the elements fall on values and midpoints
    tiny[0, 3] = info.max / 64  # the block scales of the rest underflow
    spoiled = {str(v): randn(3, 32).index_put((torch.tensor([1]), torch.tensor([5])), torch.tensor(v)) for v in
               (math.inf, -math.inf, math.nan)}  # fmt: skip
    plain = {
        "one row": one_row,
        "17 rows": randn(17, 16),
        "wide": randn(16, 32) * torch.exp2(randint(-12, 13, 16, 32)),
        "zero block": holes,
        "zero tensor": torch.zeros(2, 16),
        "negative zero": -torch.zeros(1, 16),
        "subnormal": randint(-3, 4, 3, 32) * info.smallest_normal * info.eps,
        "huge": torch.full((2, 16), info.max).where(randn(2, 16) > 0, -info.max / 3),
        "ties": ties,
        "underflow": tiny,
        **spoiled,
    }
    out: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {k: (v.to(dtype), None) for k, v in plain.items()}
    for amax in (0.5, 1e6, 0.0, math.inf, math.nan):
        out[f"amax {amax}"] = (randn(3, 16).to(dtype), torch.tensor(amax))
    return out


def check_equal(got: nvfp4.Encoded, want: oracle.Encoded, what: str, by_row: bool) -> None:
    same_bits(got.packed, torch.from_numpy(want.packed), f"{what}: packed")
    same_bits(got.block_scale.view(torch.uint8), torch.from_numpy(want.block_scale), f"{what}: block_scale")
    for field in ("tensor_scale", "amax"):
        expected = torch.from_numpy(getattr(want, field).copy())
        equal(getattr(got, field), expected if by_row else expected[0], f"{what}: {field}")


@pytest.mark.parametrize("fmt", AMAX + FOUR_OVER_SIX, ids=name)
def test_equals_the_oracle(rng: torch.Generator, fmt: NVFP4) -> None:
    cases = [inputs(rng, dtype) for dtype in DTYPES]
    for what in cases[0]:
        x, amax = cases[int(torch.randint(3, (), generator=rng))][what]  # all dtypes, over the 144 formats
        before = x.clone()
        got = nvfp4.quantize(x, fmt, amax=amax, rng=draw(fmt), first_block=3)
        want = oracle.nvfp4(x, fmt, amax=amax, rng=draw(fmt), first_block=3)
        check_equal(got, want, f"{what} {x.dtype}", fmt.scaling == "row")
        same_bits(x, before, "the input")


def test_every_combination_is_here() -> None:
    equal(len({name(fmt) for fmt in AMAX + FOUR_OVER_SIX}), 48 + 96)


@pytest.mark.parametrize("fmt", FEW, ids=name)
def test_dequantize_is_one_product_of_the_parts(rng: torch.Generator, fmt: NVFP4) -> None:
    for what, (x, amax) in inputs(rng, torch.float32).items():
        q = nvfp4.quantize(x, fmt, amax=amax)
        nibbles = torch.stack((q.packed % 16, q.packed // 16), -1).flatten(-2)
        values = torch.tensor([float(v) for v in oracle.E2M1 + [-v for v in oracle.E2M1]])[nibbles.int()]
        scale = q.block_scale.float() * q.tensor_scale.reshape(-1, 1)
        expected = values.unflatten(-1, (-1, 16)) * scale[..., None]
        same_bits(nvfp4.dequantize(*q[:3]).nan_to_num(), expected.flatten(-2).nan_to_num(), what)
        equal(nvfp4.dequantize(*q[:3]).isnan(), expected.flatten(-2).isnan(), what)


@pytest.mark.parametrize("fmt", [f for f in AMAX + FOUR_OVER_SIX if f.e4m3_max == 256], ids=name)
def test_per_matrix_equals_the_slices(rng: torch.Generator, fmt: NVFP4) -> None:
    x = torch.randn(2, 3, 17, 32, generator=rng) * torch.tensor([1.0, 10.0, 0.1])[:, None, None]
    whole = nvfp4.quantize(x, fmt, per_matrix=True, rng=draw(fmt), first_block=5)
    for i, j in itertools.product(range(2), range(3)):
        first_block = 5 + (3 * i + j) * 17 * 2  # parts draw like the whole
        part = nvfp4.quantize(x[i, j], fmt, rng=draw(fmt), first_block=first_block)
        for got, want in zip(whole, part, strict=True):
            same_bits(got[i, j], want)


@pytest.mark.parametrize("fmt", FEW, ids=name)
@pytest.mark.parametrize("shape", [(0, 32), (3, 0), (0, 0), (0,), (2, 0, 16), (16,), (64,), (2, 3, 4, 16)], ids=str)
def test_shapes(rng: torch.Generator, fmt: NVFP4, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=rng)
    q = nvfp4.quantize(x, fmt)
    equal(tuple(q.packed.shape), (*shape[:-1], shape[-1] // 2))
    equal(tuple(q.block_scale.shape), (*shape[:-1], shape[-1] // 16))
    equal(tuple(q.amax.shape), shape[:-1] if fmt.scaling == "row" else ())
    equal(tuple(nvfp4.dequantize(*q[:3]).shape), shape)
    matrix = nvfp4.quantize(x.reshape(math.prod(shape[:-1]), shape[-1]), fmt)
    for got, want in zip(q, matrix, strict=True):
        same_bits(got.flatten(), want.flatten())
    if x.numel() == 0:
        equal(q.tensor_scale, torch.ones_like(q.amax))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    fmt=st.sampled_from(FEW),
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=2),
    rows=st.integers(1, 20),
    blocks=st.integers(1, 3),
    order=st.randoms(use_true_random=False),
    step=st.integers(1, 3),
    expand=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_strides_do_not_matter(fmt, shape, rows, blocks, order, step, expand, seed) -> None:
    """A view (permuted, with steps, expanded) gives the bytes of its contiguous copy."""
    sizes = [*shape, rows, 16 * blocks]
    axes = order.sample(range(len(sizes)), len(sizes))
    stored = torch.randn([sizes[a] * step for a in axes], generator=torch.Generator().manual_seed(seed))
    x = stored[tuple(slice(None, None, step) for _ in axes)].permute([axes.index(i) for i in range(len(axes))])
    x = x[..., :1].expand(sizes) if expand else x
    equal(tuple(x.shape), tuple(sizes))
    for per_matrix in (False, True):
        got = nvfp4.quantize(x, fmt, per_matrix=per_matrix)
        want = nvfp4.quantize(x.contiguous().clone(), fmt, per_matrix=per_matrix)
        for a, b in zip(got, want, strict=True):
            same_bits(a, b)


@pytest.mark.parametrize("fmt", [f for f in AMAX + FOUR_OVER_SIX if f.e4m3_max == 448 and not f.hadamard], ids=name)
def test_nan_poisons_visibly(rng: torch.Generator, fmt: NVFP4) -> None:
    x = torch.randn(3, 32, generator=rng)
    x[1, 20] = math.nan
    q = nvfp4.quantize(x, fmt, rng=draw(fmt))
    poisoned = [1] if fmt.scaling == "row" else [0, 1, 2]
    equal(q.block_scale[poisoned].view(torch.uint8), torch.full((len(poisoned), 2), 0x7F, dtype=torch.uint8))
    equal(q.packed[poisoned], torch.zeros(len(poisoned), 16, dtype=torch.uint8))
    rows = nvfp4.dequantize(*q[:3]).isnan()
    equal(rows, torch.tensor([i in poisoned for i in range(3)])[:, None].expand(3, 32))
