"""The list of recipes."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from ..recipe import Recipe
from .console import formats_name


def print_recipes(console: Console, recipes: Mapping[str, Recipe]) -> None:
    """Two paragraphs for each: its name, which is what a user types, and what it does."""
    for name, recipe in recipes.items():
        command = "calibrate: needs data" if recipe.needs_data else "convert"
        console.print(Text.assemble((name, "bold"), (f"  {command}", "dim")))
        only = f"{recipe.policy.only} only" if recipe.policy.only != "all" else ""
        activations = f"activations {recipe.activations}" if recipe.activations != "none" else ""
        kv_cache = f"KV cache {recipe.kv_cache}" if recipe.kv_cache != "none" else ""
        facts = "; ".join(filter(None, (formats_name(recipe.options()), only, activations, kv_cache)))
        console.print(Padding(Text(f"{recipe.description.strip()}\n{facts}"), (0, 0, 0, 4), expand=False))
    console.print("Next: halfbyte convert|calibrate MODEL OUT_DIR --recipe NAME [--set a.b=c].")
