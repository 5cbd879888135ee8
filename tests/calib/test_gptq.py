"""GPTQ: a smaller output error than nearest, blocks that stay together, and Hessians of every kind."""

import pytest
import torch
from torch import Tensor

from halfbyte import NVFP4, FormatError, quantize
from halfbyte.calib.gptq import GPTQ, factorize, gptq, tensor_amax, unstack
from halfbyte.calib.group import Member, Quantizer, Statistics, output_error
from halfbyte.ops.gptq import round_block

from ..check import close, equal, same_bits, true

SEARCH = NVFP4(scale_rule="search")
FORMATS = [
    NVFP4(),
    NVFP4(scale_rule="four_over_six"),
    SEARCH,
    NVFP4(scale_rule="search", error="hessian", e4m3_max=256),
]


def problem(rng: torch.Generator, n: int = 48, k: int = 160, tokens: int = 600) -> tuple[Tensor, Tensor]:
    """A weight, and the Hessian of inputs that are correlated and of different sizes."""
    mix = torch.randn(k, k, generator=rng) / k**0.5
    x = torch.randn(tokens, k, generator=rng) @ mix * (3 * torch.rand(k, generator=rng)).exp()
    return torch.randn(n, k, generator=rng) * 0.02, x.T @ x / tokens


def run(w: Tensor, h: Tensor, fmt: NVFP4, options: GPTQ | None = None, impl: str = "auto") -> float:
    options = options or GPTQ()
    factor = factorize(h, options)
    true(factor is not None, "not positive definite")
    rounded = gptq(w, factor, fmt, tensor_amax(w.abs().amax(), options), impl=impl)
    return output_error(w, rounded.quantized.dequantize(), h)


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
def test_beats_nearest(rng: torch.Generator, fmt: NVFP4, order: bool) -> None:
    w, h = problem(rng)
    plain = output_error(w, quantize(w, NVFP4()).dequantize(), h)
    ours = run(w, h, fmt, GPTQ(activation_order=order))
    limit = 0.5 if fmt.scale_rule == "search" else 0.8
    true(ours < limit * plain, f"{ours} against {plain}")


def test_cpu_and_reference_give_the_same_bytes(rng: torch.Generator) -> None:
    w, h = problem(rng)
    factor = factorize(h, GPTQ())
    amax = tensor_amax(w.abs().amax(), GPTQ())
    for fmt in FORMATS:
        a, b = (gptq(w, factor, fmt, amax, impl=impl).quantized for impl in ("cpu", "reference"))
        same_bits(a.packed, b.packed)
        same_bits(a.block_scale, b.block_scale)


def test_loss_is_the_error_of_the_damped_hessian(rng: torch.Generator) -> None:
    w, h = problem(rng)
    options = GPTQ(damping=0.05, activation_order=False)
    rounded = gptq(w, factorize(h, options), SEARCH, tensor_amax(w.abs().amax(), options))
    damped = h.double() + 0.05 * h.double().diagonal().mean() * torch.eye(len(h))
    d = w.double() - rounded.quantized.dequantize().double()
    error = ((d @ damped) * d).sum()
    close(torch.tensor(rounded.loss), error, 1e-3 * float(error))


def test_the_chosen_scale_is_the_best_of_all_near(rng: torch.Generator) -> None:
    """Against every E4M3 scale: the sixteen tried hardly ever miss the smallest Σe²."""
    w, h = problem(rng, 32, 16)
    factor = factorize(h, GPTQ(activation_order=False)).upper
    decode_scale = w.abs().amax() / 2688
    _, chosen, error = round_block(w, factor, decode_scale, None)
    best = torch.full((len(w),), torch.inf)
    for code in range(1, 127):
        scale = torch.full((len(w),), code, dtype=torch.uint8).view(torch.float8_e4m3fn)
        best = torch.minimum(best, round_block(w, factor, decode_scale, scale)[2].square().sum(1))
    found = error.square().sum(1)
    true((found <= best * (1 + 1e-6)).double().mean() > 0.9, "too often another scale is better")
    close(found.sum(), best.sum(), 0.01 * float(best.sum()))
    again = round_block(w, factor, decode_scale, chosen)[2]
    same_bits(error, again)


def test_members_of_a_group_are_the_rows_of_the_stack(rng: torch.Generator) -> None:
    w, h = problem(rng)
    factor, amax = factorize(h, GPTQ()), tensor_amax(w.abs().amax(), GPTQ())
    parts = unstack(gptq(w, factor, SEARCH, amax).quantized, [16, 32])
    for part, rows in zip(parts, w.split([16, 32]), strict=True):
        alone = gptq(rows, factor, SEARCH, amax).quantized
        same_bits(part.packed, alone.packed)
        same_bits(part.block_scale, alone.block_scale)
        equal(part.tensor_scale, alone.tensor_scale)


def test_dead_columns(rng: torch.Generator) -> None:
    """What an input never shows cannot cost anything, and does not disturb the rest."""
    w, h = problem(rng)
    dead = [3, *range(32, 48)]
    h[dead] = 0
    h[:, dead] = 0
    true(run(w, h, SEARCH) < 0.5 * output_error(w, quantize(w, NVFP4()).dequantize(), h), "worse than nearest")
    true(factorize(torch.zeros(32, 32), GPTQ()) is not None, "nothing but zeros has a factor too")


def test_head_room_keeps_moved_weights_from_saturating(rng: torch.Generator) -> None:
    w, h = problem(rng, 256, 64)
    w = w.clamp(-0.02, 0.02)  # many weights at the maximum
    tight, roomy = GPTQ(headroom=1.0), GPTQ(headroom=4.0)
    counts = [gptq(w, factorize(h, o), SEARCH, tensor_amax(w.abs().amax(), o)).saturated for o in (tight, roomy)]
    true(counts[0] > 0 and counts[1] == 0, str(counts))
    _, report = Quantizer(tight)([Member("a.weight", "a.weight", SEARCH)], [w], Statistics(torch.tensor(1.0), 600, h))
    equal((report.saturated, report.to_json()["saturated"]), (counts[0], counts[0]))


def test_damping_is_raised_until_the_hessian_is_positive_definite(rng: torch.Generator) -> None:
    x = torch.randn(4, 64, generator=rng)
    h = x.T @ x - 0.2 * torch.eye(64)  # eigenvalues below zero
    factor = factorize(h, GPTQ(damping=0.001))
    true(factor is not None and factor.damping > 0.001, "damping as given")
    true(factorize(-torch.eye(32) + torch.ones(32, 32) * 1.5, GPTQ()) is None, "hopeless")
    true(factorize(torch.full((16, 16), torch.nan), GPTQ()) is None, "NaN")


def test_the_order_is_by_power_and_keeps_blocks(rng: torch.Generator) -> None:
    _, h = problem(rng)
    power = h.diagonal()
    equal(factorize(h, GPTQ(activation_order=False)).order, torch.arange(160))
    order = factorize(h, GPTQ(activation_order=True)).order.view(-1, 16)
    equal((order // 16).amin(1), (order // 16).amax(1), "columns of one block")
    equal(sorted(order.flatten().tolist()), list(range(160)))
    for found in (power[order].sum(1), *power[order]):
        equal(found, found.sort(descending=True).values, "power")


def test_the_factor_is_of_float64(rng: torch.Generator) -> None:
    """A Hessian that float32 could not invert, and would ask for more damping."""
    basis = torch.linalg.qr(torch.randn(64, 64, generator=rng, dtype=torch.float64)).Q
    h = ((basis * torch.logspace(0, -9, 64, dtype=torch.float64)) @ basis.T).float()
    options = GPTQ(damping=1e-7, activation_order=False)
    factor = factorize(h, options)
    equal(factor.damping, 1e-7)
    damped = h.double() + 1e-7 * h.double().diagonal().mean() * torch.eye(64)
    upper = factor.upper.double()
    close(upper @ damped @ upper.T, torch.eye(64), 1e-2)


def test_a_hopeless_hessian_falls_back_to_nearest(rng: torch.Generator) -> None:
    w, _ = problem(rng, 16, 32)
    statistics = Statistics(torch.tensor(1.0), 10, -torch.eye(32) + torch.ones(32, 32) * 1.5)
    (q,), report = Quantizer(GPTQ())([Member("a.weight", "a.weight", NVFP4())], [w], statistics)
    equal(report.method, "nearest")
    true("positive definite" in report.why, report.why)
    same_bits(q.packed, quantize(w, NVFP4()).packed)


@pytest.mark.parametrize("options", [None, GPTQ()], ids=["nearest", "GPTQ"])
def test_without_tokens_scales_are_those_of_the_weights(rng: torch.Generator, options: GPTQ | None) -> None:
    w, _ = problem(rng, 16, 32)
    fmt = NVFP4(scale_rule="search", error="hessian")
    (q,), report = Quantizer(options)(
        [Member("a.weight", "a.weight", fmt)], [w], Statistics(torch.tensor(0.0), 0, None)
    )
    wanted = quantize(w, SEARCH)
    same_bits(q.packed, wanted.packed)
    same_bits(q.block_scale, wanted.block_scale)
    equal((q.format, report.method, report.error, bool(report.why)), (fmt, "nearest", None, options is not None))


@pytest.mark.parametrize("options", [{"damping": 0.0}, {"damping": 2.0}, {"headroom": 0.5}])
def test_options_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(FormatError):
        GPTQ(**options)


def test_formats_that_gptq_cannot_keep(rng: torch.Generator) -> None:
    w, h = problem(rng, 16, 32)
    for fmt in (NVFP4(block=(16, 16)), NVFP4(scaling="row"), NVFP4(hadamard=True)):
        with pytest.raises(FormatError, match="GPTQ"):
            gptq(w, factorize(h, GPTQ()), fmt, torch.tensor(1.0))
    with pytest.raises(FormatError, match="divisible by 16"):
        factorize(torch.eye(20), GPTQ())
