"""Recipes from files: the built-in ones by name, others by path."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from ..errors import FormatError
from .document import parse, validated, with_overrides
from .schema import Recipe

_BUILTIN = Path(str(files("halfbyte"))) / "recipes"


def builtin_recipes() -> dict[str, Recipe]:
    """Name → recipe of all that ship with the package."""
    return {name: load_recipe(name) for name in _names()}


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by name, or by the path of a YAML file.

    overrides: changes such as "weights.scale_rule=search", applied before anything is checked.

    Raises:
        FormatError: there is none of that name, or it is wrong: with file, line, key and the nearest right one.
    """
    path = _path(name)
    documents = parse(recipe_text(name), name if path.parent != _BUILTIN else f"recipes/{path.name}")
    if len(documents) != 1:
        raise FormatError(f"{name}: has {len(documents)} YAML documents; a recipe is one")
    recipe = validated(with_overrides(documents[0], overrides), Recipe)
    recipe._name = name
    return recipe


def recipe_text(name: str) -> str:
    """The YAML of a recipe.

    Raises:
        FormatError: there is none of that name, or the file cannot be read.
    """
    try:
        return _path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{name}: cannot be read ({error})") from error


def _path(name: str) -> Path:
    if name in _names():
        return _BUILTIN / f"{name}.yaml"
    if Path(name).suffix in (".yaml", ".yml"):
        if not Path(name).is_file():
            raise FormatError(f"recipe {name}: no such file")
        return Path(name)
    close = difflib.get_close_matches(name, _names(), n=1, cutoff=0.5)
    remedy = (
        f"did you mean {close[0]}?" if close else f"built in are {', '.join(_names())}; a file's name ends in .yaml"
    )
    raise FormatError(f"recipe {name}: not found; {remedy}")


def _names() -> list[str]:
    return sorted(path.stem for path in _BUILTIN.glob("*.yaml"))
