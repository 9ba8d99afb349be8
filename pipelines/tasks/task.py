"""A task: one question, its answer type and how its answer is generated; tasks are read from YAML."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PositiveInt,
    PrivateAttr,
    field_validator,
)

from ovis_model.types import SamplingParams
from pipelines.storage.yaml_file import find_faults, read_item_lines, read_key_lines, read_yaml
from pipelines.tasks.answer_types import Answer, Text, parse_answer

_SAMPLING = {"max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty"}  # as in SamplingParams

Texts = TypeVar("Texts", str, tuple[str, ...], None)
Encode = Callable[[str], Sequence[int]]
"""Encode a whole answer as token ids, including the end of the turn."""


def check_texts(value: Texts) -> Texts:
    """Return the text, or texts, of a prompt. Raise ValueError for one that is empty or not UTF-8."""
    texts: Sequence[str] = (value,) if isinstance(value, str) else value or ()
    for text in texts:
        if text == "":
            raise ValueError("may not be empty")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("is not UTF-8") from None
    return value


class Task(BaseModel):
    """One question. A field that is None takes the value of the run's option, see `fill_defaults`."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=64)
    prompt: str = Field(min_length=1)
    system: str | None = Field(None, min_length=1)
    answer: Annotated[Any, BeforeValidator(parse_answer), PlainSerializer(lambda answer: answer.spec)] = Text()
    max_new_tokens: PositiveInt | None = None
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    repetition_penalty: float | None = Field(None, gt=0)
    stop: tuple[str, ...] | None = None
    seed: int | None = None
    _place: str = PrivateAttr("")

    _check_texts = field_validator("prompt", "system", "stop")(check_texts)

    def fill_defaults(self, **defaults: Any) -> Task:
        """Return the task with `defaults` in the fields that are None."""
        return self.model_copy(update={name: value for name, value in defaults.items() if getattr(self, name) is None})

    def locate(self, place: str) -> Task:
        """Return the task with the file and line where it is written, for messages before the run."""
        located = self.model_copy()
        located._place = place
        return located

    @property
    def label(self) -> str:
        """The prefix of messages in rows about this task: `task NAME: `, or "" if the task has no name."""
        return f"task {self.name}: " if self.name else ""

    @property
    def place_label(self) -> str:
        """The prefix of messages before the run: `FILE, line N, task NAME: `, without the file if it is not known."""
        return f"{self._place}, {self.label}" if self._place else self.label

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings of free text; answers of other types end where their type requires."""
        return () if self.answer.options or self.answer.constraint else self.stop or ()

    def make_sampling_params(self, row_id: str, encode: Encode) -> SamplingParams:
        """Return the sampling parameters of a row, whose seed depends only on the task's seed, the row id and the name.

        So a row gets the same answer in any batch and after any number of resumes.
        """
        key = "\0".join(filter(None, (str(self.seed), row_id, self.name)))
        kind: Answer = self.answer
        return SamplingParams(
            **self.model_dump(include=_SAMPLING),
            stop=self.stops,
            seed=int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) >> 1,  # torch seeds are signed
            choices=tuple(tuple(encode(option)) for option in kind.options),
            constraint=kind.constraint,
        )


def read_tasks(path: str) -> list[dict[str, Any]]:
    """Read the tasks of a YAML file without validating them; a `json_schema` may name a file relative to it.

    Raise ValueError if the file or a schema is malformed, OSError if it cannot be read.
    """
    values = read_yaml(path)
    tasks = values.get("tasks") if isinstance(values, dict) else values
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise ValueError(f"{path} must hold `tasks:` and a list of them, each with a name and a prompt")
    _check_words(path, values, tasks)
    places = list_places(path)
    return [_load_schema(task, Path(path).parent, place) for task, place in zip(tasks, places, strict=True)]


def list_places(path: str) -> list[str]:
    """Return "FILE, line N" of each task in a file."""
    return [f"{path}, line {line}" for line in read_item_lines(path, "tasks")]


def _check_words(path: str, values: Any, tasks: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError with line and task for what YAML would read in silence, and for keys next to `tasks`."""
    lines = read_item_lines(path, "tasks")
    for line, fault in find_faults(path):
        above = [task for task, start in zip(tasks, lines, strict=True) if start <= line]
        name = f", task {above[-1].get('name')!r}" if above else ""
        raise ValueError(f"{path}, line {line}{name}: {fault}")
    others = [key for key in values if key != "tasks"] if isinstance(values, dict) else []
    if others:
        line = read_key_lines(path).get(str(others[0]), 1)
        known = ", ".join(f"{task.get('name')}" for task in tasks)
        raise ValueError(
            f"{path}, line {line}: {others[0]!r} next to `tasks` has no effect on {known}; remove it: options of the "
            "run go into --config, those of a task into the task"
        )


def _load_schema(task: dict[str, Any], directory: Path, place: str) -> dict[str, Any]:
    answer = task.get("answer")
    if not isinstance(answer, dict) or not isinstance(answer.get("json_schema"), str):
        return task
    label, path = f"{place}, task {task.get('name')!r}", directory / answer["json_schema"]
    try:
        return {**task, "answer": {"json_schema": json.loads(path.read_text("utf-8"))}}
    except ValueError as error:
        raise ValueError(f"{label}: {path} is not JSON: {error}") from error
    except OSError as error:
        raise ValueError(f"{label}: cannot read the schema {path}: {error.strerror}") from error
