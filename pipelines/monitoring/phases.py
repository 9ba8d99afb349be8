"""Measure how long each phase of a run takes."""

from __future__ import annotations

import time
from typing import Literal

Phase = Literal["list", "start", "load", "rows", "check"]
"""Checks and listing; Ray and the plan; until the first row; until the last row; reading back what is written."""


class Phases:
    """The seconds of each phase; the first begins with this object."""

    def __init__(self) -> None:
        self._now: Phase = "list"
        self._since_s = time.monotonic()
        self._seconds: dict[Phase, float] = {}

    def begin(self, phase: Phase) -> None:
        """End the current phase and begin another, unless it is the same."""
        self._seconds = self.read()
        self._now, self._since_s = phase, time.monotonic()

    def read(self) -> dict[Phase, float]:
        """Return {phase: seconds so far}."""
        passed_s = time.monotonic() - self._since_s
        return {**self._seconds, self._now: self._seconds.get(self._now, 0.0) + passed_s}
