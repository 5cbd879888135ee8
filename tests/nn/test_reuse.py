"""reuse_weights: a weight is quantized once until it changes, whoever changes it."""

import copy

import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte.nn import convert
from halfbyte.recipe import TrainingRecipe

from ..check import equal, same_bits, true
from .test_convert import small
from .test_linear import RECIPES, M, N, data, layer_of, run


def test_reused_weights(rng, monkeypatch) -> None:
    x, w, bias, dy = data(rng, torch.bfloat16)
    calls: list[int] = []
    quantize = hb.nn.linear.quantize_weight
    monkeypatch.setattr(hb.nn.linear, "quantize_weight", lambda *a: calls.append(1) or quantize(*a))
    for name in ("quantized", "dequantized", "high_precision"):
        calls.clear()
        reusing, plain = layer_of(RECIPES[name], w, bias, reuse_weights=True), layer_of(RECIPES[name], w, bias)
        optimizer = torch.optim.SGD(reusing.parameters(), lr=0.5)
        for step in range(2):
            plain.quantization.state.copy_(reusing.quantization.state)
            for _ in range(3):
                for got, wanted in zip(run(reusing, x, dy), run(plain, x, dy), strict=True):
                    same_bits(got, wanted)
            equal(len(calls), 4 * (step + 1), "one for the step, and three of the layer without reuse")
            optimizer.step()
            plain.load_state_dict(reusing.state_dict())
        reusing.weight = nn.Parameter(torch.zeros_like(w))
        equal(reusing(x).detach(), reusing.bias.detach().expand(M, N).contiguous(), "another parameter")


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_has_stepped(rng, optimizer: type[torch.optim.Optimizer], fused: bool) -> None:
    """Fused ones, which transformers' Trainer takes by default, leave a parameter's version as it was."""
    x, w, bias, dy = data(rng, torch.float32)
    layer = layer_of(RECIPES["dequantized"], w, bias, reuse_weights=True)
    steps = optimizer(layer.parameters(), lr=0.1, fused=fused)
    for _ in range(3):
        before = run(layer, x, dy)[0]
        steps.step()
        plain = layer_of(RECIPES["dequantized"], layer.weight, layer.bias)
        for got, wanted in zip(run(layer, x, dy), run(plain, x, dy), strict=True):
            same_bits(got, wanted)
        true(not torch.equal(layer(x), before), "nothing was learnt")


def test_a_partner_is_another() -> None:
    model = small()
    convert(model, TrainingRecipe(reuse_weights=True))
    mlp, x = model.layers[0].mlp, torch.ones(2, 32)
    for size in (3.0, 9.0):  # two parameters of one version
        mlp.gate_proj.weight = nn.Parameter(torch.full((48, 32), size))
        mlp.up_proj(x)
        equal(float(mlp.up_proj.quantized_weight().amax), size)


def test_the_same_parameter_is_put_in_again(rng) -> None:
    """As FSDP does once it has gathered its data anew, which is no new version of it."""
    x, w, bias, _ = data(rng, torch.float32)
    layer = layer_of(RECIPES["dequantized"], w, bias, reuse_weights=True)
    layer(x)
    layer.weight.data.mul_(3)
    layer.weight = layer.weight
    same_bits(layer(x).detach(), layer_of(RECIPES["dequantized"], 3 * w, bias)(x).detach())


def test_a_copy_keeps_nothing(rng) -> None:
    """Its parameters count their versions from 0: at the original's count they would seem to be the same."""
    x, w, bias, _ = data(rng, torch.float32)
    layer = layer_of(RECIPES["dequantized"], w, bias, reuse_weights=True)
    layer(x)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        while twin.weight._version < layer.weight._version:
            twin.weight.mul_(3)
    same_bits(twin(x).detach(), layer_of(RECIPES["dequantized"], twin.weight, bias)(x).detach())


@pytest.mark.parametrize("name", ["quantized", "dequantized", "high_precision"])
def test_trained_with_what_an_evaluation_kept(rng, name: str) -> None:
    x, w, bias, dy = data(rng, torch.bfloat16)
    layer, plain = (layer_of(RECIPES[name], w, bias, reuse_weights=reuse) for reuse in (True, False))
    with torch.inference_mode():
        layer(x)
    for got, wanted in zip(run(layer, x, dy), run(plain, x, dy), strict=True):
        same_bits(got, wanted)
