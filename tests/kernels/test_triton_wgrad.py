"""The GPU's grouped weight gradients and accumulation, against float64; run as its neighbours are."""

import pytest
import torch

pytest.importorskip("triton")

import halfbyte as hb
from halfbyte import ops
from halfbyte.nn import GroupedLinear, grouped
from halfbyte.recipe import TransformerEngine

from ..check import close, same_bits, true
from ..test_wgrad import ENDS, E, K, N, budget, exact, operands
from .test_triton_kernels import DEVICE, INTERPRETING, poisoned_memory, pytestmark  # noqa: F401


@pytest.mark.parametrize("ends", ENDS)
def test_wgrad(rng, ends: str) -> None:
    """The grouped matmul rounds the sums to bfloat16: 2^-8 of the result more. Of the ends only whole blocks here."""
    g, x, g_scale, x_scale = operands(rng)
    blocks = [-(-end // 16) * 16 for end in ENDS[ends]]
    offsets = torch.tensor(blocks, dtype=torch.int32, device=DEVICE)
    on_device = [t.bfloat16().to(DEVICE) for t in (g, x)]
    moved = [t.mT.contiguous().mT for t in on_device]
    for scales in ((g_scale, x_scale), (None, x_scale), (g_scale[0], None), (None, None)):
        wanted, size = exact(g, x, blocks, *scales)
        there = [None if scale is None else scale.to(DEVICE) for scale in scales]
        for dtype in (torch.float32, torch.bfloat16):
            for pair in (on_device, moved):
                dw = ops.scaled_grouped_wgrad(*pair, offsets, *there, out_dtype=dtype, impl="triton")
                close(dw.cpu(), wanted, budget(wanted, size, dtype) + wanted.abs() * 2.0**-8, f"{dtype}")
        buffer = torch.ones(E, N, K, device=DEVICE)
        wide = torch.ones(E, N, 2 * K, device=DEVICE)[:, :, ::2]
        for into in (buffer, wide):
            out = ops.scaled_grouped_wgrad(*on_device, offsets, *there, accumulate_into=into, impl="triton")
            true(out is into, "the buffer itself")
            slack = budget(wanted + 1, size + 1, torch.float32) + wanted.abs() * 2.0**-8
            close(into.cpu(), wanted + 1, slack, "added")


def test_wgrad_without_tokens() -> None:
    offsets = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    g, x = (torch.empty(rows, 0, dtype=torch.bfloat16, device=DEVICE) for rows in (16, 32))
    same_bits(
        ops.scaled_grouped_wgrad(g, x, offsets, None, None, impl="triton").cpu(), torch.zeros(2, 16, 32).bfloat16()
    )


def test_grouped_linear_accumulates(rng) -> None:
    x = hb.quantize(torch.randn(40, 64, generator=rng).bfloat16().to(DEVICE), hb.NVFP4(scaling="row"))
    w = hb.quantize(torch.randn(E, 32, 64, generator=rng).bfloat16().to(DEVICE), hb.NVFP4(), per_matrix=True)
    offsets = torch.tensor([5, 5, 26, 37], dtype=torch.int32, device=DEVICE)
    plain = hb.grouped_linear(x, w, offsets, out_dtype=torch.float32, impl="triton")
    buffer = torch.randn(40, 32, generator=rng).to(DEVICE)
    before = buffer.clone()
    hb.grouped_linear(x, w, offsets, accumulate_into=buffer, impl="triton")
    same_bits(buffer.cpu(), (before + plain).cpu())


@pytest.mark.skipif(INTERPRETING, reason="CUDA only")
@pytest.mark.parametrize("stochastic", [False, True])
def test_experts_in_a_graph_and_beside_one_by_one(stochastic: bool) -> None:
    """Nothing waits for the counts: a graph replays others. Operands are one by one's, sums are rounded once more."""
    recipe = TransformerEngine(disable_stochastic_rounding=not stochastic).recipe()
    layer = GroupedLinear(8, 256, 128, DEVICE, torch.bfloat16, recipe=recipe)
    x = torch.randn(200, 256, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    dy = torch.randn(200, 128, device=DEVICE, dtype=torch.bfloat16)
    offsets = torch.tensor([20, 40, 60, 80, 100, 120, 140, 160], dtype=torch.int32, device=DEVICE)
    x.grad, layer.weight.grad = torch.zeros_like(x), torch.zeros_like(layer.weight)

    def step() -> torch.Tensor:
        x.grad.zero_()
        layer.weight.grad.zero_()
        y = layer(x, offsets)
        y.backward(dy)
        return y

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    offsets.copy_(torch.tensor([0, 1, 50, 50, 51, 120, 199, 200], dtype=torch.int32))
    state = layer.quantization.state.clone()
    graph.replay()
    got = [t.clone() for t in (y, x.grad, layer.weight.grad)]
    true(bool((layer.quantization.state != state).any()) == stochastic, "the replay advances the words")
    layer.quantization.state.copy_(state)
    for one, other in zip(got, (step(), x.grad, layer.weight.grad), strict=True):
        same_bits(one, other)
    if stochastic:  # other words: other bytes
        return
    x.grad, layer.weight.grad = None, None
    q = layer.quantization
    out = grouped.one_by_one(x, layer.weight, offsets, None, q.state, q.layer, q.groups)
    out.backward(dy)
    sizes = (x.abs().double() @ torch.ones(256, 128, device=DEVICE).double()).amax()
    for one, other in zip(got, (out, x.grad, layer.weight.grad), strict=True):
        close(one, other, other.double().abs() * 2.0**-7 + 1e-5 * float(sizes), "one more rounding of the sums")
