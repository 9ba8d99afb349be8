"""Generate the answers of prepared rows and parse them into column values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from typing import Any

from ovis_model.inputs.processor import Processor
from ovis_model.tokenizer import cut_at_stop
from ovis_model.types import (
    Completion,
    ConstraintExhausted,
    Engine,
    FinishReason,
    Request,
    RequestError,
    SamplingParams,
)
from pipelines.rows import PreparedRow
from pipelines.tasks.answer_types import Answer, Answered, find_flags, make_failed
from pipelines.tasks.questionnaire import Columns, Questionnaire
from pipelines.tasks.task import Task

# Sampling of a second attempt: far enough from the first to escape its loop or dead end, with room to finish.
_RETRY_TEMPERATURE, _RETRY_TOP_P, _RETRY_PENALTY, _RETRY_TIMES_LONGER = 0.7, 0.9, 1.1, 2


Outcome = Completion | RequestError


@dataclass(frozen=True, eq=False)
class TaskRequest:
    """One task of one row. The requests of a row form a group, so the engine encodes their images once."""

    task: Task
    row_id: str
    request: Request


class Answerer:
    """Answers all tasks of rows with `engine`. Thread-safe."""

    def __init__(self, questionnaire: Questionnaire, processor: Processor, engine: Engine) -> None:
        self._questionnaire, self._tasks = questionnaire, questionnaire.tasks
        self._processor, self._engine = processor, engine
        self._answer_ids = cache(processor.encode_answer)

    def answer(self, rows: Sequence[PreparedRow]) -> list[Columns | RequestError]:
        """Return the answer columns of each row, or the error that prevents them. Raise EngineDied."""
        asked = [
            [TaskRequest(task, row.id, request) for task, request in zip(self._tasks, row.requests, strict=True)]
            for row in rows
        ]
        answered = [
            outcome if isinstance(outcome, RequestError) else list(map(self._parse_answer, questions, outcome))
            for questions, outcome in zip(asked, self._generate_rows(asked), strict=True)
        ]
        if self._questionnaire.regenerates_flagged:
            self._retry_flagged(asked, answered)
        return [a if isinstance(a, RequestError) else self._questionnaire.make_columns(a) for a in answered]

    def _generate_rows(self, asked: Sequence[Sequence[TaskRequest]]) -> list[list[Outcome] | RequestError]:
        """Generate all rows together; if a request is invalid, generate each row separately to isolate it."""
        flat = self._generate(list(chain.from_iterable(asked)))
        if isinstance(flat, RequestError):
            return [self._generate_row(questions) for questions in asked]
        rows = [flat[i : i + len(self._tasks)] for i in range(0, len(flat), len(self._tasks))]
        return [_find_row_error(questions, row) or row for questions, row in zip(asked, rows, strict=True)]

    def _generate_row(self, questions: Sequence[TaskRequest]) -> list[Outcome] | RequestError:
        """Generate one row; on failure, name the task that caused it."""
        outcome = self._generate(questions)
        if isinstance(outcome, RequestError) and len(questions) > 1:
            for question in questions:
                if isinstance(error := self._generate([question]), RequestError):
                    return RequestError(f"{question.task.label}{error}")
        return outcome if isinstance(outcome, RequestError) else _find_row_error(questions, outcome) or outcome

    def _generate(self, questions: Sequence[TaskRequest]) -> list[Outcome] | RequestError:
        params = [question.task.make_sampling_params(question.row_id, self._answer_ids) for question in questions]
        return self._try([question.request for question in questions], params)

    def _try(self, requests: Sequence[Request], params: Sequence[SamplingParams]) -> list[Outcome] | RequestError:
        """Return the outcomes, with an error in place of an answer whose grammar is exhausted."""
        try:
            return [*self._engine.generate(requests, params)]
        except ConstraintExhausted as error:
            return [*error.outcomes] or error
        except RequestError as error:
            return error

    def _parse_answer(self, question: TaskRequest, completion: Outcome) -> Answered:
        task = question.task
        if isinstance(completion, RequestError):
            return make_failed(f"{task.label}{completion}")
        text = cut_at_stop(self._processor.detokenize(completion.output_ids), task.stops)
        value, is_valid = _parse_value(task.answer, text, completion.finish_reason)
        confidence: float | dict[str, float] = completion.mean_logprob
        if completion.choice_probs is not None:
            confidence = dict(zip(task.answer.options, completion.choice_probs.tolist(), strict=True))
        return Answered(
            text=text,
            value=value,
            finish_reason=completion.finish_reason,
            confidence=confidence,
            flags=find_flags(task.answer, text, value, completion.finish_reason, is_valid=is_valid),
            mean_logprob=completion.mean_logprob,
            num_tokens=len(completion.output_ids),
        )

    def _retry_flagged(
        self, asked: Sequence[Sequence[TaskRequest]], answered: Sequence[list[Answered] | RequestError]
    ) -> None:
        """Generate flagged answers a second time. Keep the one with fewer flags, with the other as `alternative`."""
        flagged = [
            (question, answers, place)
            for questions, answers in zip(asked, answered, strict=True)
            if not isinstance(answers, RequestError)
            for place, question in enumerate(questions)
            if answers[place].flags
        ]
        if not flagged:
            return
        seconds = self._generate_alternatives([(question, answers[place]) for question, answers, place in flagged])
        for (question, answers, place), completion in zip(flagged, seconds, strict=True):
            if isinstance(completion, Completion):
                first, second = answers[place], self._parse_answer(question, completion)
                better, other = (second, first) if len(second.flags) < len(first.flags) else (first, second)
                answers[place] = replace(better, alternative=other)

    def _generate_alternatives(self, flagged: Sequence[tuple[TaskRequest, Answered]]) -> list[Outcome | None]:
        """Generate a second answer for each flagged one; None if the context has no room for a longer answer."""
        requests = [question.request for question, _ in flagged]
        params = [self._change_sampling(question, first) for question, first in flagged]
        outcome = self._try(requests, params)
        if not isinstance(outcome, RequestError):
            return [*outcome]
        alone = [self._try([request], [its]) for request, its in zip(requests, params, strict=True)]
        return [None if isinstance(one, RequestError) else one[0] for one in alone]

    def _change_sampling(self, question: TaskRequest, first: Answered) -> SamplingParams:
        # A different seed: where the first answer was sampled too, the same seed could draw the same tokens.
        params = question.task.make_sampling_params(f"{question.row_id}\0again", self._answer_ids)
        longer = _RETRY_TIMES_LONGER if "truncated" in first.flags else 1
        room = self._processor.config.max_length - len(question.request.input_ids)
        return replace(
            params,
            temperature=max(params.temperature, _RETRY_TEMPERATURE),
            top_p=min(params.top_p, _RETRY_TOP_P),
            repetition_penalty=max(params.repetition_penalty, _RETRY_PENALTY if "repetition" in first.flags else 1),
            max_new_tokens=min(params.max_new_tokens * longer, room),
        )


def _find_row_error(questions: Sequence[TaskRequest], outcomes: Sequence[Outcome]) -> RequestError | None:
    """Return the error of the first task if all tasks of a row failed."""
    first = outcomes[0]
    if isinstance(first, RequestError) and all(isinstance(outcome, RequestError) for outcome in outcomes):
        return RequestError(f"{questions[0].task.label}{first}")
    return None


def _parse_value(answer: Answer, text: str, finish_reason: FinishReason) -> tuple[Any, bool]:
    """Return the parsed value, and False if there is none: an invalid text, or a constrained one that was truncated."""
    if answer.constraint and finish_reason == "length":
        return None, False
    try:
        return answer.parse(text), True
    except ValueError:
        return None, False
