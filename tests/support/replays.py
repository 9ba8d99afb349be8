"""Capture and replay decode steps on a CPU: a replay simply calls the step."""

from __future__ import annotations

from collections.abc import Callable

from ovis_model.engine.decode_step import CudaGraphs


class Replays(CudaGraphs):
    """CUDA graphs without CUDA that run each step twice, as a capture does: only a repeatable step can be replayed."""

    def _capture(self, run: Callable[[], None]) -> Callable[[], object]:
        return lambda: (run(), run())


class Recorded:
    """A factory of `Replays` that remembers those it made."""

    def __init__(self) -> None:
        self.made: list[Replays] = []

    def __call__(self) -> Replays:
        self.made.append(Replays())
        return self.made[-1]
