"""convert and revert on the shipped model and on small ones; what is exported is what was trained with."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import halfbyte as hb
from halfbyte.demo import DATA
from halfbyte.errors import CheckpointError, FormatError
from halfbyte.nn import Linear, convert, revert
from halfbyte.nn.linear import weight_amax
from halfbyte.recipe import LayerOverride, LayerRecipe, TrainingRecipe, TransformerEngine
from halfbyte.runtime import save_quantized

from ..check import equal, same_bits, true

SIX = hb.NVFP4(scale_rule="four_over_six")


@pytest.fixture(scope="module")
def tiny() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(DATA / "tiny", dtype=torch.float32)


def ids(rng: torch.Generator) -> Tensor:
    return torch.randint(3, 768, (2, 24), generator=rng)


def small() -> nn.Module:
    """Two layers of attention and MLP, by name; one projection is too narrow for blocks."""

    def layer() -> nn.Module:
        attention = nn.ModuleDict({f"{p}_proj": nn.Linear(32, 32) for p in "qkvo"})
        mlp = nn.ModuleDict({"gate_proj": nn.Linear(32, 48), "up_proj": nn.Linear(32, 48), "odd": nn.Linear(24, 16)})
        return nn.ModuleDict({"self_attn": attention, "mlp": mlp})

    return nn.ModuleDict({"layers": nn.ModuleList([layer(), layer()]), "lm_head": nn.Linear(32, 64)})


@pytest.mark.parametrize("backward", ["high_precision", "dequantized", "quantized"])
def test_round_trip_of_the_shipped_model(rng, tiny: Any, backward: str) -> None:
    recipe = TrainingRecipe(weights=SIX, backward=backward) if backward != "quantized" else TransformerEngine().recipe()
    batch = ids(rng)
    modules, state = dict(tiny.named_modules()), copy.deepcopy(tiny.state_dict())
    parameters = dict(tiny.named_parameters())
    before = tiny(batch, labels=batch)
    report = convert(tiny, recipe)
    try:
        equal(
            (len(report.converted), [(layer.name, layer.reason) for layer in report.left]),
            (27, [("lm_head", "lm_head")]),
        )
        equal(list(tiny.state_dict()), list(state))
        true(all(parameters[name] is p for name, p in tiny.named_parameters()), "parameters stay themselves")
        true(all(modules[name] is m for name, m in tiny.named_modules()), "modules stay themselves")
        loss = tiny(batch, labels=batch).loss
        true(1e-4 < abs(loss.item() - before.loss.item()) < 0.5, f"{before.loss} became {loss}")
        loss.backward()
        for name, parameter in parameters.items():
            true(parameter.grad is not None and bool(parameter.grad.isfinite().all()), name)
        tiny.zero_grad()
        with pytest.raises(FormatError, match="converted already; call revert"):
            convert(tiny, recipe)
    finally:
        equal(revert(tiny), 27)
    same_bits(tiny(batch, labels=batch).logits, before.logits)
    for name, tensor in tiny.state_dict().items():
        same_bits(tensor, state[name], name)
    true(not any("quantization" in vars(m) or type(m) is Linear for m in tiny.modules()), "nothing is left behind")
    with pytest.raises(FormatError, match="nothing to revert"):
        revert(tiny)


def test_plan_and_reasons() -> None:
    model = small()
    other = LayerRecipe(hb.MXFP8(), hb.MXFP8())
    recipe = TrainingRecipe(
        policy=hb.Policy(ignore=("layers.0.self_attn",)),
        overrides=(LayerOverride(None, match=("k_proj",)), LayerOverride(other, kinds=("attention",))),
    )
    model.layers[1].self_attn.q_proj.forward = lambda x: x
    report = convert(model, recipe)
    left = {layer.name: layer.reason for layer in report.left}
    equal(
        left,
        {
            **{f"layers.0.self_attn.{p}_proj": "--ignore layers.0.self_attn" for p in "qkvo"},
            "layers.0.mlp.odd": "in_features=24 is not divisible by 16",
            "layers.1.mlp.odd": "in_features=24 is not divisible by 16",
            "layers.1.self_attn.q_proj": "something has replaced its forward",
            "layers.1.self_attn.k_proj": "an override leaves it in high precision",
            "lm_head": "lm_head",
        },
    )
    recipes = {layer.name: layer.recipe for layer in report.converted}
    equal(recipes["layers.1.self_attn.v_proj"], other)
    equal(recipes["layers.0.mlp.gate_proj"], recipe.to_layer())
    equal(type(model.layers[0].mlp.gate_proj), Linear)
    equal(type(model.layers[1].self_attn.k_proj), nn.Linear)


def test_first_and_last_layers() -> None:
    model = small()
    report = convert(model, TrainingRecipe(policy=hb.Policy(num_layers_at_end_in_bf16=1)))
    true(all("layers.0." in layer.name for layer in report.converted), str(report.converted))
    equal(len(report.converted), 6)


def test_every_module_has_random_words_of_its_own() -> None:
    seeds = []
    for seed in (0, 0, 1):
        model = small()
        convert(model, TransformerEngine().recipe().__class__(**{**vars(TransformerEngine().recipe()), "seed": seed}))
        seeds.append([m.quantization.state[0, 0].item() for m in model.modules() if isinstance(m, Linear)])
    equal(seeds[0], seeds[1])
    equal(len(set(seeds[0] + seeds[2])), 2 * len(seeds[0]))


def test_errors_change_nothing() -> None:
    model = small()
    for recipe, message in (
        (TrainingRecipe(policy=hb.Policy(only="experts")), "nothing to convert: .*--only experts"),
        (TrainingRecipe(policy=hb.Policy(ignore=("q_prj",))), "--ignore q_prj: matches no layer"),
        ("nvfp4", "needs a TrainingRecipe"),
    ):
        with pytest.raises(FormatError, match=message):
            convert(model, recipe)
    with pytest.raises(FormatError, match=r"model is Parameter; needs a torch\.nn\.Module"):
        convert(nn.Linear(16, 16).weight, TrainingRecipe())
    with pytest.raises(FormatError, match="the model has no Linear layer"):
        convert(nn.LayerNorm(4), TrainingRecipe())
    equal({type(m) for m in model.modules() if isinstance(m, nn.Linear)}, {nn.Linear})


def test_fused_layers_share_a_scale() -> None:
    model = small()
    mlp = model.layers[0].mlp
    with torch.no_grad():
        mlp.gate_proj.weight[0, 0] = 9.0
        mlp.up_proj.weight[0, 0] = -5.0
        model.layers[1].mlp.up_proj.weight[0, 0] = -7.0  # not the first of the group
    convert(model, TrainingRecipe())
    equal([float(weight_amax(mlp[name])) for name in ("gate_proj", "up_proj")], [9.0, 9.0])
    equal([float(weight_amax(model.layers[1].mlp[name])) for name in ("gate_proj", "up_proj")], [7.0, 7.0])
    equal(weight_amax(model.layers[0].self_attn.o_proj), None)
    amax = torch.tensor(9.0)
    q = hb.quantize(mlp.up_proj.weight.detach(), hb.NVFP4(), amax=amax)
    operand = mlp.up_proj.quantized_weight().operand
    same_bits(operand.values, q.dequantize(torch.bfloat16, unscaled=True))
    same_bits(operand.scale, q.tensor_scale)
    apart = LayerOverride(LayerRecipe(weights=SIX), match=("gate_proj",))
    for recipe in (
        TrainingRecipe(share_fused_scales=False),
        TrainingRecipe(weights=hb.NVFP4(scaling="row")),
        TrainingRecipe(overrides=(apart,)),
    ):
        revert(model)
        convert(model, recipe)
        equal(
            weight_amax(mlp.up_proj), None, "each row has a scale of its own, or each tensor, or the other format has"
        )


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_an_exported_model_decodes_to_what_was_trained_with(rng, tiny: Any, tmp_path: Path, layout: str) -> None:
    model = copy.deepcopy(tiny).to(torch.bfloat16)
    recipe = TrainingRecipe(activations=None, weights=SIX, policy=hb.Policy(num_layers_at_start_in_bf16=1))
    convert(model, recipe)
    batch = ids(rng)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    model(batch, labels=batch).loss.backward()
    optimizer.step()
    report = save_quantized(model, DATA / "tiny", tmp_path / "out", recipe.options(layout))
    equal(len(report.weights), 4 * (4 + 3 * 8))
    equal(type(model.model.layers[1].self_attn.q_proj), Linear, "the model stays converted")
    loaded = dict(hb.load(tmp_path / "out", activations="none").named_parameters())
    for layer in (1, 4):
        for name in ("q_proj", "k_proj", "o_proj"):
            module = getattr(model.model.layers[layer].self_attn, name)
            q = hb.quantize(module.weight.detach(), SIX, amax=weight_amax(module))
            same_bits(module.quantized_weight().operand.values, q.dequantize(torch.bfloat16, unscaled=True))
            same_bits(loaded[f"model.layers.{layer}.self_attn.{name}.weight"].detach(), q.dequantize(torch.bfloat16))
        experts = model.model.layers[layer].mlp.experts
        for name in ("gate_up_proj", "down_proj"):
            wanted = hb.fake_quantize(getattr(experts, name).detach(), SIX, per_matrix=True)
            same_bits(loaded[f"model.layers.{layer}.mlp.experts.{name}"].detach(), wanted, name)
    revert(model)
    true((tmp_path / "out" / "tokenizer.json").is_file(), "companions")


def test_export_errors(tiny: Any, tmp_path: Path) -> None:
    options = TrainingRecipe().options()
    with pytest.raises(CheckpointError, match="no such directory; give the one"):
        save_quantized(tiny, tmp_path / "none", tmp_path / "out", options)
    with pytest.raises(CheckpointError, match="has no save_pretrained"):
        save_quantized(nn.Linear(2, 2), DATA / "tiny", tmp_path / "out", options)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="already exists"):
        save_quantized(tiny, DATA / "tiny", tmp_path / "out", options)
    equal([p.name for p in tmp_path.iterdir()], ["out"])


def test_configs_that_nest_their_text_model() -> None:
    model = small()
    model.config = SimpleNamespace(text_config=SimpleNamespace(num_hidden_layers=1))
    report = convert(model, TrainingRecipe())
    reasons = {layer.reason for layer in report.left if "layers.1." in layer.name}
    equal(reasons, {"multi-token prediction layer"}, "the config has one layer")
