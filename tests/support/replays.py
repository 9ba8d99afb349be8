"""Capture and replay decode steps on a CPU: a replay simply calls the step."""

from __future__ import annotations

from collections.abc import Callable

from ovis_model.engine.decode_step import CudaGraphs, Decoded


class Replays(CudaGraphs):
    """CUDA graphs without CUDA that run each step twice, as a capture does: only a repeatable step can be replayed."""

    def _capture(self, run: Callable[[], Decoded]) -> Callable[[], Decoded]:
        return lambda: (run(), run())[1]


class Recorded:
    """A factory of `Replays` that remembers those it made."""

    def __init__(self) -> None:
        self.made: list[Replays] = []

    def __call__(self) -> Replays:
        self.made.append(Replays())
        return self.made[-1]
