"""A prompt whose `{name}` stand for the columns of a row."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.errors import NoValue, SourceError

_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")


@dataclass(frozen=True)
class Template:
    """`{name}` is replaced by the row's value, `{{` and `}}` are braces. Nothing else is allowed in braces.

    `where` begins messages about it.
    """

    text: str
    where: str = "--prompt "

    @property
    def names(self) -> frozenset[str]:
        return frozenset(match[1] for match in _TOKEN.finditer(self.text) if match[1])

    def check(self) -> None:
        """Raises SourceError for a brace that is alone."""
        if any(match[0] in ("{", "}") for match in _TOKEN.finditer(self.text)):
            raise SourceError(
                f"{self.where}{self.text!r} holds a single brace; the input has columns, so {{name}} stands for one of "
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
