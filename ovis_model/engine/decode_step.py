"""Run decode steps over buffers at fixed addresses, so that a step can be captured as a CUDA graph and replayed.

On a GPU, a step of a small model mostly launches kernels, about thirty per layer. A captured step is one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ovis_model.engine.kv_cache import KVCache
from ovis_model.engine.sampling import Choice, choose_greedily
from ovis_model.network.ovis import Ovis
from ovis_model.network.uploads import upload


class Decoded(NamedTuple):
    """Logits [B, vocab_size] and the greedy choice. The next step may overwrite them."""

    logits: Tensor
    greedy: Choice


Step = Callable[[int, int], Decoded]
"""One step, given the number of sequences and the maximum of cached tokens; it uses the same buffers each time."""


StepRunner = Callable[[Step, int, int, KVCache], Decoded]
"""A function that runs a step for at least so many sequences and cached tokens; called in inference mode."""


def run_eagerly(step: Step, rows: int, longest: int, cache: KVCache) -> Decoded:
    """Run the step in exactly the shape needed, without a graph. On a CPU nothing else pays off."""
    return step(rows, longest)


class CudaGraphs:
    """One CUDA graph per bucket of batch sizes and lengths, captured on first use.

    If attention reads no masked positions, all lengths are in one bucket. All graphs are captured on one stream,
    because libraries keep a workspace per stream. They share their memory, and one buffer holds the results.
    """

    def __init__(self) -> None:
        self._graphs: dict[tuple[int, int], Callable[[], object]] = {}
        self._results: Decoded | None = None
        self._pool: Any = None
        self._stream: Any = None

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """The buckets captured so far: (rows, longest)."""
        return list(self._graphs)

    def __call__(self, step: Step, rows: int, longest: int, cache: KVCache) -> Decoded:
        """Replay the graph of the bucket; capture it first if needed."""
        shape = round_up_rows(rows, cache.slots), round_up_length(longest, cache)
        if shape not in self._graphs:
            self._graphs[shape] = self._capture(lambda: self._keep(step(*shape), cache.slots))
        self._graphs[shape]()
        assert self._results is not None, "no graph has run"
        return self._results

    def _keep(self, decoded: Decoded, slots: int) -> None:
        """Copy the result of a step to the buffer for all graphs, so that none keeps its own in memory."""
        if self._results is None:
            self._results = _make_results(decoded, slots)
        for kept, new in zip(_list_tensors(self._results), _list_tensors(decoded), strict=True):
            kept[: len(new)].copy_(new)

    def _capture(self, run: Callable[[], None]) -> Callable[[], object]:
        """Capture a graph and return its replay."""
        current = torch.cuda.current_stream()
        self._stream = self._stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()  # libraries allocate their workspaces now, because a capture must not allocate
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": work of other threads on the device must not abort the capture.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            run()
        self._pool = self._pool or graph.pool()
        return graph.replay


def _make_results(like: Decoded, slots: int) -> Decoded:
    logits, ids, logprobs = (x.new_empty(slots, *x.shape[1:]) for x in _list_tensors(like))
    return Decoded(logits, Choice(ids, logprobs))


def _list_tensors(decoded: Decoded) -> tuple[Tensor, Tensor, Tensor]:
    return decoded.logits, decoded.greedy.ids, decoded.greedy.logprobs


def round_up_rows(rows: int, slots: int) -> int:
    """Round up to 1, 2, 4, 8 or a multiple of 8, at most `slots`, so that at most seven rows of a step are padding."""
    return min(1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 8) * 8, slots)


def round_up_length(longest: int, cache: KVCache, step: int = 512) -> int:
    """Round up to a multiple of `step`, or to the whole cache if attention reads only the tokens of a sequence."""
    maximum = cache.capacity - 1
    return maximum if cache.attention_reads_lengths else min(-(-longest // step) * step, maximum)


class BatchStepper:
    """Decode steps for the sequences in the first slots of a cache.

    The newest token of each sequence and the number of tokens before it stay on the device. While no sequence enters or
    leaves, a step needs no data from the host.
    """

    def __init__(self, model: Ovis, cache: KVCache, run: StepRunner = run_eagerly) -> None:
        self.cache = cache
        self._model, self._run = model, run
        self._state = torch.zeros(2, cache.slots, dtype=torch.int64, device=model.device)

    def load(self, ids: Sequence[int], lengths: Sequence[int]) -> None:
        """Set the newest token of each sequence and the number of cached tokens before it."""
        # A slot without a sequence counts as empty: a bucket that includes it changes only its first position.
        state = np.zeros((2, self.cache.slots), np.int64)
        state[:, : len(ids)] = ids, lengths
        [uploaded] = upload(self._state.device, state)
        self._state.copy_(uploaded)

    def step(self, rows: int, longest: int) -> Decoded:
        """Run a step for the first `rows` slots, each of which holds at most `longest` tokens."""
        logits, greedy = self._run(self._step, rows, longest, self.cache)
        return Decoded(logits[:rows], Choice(greedy.ids[:rows], greedy.logprobs[:rows]))

    def advance(self, ids: Tensor) -> None:
        """Make `ids` (int64[B]) the newest tokens of the sequences."""
        self._state[0, : len(ids)] = ids
        self._state[1, : len(ids)] += 1

    def _step(self, rows: int, longest: int) -> Decoded:
        ids, lengths = self._state[:, :rows]
        embeds = self._model.llm.model.embed_tokens(ids[:, None])
        context = self.cache.begin_step(lengths, longest)
        logits = self._model.llm.compute_logits(self._model.llm.model(embeds, lengths[:, None], context)[:, -1])
        return Decoded(logits, choose_greedily(logits))
