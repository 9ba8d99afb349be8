"""The decode step over buffers that never move, so that it can be captured as a CUDA graph and replayed.

On a GPU a step of a small model is mostly launches of its kernels, some thirty a layer; a captured step is one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ovis_model.engine.kv_cache import DecodeStep, KVCache
from ovis_model.engine.sampling import Choice, choose_greedily
from ovis_model.network.ovis import Ovis


class Decoded(NamedTuple):
    """logits [B, vocab] and what greedy rows choose. The next step may overwrite them."""

    logits: Tensor
    greedy: Choice


Step = Callable[[int, int], Decoded]
"""Runs one step, given the rows and the maximum tokens in the cache; it uses the same buffers each time."""


StepRunner = Callable[[Step, int, int, KVCache], Decoded]
"""Runs a step over at least so many rows and cached tokens; called under inference mode."""


def run_eagerly(step: Step, rows: int, longest: int, cache: KVCache) -> Decoded:
    """Run the step in exactly the shape that is needed: all that pays on a CPU."""
    return step(rows, longest)


class CudaGraphs:
    """One graph per bucket of rows and, for attention that reads masked places, of lengths; captured when needed."""

    def __init__(self) -> None:
        self._replays: dict[tuple[int, int], Callable[[], Decoded]] = {}
        self._pool: Any = None

    def __call__(self, step: Step, rows: int, longest: int, cache: KVCache) -> Decoded:
        shape = round_up_rows(rows, cache.slots), round_up_length(longest, cache)
        if shape not in self._replays:
            self._replays[shape] = self._capture(lambda: step(*shape))
        return self._replays[shape]()

    def _capture(self, run: Callable[[], Decoded]) -> Callable[[], Decoded]:
        """Capture a graph. All share their memory: one runs at a time, and its results are used before the next."""
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()  # libraries allocate their workspaces, which a capture may not
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": work of other threads on the device must not end the capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            decoded = run()
        self._pool = self._pool or graph.pool()

        def replay() -> Decoded:
            graph.replay()
            return decoded

        return replay


def round_up_rows(rows: int, slots: int) -> int:
    """Round up to 1, 2, 4, 8 or a multiple of 8: at most seven rows of a step are padding."""
    return min(1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 8) * 8, slots)


def round_up_length(longest: int, cache: KVCache, step: int = 512) -> int:
    """Round up to a multiple of `step`; to all of the cache if attention reads only what a row holds anyway."""
    maximum = cache.capacity - 1
    return maximum if cache.attention_reads_lengths else min(-(-longest // step) * step, maximum)


class BatchStepper:
    """Takes the rows in the first slots of a cache from one token to the next.

    The newest token of each row and the number of tokens before it stay on the device: while no row enters or leaves,
    a step needs nothing from the host.
    """

    def __init__(self, model: Ovis, cache: KVCache, run: StepRunner = run_eagerly) -> None:
        self.cache = cache
        self._model, self._run = model, run
        self._state = torch.zeros(2, cache.slots, dtype=torch.int64, device=model.device)

    def load(self, ids: Sequence[int], lengths: Sequence[int]) -> None:
        """Set the newest token of each row, and how many tokens the cache holds before it."""
        # A slot without a row counts as empty: a bucket that takes it in touches its first place only.
        padding = [0] * (self.cache.slots - len(ids))
        self._state.copy_(torch.tensor([[*ids, *padding], [*lengths, *padding]]))

    def step(self, rows: int, longest: int) -> Decoded:
        """Run a step for the first `rows` slots, none of which holds more than `longest` tokens."""
        logits, greedy = self._run(self._step, rows, longest, self.cache)
        return Decoded(logits[:rows], Choice(greedy.ids[:rows], greedy.logprobs[:rows]))

    def advance(self, ids: Tensor) -> None:
        """Make `ids` (int64[B]) the newest tokens of the rows."""
        self._state[0, : len(ids)] = ids
        self._state[1, : len(ids)] += 1

    def _step(self, rows: int, longest: int) -> Decoded:
        ids, lengths = self._state[:, :rows]
        embeds = self._model.llm.model.embed_tokens(ids[:, None])
        context = DecodeStep(self.cache, lengths, longest)
        logits = self._model.llm.compute_logits(self._model.llm.model(embeds, lengths[:, None], context)[:, -1])
        return Decoded(logits, choose_greedily(logits))
