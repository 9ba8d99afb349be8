"""Decode steps that are captured and replayed on a CPU: a capture only calls again."""

from __future__ import annotations

from collections.abc import Callable

from ovis_model.engine.decode_step import CudaGraphs, Decoded


class Replays(CudaGraphs):
    """Runs everything twice: a capture does so too, and a step that is not the same again cannot be replayed."""

    def _capture(self, run: Callable[[], Decoded]) -> Callable[[], Decoded]:
        return lambda: (run(), run())[1]


class Recorded:
    """Makes `Replays` and keeps them."""

    def __init__(self) -> None:
        self.made: list[Replays] = []

    def __call__(self) -> Replays:
        self.made.append(Replays())
        return self.made[-1]
