"""Describe the options of a configuration: flag, value, default and meaning, read from its fields."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from pipelines.config import Section, read_extra

_METAVARS = {int: "N", float: "X.Y"}
_ALLOWED = {
    "COLUMN": "a column name",
    "COLUMN,...": "column names, separated by commas",
    "PATH": "a path or URI",
    "FILE": "a path of a YAML file",
    "LOCAL_FILE": "a local path",
    "NAME|NAME": "names of parts, joined by |",
    "PART=RATE,...": "PART=RATE pairs, separated by commas",
    "I/N": "two whole numbers such as 2/8",
    "TASK=COLUMN": "TASK=COLUMN, the names of a task and of a kept column",
}
_BOUNDS = {"gt": "above {}", "ge": "of at least {}", "le": "at most {}"}
_LIMITS = {"min_length": "", "pattern": "that matches {}", "max_length": "of at most {} characters"}


@dataclass(frozen=True)
class Option:
    """One field of a configuration, as users see it. `unset` describes a default of None or ()."""

    name: str
    field: FieldInfo
    decides_rows: bool = True
    unset: str = ""

    @property
    def flag(self) -> str:
        """The option on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def is_required(self) -> bool:
        """Whether the option has no default."""
        return self.field.is_required()

    @property
    def is_switch(self) -> bool:
        """Whether the option takes no value: --x or --no-x."""
        return self.field.annotation is bool

    @property
    def is_repeatable(self) -> bool:
        """Whether each use of the flag adds a value. A list that has its own metavar comes as one value."""
        return get_origin(self.field.annotation) is tuple and not _find_names(self.field.metadata)

    @property
    def values(self) -> list[Value]:
        """The kinds of value that the option takes."""
        return list(_list_values(self.field.annotation, self.field.metadata))

    @property
    def choices(self) -> list[str]:
        """The words that the option takes."""
        return [value.metavar for value in self.values if value.is_word]

    @property
    def metavar(self) -> str:
        """The value in --help: N, X.Y, TEXT, COLUMN, {a,b}, N|auto."""
        others = [value.metavar for value in self.values if not value.is_word]
        return "|".join([*others, *self.choices]) if others else "{" + ",".join(self.choices) + "}"

    @property
    def allowed(self) -> str:
        """What a value must be."""
        return join_with_or([value.allowed for value in sorted(self.values, key=lambda value: not value.is_word)])

    @property
    def default(self) -> str:
        """The default, or what happens without the option; "" if it is required."""
        if self.is_required:
            return ""
        if self.is_switch:
            return "on" if self.field.default else "off"
        return self.unset if self.field.default in (None, ()) else f"{self.field.default}"

    @property
    def default_note(self) -> str:
        """The default as --help shows it."""
        return f"default: {self.default}" if self.default else "required"

    @property
    def description(self) -> str:
        """What the option does."""
        return (self.field.description or "") + ("; repeatable" if self.is_repeatable else "")


@dataclass(frozen=True)
class Value:
    """One kind of value. A word is allowed as it is; any other metavar names a kind."""

    metavar: str
    allowed: str
    is_word: bool = False


def list_sections(config: type[Section]) -> list[tuple[str, list[Option]]]:
    """Return (title, options) of each section; a job's own options come after input and model."""
    declaring = [kind for kind in reversed(config.__mro__) if issubclass(kind, Section) and _list_declared(kind)]
    if declaring[-1] is config and len(declaring) > 2:
        declaring.insert(2, declaring.pop())
    declared = {
        name: kind for kind in reversed(declaring) for name in _list_declared(kind)
    }  # a subclass may declare again
    return [
        (kind.title, [_read_option(config, name) for name in _list_declared(kind) if declared[name] is kind])
        for kind in declaring
        if kind in declared.values()
    ]


def list_options(config: type[Section]) -> list[Option]:
    """Return every option, in the order of the sections."""
    return [option for _, options in list_sections(config) for option in options]


def join_with_or(words: list[str]) -> str:
    """Return "a, b or c"."""
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _list_declared(kind: type[Section]) -> list[str]:
    return [name for name in inspect.get_annotations(kind) if name in kind.model_fields]


def _read_option(config: type[Section], name: str) -> Option:
    extra = read_extra(config, name)
    return Option(name, config.model_fields[name], extra.get("decides_rows", True), extra.get("unset", ""))


def _list_values(annotation: Any, metadata: list[Any]) -> Iterator[Value]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _list_values(arguments[0], [*metadata, *arguments[1:]])
    elif origin in (Union, types.UnionType):
        for member in arguments:
            yield from _list_values(member, metadata)
    elif origin is tuple:
        yield from _list_values(arguments[0], metadata)
    elif origin is Literal:
        yield from (Value(word, word, is_word=True) for word in arguments)
    elif annotation is bool:
        yield from (Value(word, word, is_word=True) for word in ("true", "false"))
    elif annotation in (int, float):
        yield Value(_METAVARS[annotation], _describe_number(annotation, metadata))
    elif annotation is not type(None):
        metavar = [*_find_names(metadata), "TEXT"][0]
        yield Value(metavar, _ALLOWED.get(metavar) or _describe_text(metadata))


def _find_names(metadata: list[Any]) -> list[str]:
    return [part for part in metadata if isinstance(part, str)]


def _describe_number(kind: type, metadata: list[Any]) -> str:
    noun = "a whole number" if kind is int else "a number"
    bounds: dict[str, Any] = {name: getattr(part, name) for part in metadata for name in _BOUNDS if hasattr(part, name)}
    if kind is int and "gt" in bounds:
        bounds = {"ge": bounds.pop("gt") + 1, **bounds}
    if bounds.keys() == {"ge", "le"}:
        return f"{noun} from {bounds['ge']} to {bounds['le']}"
    return f"{noun} {' and '.join(_BOUNDS[name].format(value) for name, value in bounds.items())}".strip()


def _describe_text(metadata: list[Any]) -> str:
    limits = {name: value for part in metadata for name in _LIMITS if (value := getattr(part, name, None))}
    if not limits:
        return "text in quotes"
    noun = "non-empty text" if "min_length" in limits else "text"
    return " ".join([noun, *(_LIMITS[name].format(value) for name, value in limits.items() if _LIMITS[name])])
