"""Answer types of tasks: their constraint on generation, their column type, and parsing a text to a value.

text                        anything                              string
bool                        Yes or No                             bool
{choices: [a, b]}           one of them                           string
int, {int: {min, max}}      a whole number                        int64
list[str]                   a JSON array of strings               list<string>
{regex: PATTERN}            what the whole pattern matches        string
{json_schema: SCHEMA}       JSON that the schema allows           `arrow_types.infer_shape` of the schema
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import pyarrow as pa

from ovis_model.grammar.json_schema import parse_schema, validate_answer
from ovis_model.types import Constraint
from pipelines.tasks.arrow_types import Shape, close_objects, infer_shape

MAX_DIGITS = 18  # of an int64, whatever they are
MAX_ITEMS = 100  # of a list of strings, unless the task says otherwise
MAX_STRING_LENGTH = 200  # of each of them: a tag or a line, and an end to a loop
_REPETITIVE = 2.4  # times that zlib shortens a text in a loop: Whisper's threshold (arXiv:2212.04356, section 4.5)


class Answer(Protocol):
    """A type of answers. `options` are scored instead of decoded; `constraint` limits what is decoded."""

    @property
    def spec(self) -> Any:
        """The type as written in a file of tasks."""
        ...

    @property
    def type(self) -> pa.DataType: ...

    @property
    def options(self) -> tuple[str, ...]: ...

    @property
    def constraint(self) -> Constraint | None: ...

    def parse(self, text: str) -> Any:
        """Return the value for a column of `type`. Raise ValueError if the text is no such answer."""
        ...


@dataclass(frozen=True)
class Text:
    spec = "text"
    type = pa.string()
    options = ()
    constraint = None

    def parse(self, text: str) -> str:
        return text


@dataclass(frozen=True)
class Choices:
    options: tuple[str, ...]
    type = pa.string()
    constraint = None

    def __post_init__(self) -> None:
        if len(self.options) < 2 or len(set(self.options)) < len(self.options) or "" in self.options:
            raise ValueError(f"choices {list(self.options)} must be two or more texts, each once and none empty")

    @property
    def spec(self) -> Any:
        return {"choices": list(self.options)}

    def parse(self, text: str) -> str | bool:
        if text not in self.options:
            raise ValueError(f"{text!r} is none of {', '.join(self.options)}")
        return text


@dataclass(frozen=True)
class YesNo(Choices):
    options: tuple[str, ...] = ("Yes", "No")
    spec = "bool"
    type = pa.bool_()

    def parse(self, text: str) -> bool:
        return super().parse(text) == "Yes"


@dataclass(frozen=True)
class Pattern:
    regex: str
    type = pa.string()
    options = ()

    @property
    def spec(self) -> Any:
        return {"regex": self.regex}

    @property
    def constraint(self) -> Constraint:
        return Constraint("regex", self.regex)

    def parse(self, text: str) -> str:
        return text  # the decoding matched it: another engine for patterns may read them in another way


@dataclass(frozen=True)
class Record:
    """JSON that satisfies a `schema` (JSON text); `given` is the spec if the schema was made from another one.

    Objects with `properties` hold no others unless the schema speaks of them.
    """

    schema: str
    given: str = ""
    options = ()

    @property
    def spec(self) -> Any:
        return json.loads(self.given) if self.given else {"json_schema": json.loads(self.schema)}

    @property
    def type(self) -> pa.DataType:
        return _shape_of(self.schema).type

    @property
    def constraint(self) -> Constraint:
        return _constraint_of(self.schema)

    def parse(self, text: str) -> Any:
        try:
            value = json.loads(text)
            validate_answer(value, self.schema)
            return _shape_of(self.schema).convert(value)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error


@lru_cache  # every row asks for it
def _constraint_of(schema: str) -> Constraint:
    try:
        return Constraint("json_schema", json.dumps(close_objects(parse_schema(schema))))
    except ValueError:
        return Constraint("json_schema", schema)  # `guides.check` reports it, before a run starts


@lru_cache
def _shape_of(schema: str) -> Shape:
    return infer_shape(json.loads(schema))


def parse_answer(spec: Any) -> Answer:
    """Return the type that a file of tasks names. Raise ValueError."""
    if isinstance(spec, Text | Choices | Pattern | Record):
        return spec
    if isinstance(spec, str) and spec in _PLAIN:
        return _PLAIN[spec]
    if isinstance(spec, Mapping) and len(spec) == 1:
        [(kind, argument)] = spec.items()
        if kind in _WITH_ARGUMENT:
            return _WITH_ARGUMENT[kind](argument)
    raise ValueError(
        f"answer: {spec!r} is unknown; give text, bool, int, list[str], {{int: {{min: 0, max: 9}}}}, "
        "{choices: [...]}, {regex: ...} or {json_schema: ...}"
    )


def _choices(options: Any) -> Choices:
    if not isinstance(options, list | tuple):
        raise ValueError(f"choices: {options!r} is no list")
    if strange := [option for option in options if not isinstance(option, str)]:
        raise ValueError(f"choices: {strange[0]!r} is no text; YAML reads words such as yes, no and 1 so: quote it")
    return Choices(tuple(options))


def _int(bounds: Any) -> Record:
    widest = {"min": 1 - 10**MAX_DIGITS, "max": 10**MAX_DIGITS - 1}
    given = widest | _options(bounds, "int", widest)
    low, high = given["min"], given["max"]
    if not widest["min"] <= low <= high <= widest["max"]:
        raise ValueError(f"int from {low} to {high}: min may not be over max, nor have more than {MAX_DIGITS} digits")
    schema = {"type": "integer", "minimum": low, "maximum": high}
    return Record(json.dumps(schema), json.dumps("int" if given == widest else {"int": given}))


def _strings(bounds: Any) -> Record:
    default = {"max_items": MAX_ITEMS}
    given = default | _options(bounds, "list[str]", default)
    if given["max_items"] < 1:
        raise ValueError(f"max_items={given['max_items']} must be at least 1")
    items = {"type": "string", "minLength": 1, "maxLength": MAX_STRING_LENGTH}
    schema = {"type": "array", "items": items, "maxItems": given["max_items"]}
    return Record(json.dumps(schema), json.dumps("list[str]" if given == default else {"list[str]": given}))


def _options(given: Any, kind: str, names: Mapping[str, int]) -> dict[str, int]:
    if not isinstance(given, Mapping) or not given.keys() <= names.keys():
        raise ValueError(f"{kind}: {given!r} must name {' and '.join(names)} only")
    if strange := [value for value in given.values() if type(value) is not int]:
        raise ValueError(f"{kind}: {strange[0]!r} is no whole number")
    return dict(given)


def _regex(pattern: Any) -> Pattern:
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"regex: {pattern!r} is no pattern")
    return Pattern(pattern)


def _json_schema(schema: Any) -> Record:
    if not isinstance(schema, Mapping | bool):
        raise ValueError(f"json_schema: {schema!r} is neither a schema nor a file that holds one")
    try:
        text = json.dumps(schema)
    except TypeError as error:
        raise ValueError(f"json_schema: {error}; {_QUOTE}") from error
    if json.loads(text) != schema:
        raise ValueError(f"json_schema: {schema!r} holds names that are no texts, or what JSON lacks; {_QUOTE}")
    return Record(text)


_QUOTE = "YAML reads words such as yes, no, 1 and 2030-12-31 as other than text: quote them"


_PLAIN: dict[str, Answer] = {"text": Text(), "bool": YesNo(), "int": _int({}), "list[str]": _strings({})}
_WITH_ARGUMENT: dict[str, Callable[[Any], Answer]] = {
    "choices": _choices,
    "int": _int,
    "list[str]": _strings,
    "regex": _regex,
    "json_schema": _json_schema,
}


@dataclass(frozen=True)
class Answered:
    """A task's answer. `confidence` is the mean log-probability, or the probability of each option.

    `alternative` is the answer that was not chosen, if the task was asked twice.
    """

    text: str
    value: Any
    finish_reason: str
    confidence: float | dict[str, float]
    flags: tuple[str, ...]
    mean_logprob: float
    num_tokens: int
    alternative: Answered | None = None


def find_flags(answer: Answer, text: str, value: Any, finish_reason: str) -> tuple[str, ...]:
    """Return why an answer is suspicious: truncated, repetition, empty, invalid."""
    found = {
        "truncated": finish_reason == "length",
        "repetition": not answer.options and is_repetitive("\n".join(_texts(text if value is None else value))),
        "empty": not text.strip(),
        "invalid": value is None,
    }
    return tuple(flag for flag, is_so in found.items() if is_so)


def is_repetitive(text: str) -> bool:
    """Return whether a text compresses as only loops do; a short text never does."""
    data = text.encode()
    return len(data) > _REPETITIVE * len(zlib.compress(data))


def _texts(value: Any) -> Iterator[str]:
    """Yield the strings in a value, without the names of fields, which repeat by themselves."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
