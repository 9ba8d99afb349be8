"""Describe starts, deaths and retries of actors, one structured line each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime


@dataclass(frozen=True)
class Event:
    """A start, death or retry of an actor of a stage; `fields` say where and why."""

    kind: str
    stage: str
    at: str
    fields: Mapping[str, str | int]

    def __str__(self) -> str:
        """Format the event as `name=value` pairs; values with spaces are quoted as in JSON."""
        values = {"event": self.kind, "stage": self.stage, **self.fields, "at": self.at}
        return " ".join(f"{name}={_quote(value)}" for name, value in values.items() if value != "")


def make_event(kind: str, stage: str, fields: Mapping[str, str | int]) -> Event:
    """Return an event of now, in UTC."""
    return Event(kind, stage, datetime.now(UTC).isoformat(timespec="milliseconds"), fields)


def _quote(value: str | int) -> str:
    text = str(value)
    return text if text and not set(text) & set(' "=\n\t') else json.dumps(text, ensure_ascii=False)
