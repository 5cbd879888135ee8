"""YAML that knows its lines: a file as plain values, and the place of every key for the errors about it."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ..errors import FormatError

Key = tuple[str | int, ...]  # of a value: ("overrides", 0, "kinds")
Section = TypeVar("Section", bound=BaseModel)


@dataclass(frozen=True)
class Document:
    """One YAML document.

    Attributes:
        name: of the file, as errors name it.
        data: its values.
        lines: line of each key and list item.
        text: as it stands in the file; empty where it was made from another.
        given: keys that `--set` changed, with the option as it was written.
    """

    name: str
    data: Any
    lines: dict[Key, int]
    text: str = ""
    given: dict[Key, str] = field(default_factory=dict)

    def error(self, key: Key, message: str) -> FormatError:
        """An error that names the file, the line and the key, or the `--set` option that brought it."""
        return FormatError(f"{self._place(key)}: {dotted(key)}: {message}" if key else f"{self._place(key)}: {message}")

    def _place(self, key: Key) -> str:
        below = [override for path, override in self.given.items() if path[: len(key)] == key]
        if below:
            return f"{self.name} with --set {' --set '.join(below)}"
        for end in range(len(key), -1, -1):
            if key[:end] in self.given:
                return f"{self.name} with --set {self.given[key[:end]]}"
            if key[:end] in self.lines:
                return f"{self.name}:{self.lines[key[:end]]}"
        return self.name


def dotted(key: Key) -> str:
    """A key as `--set` takes it."""
    return ".".join(map(str, key))


def parse(text: str, name: str) -> list[Document]:
    """All documents of a YAML text.

    Raises:
        FormatError: not YAML, or more than JSON can hold, or a key is there twice.
    """
    loader = yaml.SafeLoader(text)
    documents = []
    try:
        while loader.check_node():
            node = loader.get_node()
            assert node is not None  # check_node saw it
            data = loader.construct_document(node)
            json.dumps(data, default=str)  # which a value that contains itself, or a date as a key, cannot become
            documents.append(Document(name, data, dict(_lines(node, (), name))))
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        mark = getattr(error, "problem_mark", None)
        place = f"{name}:{mark.line + 1}" if mark else name
        raise FormatError(f"{place}: not YAML: {getattr(error, 'problem', None) or error}") from error
    finally:
        loader.dispose()
    return documents


def _lines(node: yaml.Node, key: Key, name: str) -> Iterator[tuple[Key, int]]:
    """(key, line) of everything below a node."""
    yield key, node.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            yield from _lines(item, (*key, i), name)
    elif isinstance(node, yaml.MappingNode):
        seen = set()
        for child, value in node.value:
            path = (*key, str(child.value))
            if path in seen:
                raise FormatError(f"{name}:{child.start_mark.line + 1}: {dotted(path)}: is there twice; remove one")
            seen.add(path)
            yield from _lines(value, path, name)
            yield path, child.start_mark.line + 1


def with_overrides(document: Document, overrides: Iterable[str]) -> Document:
    """The document with each "a.b=value" put in; values are YAML, a number addresses a list's item.

    Raises:
        FormatError: no "=", a value that is not YAML, or a path through something that has no such item.
    """
    data = json.loads(json.dumps(document.data, default=str))
    given = dict(document.given)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise FormatError(f"--set {override}: write it as key=value, such as weights.scale_rule=search")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise FormatError(f"--set {override}: the value is not YAML") from error
        key: Key = ()
        parts = path.split(".")
        place = data
        for part in parts[:-1]:
            key = (*key, _index(place, part, key, override))
            place = place.setdefault(part, {}) if isinstance(place, dict) else place[int(part)]
        last = _index(place, parts[-1], key, override)
        place[last] = value
        given[(*key, last)] = override
    return dataclasses.replace(document, data=data, given=given)


def _index(place: Any, part: str, key: Key, override: str) -> str | int:
    if isinstance(place, dict):
        return part
    if isinstance(place, list) and part.isdecimal() and int(part) < len(place):
        return int(part)
    what = f"a list of {len(place)}" if isinstance(place, list) else repr(place)
    raise FormatError(f"--set {override}: {dotted(key)} is {what}, which has no {part!r}")


def validated(document: Document, section: type[Section]) -> Section:
    """The document as a section.

    Raises:
        FormatError: with a line for every key or value that is wrong, and the nearest right one.
    """
    if not isinstance(document.data, dict):
        raise document.error((), "must be a mapping of keys to values")
    try:
        return section.model_validate_json(json.dumps(document.data, default=str), strict=True)
    except ValidationError as error:
        found = [document.error(e["loc"], _message(e, section)) for e in error.errors()]
        raise FormatError("\n".join(map(str, found))) from error


def _message(error: ErrorDetails, section: type[BaseModel]) -> str:
    value = error["input"]
    match error["type"]:
        case "extra_forbidden" | "unexpected_keyword_argument":
            *parents, key = error["loc"]
            return f"unknown key{_nearest(str(key), _keys(section, parents))}"
        case "missing" | "missing_argument":
            return "is missing"
        case "literal_error":
            choices = re.findall(r"'([^']*)'|(\d+)", error["ctx"]["expected"])
            return f"{value!r} is not known{_nearest(str(value), [a or b for a, b in choices])}"
        case "value_error":
            return str(error["ctx"]["error"])
    said = error["msg"].replace("Input should", "must").replace("array", "list").replace("an object", "a mapping")
    return f"{said}; got {value!r}"


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; choose one of {', '.join(known)}"


def _keys(section: Any, parents: list[str | int]) -> list[str]:
    """Names of the fields of the section at a key below `section`."""
    for part in parents:
        if isinstance(part, str):
            section = _section(_fields(section)[part])
    return list(_fields(section))


def _fields(section: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(section):
        return {field.name: field.type for field in dataclasses.fields(section)}
    return {name: info.annotation for name, info in section.model_fields.items()}


def _section(annotation: Any) -> Any:
    """The section in an annotation such as `tuple[Section, ...]`."""
    for inner in get_args(annotation):
        if found := _section(inner):
            return found
    is_section = isinstance(annotation, type) and (
        issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation)
    )
    return annotation if is_section else None
