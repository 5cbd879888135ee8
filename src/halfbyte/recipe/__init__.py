"""PTQ recipes: what is quantized to what, and how, as YAML that is checked when it is read."""

from .load import builtin_recipes, load_recipe, recipe_text
from .schema import Algorithm, Observer, Recipe, WeightOverride, Weights

__all__ = [
    "Algorithm",
    "Observer",
    "Recipe",
    "WeightOverride",
    "Weights",
    "builtin_recipes",
    "load_recipe",
    "recipe_text",
]
