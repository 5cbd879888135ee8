"""Random words read from the device: the bytes of the same numbers, and new ones in each replay of a graph."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from halfbyte.errors import UnsupportedError
from halfbyte.formats import NVFP4
from halfbyte.kernels import fake_quantize, quantize, transposed
from halfbyte.nn import Linear
from halfbyte.numerics import nvfp4
from halfbyte.ops import gradient
from halfbyte.recipe import TransformerEngine

from ..check import same_bits, true
from .test_triton_kernels import DEVICE, INTERPRETING, check, poisoned_memory, pytestmark  # noqa: F401

PLAIN, ROW = NVFP4(rounding="stochastic"), NVFP4(rounding="stochastic", scaling="row")
SQUARE = NVFP4(rounding="stochastic", block=(16, 16))
NUMBERS = 2**64 - 3, 2**63 + 2**40 + 5
KERNELS: dict[str, Callable[[Tensor, Any], Any]] = {
    "1x16": lambda x, rng: quantize.quantize(x, PLAIN, rng=rng, first_block=3),
    "row-scaled": lambda x, rng: quantize.quantize(x, ROW, rng=rng),
    "16x16": lambda x, rng: quantize.quantize(x, SQUARE, rng=rng, first_block=3),
    "many matrices": lambda x, rng: quantize.quantize(x.view(2, -1, 48), PLAIN, rng=rng, per_matrix=True),
    "a transposed view": lambda x, rng: quantize.quantize(x.mT, PLAIN, rng=rng),
    "transposed beside the rows": lambda x, rng: transposed.quantize(x, PLAIN, rng=rng, rowwise=NVFP4())[0],
    "rows beside the transposed": lambda x, rng: transposed.quantize(x, NVFP4(), rowwise=PLAIN, rowwise_rng=rng)[1],
    "values": lambda x, rng: fake_quantize.fake_quantize(x, PLAIN, rng=rng, unscaled=True),
    "values, transposed": lambda x, rng: fake_quantize.fake_quantize(x.mT, PLAIN, rng=rng, unscaled=True),
    "codes and values": lambda x, rng: fake_quantize.quantize_with_values(x, PLAIN, rng=rng)[0],
}


@pytest.mark.parametrize("name", KERNELS)
def test_words_on_the_device_are_the_numbers(name: str, make: Callable[..., Tensor]) -> None:
    x = make("randn", torch.bfloat16, (32, 48)).to(DEVICE)
    words = torch.tensor([word - 2**64 for word in NUMBERS], device=DEVICE)
    wanted, got = KERNELS[name](x, NUMBERS), KERNELS[name](x, words)
    for one, other in zip(got, wanted, strict=True):
        same_bits(one.cpu(), other.cpu())
    other = KERNELS[name](x, (NUMBERS[0], NUMBERS[1] - 1))[0]
    true(not torch.equal(other.cpu().view(torch.uint8), wanted[0].cpu().view(torch.uint8)), "other words, other bytes")


def test_the_reference_on_the_device(make: Callable[..., Tensor]) -> None:
    """Words are tensors there too, which nothing waits for."""
    x = make("randn", torch.bfloat16, (32, 48))
    words = torch.tensor([word - 2**64 for word in NUMBERS], device=DEVICE)
    check(nvfp4.quantize(x.to(DEVICE), PLAIN, rng=words), nvfp4.quantize(x, PLAIN, rng=NUMBERS), "reference")


def captured(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """The step, run twice on another stream, as capturing wants it, and captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


@pytest.mark.skipif(INTERPRETING, reason="CUDA only")
@pytest.mark.parametrize("block", [(1, 16), (16, 16)])
def test_replay_k_is_eager_step_k(block: tuple[int, int]) -> None:
    """Three steps each: other gradients in every one, and the eager ones."""
    recipe = TransformerEngine(disable_2d_quantization=block == (1, 16)).recipe()
    layer = Linear(128, 256, False, DEVICE, torch.bfloat16, recipe=recipe)
    x = torch.randn(64, 128, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    dy = torch.randn(64, 256, device=DEVICE, dtype=torch.bfloat16)
    x.grad, layer.weight.grad = torch.zeros_like(x), torch.zeros_like(layer.weight)

    def step() -> None:
        x.grad.zero_()
        layer.weight.grad.zero_()
        layer(x).backward(dy)

    def gradients(run: Callable[[], None]) -> list[tuple[Tensor, Tensor]]:
        layer.quantization.state.copy_(gradient.new_state(7, DEVICE))
        seen = []
        for _ in range(3):
            run()
            seen.append((x.grad.clone(), layer.weight.grad.clone()))
        return seen

    eager, replayed = gradients(step), gradients(captured(step).replay)
    for one, other in zip(replayed, eager, strict=True):
        same_bits(one[0], other[0], "dx")
        same_bits(one[1], other[1], "dw")
    for i in range(2):
        true(not torch.equal(eager[i][0], eager[i + 1][0]), "dx rounds otherwise")
        true(not torch.equal(eager[i][1], eager[i + 1][1]), "dw rounds otherwise")


@pytest.mark.skipif(INTERPRETING, reason="CUDA only")
def test_words_on_the_cpu_are_not_captured() -> None:
    x, state = torch.randn(32, 32, device=DEVICE), gradient.new_state(1)
    gradient.quantize_gradient(x, PLAIN, PLAIN, gradient.new_state(1, DEVICE))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.neg_()  # a graph of nothing warns
        with pytest.raises(UnsupportedError, match="Run the step once before capturing it"):
            gradient.quantize_gradient(x, PLAIN, PLAIN, state)
