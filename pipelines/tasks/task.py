"""A task: one question, its answer type and how its answer is generated; tasks are read from YAML."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, PositiveInt, field_validator

from ovis_model.types import SamplingParams
from pipelines.storage.yaml_file import read_yaml
from pipelines.tasks.answer_types import Answer, Text, parse_answer

_SAMPLING = {"max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty"}  # as in SamplingParams

Texts = TypeVar("Texts", str, tuple[str, ...], None)
Encode = Callable[[str], Sequence[int]]
"""A whole answer as token ids, the end of the turn included."""


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
    """A question. What is None is as the run has it: `fill_defaults` fills it in."""

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

    _check_texts = field_validator("prompt", "system", "stop")(check_texts)

    def fill_defaults(self, **defaults: Any) -> Task:
        """Return the same task with `defaults` for the fields that it leaves open."""
        return self.model_copy(update={name: value for name, value in defaults.items() if getattr(self, name) is None})

    @property
    def label(self) -> str:
        """What begins a message about one task of several: `task NAME: `, or nothing."""
        return f"task {self.name}: " if self.name else ""

    @property
    def stops(self) -> tuple[str, ...]:
        """Of free text; other answers end where their type says so."""
        return () if self.answer.options or self.answer.constraint else self.stop or ()

    def make_sampling_params(self, row_id: str, encode: Encode) -> SamplingParams:
        """Every row draws from a stream of its own, whatever runs beside it and however often it is resumed."""
        key = "\0".join(filter(None, (str(self.seed), row_id, self.name)))
        kind: Answer = self.answer
        return SamplingParams(
            **self.model_dump(include=_SAMPLING),
            stop=self.stops,
            seed=int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) >> 1,  # torch takes signed ones
            choices=tuple(tuple(encode(option)) for option in kind.options),
            constraint=kind.constraint,
        )


def read_tasks(path: str) -> list[dict[str, Any]]:
    """The tasks of a YAML file, unchecked; a `json_schema` may name a file beside it. Raises ValueError, OSError."""
    values = read_yaml(path)
    tasks = values.get("tasks") if isinstance(values, dict) else values
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise ValueError(f"{path} must hold `tasks:` and a list of them, each with a name and a prompt")
    return [_with_schema(task, Path(path).parent) for task in tasks]


def _with_schema(task: dict[str, Any], directory: Path) -> dict[str, Any]:
    answer = task.get("answer")
    if not isinstance(answer, dict) or not isinstance(answer.get("json_schema"), str):
        return task
    path = directory / answer["json_schema"]
    try:
        return {**task, "answer": {"json_schema": json.loads(path.read_text("utf-8"))}}
    except json.JSONDecodeError as error:
        raise ValueError(f"task {task.get('name')}: {path} is not JSON: {error}") from error
