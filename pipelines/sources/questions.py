"""What each row is asked: its own prompt, or --prompt with the row's columns in it."""

from __future__ import annotations

import logging

import pyarrow as pa

from pipelines import schema
from pipelines.config import CaptionConfig
from pipelines.sources.prompts import NoValue, Template
from pipelines.sources.rows import Chunk, Columns, Row, SourceError
from pipelines.sources.videos import is_video

VIDEO_PROMPT = "Describe the video."  # instead of the default for images

logger = logging.getLogger(__name__)


class Asker:
    """Gives each row its question, and notes what the columns turn out to be."""

    def __init__(self, config: CaptionConfig) -> None:
        self._config, self._template = config, Template(config.prompt)
        self.columns = Columns(
            id=config.id_column,
            image=config.image_column,
            prompt=config.prompt_column,
            keep=config.keep_columns,
            in_prompt=self._template.names,
        )
        self._names: set[str] = set()
        self._num_without_columns = self._num_text_only = 0

    def table(self, chunk: Chunk) -> pa.Table:
        """Schema MANIFEST without `row`."""
        if chunk.names:
            self._template.check()
            self._names |= chunk.names
        else:
            self._num_without_columns += sum(not row.error for row in chunk.rows)
        self._num_text_only += sum(not row.images and not row.error for row in chunk.rows)
        asked = [self._ask(row, has_columns=bool(chunk.names)) for row in chunk.rows]
        columns = {
            "id": [row.id for row in chunk.rows],
            "uri": [row.uri for row in chunk.rows],
            "images": [[image._asdict() for image in row.images] for row in chunk.rows],
            "prompt": [prompt for prompt, _ in asked],
            "has_own_prompt": [row.prompt is not None for row in chunk.rows],
            "error": [error for _, error in asked],
        }
        return pa.table(columns, schema=schema.MANIFEST.remove(0))

    def _ask(self, row: Row, *, has_columns: bool) -> tuple[str, str]:
        """The question and why it cannot be asked, if so."""
        error, text = row.error, row.prompt or self._default_prompt(row)
        if row.prompt is None and has_columns and text == self._config.prompt and not error:
            try:
                text = self._template.fill(row.values)
            except NoValue as name:
                error = f"--prompt names the column {name.args[0]!r}, which is empty in this row"
        return self._config.question(text), error

    def _default_prompt(self, row: Row) -> str:
        is_asked = "prompt" in self._config.model_fields_set
        return VIDEO_PROMPT if not is_asked and any(map(is_video, row.images)) else self._config.prompt

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
                "(in --prompt, {{ and }} stand for braces)"
            )
        if self._names and self._num_without_columns and self.columns.in_prompt:
            raise SourceError(
                f"--prompt names columns, and {self._num_without_columns} rows come from inputs that have none; "
                "caption those in a run of their own"
            )
