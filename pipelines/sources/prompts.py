"""Choose the prompts of each row: its own prompt, or those of the run filled with the row's columns."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ovis_model.wording import count_nouns
from pipelines import schema
from pipelines.config import SourceOptions
from pipelines.errors import NoValue, SourceError
from pipelines.media.reference import is_video
from pipelines.media.subtitles import TRACK_MARK, mark_subtitles, remove_subtitle_marks
from pipelines.sources.columns import name_value
from pipelines.sources.rows import Chunk, ColumnRoles, SourceRow, to_text
from pipelines.tasks.questionnaire import Questionnaire

SUBTITLES = "subtitles"
_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")
_SUBTITLES_ALONE = re.compile(rf"(?<!{{){{{SUBTITLES}}}(?!}})")
VIDEO_PROMPT = "Describe the video."  # replaces the default prompt, which is about an image

logger = logging.getLogger(__name__)


class PromptBuilder:
    """Builds the prompts of rows, and checks at the end that the requested columns exist."""

    def __init__(self, options: SourceOptions, questionnaire: Questionnaire) -> None:
        self._questionnaire = questionnaire
        self._templates = [
            Template(task.prompt, task.label or "--prompt ", task.place_label) for task in questionnaire.tasks
        ]
        names = frozenset[str]().union(*(template.names for template in self._templates))
        if options.subtitle_column is not None and SUBTITLES not in names:
            raise SourceError("--subtitle-column is for prompts with {subtitles}, and none has it")
        self.columns = ColumnRoles(
            id=options.id_column,
            image=options.image_column,
            prompt=questionnaire.prompt_column or None,
            subtitles=options.subtitle_column,
            keep=options.keep_columns,
            in_prompt=names.union(filter(None, [options.subtitle_column])) - {SUBTITLES},
        )
        self._is_subtitled = SUBTITLES in names
        self._names: set[str] = set()
        self._num_without_columns = self._num_text_only = 0
        self._notes: Counter[str] = Counter()

    def to_table(self, chunk: Chunk) -> pa.Table:
        """Return the rows with prompts in schema MANIFEST without `row`. Raise SourceError for a single brace."""
        if chunk.names:
            for template in self._templates:
                template.check()
            self._names |= chunk.names
            self._check_subtitles(chunk.names)
        else:
            self._num_without_columns += sum(not row.error for row in chunk.rows)
        if chunk.columns is not None:
            return self._complete(chunk.columns)
        self._num_text_only += sum(not row.images and self._has_own_prompt(row) and not row.error for row in chunk.rows)
        self._notes.update(note for row in chunk.rows for note in row.notes)
        chosen = [self._choose_prompts(row, has_columns=bool(chunk.names)) for row in chunk.rows]
        columns = {
            "id": [row.id for row in chunk.rows],
            "uri": [row.uri for row in chunk.rows],
            "images": [[image.to_struct() for image in row.images] for row in chunk.rows],
            "prompt": [self._questionnaire.layout.join_prompts(prompts) for prompts, _ in chosen],
            "has_own_prompt": [self._has_own_prompt(row) for row in chunk.rows],
            "error": [error for _, error in chosen],
        }
        return pa.table(columns, schema=schema.MANIFEST.remove(0))

    def _complete(self, plain: pa.Table) -> pa.Table:
        """Return plain rows with prompts in schema MANIFEST without `row`."""
        join = self._questionnaire.layout.join_prompts
        own = plain.column("prompt")
        has_own = own.is_valid() if self._questionnaire.prompt_column is not None else pa.repeat(False, len(plain))
        self._num_text_only += pc.sum(pc.equal(pc.list_value_length(plain.column("images")), 0)).as_py() or 0
        owned = pc.if_else(has_own, own, None).to_pylist()
        if self.columns.in_prompt:
            filled = zip(*(template.fill_columns(plain).to_pylist() for template in self._templates), strict=True)
            pairs = zip(owned, filled, strict=True)
            joined = [join(prompts) if prompt is None else join([prompt]) for prompt, prompts in pairs]
        else:
            usual = join([template.fill({}) for template in self._templates])
            joined = [usual if prompt is None else join([prompt]) for prompt in owned]
        columns = {
            **{name: plain.column(name) for name in ("id", "uri", "images")},
            "prompt": joined,
            "has_own_prompt": has_own,
            "error": pa.repeat("", len(plain)),
        }
        return pa.table(columns, schema=schema.MANIFEST.remove(0))

    def _choose_prompts(self, row: SourceRow, *, has_columns: bool) -> tuple[list[str], str]:
        """Return the prompts and the error of the row, "" if it has none."""
        if row.prompt is not None and self._has_own_prompt(row):
            return [remove_subtitle_marks(row.prompt)], row.error
        if any(map(is_video, row.images)) and self._questionnaire.has_default_prompt:
            return [VIDEO_PROMPT], row.error
        if row.error:
            return [template.text for template in self._templates], row.error
        if not has_columns:
            return [_SUBTITLES_ALONE.sub(TRACK_MARK, template.text) for template in self._templates], ""
        return self._fill_templates(row)

    def _fill_templates(self, row: SourceRow) -> tuple[list[str], str]:
        prompts, subtitles, error = [], "", ""
        try:
            subtitles = self._mark_subtitles(row)
        except ValueError as reason:
            error = f"column {self.columns.subtitles!r} holds neither SRT nor WebVTT: {reason}"
        for template in self._templates:
            try:
                prompts.append(template.fill(row.values, subtitles))
            except NoValue as name:
                prompts.append(template.text)
                error = error or f"{template.label}names the column {name.args[0]!r}, which is null in this row"
        return prompts, error

    def _mark_subtitles(self, row: SourceRow) -> str:
        """Return the mark of the row's subtitles. Raise ValueError if they cannot be read."""
        name = self.columns.subtitles
        return TRACK_MARK if name is None else mark_subtitles(to_text(row.values.get(name)))

    def _check_subtitles(self, names: frozenset[str]) -> None:
        """Raise SourceError if it is not clear whether {subtitles} is a column."""
        if self._is_subtitled and self.columns.subtitles is None and SUBTITLES in names:
            raise SourceError(
                f"the input has a column {SUBTITLES!r}: give --subtitle-column {SUBTITLES} if it holds SRT, or rename "
                "it and the name in the prompt; {subtitles} alone is the text track of a video"
            )

    def _has_own_prompt(self, row: SourceRow) -> bool:
        return self._questionnaire.prompt_column is not None and row.prompt is not None

    def finish(self) -> None:
        """Log the numbers of rows without image and with notes. Raise SourceError if no row has a requested column."""
        in_prompt = self.columns.in_prompt - {self.columns.subtitles}
        if self._num_text_only:
            without = count_nouns(self._num_text_only, "row without an image is", "rows without an image are")
            logger.warning("%s sent as text only", without)
        for note, count in self._notes.items():
            logger.warning("%s with %s", count_nouns(count, "row"), note)
        for template in () if self._names else self._templates:
            if named := ", ".join(
                dict.fromkeys(
                    match[0]
                    for match in _TOKEN.finditer(template.text)
                    if match[0] not in "{}" and match[1] != SUBTITLES
                )
            ):
                logger.warning(
                    "%sthe input has no columns, so the prompt's %s is sent as it is, braces included",
                    template.place,
                    named,
                )
        requested = self.columns.wanted.union(filter(None, [self.columns.image]))
        wanted = requested if self._names else requested - in_prompt
        if unknown := sorted(wanted - self._names):
            place = next((template.place for template in self._templates if template.names & {*unknown}), "")
            known = ", ".join(sorted(self._names)) or "none: files and tars without .json or .txt have no columns"
            raise SourceError(
                f"{place}the input has no column {', '.join(unknown)}; its columns: {known} "
                "(in prompts, write {{ and }} for braces)"
            )
        if self._names and self._num_without_columns and in_prompt:
            raise SourceError(
                f"--prompt names columns, but {count_nouns(self._num_without_columns, 'row comes', 'rows come')} from "
                "inputs without columns; process those inputs in a separate run"
            )


@dataclass(frozen=True)
class Template:
    """A prompt in which `{name}` means the row's value and `{{`, `}}` mean braces; nothing else is allowed in braces.

    Errors of rows begin with `label`, messages before the run with `place`, if it is known.
    """

    text: str
    label: str = "--prompt "
    place: str = ""

    @property
    def names(self) -> frozenset[str]:
        """The columns that the template names."""
        return frozenset(match[1] for match in _TOKEN.finditer(self.text) if match[1])

    def check(self) -> None:
        """Raise SourceError for a single brace."""
        if any(match[0] in ("{", "}") for match in _TOKEN.finditer(self.text)):
            raise SourceError(
                f"{self.place or self.label}{self.text!r} has a single brace; write {{{{ and }}}} for braces: {{name}} "
                "means the value of a column"
            )

    def fill(self, values: Mapping[str, Any], subtitles: str = TRACK_MARK) -> str:
        """Replace the names by their values, and {subtitles}. Raise NoValue if a value is null."""

        def replace_token(match: re.Match[str]) -> str:
            if match[1] == SUBTITLES:
                return subtitles
            return remove_subtitle_marks(_format_value(values, match[1])) if match[1] else match[0][0]

        return _TOKEN.sub(replace_token, self.text)

    def fill_columns(self, plain: pa.Table) -> pa.ChunkedArray:
        """Replace the names by the values of each of some plain rows."""
        parts: list[Any] = [pa.repeat("", len(plain))]
        at = 0
        for match in _TOKEN.finditer(self.text):
            named = TRACK_MARK if match[1] == SUBTITLES else match[1] and plain.column(name_value(match[1]))
            parts += [self.text[at : match.start()], match[0][0] if named is None else named]
            at = match.end()
        return pc.binary_join_element_wise(*parts, self.text[at:], "")


def _format_value(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    if value is None:
        raise NoValue(name)
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict | list) else str(value)
