"""The answer types of tasks: their constraint on generation, their column type, and how a text becomes a value.

text                        any text                              string
bool                        Yes or No                             bool
{choices: [a, b]}           one of the choices                    string
int, {int: {min, max}}      a whole number                        int64
float, {float: {min, max}}  a number                              float64
date                        YYYY-MM-DD                            date32
list[str]                   a JSON array of strings               list<string>
{list[choice]: [a, b]}      a JSON array of some of the choices   list<string>
{regex: PATTERN}            text that the whole pattern matches   string
{json_schema: SCHEMA}       JSON that satisfies the schema        the type of `arrow_types.infer_shape`
"""

from __future__ import annotations

import datetime
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import pyarrow as pa

from ovis_model.grammar.json_schema import drop_repeats, parse_schema, validate_answer
from ovis_model.grammar.keywords import DATE_PATTERN
from ovis_model.types import Constraint
from pipelines.tasks.arrow_types import Shape, infer_shape
from pipelines.tasks.closing import close_objects

MAX_DIGITS = 18  # any number of 18 digits fits an int64
MAX_ITEMS = 100  # default limit of a list of strings
MAX_STRING_LENGTH = 200  # characters per item: enough for a tag or a line, and it ends a loop
_REPETITIVE = 2.4  # zlib compression ratio of a looping text: Whisper's threshold (arXiv:2212.04356, section 4.5)


class Answer(Protocol):
    """An answer type. `options` are scored, other answers are generated within `constraint`."""

    @property
    def spec(self) -> Any:
        """The type as written in a tasks file."""
        ...

    @property
    def type(self) -> pa.DataType:
        """The type of the column."""
        ...

    @property
    def options(self) -> tuple[str, ...]:
        """The texts to score; empty if the answer is generated."""
        ...

    @property
    def constraint(self) -> Constraint | None:
        """The grammar of generated text; None for free text."""
        ...

    def parse(self, text: str) -> Any:
        """Return the value for a column of `type`. Raise ValueError if the text is not a valid answer."""
        ...


@dataclass(frozen=True)
class Text:
    """Free text."""

    spec = "text"
    type = pa.string()
    options = ()
    constraint = None

    def parse(self, text: str) -> str:
        """Return the text unchanged."""
        return text


@dataclass(frozen=True)
class Choices:
    """One of several given texts."""

    options: tuple[str, ...]
    type = pa.string()
    constraint = None

    def __post_init__(self) -> None:
        if len(self.options) < 2 or len(set(self.options)) < len(self.options) or "" in self.options:
            raise ValueError(f"choices {list(self.options)} must be two or more different, non-empty texts")

    @property
    def spec(self) -> Any:
        """The type as written in a tasks file."""
        return {"choices": list(self.options)}

    def parse(self, text: str) -> str | bool:
        """Return the text. Raise ValueError if it is not one of the options."""
        if text not in self.options:
            raise ValueError(f"{text!r} is not one of {', '.join(self.options)}")
        return text


@dataclass(frozen=True)
class YesNo(Choices):
    """Yes or No, as a boolean."""

    options: tuple[str, ...] = ("Yes", "No")
    spec = "bool"
    type = pa.bool_()

    def parse(self, text: str) -> bool:
        """Return True for Yes and False for No. Raise ValueError for any other text."""
        return super().parse(text) == "Yes"


@dataclass(frozen=True)
class Pattern:
    """Text that a whole regular expression matches."""

    regex: str
    type = pa.string()
    options = ()

    @property
    def spec(self) -> Any:
        """The type as written in a tasks file."""
        return {"regex": self.regex}

    @property
    def constraint(self) -> Constraint:
        """The regular expression as a constraint."""
        return Constraint("regex", self.regex)

    def parse(self, text: str) -> str:
        """Return the text unchecked: generation matched it, and another engine may read the pattern differently."""
        return text


@dataclass(frozen=True)
class Date:
    """A day of the calendar, from the year 1000 to 2999."""

    spec = "date"
    type = pa.date32()
    options = ()
    constraint = Constraint("regex", DATE_PATTERN)

    def parse(self, text: str) -> datetime.date:
        """Return the day. Raise ValueError if the text is none."""
        return datetime.date.fromisoformat(text)


@dataclass(frozen=True)
class Record:
    """JSON that satisfies `schema`, which is JSON text.

    `given` is the spec as JSON text if the schema was derived from a spec of another kind. Objects with `properties`
    allow no others, unless the schema has keywords about them.
    """

    schema: str
    given: str = ""
    options = ()

    @property
    def spec(self) -> Any:
        """The type as written in a tasks file."""
        return json.loads(self.given) if self.given else {"json_schema": json.loads(self.schema)}

    @property
    def type(self) -> pa.DataType:
        """The Arrow type of the schema."""
        return _infer_shape(self.schema).type

    @property
    def constraint(self) -> Constraint:
        """The schema with closed objects as a constraint."""
        return _make_constraint(self.schema)

    def parse(self, text: str) -> Any:
        """Return the column value of a JSON text. Raise ValueError if the schema forbids it or it is not JSON."""
        try:
            value = drop_repeats(json.loads(text, parse_float=_parse_float, parse_constant=_parse_float), self.schema)
            validate_answer(value, self.schema)
            return _infer_shape(self.schema).convert(value)
        except RecursionError as error:
            raise ValueError("the answer is nested too deeply") from error


def _parse_float(text: str) -> float:
    """Return a number of JSON. Raise ValueError for one that a float64 does not hold, and for NaN."""
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {text} does not fit a float64")
    return number


@lru_cache  # called for every row
def _make_constraint(schema: str) -> Constraint:
    try:
        return Constraint("json_schema", json.dumps(close_objects(parse_schema(schema))))
    except ValueError:
        return Constraint("json_schema", schema)  # `guides.check` reports the fault before a run starts


@lru_cache
def _infer_shape(schema: str) -> Shape:
    return infer_shape(json.loads(schema))


def parse_answer(spec: Any) -> Answer:
    """Return the answer type that a spec of a tasks file describes. Raise ValueError if it describes none."""
    if isinstance(spec, Text | Choices | Pattern | Date | Record):
        return spec
    if isinstance(spec, str) and spec in _PLAIN:
        return _PLAIN[spec]
    if isinstance(spec, Mapping) and len(spec) == 1:
        [(kind, argument)] = spec.items()
        if kind in _WITH_ARGUMENT:
            return _WITH_ARGUMENT[kind](argument)
    raise ValueError(
        f"answer: {spec!r} is unknown; give text, bool, int, float, date, list[str], {{int: {{min: 0, max: 9}}}}, "
        "{choices: [...]}, {list[choice]: [...]}, {regex: ...} or {json_schema: ...}"
    )


def _parse_choices(options: Any) -> Choices:
    if not isinstance(options, list | tuple):
        raise ValueError(f"choices: {options!r} is not a list")
    if strange := [option for option in options if not isinstance(option, str)]:
        raise ValueError(
            f"choices: {strange[0]!r} is not text; quote it: YAML reads words such as yes, no and 1 as other types"
        )
    return Choices(tuple(options))


def _parse_int(bounds: Any) -> Record:
    widest = {"min": 1 - 10**MAX_DIGITS, "max": 10**MAX_DIGITS - 1}
    given = widest | _parse_bounds(bounds, "int", widest)
    low, high = given["min"], given["max"]
    if not widest["min"] <= low <= high <= widest["max"]:
        raise ValueError(f"int from {low} to {high}: min must be at most max, both of at most {MAX_DIGITS} digits")
    schema = {"type": "integer", "minimum": low, "maximum": high}
    return Record(json.dumps(schema), json.dumps("int" if given == widest else {"int": given}))


def _parse_float_answer(bounds: Any) -> Record:
    if not isinstance(bounds, Mapping) or not bounds.keys() <= {"min", "max"}:
        raise ValueError(f"float: {bounds!r} must be a mapping with only min and max")
    if strange := [value for value in bounds.values() if type(value) not in (int, float)]:
        raise ValueError(f"float: {strange[0]!r} is not a number")
    low, high = bounds.get("min", -math.inf), bounds.get("max", math.inf)
    if not low <= high:
        raise ValueError(f"float from {low} to {high}: min must be at most max")
    names = {"min": "minimum", "max": "maximum"}
    schema = {"type": "number", **{names[name]: value for name, value in bounds.items()}}
    return Record(json.dumps(schema), json.dumps({"float": dict(bounds)} if bounds else "float"))


def _parse_choice_list(options: Any) -> Record:
    limit = options.get("max_items") if isinstance(options, Mapping) else None
    if isinstance(options, Mapping) and (not options.keys() <= {"choices", "max_items"} or "choices" not in options):
        raise ValueError(f"list[choice]: {options!r} must be a list, or a mapping with only choices and max_items")
    choices = list(_parse_choices(options["choices"] if isinstance(options, Mapping) else options).options)
    if limit is not None and (type(limit) is not int or not limit >= 1):
        raise ValueError(f"max_items={limit!r} must be at least 1")
    schema = {"type": "array", "items": {"enum": choices}, "uniqueItems": True}
    if limit is None:
        return Record(json.dumps(schema), json.dumps({"list[choice]": choices}))
    given = {"choices": choices, "max_items": limit}
    return Record(json.dumps({**schema, "maxItems": limit}), json.dumps({"list[choice]": given}))


def _parse_strings(bounds: Any) -> Record:
    default = {"max_items": MAX_ITEMS}
    given = default | _parse_bounds(bounds, "list[str]", default)
    if given["max_items"] < 1:
        raise ValueError(f"max_items={given['max_items']} must be at least 1")
    items = {"type": "string", "minLength": 1, "maxLength": MAX_STRING_LENGTH}
    schema = {"type": "array", "items": items, "maxItems": given["max_items"]}
    return Record(json.dumps(schema), json.dumps("list[str]" if given == default else {"list[str]": given}))


def _parse_bounds(given: Any, kind: str, names: Mapping[str, int]) -> dict[str, int]:
    if not isinstance(given, Mapping) or not given.keys() <= names.keys():
        raise ValueError(f"{kind}: {given!r} must be a mapping with only {' and '.join(names)}")
    if strange := [value for value in given.values() if type(value) is not int]:
        raise ValueError(f"{kind}: {strange[0]!r} is not a whole number")
    return dict(given)


def _parse_regex(pattern: Any) -> Pattern:
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"regex: {pattern!r} is not a pattern; give a non-empty text")
    return Pattern(pattern)


def _parse_json_schema(schema: Any) -> Record:
    if not isinstance(schema, Mapping | bool):
        raise ValueError(f"json_schema: {schema!r} is neither a schema nor the path of a file that holds one")
    try:
        text = json.dumps(schema)
    except TypeError as error:
        raise ValueError(f"json_schema: {error}; {_QUOTE}") from error
    if json.loads(text) != schema:
        raise ValueError(
            f"json_schema: {schema!r} holds names that are not text, or values that JSON does not have; {_QUOTE}"
        )
    return Record(text)


_QUOTE = "YAML reads words such as yes, no, 1 and 2030-12-31 as other types: quote them"


_PLAIN: dict[str, Answer] = {
    "text": Text(),
    "bool": YesNo(),
    "int": _parse_int({}),
    "float": _parse_float_answer({}),
    "date": Date(),
    "list[str]": _parse_strings({}),
}
_WITH_ARGUMENT: dict[str, Callable[[Any], Answer]] = {
    "choices": _parse_choices,
    "int": _parse_int,
    "float": _parse_float_answer,
    "list[str]": _parse_strings,
    "list[choice]": _parse_choice_list,
    "regex": _parse_regex,
    "json_schema": _parse_json_schema,
}


@dataclass(frozen=True)
class Answered:
    """A task's answer. `confidence` is the mean log-probability of its tokens, or the probability of each option.

    `alternative` is the answer that was not chosen, if the task was generated twice; `error` says why there is none.
    """

    text: str
    value: Any
    finish_reason: str
    confidence: float | dict[str, float]
    flags: tuple[str, ...]
    mean_logprob: float
    num_tokens: int
    alternative: Answered | None = None
    error: str = ""


def make_failed(error: str) -> Answered:
    """Return what stands for an answer that could not be generated, although others of its row could."""
    return Answered("", None, "", math.nan, ("error",), math.nan, 0, error=error)


def find_flags(
    answer: Answer, text: str, value: Any, finish_reason: str, *, is_valid: bool | None = None
) -> tuple[str, ...]:
    """Return the flags of a suspicious answer: truncated, repetition, empty or invalid.

    `is_valid`: whether the text has a value, which may be None; by default, whether the value is not None.
    """
    found = {
        "truncated": finish_reason == "length",
        "repetition": not answer.options and is_repetitive("\n".join(_find_strings(text if value is None else value))),
        "empty": not text.strip(),
        "invalid": value is None if is_valid is None else not is_valid,
    }
    return tuple(flag for flag, is_so in found.items() if is_so)


def is_repetitive(text: str) -> bool:
    """Return whether a text compresses so well that it must be a loop; a short text never does."""
    data = text.encode()
    return len(data) > _REPETITIVE * len(zlib.compress(data))


def _find_strings(value: Any) -> Iterator[str]:
    """Yield the strings in a value, without field names, which repeat in any list of records."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _find_strings(item)
