"""Record metrics as JSON lines: one object per line, by step. A resumed run continues where its checkpoint stands."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from pipelines.storage import store

Metrics = dict[str, Any]
"""Values of one step: `step` and `kind` ("train", "eval" or "sample"), and what was measured."""


class MetricLog:
    """The lines of OUTPUT/metrics.jsonl, in memory and in the file."""

    def __init__(self, output: str, *, until_step: int) -> None:
        """Read the lines of an earlier run up to a step; what it did after its last checkpoint is done again."""
        self._uri = store.join(output, "metrics.jsonl")
        found = _read_lines(self._uri) if store.find_file(self._uri) else []
        self.lines: list[Metrics] = [line for line in found if line["step"] <= until_step]
        self._is_changed = len(found) != len(self.lines)

    def add(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Append lines; `write` makes them last."""
        added = [dict(line) for line in lines]
        self.lines += added
        self._is_changed = self._is_changed or bool(added)

    def write(self) -> None:
        """Write the file if it has changed, as a whole: a store cannot append. Raise OSError or StoreFault."""
        if self._is_changed:
            text = "".join(f"{json.dumps(_replace_infinite(line), ensure_ascii=False)}\n" for line in self.lines)
            store.write_bytes(self._uri, text.encode())
            self._is_changed = False

    def list_points(self, name: str) -> list[tuple[int, float]]:
        """Return (step, value) for each line that has a finite value of this name."""
        pairs = ((line["step"], line.get(name)) for line in self.lines)
        return [(step, value) for step, value in pairs if isinstance(value, int | float) and math.isfinite(value)]


def _read_lines(uri: str) -> list[Metrics]:
    return [json.loads(line) for line in store.read_bytes(uri).splitlines() if line.strip()]


def _replace_infinite(line: Metrics) -> Metrics:
    """Return the line with null for values that JSON has not."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
