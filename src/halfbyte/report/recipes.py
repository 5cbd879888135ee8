"""The table of recipes."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from ..recipe import Recipe
from .console import formats_name


def print_recipes(console: Console, recipes: Mapping[str, Recipe]) -> None:
    """One row for each."""
    table = Table("recipe", "weights", "activations", "KV cache", "needs data", "what it is")
    for name, recipe in recipes.items():
        what = recipe.policy.only if recipe.policy.only != "all" else ""
        weights = " ".join(filter(None, (what, formats_name(recipe.options()))))
        needs = "yes" if recipe.needs_data else ""
        activations, kv_cache = (value if value != "none" else "" for value in (recipe.activations, recipe.kv_cache))
        table.add_row(name, weights, activations, kv_cache, needs, recipe.description)
    console.print(table)
    console.print("halfbyte convert MODEL OUT_DIR --recipe NAME [--set a.b=c]; with data: halfbyte calibrate")
