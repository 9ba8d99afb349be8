"""The tasks of a run and the output columns that hold their answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipelines import schema
from pipelines.tasks.answer_types import Answered
from pipelines.tasks.task import Task

FLAGS = "flags"

Columns = Mapping[str, Any]
"""{column: value} of one row."""


@dataclass(frozen=True)
class Questionnaire:
    """The tasks of a run with all defaults filled in, and the layout of their columns.

    `prompt_column`: the input column with a prompt per row, "" for the format's own one, None if rows have no prompts.
    `has_default_prompt`: whether the user gave no prompt, so that videos may get another default.
    `row_columns`: columns on request that say something about the row and its media, after those of the answers.
    """

    tasks: tuple[Task, ...]
    layout: FlatLayout | TaskLayout
    prompt_column: str | None = None
    has_default_prompt: bool = False
    row_columns: pa.Schema = field(default_factory=lambda: pa.schema([]))

    @property
    def schema(self) -> pa.Schema:
        """The columns of the output without kept columns."""
        return pa.schema([*self.layout.make_schema(self.tasks), *self.row_columns])

    @property
    def regenerates_flagged(self) -> bool:
        """Whether flagged answers are generated a second time."""
        return self.layout.with_alternatives

    def split_prompts(self, stored: str) -> Sequence[str]:
        """Return one prompt per task from the text that the manifest stores for a row."""
        return self.layout.split_prompts(stored)

    def change_prompts(self, stored: str, change: Callable[[str], str]) -> str:
        """Return the text that the manifest stores for a row with each of its prompts changed."""
        return self.layout.change_prompts(stored, change)

    def make_columns(self, answers: Sequence[Answered]) -> Columns:
        """Return the columns of a row for its answers, one per task."""
        num_tokens = sum(answer.num_tokens for answer in answers)
        errors = "; ".join(answer.error for answer in answers if answer.error)
        columns = {**self.layout.make_columns(self.tasks, answers), "num_output_tokens": num_tokens}
        return {**columns, "error": errors} if errors else columns

    def make_empty_columns(self) -> Columns:
        """Return the same columns for an error row."""
        return {**self.layout.make_empty_columns(self.tasks), "num_output_tokens": 0}

    def describe(self) -> dict[str, Any]:
        """Return what run.json records in addition to the options: the tasks of an annotation, nothing for captions."""
        if isinstance(self.layout, FlatLayout):
            return {}
        return {"tasks": [task.model_dump(mode="json") for task in self.tasks]}


@dataclass(frozen=True)
class FlatLayout:
    """The columns of one task without a name: the answer is `text`. Every prompt gets `prompt_suffix`."""

    prompt_suffix: str = ""
    with_alternatives = False

    def make_schema(self, tasks: Sequence[Task]) -> pa.Schema:
        """Return the columns of the output without kept columns."""
        return schema.OUTPUT

    def join_prompts(self, prompts: Sequence[str]) -> str:
        """Return the text that the manifest stores for a row with these prompts."""
        [prompt] = prompts
        return prompt + self.prompt_suffix

    def split_prompts(self, stored: str) -> Sequence[str]:
        """Return the prompts of a row from the text that the manifest stores."""
        return (stored,)

    def change_prompts(self, stored: str, change: Callable[[str], str]) -> str:
        """Return the text that the manifest stores for a row with its prompt changed."""
        return change(stored)

    def make_columns(self, tasks: Sequence[Task], answers: Sequence[Answered]) -> Columns:
        """Return the columns that the answers to `tasks` fill."""
        [answer] = answers
        return {"text": answer.text, "finish_reason": answer.finish_reason, "mean_logprob": answer.mean_logprob}

    def make_empty_columns(self, tasks: Sequence[Task]) -> Columns:
        """Return the same columns for an error row."""
        return {"text": "", "finish_reason": "", "mean_logprob": float("nan")}


@dataclass(frozen=True)
class TaskLayout:
    """The columns of several tasks: `flags`, then for each task the value, its text, finish reason and confidence.

    With `with_alternatives`, each task also has a column for the answer that was not chosen.
    """

    with_alternatives: bool = False

    def make_schema(self, tasks: Sequence[Task]) -> pa.Schema:
        """Return the columns of the output without kept columns."""
        flags = pa.field(FLAGS, pa.list_(pa.field("item", pa.string(), nullable=False)), nullable=False)
        return pa.schema([*schema.ITEM, flags, *(field for task in tasks for field in self._list_fields(task))])

    def _list_fields(self, task: Task) -> Iterator[pa.Field]:
        yield pa.field(task.name, task.answer.type)
        yield pa.field(f"{task.name}_text", pa.string(), nullable=False)
        yield pa.field(f"{task.name}_finish_reason", pa.string(), nullable=False)
        yield pa.field(f"{task.name}_confidence", _find_confidence_type(task), nullable=bool(task.answer.options))
        if self.with_alternatives:
            yield pa.field(f"{task.name}_alternative", _ALTERNATIVE)

    def join_prompts(self, prompts: Sequence[str]) -> str:
        """Return the prompts as a JSON array, which the manifest stores."""
        return json.dumps(prompts, ensure_ascii=False)

    def split_prompts(self, stored: str) -> Sequence[str]:
        """Return the prompts of a row from the JSON array that the manifest stores."""
        prompts: list[str] = json.loads(stored)
        return prompts

    def change_prompts(self, stored: str, change: Callable[[str], str]) -> str:
        """Return the text that the manifest stores for a row with each of its prompts changed."""
        return self.join_prompts([change(prompt) for prompt in self.split_prompts(stored)])

    def make_columns(self, tasks: Sequence[Task], answers: Sequence[Answered]) -> Columns:
        """Return the columns that the answers to `tasks` fill."""
        pairs = list(zip(tasks, answers, strict=True))
        values: dict[str, Any] = {FLAGS: [f"{task.name}:{flag}" for task, answer in pairs for flag in answer.flags]}
        for task, answer in pairs:
            values[task.name] = answer.value
            values[f"{task.name}_text"] = answer.text
            values[f"{task.name}_finish_reason"] = answer.finish_reason
            values[f"{task.name}_confidence"] = _lay_out_confidence(task, answer)
            if other := answer.alternative:
                alternative = {"text": other.text, "finish_reason": other.finish_reason, "flags": list(other.flags)}
                values[f"{task.name}_alternative"] = alternative
        return values

    def make_empty_columns(self, tasks: Sequence[Task]) -> Columns:
        """Return the same columns for an error row: null, empty or NaN."""
        values: dict[str, Any] = {FLAGS: []}
        for task in tasks:
            values |= {task.name: None, f"{task.name}_text": "", f"{task.name}_finish_reason": ""}
            if not task.answer.options:
                values[f"{task.name}_confidence"] = float("nan")
        return values


MAX_FIELDS = 64  # choices whose probabilities are fields of a struct; more of them make readers slow


def _find_confidence_type(task: Task) -> pa.DataType:
    """Return the type of a confidence: a number, or the probabilities of the choices.

    A struct has a field per choice. Many choices, and those whose names differ in case only, of which DuckDB would read
    the wrong one, are a list instead.
    """
    options = task.answer.options
    if not options:
        return pa.float32()
    if _is_listed(task):
        pair = [pa.field("choice", pa.string(), nullable=False), pa.field("p", pa.float32(), nullable=False)]
        return pa.list_(pa.field("item", pa.struct(pair), nullable=False))
    return pa.struct([pa.field(option, pa.float32(), nullable=False) for option in options])


def _is_listed(task: Task) -> bool:
    options = task.answer.options
    return len(options) > MAX_FIELDS or len({option.lower() for option in options}) < len(options)


def _lay_out_confidence(task: Task, answer: Answered) -> Any:
    """Return the confidence as its column holds it; null for choices that could not be scored."""
    if not task.answer.options:
        return answer.confidence
    if not isinstance(answer.confidence, dict):
        return None
    pairs = answer.confidence.items()
    return [{"choice": choice, "p": p} for choice, p in pairs] if _is_listed(task) else answer.confidence


_ALTERNATIVE = pa.struct({"text": pa.string(), "finish_reason": pa.string(), "flags": pa.list_(pa.string())})
