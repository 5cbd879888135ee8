"""Training on a GPU: operands are the reference quantizer's, bit for bit, whose products float32 sums in another order.

Run with `-m gpu`. Few formats and one shape: each is a kernel to compile, and tests/kernels has them all.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from halfbyte.nn import GroupedLinear, Linear
from halfbyte.recipe import LayerRecipe

from ..check import close, equal, same_bits
from .test_experts import OFFSETS, TOKENS
from .test_experts import RECIPES as OF_EXPERTS
from .test_linear import NEAREST, RECIPES, K, N, data, decoded, exact, layer_of, quantized_backward, run, seen

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
DTYPE, M = torch.bfloat16, 21  # tokens, no whole blocks
NAMES = (
    "high_precision", "dequantized", "dequantized, row-scaled on both sides", "dequantized, MXFP8", "quantized",
    "quantized, MXFP8",
)  # fmt: skip
MODES: dict[str, LayerRecipe] = {
    "high_precision": RECIPES["high_precision"],
    "dequantized": RECIPES["dequantized"],
    "quantized": NEAREST.recipe().to_layer(),
}
QUIET = ("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")  # torch's own, while compiling


def near(got: Tensor, pair: tuple[Tensor, Tensor], depth: int, what: str, extra: float = 0.0) -> None:
    """Within what `depth` float32 sums, and the epilogue, may be off; extra: of Σ|a·b| besides."""
    wanted, size = pair
    equal((got.dtype, got.device.type), (DTYPE, "cuda"), what)
    budget = ((depth + 4) * 2.0**-24 + extra) * size + wanted.abs() * torch.finfo(DTYPE).eps / 2
    close(got.cpu(), wanted, 1.01 * budget + 1e-7, what)


@pytest.mark.parametrize("name", NAMES)
def test_linear_is_the_formula(rng: torch.Generator, name: str) -> None:
    recipe, seed = RECIPES[name], 2**64 - 3
    x, w, bias, dy = data(rng, DTYPE, M)
    layer = layer_of(recipe, w, bias, seed=seed).cuda()
    y, dx, dw = run(layer, x.cuda(), dy.cuda())
    wanted, size = exact(seen(x, recipe.activations), seen(w, recipe.weights))
    near(y, (wanted + bias.double(), size + bias.double().abs()), K, "y")
    if recipe.backward == "quantized":
        dgrad, wgrad = quantized_backward(recipe, x, w, dy, seed)
        of_x, of_w = exact(*dgrad), exact(*wgrad)
        near(dx, (of_x[0][:M], of_x[1][:M]), N, "dx")
        near(dw, of_w, 32, "dw")  # tokens, filled up
    else:
        original = recipe.backward == "high_precision"
        w_seen = w if original else decoded(w, recipe.weights, DTYPE)
        x_seen = x if original else decoded(x, recipe.activations, DTYPE)
        # A matmul of bfloat16 may add up parts of its sums in bfloat16.
        near(dx, exact((dy, None), (w_seen.mT, None)), N, "dx", 2.0**-8)
        near(dw, exact((dy.mT, None), (x_seen.mT, None)), M, "dw", 2.0**-8)
    near(layer.bias.grad, (dy.double().sum(0), dy.double().abs().sum(0)), M, "db")


@pytest.mark.parametrize("name", ["high_precision", "dequantized", "dequantized, MXFP8", "quantized"])
def test_experts_are_those_of_the_cpu(rng: torch.Generator, name: str) -> None:
    """Sums in another order, which a grouped matmul rounds to bfloat16 once more."""
    experts, n = len(OFFSETS), 32
    x, dy = torch.randn(TOKENS, K, generator=rng).to(DTYPE), torch.randn(TOKENS, n, generator=rng).to(DTYPE)
    layer = GroupedLinear(experts, K, n, dtype=DTYPE, recipe=OF_EXPERTS[name])
    results = []
    for device in ("cpu", "cuda"):
        there = copy.deepcopy(layer).to(device)
        leaf = x.to(device, copy=True).requires_grad_()
        y = there(leaf, OFFSETS.to(device))
        y.backward(dy.to(device))
        results.append([t.detach().cpu() for t in (y, leaf.grad, there.weight.grad)])
    sizes = [torch.zeros(t.shape, dtype=torch.float64) for t in results[0]]
    start = 0
    for expert, end in enumerate(OFFSETS.tolist()):
        a, g, w = (
            x[start:end].double().abs(),
            dy[start:end].double().abs(),
            layer.weight[expert].detach().double().abs(),
        )
        sizes[0][start:end], sizes[1][start:end], sizes[2][expert] = a @ w.mT, g @ w, g.mT @ a
        start = end
    for what, wanted, got, size in zip(("y", "dx", "dw"), *results, sizes, strict=True):
        close(got, wanted, 2.0**-7 * 1.5 * size + 1e-6, what)


@pytest.mark.filterwarnings(*QUIET)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", MODES)
def test_compiled_in_one_graph(rng: torch.Generator, name: str, backend: str) -> None:
    torch._dynamo.reset()
    x, w, bias, dy = (t.cuda() for t in data(rng, DTYPE))
    eager, twin = layer_of(MODES[name], w, bias).cuda(), layer_of(MODES[name], w, bias).cuda()
    wanted = run(eager, x, dy)
    leaf = x.clone().requires_grad_()
    y = torch.compile(twin, fullgraph=True, backend=backend)(leaf)
    y.backward(dy)
    for what, got, expected in zip(("y", "dx", "dw"), (y.detach(), leaf.grad, twin.weight.grad), wanted, strict=True):
        same_bits(got, expected, what)


@pytest.mark.parametrize("name", MODES)
def test_captured_in_a_graph(rng: torch.Generator, name: str) -> None:
    """Forward and backward; a replay reads the inputs anew."""
    x, w, bias, dy = (t.cuda() for t in data(rng, DTYPE))
    layer, leaf = layer_of(MODES[name], w, bias).cuda(), x.clone().requires_grad_()

    def step() -> tuple[Tensor, ...]:
        y = layer(leaf)
        return y.detach(), *torch.autograd.grad(y, (leaf, layer.weight), dy)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaf.mul_(-3)
        dy.mul_(0.3)
    graph.replay()
    got = [t.clone() for t in captured]
    for what, a, e in zip(("y", "dx", "dw"), got, step(), strict=True):
        same_bits(a, e, what)


@pytest.mark.parametrize("name", MODES)
def test_autocast(rng: torch.Generator, name: str) -> None:
    """x goes to autocast's dtype, the float32 weight is quantized as it is, gradients have their inputs' dtypes."""
    x, w, bias, _ = data(rng, torch.float32)
    recipe = MODES[name]
    layer, leaf = layer_of(recipe, w, bias).cuda(), x.cuda().requires_grad_()
    with torch.autocast("cuda", DTYPE):
        y = layer(leaf)
    wanted, size = exact(seen(x.to(DTYPE), recipe.activations), seen(w, recipe.weights))
    near(y.detach(), (wanted + bias.double(), size + bias.double().abs()), K, "y")
    y.sum().backward()
    equal([t.grad.dtype for t in (leaf, layer.weight, layer.bias)], [torch.float32] * 3)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["quantized", "dequantized", "high_precision"])
def test_checkpointing_changes_nothing(rng: torch.Generator, name: str, reentrant: bool) -> None:
    x, w, bias, dy = (t.cuda() for t in data(rng, DTYPE))
    layers: list[Linear] = [layer_of(RECIPES[name], w, bias).cuda() for _ in range(2)]
    for _ in range(2):  # stochastic rounding: each pass has words of its own
        wanted = run(layers[0], x, dy)
        leaf: Any = x.clone().requires_grad_()
        layers[1].weight.grad = None
        y = checkpoint(layers[1], leaf, use_reentrant=reentrant)
        y.backward(dy)
        for what, a, e in zip(("y", "dx", "dw"), (y.detach(), leaf.grad, layers[1].weight.grad), wanted, strict=True):
            same_bits(a, e, what)


def test_evaluated_before_it_is_trained(rng: torch.Generator) -> None:
    """The first forward pass moves the random words' state, in inference mode too; backward passes write to it."""
    x, w, bias, dy = data(rng, DTYPE)
    layer = layer_of(RECIPES["quantized"], w, bias).cuda()
    with torch.inference_mode():
        layer(x.cuda())
    run(layer, x.cuda(), dy.cuda())
    equal(layer.quantization.state.tolist(), [[0, 2], [0, 3]])
