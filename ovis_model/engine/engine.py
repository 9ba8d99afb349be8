"""Generation with row replacement: a finished row leaves and the next one enters at the next step.

Knows token ids only: no prompts, no pictures.
"""

from __future__ import annotations

import math
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from time import perf_counter
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ovis_model.checkpoint import fetch_checkpoint
from ovis_model.config import OvisConfig
from ovis_model.engine.decode_step import CudaGraphs, Decoder, Runner, run_eagerly
from ovis_model.engine.kv_cache import Extend, KVCache, Prefill
from ovis_model.engine.memory_plan import describe, halved, plan_for
from ovis_model.engine.prefix_sharing import Item
from ovis_model.engine.rank_pool import TensorParallelEngine
from ovis_model.engine.sampling import Choice, Sampler
from ovis_model.engine.scheduler import Budget, Row, Scheduler, Span, after_prompt, passes, rows_of
from ovis_model.grammar.guides import Guide, Guides
from ovis_model.network.attention import Memory
from ovis_model.network.ovis import Ovis
from ovis_model.network.weights import load_model
from ovis_model.tokenizer import cut_at_stop, detokenize, load_tokenizer
from ovis_model.types import (
    IMAGE_ATOM_ID,
    IMAGE_END_ID,
    Completion,
    EngineDied,
    FinishReason,
    Request,
    RequestError,
    SamplingParams,
)

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16"]


# The CUDA libraries' faults come as plain RuntimeErrors.
_DEVICE_FAULT = re.compile(r"CUDA error|CUBLAS_STATUS|CUDNN_STATUS")


@dataclass
class Stats:
    """Of all work so far. `row_steps` counts the rows of each decode step, `slot_steps` the slots there were."""

    vision_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    tiles: int = 0
    prompt_tokens: int = 0
    steps: int = 0
    row_steps: int = 0
    slot_steps: int = 0


class OvisEngine:
    """One replica of the model on one device. See `types.Engine`."""

    def __init__(
        self,
        model: Ovis,
        *,
        tokenizer: Tokenizer | None = None,
        budget: Budget | None = None,
        make_runner: Callable[[], Runner] | None = None,
    ) -> None:
        """`make_runner`: how decode steps are run; by default from CUDA graphs on CUDA and eagerly on a CPU."""
        self.model = model
        self.config: OvisConfig = model.config
        self.stats = Stats()
        self._budget = budget or plan_for(model.config, model.dtype, model.device, model.shard)
        self._scheduler = Scheduler(self._budget)
        self._tokenizer = tokenizer  # for stop strings and constraints only
        self._guides = (
            Guides(tokenizer, self.config.language.vocab_size, self.config.eos_token_ids) if tokenizer else None
        )
        self._decoder: Decoder | None = None
        self._sampler: Sampler | None = None
        self._make_runner = make_runner or (CudaGraphs if model.device.type == "cuda" else lambda: run_eagerly)
        self._lock = threading.Lock()
        self._fault: BaseException | None = None

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str,
        device: Device = "auto",
        dtype: Dtype = "auto",
        tensor_parallel: int = 1,
        post_trunk_norm: bool = False,
        *,
        revision: str | None = None,
    ) -> OvisEngine | TensorParallelEngine:
        """Load "demo", a directory, a hub id or a URI. `auto` is CUDA in bfloat16 if there is one, else CPU in float32.

        With `tensor_parallel` the model is loaded by that many processes of this machine, which end with the engine.
        Raises CheckpointError, ConfigError or WeightsError, all ValueErrors that say what to do.
        """
        if tensor_parallel != 1:
            return TensorParallelEngine(
                path_or_id,
                tensor_parallel=tensor_parallel,
                device=device,
                dtype=dtype,
                post_trunk_norm=post_trunk_norm,
                revision=revision,
            )
        target = torch_device(device)
        directory = fetch_checkpoint(path_or_id, revision)
        model = load_model(directory, device=target, dtype=model_dtype(dtype, target), post_trunk_norm=post_trunk_norm)
        engine = cls(model, tokenizer=load_tokenizer(directory))
        if target.type == "cuda":  # on a CPU there is nothing to capture, and it would take minutes
            engine.warm_up()
        print(f"{path_or_id} on {target}: {engine.describe()}", file=sys.stderr)
        return engine

    def describe(self) -> str:
        """What it may hold at once."""
        return describe(self.config, self.model.dtype, self._scheduler.budget, self.model.pass_dtype)

    def warm_up(self) -> None:
        """Generate for the most rows, tiles and prompt tokens at once, then for one row less a step.

        So memory runs out here if it ever does, and all buckets of rows are captured.
        """
        tile = np.zeros((1, 3, self.config.vision.image_size, self.config.vision.image_size), np.uint8)
        ids = np.full(self.config.vision.tokens_per_tile, IMAGE_ATOM_ID, np.int32)
        size = np.array([tile.shape[2:]], np.int32)
        rows = min(self._budget.slots, self._budget.kv_tokens // (len(ids) + self._budget.slots + 1))
        requests = [Request(ids, tile[:], size) for _ in range(rows)]  # views: no two are of one item
        self.generate(requests, [SamplingParams(max_new_tokens=n) for n in range(rows + 1, 1, -1)])
        self.stats = Stats()

    def generate(
        self, requests: Sequence[Request], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """Completions in the order of `requests`; `params` for all of them or one for each.

        Of requests with the very same array of tiles, vision runs once, and so does what their prompts begin with.
        In float32 a row's tokens are those that it gets alone. Several threads may call at once: their rows run side
        by side, so that the last rows of one call do not leave slots empty. Raises RequestError if a request can
        never be generated, EngineDied when the device is lost.
        """
        rows = self.enqueue(requests, params)
        for row in rows:
            while not row.has_left:
                self.step()
        return [row.completion() for row in rows]

    def enqueue(self, requests: Sequence[Request], params: SamplingParams | Sequence[SamplingParams]) -> list[Row]:
        """Let `requests` wait for the next steps. Raises as `generate`."""
        each = [params] * len(requests) if isinstance(params, SamplingParams) else params
        if len(each) != len(requests):
            raise ValueError(f"{len(each)} sampling parameters for {len(requests)} requests; give one, or one for each")
        rows = rows_of(requests, each)
        for index, row in enumerate(rows):
            self._check(index, row)
            row.guide = self._guide(row.params)
        with self._lock:
            self._scheduler.enqueue(rows)
        return rows

    def step(self) -> None:
        """Whichever thread has the lock takes a step, for its own rows and for those of the others."""
        with self._lock:
            if self._fault is not None:
                raise self._fault
            try:
                self._step_within_memory()
            except Exception as fault:
                self._fault = fault  # the state of the rows is unknown now, to all threads
                raise
            except BaseException:  # Ctrl-C: the engine is whole, its rows are not
                self.abandon_rows()
                raise

    def _check(self, index: int, row: Row) -> None:
        self._check_prompt(index, row.request)
        prompt, output = row.num_prompt_tokens, row.max_new_tokens
        limit = min(self.config.max_length, self._budget.kv_tokens)
        if prompt + output > limit:
            raise RequestError(
                f"request {index}: {prompt} prompt + {output} output tokens are {prompt + output - limit} over the "
                f"limit of {limit}"
            )
        tokens, what = (prompt + output, "prompt and choice") if row.params.choices else (prompt, "prompt")
        if tokens > self._budget.prompt_tokens:
            raise RequestError(
                f"request {index}: {tokens} {what} tokens are {tokens - self._budget.prompt_tokens} over the "
                f"{self._budget.prompt_tokens} that the device has memory for"
            )
        self._check_choices(index, row)
        if (row.params.stop or row.params.constraint) and self._tokenizer is None:
            raise ValueError("stop strings and constraints need a tokenizer: give OvisEngine one")

    def _guide(self, params: SamplingParams) -> Guide | None:
        """Its grammar is compiled from now on, beside what is done before the row's first token is chosen."""
        if self._guides is None or params.constraint is None or params.choices:
            return None
        return self._guides.guide(params.constraint)

    def _check_prompt(self, index: int, request: Request) -> None:
        """A prompt that the model cannot take in would fail the rows beside it as well."""
        ids, vocab_size = request.input_ids, self.config.language.vocab_size
        if not len(ids):
            raise RequestError(f"request {index}: the prompt is empty")
        if ids.max() >= vocab_size or ids.min() < IMAGE_END_ID:
            raise RequestError(
                f"request {index}: prompt ids from {ids.min()} to {ids.max()}; the model has {vocab_size}"
            )
        found, wanted = int((ids == IMAGE_ATOM_ID).sum()), len(request.tiles) * self.config.vision.tokens_per_tile
        if found != wanted:
            raise RequestError(f"request {index}: {found} placeholders for {wanted} visual tokens")

    def _check_choices(self, index: int, row: Row) -> None:
        largest, vocab_size = max(map(max, row.params.choices), default=0), self.config.language.vocab_size
        if largest >= vocab_size:
            raise RequestError(f"request {index}: a choice holds token {largest}; the model has {vocab_size}")
        if row.params.choices and row.request.input_ids[-1] == IMAGE_ATOM_ID:
            raise RequestError(f"request {index}: the prompt ends within an image; choices must follow a text")

    def _step_within_memory(self) -> None:
        """A step; if the device is out of memory after all, the rows start again with half the budget."""
        try:
            self._step()
        except torch.OutOfMemoryError as error:
            if self.model.shard.size > 1:  # the other ranks are in the middle of the step
                raise EngineDied(f"rank {self.model.shard.rank} is out of memory: {error}") from error
            self._shrink(error)
        except RuntimeError as error:
            if not isinstance(error, torch.AcceleratorError) and not _DEVICE_FAULT.search(str(error)):
                raise
            raise EngineDied(str(error)) from error

    def abandon_rows(self) -> None:
        """All rows that run or wait fail, not those that finished in the last step."""
        for row in (*self._scheduler.running, *self._scheduler.waiting):
            if not row.has_left:
                row.error = RequestError("interrupted")
        self._scheduler = Scheduler(self._budget)
        self._decoder = self._sampler = None

    def _shrink(self, error: torch.OutOfMemoryError) -> None:
        scheduler = self._scheduler
        scheduler.restart_all()
        if scheduler.budget.slots > 1:
            scheduler.budget = halved(scheduler.budget)
        else:
            failed = scheduler.waiting.popleft()
            failed.error = RequestError(f"out of device memory on a request of its own: {error}")
            self._release([failed.item])
            scheduler.budget = self._budget
        self._decoder = self._sampler = None

    @torch.inference_mode()
    def _step(self) -> None:
        """Rows enter and leave, then one token of every row."""
        self._replace_finished()
        running = self._scheduler.running
        if not running:
            return
        with self._timed("decode_s"):
            decoder = self._held_decoder()
            lengths = [row.num_cached for row in running]
            if self._sampler is None:  # other rows than at the last step
                self._sampler = self._sampler_of(running)
                decoder.load([row.output_ids[-1] for row in running], lengths)
            masks = self._masks(running)
            logits, greedy = decoder.step(len(running), max(lengths))
            choice = self._agreed(greedy if self._sampler.is_greedy else self._sampler(logits, masks))
            decoder.advance(choice.ids)
            self._record(running, choice)
        self.stats.steps += 1
        self.stats.row_steps += len(running)
        self.stats.slot_steps += self._scheduler.slots

    def _replace_finished(self) -> None:
        """Waiting rows take free slots; some may be finished at once, by their first token or their choices."""
        while True:
            if any(row.has_left for row in self._scheduler.running):
                self._sampler = None
            admitted = self._scheduler.admit()
            self._retire_finished()
            if self._scheduler.plan_cache():
                self._allocate()
                continue
            if admitted:
                self._prefill(admitted)
            if not admitted or not self._scheduler.next_is_sibling:
                break
        self._retire_finished()

    def _retire_finished(self) -> None:
        for move in self._scheduler.retire():
            self._held_decoder().cache.move(move.source, move.target, move.length)

    def _allocate(self) -> None:
        self._decoder = None  # before the next cache, not beside it
        cache = KVCache(
            self.model.shard.local(self.config.language),
            slots=self._scheduler.slots,
            capacity=self._scheduler.capacity,
            device=self.model.device,
            dtype=self.model.dtype,
        )
        self._decoder = Decoder(self.model, cache, self._make_runner())

    def _held_decoder(self) -> Decoder:
        assert self._decoder is not None, "rows run without a cache"
        return self._decoder

    def _prefill(self, admitted: list[Row]) -> None:
        """Prompts into their slots, and the first token of each row or its choice."""
        whole, rest = self._scheduler.prompts(admitted)
        most = self._scheduler.budget.prefill_tokens
        self._encode_ahead([span.row.item for span in whole])
        with self._timed("prefill_s"):
            for group in chain(passes(whole, most), passes(rest, most)):
                masks = self._masks([span.row for span in group])
                self._begin(group, self._hidden(group), masks)
            self._choose([*whole, *rest])
        self._release({row.item for row in admitted})
        self._sampler = None

    def _begin(self, group: list[Span], hidden: Tensor, masks: Future[NDArray[np.uint8]] | None) -> None:
        """The first token of rows whose prompts end in `hidden` [B, T, hidden_size]; not of those with choices."""
        self.stats.prompt_tokens += sum(len(span.ids) for span in group)
        at = [(index, len(span.ids) - 1) for index, span in enumerate(group) if not span.row.params.choices]
        if at:
            rows = [group[index].row for index, _ in at]
            logits = self.model.llm.logits(hidden[self._tensor(at).unbind(1)])
            self._record(rows, self._agreed(self._sampler_of(rows)(logits, masks)))

    def _choose(self, prompts: list[Span]) -> None:
        """The answers of rows with choices: each choice is scored after the prompt in the row's slot."""
        if not any(prompt.row.params.choices for prompt in prompts):
            return
        choice_of = {span: choice for prompt in prompts for span, choice in after_prompt(prompt)}
        logliks: dict[Span, float] = {}
        for group in passes(choice_of, self._scheduler.budget.prefill_tokens):
            logliks.update(zip(group, self._logliks(group, [choice_of[span] for span in group]), strict=True))
        of_rows: dict[Row, list[float]] = {}
        for span in choice_of:
            of_rows.setdefault(span.row, []).append(logliks[span])
        for row, index in zip(of_rows, self._drawn(of_rows), strict=True):
            row.choose(index, np.array(of_rows[row]))

    def _logliks(self, group: list[Span], choices: Sequence[Sequence[int]]) -> list[float]:
        """Natural-log likelihoods of `choices`, whose tokens but the last end the spans of `group`."""
        hidden = self._hidden(group)
        at = [(index, place) for index, choice in enumerate(choices) for place in range(len(choice))]
        ids, most = self._tensor(list(chain.from_iterable(choices))), self._scheduler.budget.slots
        parts = zip(torch.split(hidden[self._tensor(at).unbind(1)], most), torch.split(ids, most), strict=True)
        losses = [F.cross_entropy(self.model.llm.logits(x).float(), y, reduction="none") for x, y in parts]
        each = iter(torch.cat(losses).tolist())
        return [-sum(islice(each, len(choice))) for choice in choices]

    def _drawn(self, logliks: dict[Row, list[float]]) -> list[int]:
        """Which choice each row takes; by the rows' own random streams where they have a temperature."""
        params = [SamplingParams(temperature=row.params.temperature, logprobs=False) for row in logliks]
        scores = pad_sequence([torch.tensor(each) for each in logliks.values()], True, -math.inf)
        sampler = Sampler(params, [row.stream for row in logliks], scores.shape[1], scores.device)
        ids: list[int] = self._agreed(sampler(scores)).ids.tolist()
        return ids

    def _hidden(self, group: list[Span]) -> Tensor:
        """[B, T, hidden_size] of the tokens of all spans, the longest first, padded on the right."""
        starts = self._tensor([span.start for span in group])
        parts = torch.split(self._embed(group), [len(span.ids) for span in group])
        embeds = pad_sequence(list(parts), batch_first=True)
        position_ids = starts[:, None] + torch.arange(embeds.shape[1], device=starts.device)
        hidden: Tensor = self.model.llm.model(embeds, position_ids, self._memory(group, starts, embeds.shape[1]))
        return hidden

    def _embed(self, group: list[Span]) -> Tensor:
        """[all tokens, hidden_size] of the spans, one after the other; placeholders are in whole prompts only."""
        visual = [self.model.vte.weight.new_empty(0, self.config.language.hidden_size)]
        visual += [span.row.item.visual for span in group if not span.start]
        return self.model.embed(self._tensor(np.concatenate([span.ids for span in group])), torch.cat(visual))

    def _memory(self, group: list[Span], starts: Tensor, width: int) -> Memory:
        """What tokens of `group`, of which all or none are kept, attend to."""
        cache, longest = self._held_decoder().cache, max(span.start for span in group)
        targets = self._tensor([span.target for span in group if span.target is not None])
        if len(targets) and not longest:
            return Prefill(cache, targets)
        sources = self._tensor([span.source for span in group])
        return Extend(cache, sources, starts, longest, width, targets if len(targets) else None)

    def _release(self, items: Iterable[Item]) -> None:
        """Embeddings of items of which no row waits; siblings wait next to each other."""
        waiting = self._scheduler.waiting
        for item in items:
            if not waiting or waiting[0].item is not item:
                item.visual = None

    def _encode_ahead(self, entering: Iterable[Item]) -> None:
        """Visual embeddings of items that enter, and of those next in line until the passes are full."""
        items = dict.fromkeys(item for item in entering if item.visual is None)
        num_tiles = sum(len(item.tiles) for item in items)
        most = self._scheduler.budget.vision_tiles
        wanted = -(-num_tiles // most) * most
        for item in (row.item for row in self._scheduler.waiting):
            if num_tiles == wanted or num_tiles + len(item.tiles) > wanted:
                break
            if item.visual is None and item not in items:
                items[item] = None
                num_tiles += len(item.tiles)
        with self._timed("vision_s"):
            visual = self._encode(items)
        counts = [len(item.tiles) * self.config.vision.tokens_per_tile for item in items]
        for item, part in zip(items, torch.split(visual, counts), strict=True):
            item.visual = part
        self.stats.tiles += num_tiles

    def _encode(self, items: Iterable[Item]) -> Tensor:
        """Visual embeddings [all tokens, hidden_size] of all tiles, in order; passes cross the borders of items."""
        parts = [self.model.vte.weight.new_empty(0, self.config.language.hidden_size)]
        tiles, sizes = [], []
        for item in items:
            tiles += [*item.tiles]
            sizes += [*item.tile_sizes]
        most = self._scheduler.budget.vision_tiles
        for start in range(0, len(tiles), most):
            chunk = slice(start, start + most)
            pixels = self.model.normalize(self._stack(tiles[chunk]), self._stack(sizes[chunk]))
            parts.append(self.model.encode_tiles(pixels).flatten(0, 1))
        return torch.cat(parts)

    def _sampler_of(self, rows: Sequence[Row]) -> Sampler:
        return Sampler(
            [row.params for row in rows],
            [row.stream for row in rows],
            self.config.language.vocab_size,
            self.model.device,
            [row.output_ids for row in rows],
        )

    def _masks(self, rows: Sequence[Row]) -> Future[NDArray[np.uint8]] | None:
        """Of the next tokens of the rows that have a constraint, computed while the model runs."""
        answers = [(row.guide, row.output_ids) for row in rows if row.guide]
        return self._guides.masks(answers) if self._guides and answers else None

    def _agreed(self, choice: Choice) -> Choice:
        """Of all ranks: that of the first."""
        return Choice(self.model.shard.of_leader(choice.ids), choice.logprobs)

    def _record(self, rows: Sequence[Row], choice: Choice) -> None:
        # One copy from the device, as float64, which holds both exactly.
        ids, logprobs = torch.stack([part.double() for part in choice]).tolist()
        for row, token_id, logprob in zip(rows, ids, logprobs, strict=True):
            row.append(int(token_id), logprob)
            row.finish_reason = self._finish_reason(row)
            if row.guide and row.guide.error:
                row.error = RequestError(row.guide.error)

    def _finish_reason(self, row: Row) -> FinishReason | None:
        if row.output_ids[-1] in self.config.eos_token_ids or self._is_stopped(row):
            return "stop"
        return "length" if len(row.output_ids) == row.params.max_new_tokens else None

    def _is_stopped(self, row: Row) -> bool:
        if not row.params.stop or self._tokenizer is None:
            return False
        # A character takes up to four byte tokens: only the tail can newly hold a stop string.
        tail = row.output_ids[-4 * (max(map(len, row.params.stop)) + 1) :]
        text = detokenize(self._tokenizer, tail)
        return cut_at_stop(text, row.params.stop) != text

    def _tensor(self, values: Sequence[int] | Sequence[tuple[int, int]] | NDArray[np.int32]) -> Tensor:
        return torch.from_numpy(np.array(values, dtype=np.int64)).to(self.model.device)

    def _stack(self, arrays: Sequence[NDArray[np.uint8]] | Sequence[NDArray[np.int32]]) -> Tensor:
        return torch.from_numpy(np.stack(arrays)).to(self.model.device)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started_s = perf_counter()
        yield
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()  # tokens are awaited anyway; vision alone would end before its kernels do
        setattr(self.stats, name, getattr(self.stats, name) + perf_counter() - started_s)


def torch_device(name: Device) -> torch.device:
    """Raises ValueError if there is no such device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda', but torch sees no CUDA device; use device='cpu' or check the driver")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def model_dtype(name: Dtype, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on CUDA and float32 on a CPU."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
