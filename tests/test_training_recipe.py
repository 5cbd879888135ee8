"""Training recipes: what is refused when one is built, and what others' settings become."""

from pathlib import Path

import pytest
import torch

import halfbyte as hb
from halfbyte import names
from halfbyte.errors import FormatError
from halfbyte.recipe import LayerOverride, LayerRecipe, TrainingRecipe, TransformerEngine, read_precision_config

from .check import equal, true

NV, ROW, SQUARE, MX = hb.NVFP4(), hb.NVFP4(scaling="row"), hb.NVFP4(block=(16, 16)), hb.MXFP8()
STOCHASTIC, SIX = hb.NVFP4(rounding="stochastic"), hb.NVFP4(scale_rule="four_over_six")

ILLEGAL = {
    "nothing is quantized": ({"activations": None, "weights": None}, "quantizes nothing"),
    "an unknown backward": ({"backward": "bf16"}, "backward='bf16': choose one of"),
    "an unknown evaluation": ({"evaluation": None}, "evaluation=None"),
    "a format that is none": ({"weights": "nvfp4"}, "weights='nvfp4': needs"),
    "gradients that nobody quantizes": ({"gradients": STOCHASTIC}, "backward='high_precision', which quantizes no"),
    "a transform of nothing": ({"hadamard": True, "backward": "dequantized"}, "whose wgrad is not quantized"),
    "no gradients": ({"backward": "quantized"}, "gradients=None with backward='quantized'"),
    "no weights": ({"backward": "quantized", "gradients": NV, "weights": None}, "weights=None with"),
    "MXFP8 with a transform": ({"backward": "quantized", "gradients": MX, "hadamard": True}, "MXFP8 has no transform"),
    "a transformed operand": ({"activations": hb.NVFP4(hadamard=True)}, "use the recipe's hadamard=True"),
    "stochastic activations": ({"activations": STOCHASTIC}, "only gradients are rounded stochastically"),
    "stochastic weights": ({"weights": STOCHASTIC}, "only gradients are rounded stochastically"),
    "4over6 gradients": ({"backward": "quantized", "gradients": SIX}, "4over6 is for weights and activations"),
    "Hessians": ({"weights": hb.NVFP4(scale_rule="search", error="hessian")}, "training has no Hessians"),
    "a hadamard that is no bool": ({"hadamard": 1}, "hadamard=1"),
    "a main_grad that is none": ({"main_grad": torch.zeros(1)}, "needs True or False"),
    "a reuse that is no bool": ({"reuse_weights": "no"}, "reuse_weights='no'"),
    "a sharing that is no bool": ({"share_fused_scales": None}, "share_fused_scales=None"),
    "a seed of 65 bits": ({"seed": 2**64}, "seed="),
    "a policy that is none": ({"policy": "all"}, "policy='all'"),
    "an override that is none": ({"overrides": (NV,)}, "is not a LayerOverride"),
}


@pytest.mark.parametrize("name", ILLEGAL)
def test_illegal_combinations_raise_when_built(name: str) -> None:
    values, message = ILLEGAL[name]
    with pytest.raises(FormatError) as error:
        TrainingRecipe(**values)
    true(message in str(error.value), str(error.value))


LEGAL = {
    "defaults": {},
    "weights only": {"activations": None},
    "activations only": {"weights": None, "backward": "dequantized"},
    "mixed formats": {"activations": MX, "weights": NV},
    "row-scaled, quantized": {"activations": ROW, "gradients": ROW, "backward": "quantized", "hadamard": True},
    "4over6, transformed": {
        "activations": SIX,
        "weights": SIX,
        "gradients": NV,
        "backward": "quantized",
        "hadamard": True,
    },
    "MXFP8": {"activations": MX, "weights": MX, "gradients": MX, "backward": "quantized"},
    "searched": {"weights": hb.NVFP4(block=(16, 16), scale_rule="search")},
}


@pytest.mark.parametrize("name", LEGAL)
def test_legal_combinations(name: str) -> None:
    recipe = TrainingRecipe(**LEGAL[name])
    equal(type(recipe.to_layer()), LayerRecipe)
    equal(recipe.to_layer().to_layer(), recipe.to_layer())


def test_operands_of_wgrad() -> None:
    layer = LayerRecipe(ROW, NV, hb.NVFP4(scaling="row", rounding="stochastic"), True, "quantized")
    equal(layer.wgrad_activations, hb.NVFP4(hadamard=True))
    equal(layer.wgrad_gradients, hb.NVFP4(hadamard=True, rounding="stochastic"))
    equal((layer.stochastic, layer.token_block), (True, 16))
    equal(LayerRecipe(MX, MX, NV, backward="quantized").token_block, 32)


def test_defaults_are_transformer_engines() -> None:
    equal(
        TransformerEngine(),
        TransformerEngine(False, False, False, False, "none", "all", "mae", "exact", None),
    )
    wanted = TrainingRecipe(NV, SQUARE, STOCHASTIC, True, "quantized")
    equal(TransformerEngine().recipe(), wanted)
    equal(TransformerEngine.from_env({}), wanted)
    equal(TransformerEngine.from_env({"PATH": "/", "NVTE_DEBUG": "1"}), wanted)


@pytest.mark.parametrize("scope", ["none", "weights", "activations", "all"])
@pytest.mark.parametrize("use_256", ["none", "weights", "activations", "all"])
def test_scopes(scope: str, use_256: str) -> None:
    environ = {
        "NVTE_NVFP4_4OVER6": scope,
        "NVTE_NVFP4_4OVER6_E4M3_USE_256": use_256,
        "NVTE_NVFP4_4OVER6_ERR_MODE": "mse",
        "NVTE_NVFP4_ROW_SCALED_ACTIVATION": "1",
    }
    recipe = TransformerEngine.from_env(environ)
    for operand, plain in (("weights", SQUARE), ("activations", ROW)):
        e4m3_max = 256 if use_256 in (operand, "all") else 448
        chosen = hb.NVFP4(plain.block, plain.scaling, "four_over_six", error="mse", e4m3_max=e4m3_max)
        equal(getattr(recipe, operand), chosen if scope in (operand, "all") else plain, operand)
    equal(recipe.gradients, STOCHASTIC)


def test_switches() -> None:
    names = ("RHT", "STOCHASTIC_ROUNDING", "2D_QUANTIZATION")
    off = {f"NVTE_NVFP4_DISABLE_{name}": "1" for name in names}
    equal(TransformerEngine.from_env(off), TrainingRecipe(NV, NV, NV, False, "quantized"))
    equal(TransformerEngine.from_env(dict.fromkeys(off, "0")), TransformerEngine().recipe())
    six = {"NVTE_NVFP4_4OVER6": "weights", "NVTE_NVFP4_4OVER6_ERR_USE_FAST_MATH": "1", "NVTE_USE_FAST_MATH": "0"}
    weights = hb.NVFP4((16, 16), scale_rule="four_over_six", error_arithmetic="fp16")
    equal(TransformerEngine.from_env(six).weights, weights)
    for backward in ("high_precision", "dequantized"):
        got = TransformerEngine.from_env({**off, "NVTE_BACKWARD_OVERRIDE": backward})
        equal(got, TrainingRecipe(backward=backward))


BAD_VARIABLES = {
    "NVTE_NVFP4_DISABLE_RTH": ("1", "NVTE_NVFP4_DISABLE_RTH: unknown; known are"),
    "NVTE_NVFP4_DISABLE_RHT": ("true", "choose one of 0, 1"),
    "NVTE_NVFP4_4OVER6": ("both", "choose one of none, weights, activations, all"),
    "NVTE_NVFP4_4OVER6_E4M3_USE_256": ("1", "choose one of none"),
    "NVTE_NVFP4_4OVER6_ERR_MODE": ("L2", "choose one of MAE, MSE"),
    "NVTE_BACKWARD_OVERRIDE": ("bf16", "choose one of high_precision, dequantized"),
    "NVTE_USE_FAST_MATH": ("1", "NVTE_NVFP4_4OVER6_ERR_USE_FAST_MATH=1"),
}


@pytest.mark.parametrize("name", BAD_VARIABLES)
def test_bad_variables(name: str) -> None:
    value, message = BAD_VARIABLES[name]
    with pytest.raises(FormatError) as error:
        TransformerEngine.from_env({name: value})
    true(name in str(error.value) and message in str(error.value), str(error.value))


def test_bad_options() -> None:
    with pytest.raises(FormatError, match="four_over_six='both': choose one of"):
        TransformerEngine(four_over_six="both")


def test_overrides() -> None:
    layer = LayerRecipe(MX, MX)
    recipe = TrainingRecipe(
        overrides=(
            LayerOverride(None, match=("layers.0",)),
            LayerOverride(layer, kinds=("attention",)),
            LayerOverride(layer, megatron=("*.mlp.experts.linear_fc2",)),
        )
    )

    def chosen(name: str) -> LayerRecipe | None:
        return recipe.layer(names.parse(name))

    equal(chosen("model.layers.0.self_attn.q_proj.weight"), None)
    equal(chosen("model.layers.1.self_attn.q_proj.weight"), layer)
    equal(chosen("model.layers.1.mlp.experts.3.down_proj.weight"), layer)
    equal(chosen("model.layers.1.mlp.experts.3.gate_proj.weight"), recipe.to_layer())
    for values, message in (({}, "selects nothing"), ({"match": "q_proj"}, "needs a tuple")):
        with pytest.raises(FormatError, match=message):
            LayerOverride(layer, **values)


def test_options_of_a_checkpoint() -> None:
    recipe = TrainingRecipe(
        weights=SIX,
        policy=hb.Policy(ignore=("q_proj",)),
        overrides=(LayerOverride(None, ("layers.0",)), LayerOverride(LayerRecipe(MX, MX), ("o_proj",))),
    )
    options = recipe.options("compressed-tensors")
    equal((options.format, options.policy.ignore), (SIX, ("q_proj", "layers.0")))
    equal([(o.format, o.match) for o in options.overrides], [(MX, ("o_proj",))])
    with pytest.raises(FormatError, match="quantizes no weights"):
        TrainingRecipe(weights=None).options()
    with pytest.raises(FormatError, match="exclusions are patterns"):
        TrainingRecipe(overrides=(LayerOverride(None, megatron=("*",)),)).options()


PRECISION = """
configs:
  nvfp4: {transformer_engine_config_type: TEQuantizationParams, training_recipe: {fp4_quantization_recipe: nvfp4}}
  mxfp8:
    transformer_engine_config_type: TEQuantizationParams
    training_recipe: {fp8_quantization_recipe: mxfp8}
    evaluation_recipe: {}
  bf16: {transformer_engine_config_type: TEQuantizationParams, training_recipe: {}}
matchers:
  off: {type: glob, enabled: false, pattern: "*", config: bf16}
  qkv: {type: glob, enabled: true, pattern: "*.linear_qkv", config: bf16}
  first: {type: glob, enabled: true, pattern: "*layers.0.*", config: mxfp8}
  experts: {type: glob, enabled: true, pattern: "*.mlp.experts.*", config: nvfp4}
"""


def test_megatrons_precision_config(tmp_path: Path) -> None:
    file = tmp_path / "precision.yaml"
    file.write_text(PRECISION)
    default = TransformerEngine().recipe()
    recipe = read_precision_config(file, default)
    mxfp8 = LayerRecipe(MX, MX, MX, backward="quantized", evaluation="high_precision")
    for name, wanted in (
        ("model.layers.0.self_attn.k_proj.weight", None),
        ("model.layers.0.self_attn.o_proj.weight", mxfp8),
        ("model.layers.1.self_attn.o_proj.weight", default.to_layer()),
        ("model.layers.0.mlp.experts.1.up_proj.weight", mxfp8),
        ("model.layers.1.mlp.experts.1.up_proj.weight", default.to_layer()),
    ):
        equal(recipe.layer(names.parse(name)), wanted, name)
    equal(recipe.policy, default.policy)


def test_a_precision_config_keeps_the_rest_of_the_default(tmp_path: Path) -> None:
    file = tmp_path / "precision.yaml"
    file.write_text(PRECISION)
    name = names.parse("model.layers.0.self_attn.o_proj.weight")
    mxfp8 = LayerRecipe(MX, MX, evaluation="high_precision", batch_invariant=True)
    equal(read_precision_config(file, TrainingRecipe(ROW, batch_invariant=True)).layer(name), mxfp8)
    with pytest.raises(FormatError, match="means the default recipe's formats, none of which is NVFP4"):
        read_precision_config(file, TrainingRecipe(MX, MX))


BAD_CONFIGS = {
    "an unknown matcher type": (
        'type: glob, enabled: true, pattern: "*.linear_qkv"',
        "type: regex, enabled: true, pattern: x",
        "11: matchers.qkv.type: 'regex'",
    ),
    "an unknown config": ("config: mxfp8", "config: fp8", "12: matchers.first.config: 'fp8' is none of"),
    "no pattern": ('pattern: "*.linear_qkv", ', "", "11: matchers.qkv: needs a pattern"),
    "another fp8": (
        "fp8_quantization_recipe: mxfp8",
        "fp8_quantization_recipe: blockwise",
        "'blockwise': halfbyte has",
    ),
    "an unknown key": ("fp4_quantization_recipe", "fp4_recipe", "unknown; known are"),
    "both": (
        "{fp4_quantization_recipe: nvfp4}",
        "{fp4_quantization_recipe: nvfp4, fp8_quantization_recipe: mxfp8}",
        "remove one",
    ),
    "another type": (
        "TEQuantizationParams, training_recipe: {}",
        "Other, training_recipe: {}",
        "needs 'TEQuantizationParams'",
    ),
    "no training recipe": (", training_recipe: {}}", "}", "needs a training_recipe"),
    "what cannot be said": (
        "training_recipe: {}",
        "training_recipe: {override_nonquantized_autocast: true}",
        "no equal here",
    ),
    "another evaluation": (
        "evaluation_recipe: {}",
        "evaluation_recipe: {fp4_quantization_recipe: nvfp4}",
        "must be the training",
    ),
    "no mapping": ("configs:\n", "configs: 3\nmatchers_:\n", "unknown; known are"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_precision_configs(tmp_path: Path, name: str) -> None:
    old, new, message = BAD_CONFIGS[name]
    file = tmp_path / "precision.yaml"
    true(old in PRECISION, old)
    file.write_text(PRECISION.replace(old, new))
    with pytest.raises(FormatError) as error:
        read_precision_config(file, TransformerEngine().recipe())
    true(message in str(error.value) and "precision.yaml:" in str(error.value), str(error.value))


def test_no_precision_config(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        read_precision_config(tmp_path / "none.yaml", TrainingRecipe())
