"""Linear: forward and each backward against the formulas, written out with the reference quantizer."""

import copy
import math
from typing import Any

import pytest
import torch
from benchmarks.memory import saved_bytes
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import halfbyte as hb
from halfbyte.errors import FormatError, ShapeError
from halfbyte.formats import Format
from halfbyte.nn import AmaxGroups, Linear
from halfbyte.numerics import mxfp8, nvfp4
from halfbyte.ops.gradient import new_state, words
from halfbyte.ops.matmul import scaled_matmul
from halfbyte.recipe import LayerRecipe, TrainingRecipe, TransformerEngine

from ..check import close, equal, same_bits, true

NV, ROW, MX = hb.NVFP4(), hb.NVFP4(scaling="row"), hb.MXFP8()
SIX_ROW, SIX = hb.NVFP4(scaling="row", scale_rule="four_over_six"), hb.NVFP4(scale_rule="four_over_six")
NEAREST = TransformerEngine(disable_stochastic_rounding=True)
M, N, K = 48, 96, 64
RECIPES: dict[str, LayerRecipe] = {
    "high_precision": LayerRecipe(),
    "high_precision, row-scaled 4over6": LayerRecipe(SIX_ROW, SIX),
    "high_precision, weights only": LayerRecipe(None, NV),
    "dequantized": LayerRecipe(NV, NV, backward="dequantized"),
    "dequantized, row-scaled on both sides": LayerRecipe(SIX_ROW, ROW, backward="dequantized"),
    "dequantized, activations only": LayerRecipe(ROW, None, backward="dequantized"),
    "dequantized, MXFP8": LayerRecipe(MX, MX, backward="dequantized"),
    "quantized": TransformerEngine().recipe().to_layer(),
    "quantized, 1x16, row-scaled 4over6": TransformerEngine(
        disable_2d_quantization=True, row_scaled_activation=True, four_over_six="all"
    )
    .recipe()
    .to_layer(),
    "quantized, row-scaled gradients": LayerRecipe(ROW, ROW, ROW, True, "quantized"),
    "quantized, MXFP8": LayerRecipe(MX, MX, MX, backward="quantized"),
    "quantized, mixed": LayerRecipe(MX, NV, NV, backward="quantized"),
}


def data(rng: torch.Generator, dtype: torch.dtype, tokens: int = M) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, w, bias and dy; x has outliers."""
    x = torch.randn(tokens, K, generator=rng)
    x[:, 3] *= 20
    w, bias = 0.1 * torch.randn(N, K, generator=rng), torch.randn(N, generator=rng)
    return x.to(dtype), w.to(dtype), bias.to(dtype), torch.randn(tokens, N, generator=rng).to(dtype)


def layer_of(recipe: LayerRecipe, w: Tensor, bias: Tensor | None, **options: Any) -> Linear:
    layer = Linear(K, N, bias is not None, dtype=w.dtype, recipe=TrainingRecipe(**vars(recipe), **options))
    with torch.no_grad():
        layer.weight.copy_(w)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def run(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx, dw."""
    x = x.clone().requires_grad_()
    layer.weight.grad = None
    y = layer(x)
    y.backward(dy)
    return y.detach(), x.grad, layer.weight.grad


def seen(x: Tensor, fmt: Format | None, rng: Any = None) -> tuple[Tensor, Tensor | None]:
    """(q·s in bf16, S_dec) of the reference quantizer."""
    if fmt is None:
        return x, None
    if isinstance(fmt, hb.MXFP8):
        return mxfp8.dequantize(*mxfp8.quantize(x), torch.float32).bfloat16(), None
    q = nvfp4.quantize(x, fmt, rng=rng)
    return nvfp4.decode_without_tensor_scale(q.packed, q.block_scale).bfloat16(), q.tensor_scale


def decoded(x: Tensor, fmt: Format | None, dtype: torch.dtype) -> Tensor:
    values, scale = seen(x, fmt)
    if scale is None:
        return values.to(dtype)
    if isinstance(fmt, hb.NVFP4):
        q = nvfp4.quantize(x, fmt)
        return nvfp4.dequantize(q.packed, q.block_scale, q.tensor_scale, dtype)
    return values.to(dtype)


def exact(a: tuple[Tensor, Tensor | None], b: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
    """α·a·bᵀ and α·|a|·|b|ᵀ in float64."""
    one = torch.ones(())
    alpha = (one if a[1] is None else a[1]).double().reshape(-1, 1) * (one if b[1] is None else b[1]).double()
    return alpha * (a[0].double() @ b[0].double().mT), alpha.abs() * (a[0].double().abs() @ b[0].double().abs().mT)


def quantized_backward(recipe: LayerRecipe, x: Tensor, w: Tensor, dy: Tensor, seed: int) -> tuple[Any, Any]:
    """What dgrad and wgrad of the first backward pass multiply: two operands each, as `seen` gives them."""
    # Tokens are filled up with zeros to whole blocks.
    xs, dys = (nn.functional.pad(t, (0, 0, 0, -len(t) % recipe.token_block)) for t in (x, dy))
    random, transposed_random = words(new_state(seed)) if recipe.stochastic else (None, None)
    square = isinstance(recipe.weights, hb.NVFP4) and recipe.weights.block == (16, 16)
    values, scale = seen(w, recipe.weights)
    wt = (values.mT, scale) if square else seen(w.mT.contiguous(), recipe.weights)
    gt = seen(dys.mT.contiguous(), recipe.wgrad_gradients, transposed_random)
    xt = seen(xs.mT.contiguous(), recipe.wgrad_activations)
    return (seen(dys, recipe.gradients, random), wt), (gt, xt)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("name", RECIPES)
def test_forward_is_the_reference_quantizer_and_a_float64_matmul(rng, name: str, dtype: torch.dtype) -> None:
    """Budget: (K + 4)·2^-24 of Σ|x·w| and of |bias| for float32 sums and the epilogue, and the output's rounding."""
    recipe = RECIPES[name]
    x, w, bias, _ = data(rng, dtype)
    y = layer_of(recipe, w, bias)(x.reshape(3, 16, K))
    equal((y.dtype, tuple(y.shape)), (dtype, (3, 16, N)))
    wanted, size = exact(seen(x, recipe.activations), seen(w, recipe.weights))
    wanted = wanted + bias.double()
    budget = (K + 4) * 2.0**-24 * (size + bias.double().abs()) + wanted.abs() * torch.finfo(dtype).eps / 2
    close(y.reshape(-1, N), wanted, 1.01 * budget + 1e-7, name)


@pytest.mark.parametrize("tokens", [M, 21])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", RECIPES)
def test_gradients_are_the_formula(rng, name: str, dtype: torch.dtype, tokens: int) -> None:
    """The same matmuls of what the reference quantizer gives: the same bits."""
    recipe = RECIPES[name]
    x, w, bias, dy = data(rng, dtype, tokens)
    layer = layer_of(recipe, w, bias, seed=2**64 - 3)
    _, dx, dw = run(layer, x, dy)
    if recipe.backward == "quantized":
        ((g, g_scale), (wt, wt_scale)), ((gt, gt_scale), (xt, xt_scale)) = quantized_backward(
            recipe, x, w, dy, 2**64 - 3
        )
        wanted_dx = scaled_matmul(g, wt, g_scale, wt_scale, out_dtype=dtype)[:tokens]
        wanted_dw = scaled_matmul(gt, xt, gt_scale, xt_scale, out_dtype=dtype)
    else:
        original = recipe.backward == "high_precision"
        wanted_dx = dy @ (w if original else decoded(w, recipe.weights, dtype))
        wanted_dw = dy.mT @ (x if original else decoded(x, recipe.activations, dtype))
    same_bits(dx, wanted_dx.to(dtype), "dx")
    same_bits(dw, wanted_dw.to(dtype), "dw")
    equal(layer.bias.grad, dy.sum(0, dtype=torch.float32).to(dtype))


@pytest.mark.parametrize("name", RECIPES)
def test_inputs_of_any_shape(rng, name: str) -> None:
    x, w, bias, dy = data(rng, torch.bfloat16)
    for shape in ((M,), (2, 3, 8), (0,), (2, 0)):
        count = math.prod(shape)
        results = []
        for given, gradient in ((x[:count].view(*shape, K), dy[:count].view(*shape, N)), (x[:count], dy[:count])):
            layer = layer_of(RECIPES[name], w, bias)
            results.append([t.reshape(-1, t.shape[-1]) for t in (*run(layer, given, gradient), layer.bias.grad[None])])
        for got, wanted in zip(*results, strict=True):
            same_bits(got, wanted)
        if count == 0:
            equal([t.count_nonzero().item() for t in results[0]], [0] * 4)
    leaf = x[0].clone().requires_grad_()
    layer(leaf).backward(dy[0])
    equal(tuple(leaf.grad.shape), (K,))


@pytest.mark.parametrize("name", RECIPES)
def test_gradients_of_what_needs_one(rng, name: str) -> None:
    """Whatever is frozen, the others' are the same bits; strides do not matter either."""
    x, w, bias, dy = data(rng, torch.bfloat16)
    layer = layer_of(RECIPES[name], w, bias)
    _, dx, dw = run(layer, x, dy)
    wanted = dx, dw, layer.bias.grad
    for needed in ((True, False, False), (False, True, False), (False, False, True), (True, False, True)):
        layer = layer_of(RECIPES[name], w, bias)
        leaves = x.mT.contiguous().mT.requires_grad_(needed[0]), *layer.requires_grad_(False).parameters()
        for leaf, need in zip(leaves, needed, strict=True):
            leaf.requires_grad_(need)
        layer(leaves[0]).backward(dy.mT.contiguous().mT)
        for leaf, need, grad in zip(leaves, needed, wanted, strict=True):
            same_bits(leaf.grad.contiguous(), grad) if need else equal(leaf.grad, None)


@pytest.mark.parametrize("name", RECIPES)
def test_a_second_derivative_is_refused(rng, name: str) -> None:
    x, w, _, _ = data(rng, torch.float32)
    leaf = x.requires_grad_()
    (dx,) = torch.autograd.grad(layer_of(RECIPES[name], w, None)(leaf).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        (dx.square().sum() + leaf.square().sum()).backward()


def test_gradients_of_a_quantized_backward_are_near_the_true_ones(rng) -> None:
    """Against the formula's own mistakes: transposes, scales and the transform end up where they should."""
    x, w, _, dy = data(rng, torch.float32)
    for name, recipe in RECIPES.items():
        _, dx, dw = run(layer_of(recipe, w, None), x, dy)
        for what, got, wanted in (("dx", dx, dy @ w), ("dw", dw, dy.mT @ x)):
            error = float((got - wanted).norm() / wanted.norm())
            true(error < 0.25, f"{name}: {what} is off by {error:.3f}")


def test_saved_bytes(rng) -> None:
    tokens, k, n = 1024, 256, 128
    x = torch.randn(tokens, k, generator=rng).bfloat16().requires_grad_()
    plain = nn.Linear(k, n, dtype=torch.bfloat16)
    bf16 = saved_bytes(plain, x)
    equal(bf16, 2 * tokens * k)
    of_x, of_w = tokens * k * 9 // 16, n * k * 9 // 16
    for recipe, activations, weight in (
        (LayerRecipe(), bf16, 0),
        (LayerRecipe(ROW, backward="dequantized"), of_x + 4 * tokens, of_w + 4),
        (LayerRecipe(backward="dequantized"), of_x + 4, of_w + 4),
        (TransformerEngine().recipe().to_layer(), of_x + 4, of_w + 4),  # 16×16 blocks: dgrad multiplies by the same
        (LayerRecipe(gradients=hb.NVFP4(), backward="quantized"), of_x + 4, 0),
    ):
        layer = Linear(k, n, dtype=torch.bfloat16, recipe=recipe)
        equal(saved_bytes(layer, x), activations + weight, str(recipe))
        if recipe.backward != "high_precision":
            true(activations <= 0.30 * bf16, f"{activations / bf16:.3f}")
    frozen = Linear(k, n, dtype=torch.bfloat16, recipe=LayerRecipe(backward="dequantized")).requires_grad_(False)
    equal(saved_bytes(frozen, x), of_w + 4, "a frozen weight needs no x")
    trained = Linear(k, n, dtype=torch.bfloat16, recipe=LayerRecipe(backward="dequantized"))
    equal(saved_bytes(trained, x.detach()), of_x + 4, "an input without gradient needs no w")


def test_stochastic_rounding_is_unbiased(rng) -> None:
    """The mean over many backward passes goes to what unrounded gradients give.

    For each dx the error of one pass is Σ_n e_n·ŵ_n with independent e_n of mean 0, |e_n| ≤ a code step δ. Its standard
    deviation is at most (δ/2)·‖ŵ‖₂, so that of the mean over R passes is at most that / √R. Six of them for each of
    M·K = 1024 values fail by chance less than once in 10^5 runs. The bias of the bits, 2^-17 of a step, and bf16-exact
    products in float32 sums come on top.
    """
    tokens, passes = 16, 400
    recipe = TransformerEngine().recipe().to_layer()
    x, w, _, _ = data(rng, torch.float32, tokens)
    dy = torch.rand(tokens, N, generator=rng) + 0.5
    dy[:, ::16] = 4.0  # every block has the tensor's maximum: scale 448, decode scale 4 / 2688
    layer = layer_of(recipe, w, None, seed=11)
    mean = torch.stack([run(layer, x, dy)[1] for _ in range(passes)]).double().mean(0)
    values, scale = seen(w, recipe.weights)
    w_seen = values.double() * scale.double()
    step = 2 * 448 * 4 / 2688  # between the codes 4 and 6; the largest one
    deviation = step / 2 * w_seen.norm(dim=0)
    bound = 6 * deviation / math.sqrt(passes) + (step * 2.0**-17 + 2.0**-18) * w_seen.abs().sum(0)
    close(mean, dy.double() @ w_seen, bound.expand(tokens, K), "mean dx")
    equal(layer.quantization.state.tolist(), [[11, 2 * passes], [11, 2 * passes + 1]], "each pass has words of its own")


def test_random_words_depend_on_the_seed_and_the_count_alone(rng) -> None:
    x, w, _, dy = data(rng, torch.bfloat16)
    recipe = TransformerEngine().recipe().to_layer()
    first, again, other = (layer_of(recipe, w, None, seed=seed) for seed in (1, 1, 2))
    a, b = run(first, x, dy), run(first, x, dy)
    true(not torch.equal(a[1], b[1]) and not torch.equal(a[2], b[2]), "the second pass rounds otherwise")
    for got, wanted in zip((run(again, x, dy), run(again, x, dy)), (a, b), strict=True):
        same_bits(got[1], wanted[1])
        same_bits(got[2], wanted[2])
    true(not torch.equal(run(other, x, dy)[1], a[1]), "another seed rounds otherwise")


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["quantized", "dequantized", "high_precision, row-scaled 4over6"])
def test_checkpointing_changes_nothing(rng, name: str, reentrant: bool) -> None:
    x, w, bias, dy = data(rng, torch.bfloat16)
    eager, twin = layer_of(RECIPES[name], w, bias), layer_of(RECIPES[name], w, bias)
    for _ in range(2):
        y, dx, dw = run(eager, x, dy)
        leaf = x.clone().requires_grad_()
        twin.weight.grad = None
        out = checkpoint(twin, leaf, use_reentrant=reentrant)
        out.backward(dy)
        same_bits(out.detach(), y)
        same_bits(leaf.grad, dx)
        same_bits(twin.weight.grad, dw)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while tracing
@pytest.mark.parametrize("name", RECIPES)
def test_compiled_in_one_graph(rng, name: str) -> None:
    """The same operators in the same order: equal bits, also of the second pass, without another compilation."""
    torch._dynamo.reset()
    x, w, bias, dy = data(rng, torch.bfloat16)
    eager, twin = layer_of(RECIPES[name], w, bias), layer_of(RECIPES[name], w, bias)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(twin, fullgraph=True, backend=counter)
    for _ in range(3):
        wanted = run(eager, x, dy)
        leaf = x.clone().requires_grad_()
        twin.weight.grad = None
        y = compiled(leaf)
        y.backward(dy)
        for got, expected in zip((y.detach(), leaf.grad, twin.weight.grad), wanted, strict=True):
            same_bits(got, expected)
    equal(counter.frame_count, 1)


def test_autocast(rng) -> None:
    """x goes to autocast's dtype, the float32 weight is quantized as it is, gradients have their inputs' dtypes."""
    x, w, bias, _ = data(rng, torch.float32)
    layer = layer_of(RECIPES["dequantized"], w, bias)
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(leaf)
    equal(y.dtype, torch.bfloat16)
    values, scale = seen(w, NV)
    x_values, x_scale = seen(x.bfloat16(), NV)
    same_bits(y.detach(), scaled_matmul(x_values, values, x_scale, scale, bias=bias))
    y.sum().backward()
    equal((leaf.grad.dtype, layer.weight.grad.dtype, layer.bias.grad.dtype), (torch.float32,) * 3)


@pytest.mark.parametrize("name", ["quantized, row-scaled gradients", "dequantized", "high_precision"])
def test_main_grad(rng, name: str) -> None:
    x, w, _, dy = data(rng, torch.bfloat16)
    layer = layer_of(RECIPES[name], w, None, main_grad=True)
    with pytest.raises(ShapeError, match=r"weight.main_grad is None; main_grad=True needs float32 \(96, 64\)"):
        layer(x)
    layer.weight.main_grad = torch.ones(N, K)
    first, second = layer(x), layer(2 * x)  # two micro-batches in flight
    first.backward(dy)
    equal(layer.weight.grad, None)
    plain = layer_of(RECIPES[name], w, None)
    once = run(plain, x, dy)[2].float()
    close(layer.weight.main_grad - 1, once, once.abs() * 2.0**-7 + 1e-4)
    second.backward(dy)
    twice = once + run(plain, 2 * x, dy)[2].float()
    close(layer.weight.main_grad - 1, twice, (once.abs() * 3) * 2.0**-7 + 1e-3)
    with torch.no_grad():
        layer(x)


def test_a_copy_computes_the_same_and_shares_nothing(rng) -> None:
    x, w, bias, dy = data(rng, torch.bfloat16)
    layer = layer_of(RECIPES["quantized"], w, bias)
    twin = copy.deepcopy(layer)
    for got, wanted in zip(run(twin, x, dy), run(layer, x, dy), strict=True):
        same_bits(got, wanted)
    equal(layer.quantization.state.tolist(), [[0, 2], [0, 3]])
    equal(twin.quantization.state.tolist(), [[0, 2], [0, 3]])


def test_a_copy_is_on_the_same_ranks() -> None:
    layer = Linear(K, N)
    layer.quantization.groups = AmaxGroups(torch.distributed.ProcessGroup(0, 1))
    equal(copy.deepcopy(layer).quantization.groups is layer.quantization.groups, True)


def test_drop_in_for_torchs_linear(rng) -> None:
    plain = nn.Linear(K, N)
    layer = Linear(K, N, recipe=LayerRecipe(evaluation="high_precision"))
    layer.load_state_dict(plain.state_dict())
    equal(list(layer.state_dict()), list(plain.state_dict()))
    x = torch.randn(5, K, generator=rng)
    true(not torch.equal(layer(x), plain(x)), "in training it is quantized")
    same_bits(layer.eval()(x), plain(x))
    true("backward='high_precision'" in repr(layer), repr(layer))
    layer.train()
    same_bits(layer(x[0]), layer(x[:1])[0], "a vector")


def test_errors() -> None:
    for wrong in ("weights", ("weight",)):
        with pytest.raises(FormatError, match=r"along_columns=.*needs a tuple of 'activations', 'weights'"):
            AmaxGroups(along_columns=wrong)
    with pytest.raises(ShapeError, match=r"Linear\(40, 96\): in_features=40 is not divisible by 16"):
        Linear(40, 96)
    with pytest.raises(ShapeError, match="in_features=48 is not divisible by 32"):
        Linear(48, 96, recipe=LayerRecipe(MX, NV))
    with pytest.raises(ShapeError, match="out_features=40 is not divisible by 16, which dgrad needs"):
        Linear(64, 40, recipe=TransformerEngine().recipe())
    with pytest.raises(ShapeError, match=r"x has shape \(2, 32\); this layer takes \(…, 64\)"):
        Linear(64, 48)(torch.ones(2, 32))
