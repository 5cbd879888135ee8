"""Experts: each one's tokens and weight are matrices of their own, whatever the others are given."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import halfbyte as hb
from halfbyte import ops
from halfbyte.errors import FormatError, ShapeError
from halfbyte.nn import GroupedLinear, Linear, convert, grouped, revert
from halfbyte.numerics import nvfp4
from halfbyte.recipe import LayerRecipe, TrainingRecipe, TransformerEngine

from ..check import close, equal, same_bits, true

ROW, SIX, MX = hb.NVFP4(scaling="row"), hb.NVFP4(scale_rule="four_over_six"), hb.MXFP8()
SQUARE = hb.NVFP4(block=(16, 16))
RECIPES = {
    "high_precision": TrainingRecipe(),
    "high_precision, row-scaled 4over6": TrainingRecipe(hb.NVFP4(scaling="row", scale_rule="four_over_six"), SIX),
    "high_precision, weights only": TrainingRecipe(None, SIX),
    "dequantized": TrainingRecipe(backward="dequantized"),
    "dequantized, row-scaled": TrainingRecipe(ROW, backward="dequantized"),
    "dequantized, MXFP8": TrainingRecipe(MX, MX, backward="dequantized"),
    "quantized": TransformerEngine(disable_stochastic_rounding=True).recipe(),
    "quantized, 1x16": TransformerEngine(disable_stochastic_rounding=True, disable_2d_quantization=True).recipe(),
    "quantized, row-scaled 4over6": TransformerEngine(
        disable_2d_quantization=True, disable_stochastic_rounding=True, row_scaled_activation=True, four_over_six="all"
    ).recipe(),
    "quantized, row-scaled throughout": TrainingRecipe(ROW, ROW, ROW, True, "quantized"),
    "quantized, MXFP8": TrainingRecipe(MX, MX, MX, backward="quantized"),
    "quantized, mixed": TrainingRecipe(MX, hb.NVFP4(), hb.NVFP4(), backward="quantized"),
    "quantized, 16x16 throughout": TrainingRecipe(SQUARE, SQUARE, SQUARE, backward="quantized"),
}
E, N, K = 4, 32, 64
OFFSETS = torch.tensor([5, 5, 26, 40], dtype=torch.int32)  # no token reaches expert 1
TOKENS = 43  # three rows belong to nobody


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RECIPES)
def test_as_one_linear_for_each_expert(rng, name: str, dtype: torch.dtype) -> None:
    """The same operands; sums in another order, and on bf16 one more rounding: budgets by Σ|a·b|."""
    x = torch.randn(TOKENS, K, generator=rng)
    x[::7] *= 10
    x, dy = x.to(dtype), torch.randn(TOKENS, N, generator=rng).to(dtype)
    layer = GroupedLinear(E, K, N, dtype=dtype, recipe=RECIPES[name])
    leaf = x.clone().requires_grad_()
    y = layer(leaf, OFFSETS)
    y.backward(dy)
    slack = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-18
    start = 0
    for expert, end in enumerate(OFFSETS.tolist()):
        one = Linear(K, N, False, dtype=dtype, recipe=RECIPES[name])
        with torch.no_grad():
            one.weight.copy_(layer.weight[expert])
        rows = x[start:end].clone().requires_grad_()
        out = one(rows)
        out.backward(dy[start:end])
        a, g, w = rows.detach().double().abs(), dy[start:end].double().abs(), one.weight.detach().double().abs()
        close(y[start:end], out, slack * 1.5 * (a @ w.mT) + 1e-6, f"y of {expert}")
        close(leaf.grad[start:end], rows.grad, slack * 1.5 * (g @ w) + 1e-6, f"dx of {expert}")
        close(layer.weight.grad[expert], one.weight.grad, slack * 1.5 * (g.mT @ a) + 1e-6, f"dw of {expert}")
        start = end
    equal(y[start:].detach(), torch.zeros(3, N, dtype=dtype))
    equal(leaf.grad[start:], torch.zeros(3, K, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("quantized") and "16x16" not in name])
def test_all_experts_at_once_as_one_by_one(rng, monkeypatch, name: str, dtype: torch.dtype) -> None:
    """The same codes and scales, whatever counts tokens come in; on a CPU the same matmuls of them: equal bits."""
    layer = GroupedLinear(E, K, N, dtype=dtype, recipe=RECIPES[name])
    results = []
    for function in (grouped.grouped_linear, one_by_one):
        monkeypatch.setattr("halfbyte.nn.experts.grouped_linear", function)
        torch.manual_seed(0)
        for ends in ([5, 5, 26, 40], [16, 32, 48, 80], [0, 0, 0, 1], [0, 0, 0, 0], [1, 2, 3, 83]):
            x = torch.randn(83, K)
            x[::7] *= 10
            x[ends[-1] :] = float("nan")  # rows of nobody
            x, dy = x.to(dtype).requires_grad_(), torch.randn(83, N).to(dtype)
            layer.weight.grad = None
            y = layer(x, torch.tensor(ends, dtype=torch.int32))
            y.backward(dy)
            results.append((f"{ends}", y.detach(), x.grad, layer.weight.grad))
    half = len(results) // 2
    for (what, *got), (_, *wanted) in zip(results[:half], results[half:], strict=True):
        for g, w in zip(got, wanted, strict=True):
            same_bits(g, w, what)


def one_by_one(x: Tensor, weight: Tensor, offsets: Tensor, q: Any) -> Tensor:
    return grouped.one_by_one(x, weight, offsets, None, q.state, q.layer, q.groups)


def test_stochastic_gradients_are_parts_of_one_tensor(rng) -> None:
    """The words of a block are those of its place: among all experts' rows, and among all filled-up tokens."""
    recipe = TrainingRecipe(**{**vars(TransformerEngine().recipe()), "seed": 5})
    x, dy = torch.randn(40, K, generator=rng), torch.randn(40, N, generator=rng)
    layer = GroupedLinear(E, K, N, recipe=recipe)
    leaf = x.clone().requires_grad_()
    layer(leaf, OFFSETS).backward(dy)
    tokens = -(-(40 + 15 * E) // 16)  # blocks of 16 that there are along the tokens
    start = block = 0
    for e, end in enumerate(OFFSETS.tolist()):
        rows = dy[start:end]
        g = nvfp4.quantize(rows, recipe.gradients, rng=(5, 0), first_block=start * N // 16)
        w = nvfp4.quantize(layer.weight[e].detach(), recipe.weights)
        same_bits(leaf.grad[start:end], matmul(g, w, transposed=True), f"dx of {e}")
        whole = nn.functional.pad(rows, (0, 0, 0, -len(rows) % 16)).mT.contiguous()
        amax = nvfp4.quantize(whole, hb.NVFP4(hadamard=True)).amax
        parts = [
            nvfp4.quantize(whole[n], recipe.wgrad_gradients, amax=amax, rng=(5, 1), first_block=n * tokens + block)
            for n in range(N)
        ]
        gt = nvfp4.Encoded(*map(torch.stack, list(zip(*parts, strict=True))[:2]), parts[0].tensor_scale, amax)
        seen = nn.functional.pad(x[start:end], (0, 0, 0, -len(rows) % 16)).mT.contiguous()
        same_bits(layer.weight.grad[e], matmul(gt, nvfp4.quantize(seen, recipe.wgrad_activations)), f"dw of {e}")
        block += whole.shape[1] // 16
        start = end
    equal(layer.quantization.state.tolist(), [[5, 2], [5, 3]])


def matmul(a: Any, b: Any, transposed: bool = False) -> Tensor:
    a_values, b_values = (nvfp4.decode_without_tensor_scale(q.packed, q.block_scale).bfloat16() for q in (a, b))
    b_values = b_values.mT if transposed else b_values
    return ops.scaled_matmul(a_values, b_values, a.tensor_scale, b.tensor_scale, out_dtype=torch.float32)


@pytest.mark.parametrize("name", RECIPES)
def test_gradients_of_any_strides_and_sizes(rng, name: str) -> None:
    """torch's grouped matmul wants rows in 16 bytes; 20 columns have 40, and a gradient of ones has no strides."""
    quantized = RECIPES[name].backward == "quantized"
    layer = GroupedLinear(E, K, N if quantized else 20, dtype=torch.bfloat16, recipe=RECIPES[name])
    x = torch.randn(K, TOKENS, generator=rng).bfloat16().mT
    results = []
    for leaf in (x.detach().requires_grad_(), x.contiguous().requires_grad_()):
        layer.weight.grad = None
        y = layer(leaf, OFFSETS)
        y.sum().backward() if not results else y.backward(torch.ones_like(y))
        results.append((y.detach(), leaf.grad.contiguous(), layer.weight.grad))
    for got, wanted in zip(*results, strict=True):
        same_bits(got, wanted)
    nothing, layer.weight.grad = x[:0].detach().requires_grad_(), None
    layer(nothing, torch.zeros_like(OFFSETS)).sum().backward()
    equal((tuple(nothing.grad.shape), layer.weight.grad.count_nonzero().item()), ((0, K), 0))


def test_evaluation_and_autocast(rng) -> None:
    x = torch.randn(TOKENS, K, generator=rng)
    layer = GroupedLinear(E, K, N, recipe=LayerRecipe(evaluation="high_precision"))
    with torch.autocast("cpu", torch.bfloat16):
        same_bits(layer(x, OFFSETS).detach(), layer(x.bfloat16(), OFFSETS).detach())
        equal(layer.eval()(x, OFFSETS).dtype, torch.bfloat16)
    y, start = layer(x, OFFSETS).detach(), 0
    for expert, end in enumerate(OFFSETS.tolist()):
        same_bits(y[start:end], x[start:end] @ layer.weight[expert].detach().mT)
        start = end
    equal(y[start:], torch.zeros(TOKENS - start, N))


def test_an_outlier_of_one_expert_leaves_the_others_alone(rng) -> None:
    x = torch.randn(40, K, generator=rng)
    layer = GroupedLinear(E, K, N)
    before = layer(x, OFFSETS).detach()
    x[0, 0] = 1e4
    after = layer(x, OFFSETS).detach()
    same_bits(after[5:], before[5:])
    true(not torch.equal(after[1:5], before[1:5]), "its own tokens share its scale")


def test_main_grad(rng) -> None:
    x, dy = torch.randn(TOKENS, K, generator=rng), torch.randn(TOKENS, N, generator=rng)
    for name in ("quantized", "dequantized"):
        recipe = TrainingRecipe(**{**vars(RECIPES[name]), "main_grad": True})
        layer, plain = GroupedLinear(E, K, N, recipe=recipe), GroupedLinear(E, K, N, recipe=RECIPES[name])
        plain.load_state_dict(layer.state_dict())
        with pytest.raises(ShapeError, match="main_grad"):
            layer(x, OFFSETS)
        layer.weight.main_grad = torch.ones(E, N, K)
        layer(x, OFFSETS).backward(dy)
        equal(layer.weight.grad, None)
        plain(x, OFFSETS).backward(dy)
        close(layer.weight.main_grad, plain.weight.grad + 1, 1e-5 * (1 + plain.weight.grad.double().abs()))


class Model(nn.Module):
    """One of transformers' experts, where a checkpoint has them."""

    def __init__(self, rng: torch.Generator | None = None) -> None:
        super().__init__()
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        config = Qwen3MoeConfig(num_experts=E, hidden_size=K, moe_intermediate_size=N, num_hidden_layers=1)
        config._experts_implementation = "eager"
        experts = Qwen3MoeExperts(config)
        for parameter in experts.parameters():
            nn.init.normal_(parameter, std=0.2, generator=rng)
        self.model = nn.ModuleDict(
            {"layers": nn.ModuleList([nn.ModuleDict({"mlp": nn.ModuleDict({"experts": experts})})])}
        )
        self.config = config

    @property
    def experts(self) -> Any:
        return self.model.layers[0].mlp.experts

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x, chosen, weights)


def routed(rng: torch.Generator, tokens: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(tokens, K, generator=rng)
    chosen = torch.stack([torch.randperm(E, generator=rng)[:2] for _ in range(tokens)])
    return x, chosen, torch.rand(tokens, 2, generator=rng)


def by_hand(model: Model, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """One expert after the other, decoded operands."""
    experts, out = model.experts, torch.zeros_like(x)
    for expert in range(E):
        token, position = torch.where(chosen == expert)
        a = hb.fake_quantize(x[token], hb.NVFP4())
        h = experts._apply_gate(a @ hb.fake_quantize(experts.gate_up_proj[expert].detach(), SIX).mT)
        h = hb.fake_quantize(h, hb.NVFP4()) @ hb.fake_quantize(experts.down_proj[expert].detach(), SIX).mT
        out.index_add_(0, token, h * weights[token, position, None])
    return out


def test_transformers_experts(rng) -> None:
    model, inputs = Model(rng), routed(rng)
    plain = model(*inputs).detach()
    report = convert(model, TrainingRecipe(weights=SIX, evaluation="high_precision"))
    equal([layer.name for layer in report.converted], ["model.layers.0.mlp.experts"])
    close(model(*inputs), by_hand(model, *inputs), 1e-4, "by hand")
    x, chosen, weights = inputs
    beyond = chosen.clone()
    beyond[0] = E  # served by another rank
    equal(model(x, beyond, weights)[0].detach(), torch.zeros(K))
    close(model.eval()(*inputs), plain, 1e-4, "evaluation in high precision")
    model.train()
    equal(model.config._experts_implementation, "eager", "the model's config is not touched")
    revert(model)
    same_bits(model(*inputs).detach(), plain)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while tracing
@pytest.mark.parametrize("backward", ["dequantized", "quantized"])
def test_compiled(rng, backward: str) -> None:
    torch._dynamo.reset()
    model, inputs = Model(rng), routed(rng)
    recipe = TrainingRecipe(weights=SIX, backward="dequantized")
    if backward == "quantized":
        recipe = TransformerEngine(row_scaled_activation=True).recipe()
    convert(model, recipe)
    states = [module.quantization.state for module in model.modules() if hasattr(module, "quantization")]
    initial = [state.clone() for state in states]
    model.to(torch.bfloat16)
    inputs = tuple(t.bfloat16() if t.is_floating_point() else t for t in inputs)
    y = model(*inputs)
    y.sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for state, value in zip(states, initial, strict=True):
        state.copy_(value)
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs)
    out.sum().backward()
    same_bits(out, y)
    for got, wanted in zip(model.parameters(), grads, strict=True):
        same_bits(got.grad, wanted)


def test_refusals() -> None:
    model = Model()
    with pytest.raises(FormatError, match="the recipe tells them apart; select all or none"):
        convert(model, TrainingRecipe(policy=hb.Policy(ignore=("experts.2.down_proj",))))
    model.experts.has_bias = True
    with pytest.raises(FormatError, match="nothing to convert: experts other than gated ones"):
        convert(model, TrainingRecipe())
    with pytest.raises(ShapeError, match=r"offsets \(3,\); needs \(T, 64\) and \(4,\)"):
        GroupedLinear(E, K, N)(torch.ones(2, K), OFFSETS[:3])
    with pytest.raises(ShapeError, match=r"GroupedLinear\(4, 40, 32\): in_features=40"):
        GroupedLinear(E, 40, N)
    equal(LayerRecipe(), GroupedLinear(E, K, N).quantization.layer)
