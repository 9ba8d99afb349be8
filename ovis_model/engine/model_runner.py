"""Run the network on its cache, as the scheduler has decided. Knows no queue."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from itertools import chain, islice

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ovis_model.engine.decode_step import BatchStepper, StepRunner
from ovis_model.engine.kv_cache import Extend, KVCache, PagedKVCache, Prefill
from ovis_model.engine.prefix_sharing import Item
from ovis_model.engine.requests import RequestState
from ovis_model.engine.sampling import Choice, Sampler
from ovis_model.engine.scheduler import Budget, Move, Pages, Span, pad_into_passes
from ovis_model.engine.tile_loader import TileLoader, split_into_passes
from ovis_model.network.attention import PackedSequences
from ovis_model.network.ovis import Ovis
from ovis_model.network.uploads import upload
from ovis_model.types import IMAGE_ATOM_ID, SamplingParams

Masks = Future[NDArray[np.uint8]]
"""A future of the allowed next tokens of constrained requests; see `Guides.masks`."""


class ModelRunner:
    """Vision passes, prefill and decode steps with one cache. Its methods must be called in inference mode."""

    def __init__(self, model: Ovis, make_step_runner: Callable[[], StepRunner], tiles: TileLoader) -> None:
        self.model, self.tiles = model, tiles
        self._make_step_runner = make_step_runner
        self._stepper: BatchStepper | None = None
        self._decoding: list[RequestState] = []  # the requests of the last decode step, for which `_sampler` was made
        self._sampler: Sampler | None = None

    def allocate(self, slots: int, capacity: int, pages: Pages | None) -> None:
        """Replace the cache by an empty one of another size."""
        self.release_cache()
        config = self.model.shard.to_local(self.model.config.language)
        device, dtype = self.model.device, self.model.dtype
        if pages is None:
            cache = KVCache(config, slots=slots, capacity=capacity, device=device, dtype=dtype)
        else:
            size = pages.count, pages.page_tokens
            cache = PagedKVCache(config, *size, slots=slots, capacity=capacity, device=device, dtype=dtype)
        self._stepper = BatchStepper(self.model, cache, self._make_step_runner())

    def release_cache(self) -> None:
        """Free the cache and what was captured for it."""
        self._stepper = self._sampler = None
        self._decoding = []

    def move(self, moves: Iterable[Move], table: NDArray[np.int32] | None) -> None:
        """Copy cached tokens from slot to slot, or let the slots have the pages of another `table`."""
        for move in moves:
            self.stepper.cache.move(move.source, move.target, move.length)
        if table is not None:
            self.stepper.cache.set_table(table)

    def encode(self, items: Sequence[Item], max_tiles: int) -> None:
        """Compute the visual embeddings [tokens, hidden_size] of items, in passes of up to `max_tiles` tiles.

        A pass may hold tiles of several items.
        """
        parts = [_make_empty_embeddings(self.model)]
        for pieces in split_into_passes(items, max_tiles):
            pixels = self.model.normalize(*self.tiles.load(pieces))
            parts.append(self.model.encode_tiles(pixels).flatten(0, 1))
        counts = [len(item.tiles) * self.model.config.vision.tokens_per_tile for item in items]
        for item, visual in zip(items, torch.split(torch.cat(parts), counts), strict=True):
            item.visual, item.sent = visual, None

    def prefill(self, group: list[Span], masks: Masks | None) -> Choice | None:
        """Run the spans and keep their tokens; return the first token of each request without choices."""
        last = [(index, len(span.ids) - 1) for index, span in enumerate(group) if not span.state.params.choices]
        hidden = self.run_spans(group, last)
        if not last:
            return None
        logits = self.model.llm.compute_logits(hidden)
        return self.broadcast_choice(
            _make_sampler(self.model, [group[index].state for index, _ in last])(logits, masks)
        )

    def decode(self, states: Sequence[RequestState], masks: Masks | None) -> Choice:
        """Run one decode step; return the next token of each request. Request i is in slot i."""
        lengths = [state.num_cached for state in states]
        if self._sampler is None or states != self._decoding:
            self._sampler, self._decoding = _make_sampler(self.model, states), [*states]
            self.stepper.load([state.output_ids[-1] for state in states], lengths)
        logits, greedy = self.stepper.step(len(states), max(lengths))
        choice = self.broadcast_choice(greedy if self._sampler.is_greedy else self._sampler(logits, masks))
        self.stepper.advance(choice.ids)
        return choice

    def run_spans(self, group: list[Span], places: Sequence[tuple[int, int]]) -> Tensor:
        """Run the decoder on spans; return hidden states [n, hidden_size] at n (span, time) places.

        Either all spans are whole prompts, or none is.
        """
        run = self._run_prompts if group[0].is_whole_prompt else self._run_rests
        return run(group, places)

    def _run_prompts(self, group: list[Span], places: Sequence[tuple[int, int]]) -> Tensor:
        """Run whole prompts, which stand next to each other in one row of tokens."""
        sizes = [len(span.ids) for span in group]
        starts = np.concatenate(([0], np.cumsum(sizes)))
        ids, slots, positions, at, lengths, offsets = upload(
            self.model.device,
            _concatenate_ids(group),
            np.repeat(np.array([span.target for span in group], np.int64), sizes),
            np.concatenate([np.arange(size, dtype=np.int64) for size in sizes]),
            np.array([starts[index] + time for index, time in places], np.int64),
            np.array(sizes, np.int32),
            starts.astype(np.int32),
        )
        visual = [_make_empty_embeddings(self.model), *(span.state.item.visual for span in group)]
        wanted, found = sum(int((span.ids == IMAGE_ATOM_ID).sum()) for span in group), sum(map(len, visual))
        assert wanted == found, f"{wanted} placeholders for {found} visual tokens"
        embeds = self.model.embed(ids, torch.cat(visual))[None]
        context = Prefill(self.stepper.cache, slots, positions, PackedSequences(tuple(sizes), lengths, offsets))
        hidden: Tensor = self.model.llm.model(embeds, positions[None], context)
        return hidden[0, at]

    def _run_rests(self, group: list[Span], places: Sequence[tuple[int, int]]) -> Tensor:
        """Run what follows cached tokens, padded on the right; either all spans have a target or none has."""
        width, longest = max(len(span.ids) for span in group), max(span.start for span in group)
        ids, starts, sources, targets, at = upload(
            self.model.device,
            _concatenate_ids(group),
            *(np.array([getattr(span, name) for span in group], np.int64) for name in ("start", "source")),
            np.array([span.target for span in group if span.target is not None], np.int64),
            np.array([index * width + time for index, time in places], np.int64),
        )
        parts = torch.split(self.model.llm.model.embed_tokens(ids), [len(span.ids) for span in group])
        embeds = pad_sequence(list(parts), batch_first=True)
        kept = targets if len(targets) else None
        context = Extend(self.stepper.cache, sources, starts, longest, width, kept)
        position_ids = starts[:, None] + torch.arange(width, device=ids.device)
        hidden: Tensor = self.model.llm.model(embeds, position_ids, context)
        return hidden.flatten(0, 1)[at]

    def broadcast_choice(self, choice: Choice) -> Choice:
        """Replace the ids by those of rank 0, so that all ranks continue with the same tokens."""
        return Choice(self.model.shard.broadcast(choice.ids), choice.logprobs)

    @property
    def stepper(self) -> BatchStepper:
        """The decode steps over the allocated cache."""
        assert self._stepper is not None, "the cache is not allocated"
        return self._stepper


def _concatenate_ids(group: Sequence[Span]) -> NDArray[np.int64]:
    return np.concatenate([span.ids for span in group]).astype(np.int64)


def _make_empty_embeddings(model: Ovis) -> Tensor:
    return model.vte.weight.new_empty(0, model.config.language.hidden_size)


def _make_sampler(model: Ovis, states: Sequence[RequestState]) -> Sampler:
    params, streams = [state.params for state in states], [state.stream for state in states]
    output_ids = [state.output_ids for state in states]
    return Sampler(params, streams, model.config.language.vocab_size, model.device, output_ids)


def answer_choices(runner: ModelRunner, prompts: Sequence[Span], budget: Budget) -> None:
    """Finish the requests with choices: score each choice after the prompt, which is in the request's slot."""
    choice_of = {span: choice for prompt in prompts for span, choice in _make_choice_spans(prompt)}
    logliks: dict[Span, float] = {}
    for group in pad_into_passes(choice_of, budget.prefill_tokens):
        logliks.update(zip(group, _score(runner, group, [choice_of[span] for span in group], budget), strict=True))
    of_states: dict[RequestState, list[float]] = {}
    for span in choice_of:
        of_states.setdefault(span.state, []).append(logliks[span])
    for state, index in zip(of_states, _draw(runner, of_states), strict=True):
        state.choose(index, np.array(of_states[state]))


def _make_choice_spans(prompt: Span) -> Iterator[tuple[Span, tuple[int, ...]]]:
    """Yield each choice of a request with the span of tokens that predict it."""
    ids, slot = prompt.state.request.input_ids, prompt.target
    assert slot is not None, "a prompt has no slot"
    for choice in prompt.state.params.choices:
        yield Span(prompt.state, np.array([ids[-1], *choice[:-1]], np.int32), len(ids) - 1, slot), choice


def _score(runner: ModelRunner, group: list[Span], choices: Sequence[Sequence[int]], budget: Budget) -> list[float]:
    """Return the natural-log likelihoods of `choices`; each span ends with all tokens of its choice but the last."""
    places = [(index, place) for index, choice in enumerate(choices) for place in range(len(choice))]
    hidden = runner.run_spans(group, places)
    [wanted] = upload(hidden.device, np.array(list(chain.from_iterable(choices)), np.int64))
    losses = []
    for part, ids in zip(torch.split(hidden, budget.slots), torch.split(wanted, budget.slots), strict=True):
        losses.append(F.cross_entropy(runner.model.llm.compute_logits(part).float(), ids, reduction="none"))
    each = iter(torch.cat(losses).tolist())
    return [-sum(islice(each, len(choice))) for choice in choices]


def _draw(runner: ModelRunner, logliks: dict[RequestState, list[float]]) -> list[int]:
    if not logliks:
        return []
    ids: list[int] = runner.broadcast_choice(sample_choices(logliks)).ids.tolist()
    return ids


def sample_choices(logliks: Mapping[RequestState, Sequence[float]]) -> Choice:
    """Return as ids the index of each request's choice: the most probable, or a draw from its random stream.

    `logliks` are the log-likelihoods of all choices of each request.
    """
    params = [SamplingParams(temperature=state.params.temperature, logprobs=False) for state in logliks]
    scores = pad_sequence([torch.tensor(each) for each in logliks.values()], True, -math.inf)
    return Sampler(params, [state.stream for state in logliks], scores.shape[1], scores.device)(scores)
