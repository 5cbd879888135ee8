"""ModelOpt's YAML with its `imports:` and `$import` resolved, every mapping knowing where it stands."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ..errors import FormatError
from .document import Document, Key, parse

IMPORT = "$import"
PACKAGE = "modelopt_recipes"  # part of nvidia-modelopt: where imports are looked for if not beside the file


class Placed(dict[Any, Any]):
    """A mapping that knows its file and line."""

    place = ""

    def error(self, message: str) -> FormatError:
        """An error about it."""
        return FormatError(f"{self.place}: {message}")


def read(path: Path, chain: tuple[Path, ...] = ()) -> Any:
    """The content of a file: mappings as `Placed`, lists as lists.

    Raises:
        FormatError: not YAML, or an import is not found, not declared, or leads back to itself.
    """
    if path.resolve() in chain:
        raise FormatError(f"{path}: imports itself by way of {chain[-1]}")
    try:
        documents = parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: cannot be read ({error})") from error
    if not 1 <= len(documents) <= 2 or not isinstance(documents[0].data, dict | list):
        raise FormatError(f"{path}: must be a mapping, or its imports and a list")
    head, body = documents[0], documents[-1]
    declared = head.data.get("imports") or {} if isinstance(head.data, dict) else {}
    if not isinstance(declared, dict):
        raise head.error(("imports",), "must be a mapping of names to files")
    imported: dict[str, Any] = {}
    for name, target in declared.items():
        found = _find(str(target), path)
        if found is None:
            raise head.error(("imports", name), f"{target}: no such file beside this one; pip install nvidia-modelopt")
        imported[name] = read(found, (*chain, path.resolve()))
    return _resolved(body.data, (), body, imported)


def _find(target: str, path: Path) -> Path | None:
    """An imported file: relative to a folder that holds this one, or in ModelOpt's own library."""
    roots = list(path.resolve().parents)
    package = importlib.util.find_spec(PACKAGE)
    roots += [Path(package.origin).parent] if package is not None and package.origin else []
    names = [target] if target.endswith((".yaml", ".yml")) else [f"{target}.yaml", f"{target}.yml"]
    return next((root / name for root in roots for name in names if (root / name).is_file()), None)


def _resolved(value: Any, key: Key, document: Document, imported: dict[str, Any]) -> Any:
    if isinstance(value, list):
        items: list[Any] = []
        for i, item in enumerate(value):
            found = _resolved(item, (*key, i), document, imported)
            whole = isinstance(item, dict) and item.keys() == {IMPORT}
            items += found if whole and isinstance(found, list) else [found]
        return items
    if not isinstance(value, dict):
        return value
    merged = Placed()
    merged.place = f"{document.name}:{document.lines.get(key, 1)}"
    wanted = value.get(IMPORT, [])
    for name in wanted if isinstance(wanted, list) else [wanted]:
        if name not in imported:
            raise document.error((*key, IMPORT), f"{name} is not among the imports: {', '.join(imported) or 'none'}")
        if isinstance(imported[name], list):
            if value.keys() != {IMPORT}:
                raise document.error((*key, IMPORT), f"{name} is a list; keys beside it have no meaning")
            return imported[name]
        merged.update(imported[name])
        if value.keys() == {IMPORT} and not isinstance(wanted, list):
            merged.place = imported[name].place
    for part, inner in value.items():
        if part != IMPORT and not (key == () and part == "imports"):
            merged[part] = _resolved(inner, (*key, str(part)), document, imported)
    return merged
