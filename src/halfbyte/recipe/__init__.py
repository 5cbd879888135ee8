"""Recipes. Of PTQ: YAML that is checked when it is read. Of training: frozen values that are checked when built."""

from .load import builtin_recipes, load_recipe, recipe_text
from .megatron import read_precision_config
from .schema import Algorithm, Observer, Recipe, WeightOverride, Weights
from .training import LayerOverride, LayerRecipe, TrainingRecipe
from .transformer_engine import TransformerEngine

__all__ = [
    "Algorithm",
    "LayerOverride",
    "LayerRecipe",
    "Observer",
    "Recipe",
    "TrainingRecipe",
    "TransformerEngine",
    "WeightOverride",
    "Weights",
    "builtin_recipes",
    "load_recipe",
    "read_precision_config",
    "recipe_text",
]
