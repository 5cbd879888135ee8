"""The rule `search` against a brute force in float64 over all 126 scales, and where its bounds bite."""

import pytest
import torch
from torch import Tensor

from halfbyte import NVFP4
from halfbyte.formats import E4M3_MAX_CHOICES
from halfbyte.numerics import nvfp4, search

from ..check import close, equal, same_bits, true

GRID = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
CODES = torch.arange(1, 127, dtype=torch.uint8)
VALUES = CODES.view(torch.float8_e4m3fn).double()
EXPONENTS = [-80, 0, 100]


def distribution(name: str, rng: torch.Generator, shape: tuple[int, int] = (16, 128)) -> Tensor:
    x = torch.randn(shape, generator=rng)
    if name == "heavy":
        return x * torch.exp(3 * torch.randn(shape, generator=rng))
    if name == "blocks of all sizes":  # from E4M3's saturation to its subnormals and below
        return x * torch.exp2(-24 * torch.rand(shape[0], shape[1] // 16, generator=rng)).repeat_interleave(16, 1)
    if name == "outliers":
        return torch.where(torch.rand(shape, generator=rng) < 0.02, 40 * x, x)
    return x


DISTRIBUTIONS = ["normal", "heavy", "blocks of all sizes", "outliers"]


def brute_force(x: Tensor, encode_scale: Tensor, fmt: NVFP4, w: Tensor, h: Tensor | None = None) -> Tensor:
    """Errors of all candidates by nearest grid points in float64, [126, M, K/16] (16×16: [126, M/16, K/16])."""
    t = (x.double() * encode_scale.double()).unflatten(-1, (-1, 16))
    errors = []
    for value in VALUES:
        nearest = GRID[((t.abs() / value).unsqueeze(-1) - GRID).abs().argmin(-1)] * value * t.sign()
        d = nearest - t
        if h is not None:
            errors.append(torch.einsum("mbi,bij,mbj->mb", d, h.double(), d))
        else:
            errors.append(((d * d if fmt.error == "mse" else d.abs()) * w.double().view(-1, 16)).sum(-1))
    total = torch.stack(errors)
    return total.unflatten(1, (-1, 16)).sum(2) if fmt.block == (16, 16) else total


def check_optimal(x: Tensor, fmt: NVFP4, w: Tensor | None = None, h: Tensor | None = None) -> None:
    """The error of the chosen codes, in float64, is within 1e-5 of the least of all."""
    made = nvfp4.quantize(x, fmt, importance=w, hessian=h)
    encode_scale = nvfp4.tensor_scales(made.amax, fmt)[0].reshape(-1, 1)
    weights = torch.ones(x.shape[-1]) if w is None else w
    least = brute_force(x, encode_scale, fmt, weights, h).amin(0)
    t = x.double() * encode_scale.double()
    d = (nvfp4.decode_without_tensor_scale(made.packed, made.block_scale).double() - t).unflatten(-1, (-1, 16))
    if h is not None:
        found = torch.einsum("mbi,bij,mbj->mb", d, h.double(), d)
    else:
        found = ((d * d if fmt.error == "mse" else d.abs()) * weights.double().view(-1, 16)).sum(-1)
    if fmt.block == (16, 16):
        found = found.unflatten(0, (-1, 16)).sum(1)
    close(found, least, 1e-5 * least + 1e-12, str(fmt))


@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("block", [(1, 16), (16, 16)], ids=str)
@pytest.mark.parametrize("error", ["mse", "mae"])
def test_no_scale_is_better(name: str, exponent: int, block: tuple[int, int], error: str, rng: torch.Generator) -> None:
    x = distribution(name, rng) * 2.0**exponent
    for e4m3_max in E4M3_MAX_CHOICES if exponent == 0 else (448,):
        check_optimal(x, NVFP4(scale_rule="search", block=block, error=error, e4m3_max=e4m3_max))


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("error", ["mse", "mae"])
def test_importance(name: str, error: str, rng: torch.Generator) -> None:
    w = torch.rand(128, generator=rng) ** 4
    w[5] = 0
    check_optimal(distribution(name, rng), NVFP4(scale_rule="search", error=error), w)
    check_optimal(distribution(name, rng), NVFP4(scale_rule="search", error=error, scaling="row"), w)
    check_optimal(distribution(name, rng), NVFP4(scale_rule="search", error=error, block=(16, 16)), w)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("block", [(1, 16), (16, 16)], ids=str)
def test_hessian(name: str, block: tuple[int, int], rng: torch.Generator) -> None:
    a = torch.randn(8, 24, 16, generator=rng)
    h = a.mT @ a
    check_optimal(distribution(name, rng), NVFP4(scale_rule="search", error="hessian", block=block), h=h)


def test_an_identity_hessian_is_mse(rng: torch.Generator) -> None:
    """And a diagonal one is importance, up to the order of two factors: powers of two make them equal."""
    x = torch.randn(16, 64, generator=rng)
    w = torch.exp2(torch.randint(-3, 4, (64,), generator=rng).float())
    for weights in (None, w):
        h = torch.diag_embed((torch.ones(64) if weights is None else weights).view(4, 16))
        by_hessian = nvfp4.quantize(x, NVFP4(scale_rule="search", error="hessian"), hessian=h)
        by_mse = nvfp4.quantize(x, NVFP4(scale_rule="search"), importance=weights)
        # Only the hessian rule looks beyond c0 + 7, where a scale may tie but then has the larger code.
        same_bits(by_hessian.block_scale, by_mse.block_scale)


def test_weights_turn_the_choice() -> None:
    """With all weight on one element its error is zero, which no other choice gives."""
    x = torch.tensor([[6.0, *(0.7,) * 15]])
    w = torch.zeros(16)
    w[3] = 1
    made = nvfp4.quantize(x, NVFP4(scale_rule="search"), importance=w)
    decoded = nvfp4.dequantize(made.packed, made.block_scale, made.tensor_scale)
    close(decoded[0, 3], x[0, 3], 0.7 * 2.0**-4)
    plain = nvfp4.quantize(x, NVFP4(scale_rule="search"))
    true(not torch.equal(plain.block_scale, made.block_scale), "weights have no effect")


def test_better_than_the_other_rules(rng: torch.Generator) -> None:
    """Gaussian data: -16.6% for four_over_six and -27.1% for the search, of the squared error of `amax`."""
    x = torch.randn(128, 256, generator=rng)

    def squared(fmt: NVFP4) -> float:
        made = nvfp4.quantize(x, fmt)
        return float((nvfp4.dequantize(made.packed, made.block_scale, made.tensor_scale) - x).square().sum())

    plain = squared(NVFP4())
    true(squared(NVFP4(scale_rule="four_over_six", error="mse")) / plain < 0.85, "four_over_six")
    close(torch.tensor(squared(NVFP4(scale_rule="search")) / plain), torch.tensor(1 - 0.271), 0.01)


def test_ties_take_the_smaller_code() -> None:
    """A block that many scales store exactly: ±1 is on the grid of 1, 1/2, 2/3, 1/3, 1/4, 1/6 and 2."""
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 16:] = 2688, 96.0
    made = nvfp4.quantize(x, NVFP4(scale_rule="search"))  # S_enc = 1
    equal(float(made.tensor_scale), 1.0)
    equal(made.block_scale.float().tolist(), [[448.0, 16.0]])  # 16 · 6 = 96; 24 · 4 and 32 · 3 are as good


def test_zero_nan_and_infinity(rng: torch.Generator) -> None:
    fmt = NVFP4(scale_rule="search")
    x = torch.randn(2, 64, generator=rng)
    x[0, :16] = 0
    equal(int(nvfp4.quantize(x, fmt).block_scale.view(torch.uint8)[0, 0]), 0)
    x[1, 20] = torch.nan
    made = nvfp4.quantize(x, fmt)
    equal(set(made.block_scale.view(torch.uint8).flatten().tolist()), {0x7F})
    equal(int(made.packed.sum()), 0)
    made = nvfp4.quantize(x, fmt, amax=torch.tensor(4.0))  # a caller's A: only the block with the NaN
    equal((made.block_scale.view(torch.uint8) == 0x7F).nonzero().tolist(), [[1, 1]])
    x[1, 20] = torch.inf
    made = nvfp4.quantize(x, fmt, amax=torch.tensor(4.0))
    equal(int(made.block_scale.view(torch.uint8)[1, 1]), 1)  # every error is infinite


@pytest.mark.parametrize("error", ["mse", "mae"])
def test_candidates_beyond_the_bound_never_win(
    error: str, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The contract's bound leaves the optimum in: with all 126 candidates the least error is the same."""
    for name in DISTRIBUTIONS:
        x = distribution(name, rng, (64, 256))
        fmt = NVFP4(scale_rule="search", error=error)
        bounded = nvfp4.quantize(x, fmt)
        monkeypatch.setattr(search, "ABOVE", 126)
        same_bits(nvfp4.quantize(x, fmt).block_scale, bounded.block_scale, name)
        monkeypatch.undo()


def test_saturated_blocks_and_small_amaxes(rng: torch.Generator) -> None:
    """A caller's A far below or above the elements: 448 at the top, the smallest scales at the bottom."""
    x = torch.randn(4, 64, generator=rng)
    fmt = NVFP4(scale_rule="search")
    equal(set(nvfp4.quantize(x, fmt, amax=torch.tensor(1e-3)).block_scale.float().flatten().tolist()), {448.0})
    low = nvfp4.quantize(x, fmt, amax=torch.tensor(1e6)).block_scale.view(torch.uint8)
    true(bool((low >= 1).all() and (low <= 15).all()), str(low))
