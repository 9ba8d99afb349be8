"""Choose the prompts of each row: its own, or those of the run with the columns of the row filled in."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines import schema
from pipelines.config import SourceOptions
from pipelines.errors import NoValue, SourceError
from pipelines.media.reference import is_video
from pipelines.sources.rows import Chunk, ColumnRoles, SourceRow
from pipelines.tasks.questionnaire import Questionnaire

_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")
VIDEO_PROMPT = "Describe the video."  # instead of the default for images

logger = logging.getLogger(__name__)


class PromptBuilder:
    """Gives each row its question, and notes what the columns turn out to be."""

    def __init__(self, options: SourceOptions, questionnaire: Questionnaire) -> None:
        self._questionnaire = questionnaire
        self._templates = [Template(task.prompt, task.label or "--prompt ") for task in questionnaire.tasks]
        self.columns = ColumnRoles(
            id=options.id_column,
            image=options.image_column,
            prompt=questionnaire.prompt_column or None,
            keep=options.keep_columns,
            in_prompt=frozenset[str]().union(*(template.names for template in self._templates)),
        )
        self._names: set[str] = set()
        self._num_without_columns = self._num_text_only = 0

    def to_table(self, chunk: Chunk) -> pa.Table:
        """Schema MANIFEST without `row`."""
        if chunk.names:
            for template in self._templates:
                template.check()
            self._names |= chunk.names
        else:
            self._num_without_columns += sum(not row.error for row in chunk.rows)
        self._num_text_only += sum(not row.images and self._has_own_prompt(row) and not row.error for row in chunk.rows)
        asked = [self._asked(row, has_columns=bool(chunk.names)) for row in chunk.rows]
        columns = {
            "id": [row.id for row in chunk.rows],
            "uri": [row.uri for row in chunk.rows],
            "images": [[image.to_struct() for image in row.images] for row in chunk.rows],
            "prompt": [self._questionnaire.layout.join_prompts(prompts) for prompts, _ in asked],
            "has_own_prompt": [self._has_own_prompt(row) for row in chunk.rows],
            "error": [error for _, error in asked],
        }
        return pa.table(columns, schema=schema.MANIFEST.remove(0))

    def _asked(self, row: SourceRow, *, has_columns: bool) -> tuple[list[str], str]:
        """The questions and why they cannot be asked, if so."""
        if row.prompt is not None and self._has_own_prompt(row):
            return [row.prompt], row.error
        if any(map(is_video, row.images)) and self._questionnaire.has_default_prompt:
            return [VIDEO_PROMPT], row.error
        if row.error or not has_columns:
            return [template.text for template in self._templates], row.error
        return self._filled(row)

    def _filled(self, row: SourceRow) -> tuple[list[str], str]:
        prompts, error = [], ""
        for template in self._templates:
            try:
                prompts.append(template.fill(row.values))
            except NoValue as name:
                prompts.append(template.text)
                error = error or f"{template.label}names the column {name.args[0]!r}, which is empty in this row"
        return prompts, error

    def _has_own_prompt(self, row: SourceRow) -> bool:
        return self._questionnaire.prompt_column is not None and row.prompt is not None

    def finish(self) -> None:
        """Raises SourceError for columns that no row has."""
        if self._num_text_only:
            logger.warning("%d rows have no image and are asked as text", self._num_text_only)
        named = self.columns.wanted.union(filter(None, [self.columns.image]))
        wanted = named if self._names else named - self.columns.in_prompt
        if unknown := sorted(wanted - self._names):
            known = ", ".join(sorted(self._names)) or "none: files and tars without .json or .txt have no columns"
            raise SourceError(
                f"the input has no column {', '.join(unknown)}; its columns: {known} "
                "(in prompts, {{ and }} stand for braces)"
            )
        if self._names and self._num_without_columns and self.columns.in_prompt:
            raise SourceError(
                f"--prompt names columns, and {self._num_without_columns} rows come from inputs that have none; "
                "caption those in a run of their own"
            )


@dataclass(frozen=True)
class Template:
    """`{name}` is replaced by the row's value, `{{` and `}}` are braces. Nothing else is allowed in braces.

    `label` begins messages about it.
    """

    text: str
    label: str = "--prompt "

    @property
    def names(self) -> frozenset[str]:
        return frozenset(match[1] for match in _TOKEN.finditer(self.text) if match[1])

    def check(self) -> None:
        """Raises SourceError for a brace that is alone."""
        if any(match[0] in ("{", "}") for match in _TOKEN.finditer(self.text)):
            raise SourceError(
                f"{self.label}{self.text!r} holds a single brace; the input has columns, so {{name}} stands for one of "
                "them: write {{ and }} for braces"
            )

    def fill(self, values: Mapping[str, Any]) -> str:
        """Raises NoValue."""
        return _TOKEN.sub(lambda match: _shown(values, match[1]) if match[1] else match[0][0], self.text)


def _shown(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    if value is None:
        raise NoValue(name)
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict | list) else str(value)
