"""The step of GPTQ in Triton and compiled for the CPU, against the contract."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from halfbyte import NVFP4
from halfbyte.calib.gptq import GPTQ, factorize, gptq, tensor_amax
from halfbyte.kernels import gptq as triton_gptq
from halfbyte.kernels.cpu import gptq as cpu_gptq
from halfbyte.numerics import gptq as numerics

from ..check import same_bits, true
from .test_triton_kernels import DEVICE, INTERPRETING, pytestmark  # noqa: F401

ROWS = 21 if INTERPRETING else 1000  # not divisible by the rows of a program


def blocks(rng: torch.Generator) -> dict[str, Tensor]:
    """Blocks of all magnitudes, zeros, ties, and weights beyond the reach of every scale."""
    x = torch.randn(ROWS, 16, generator=rng)
    out = {
        "plain": x,
        "mixed": x * torch.exp2(-20 * torch.rand(ROWS, 1, generator=rng)),
        "few": torch.randint(-3, 4, (ROWS, 16), generator=rng).float(),
        "large": 100 * x,
    }
    for block in out.values():
        block[3], block[4, 1:] = 0, 0
    return out


def upper(rng: torch.Generator) -> Tensor:
    """The factor of correlated inputs of different powers."""
    x = torch.randn(200, 16, generator=rng) @ torch.randn(16, 16, generator=rng)
    h = (x * (3 * torch.rand(16, generator=rng)).exp()).double()
    return torch.linalg.cholesky(torch.linalg.inv(h.T @ h / 200), upper=True).float()


@pytest.mark.parametrize("given", [False, True])
def test_all_three_give_the_same_bits(rng: torch.Generator, given: bool) -> None:
    seen = set()
    for factor in (torch.eye(16), upper(rng)):
        for name, weight in blocks(rng).items():
            decode_scale = torch.tensor(3.0 / 2688)
            code = torch.randint(0, 127, (ROWS,), generator=rng).to(torch.uint8).view(torch.float8_e4m3fn)
            code = code if given else None
            expected = numerics.round_block(weight, factor, decode_scale, code)
            seen |= set(expected[1].view(torch.uint8).tolist())
            moved = (x if x is None else x.to(DEVICE) for x in (weight, factor, decode_scale, code))
            for who, actual in (
                ("triton", triton_gptq.round_block(*moved)),
                ("cpu", cpu_gptq.round_block(weight, factor, decode_scale, code)),
            ):
                for part, a, e in zip(("codes", "scale", "error"), actual, expected, strict=True):
                    same_bits(a.cpu(), e, f"{part} by {who} of {name}")
    true(len(seen) > 20, f"only scales {seen}")


def test_a_scale_whose_loss_overflows_is_never_the_best() -> None:
    """Weights that one scale holds exactly, and a factor that makes infinities, and NaN, of any other's errors."""
    grid = torch.tensor([6.0, 0, 0.5, 1, 1.5, 2, 3, 4]).repeat(3, 2)
    code = torch.tensor([20, 64, 126], dtype=torch.uint8).view(torch.float8_e4m3fn)
    weight = grid * code.float()[:, None]
    factor = torch.full((16, 16), 2.0**62).triu(1) + 2.0**-66 * torch.eye(16)
    for round_block, device in (
        (numerics.round_block, "cpu"),
        (cpu_gptq.round_block, "cpu"),
        (triton_gptq.round_block, DEVICE),
    ):
        _, chosen, error = round_block(*(x.to(device) for x in (weight, factor, torch.ones(()))), None)
        same_bits(chosen.cpu(), code, round_block.__module__)
        true(not error.any(), f"an error in {round_block.__module__}")


@pytest.mark.skipif(INTERPRETING, reason="too much for the interpreter")
def test_whole_weights_on_the_gpu(rng: torch.Generator) -> None:
    """Beside the contract on the same GPU: the same bytes, the rest of the arithmetic being the same calls."""
    x = torch.randn(2000, 640, generator=rng, dtype=torch.float64).to(DEVICE)
    x = x @ torch.randn(640, 640, generator=rng, dtype=torch.float64).to(DEVICE) / 25
    w = 0.02 * torch.randn(512, 640, generator=rng).to(DEVICE)
    factor = factorize((x.T @ x / 2000).float(), GPTQ())
    true(factor is not None, "not positive definite")
    amax = tensor_amax(w.abs().amax(), GPTQ())
    for fmt in (NVFP4(scale_rule="search"), NVFP4(scale_rule="search", error="mae"), NVFP4()):
        a, b = (gptq(w, factor, fmt, amax, impl=impl) for impl in ("triton", "reference"))
        same_bits(a.quantized.packed, b.quantized.packed, f"codes, {fmt}")
        same_bits(a.quantized.block_scale, b.quantized.block_scale, f"scales, {fmt}")
        true((a.saturated, a.loss) == (b.saturated, b.loss), "figures")
