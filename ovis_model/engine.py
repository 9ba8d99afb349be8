"""Generation with row replacement: a finished row leaves and the next one enters at the next step.

Knows token ids only: no prompts, no pictures.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from ovis_model.checkpoint import fetch_checkpoint
from ovis_model.config import OvisConfig
from ovis_model.decoding import CudaGraphs, Decoder, Runner, run_eagerly
from ovis_model.kv_cache import KVCache, Prefill
from ovis_model.memory import describe, halved, plan_for
from ovis_model.model import Ovis
from ovis_model.ranks import TensorParallelEngine
from ovis_model.sampling import Choice, RandomStream, Sampler
from ovis_model.scheduler import Budget, Row, Scheduler, prefill_groups
from ovis_model.text import cut_at_stop, detokenize, load_tokenizer
from ovis_model.types import IMAGE_ATOM_ID, Completion, EngineDied, FinishReason, Request, RequestError, SamplingParams
from ovis_model.weights import load_model

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
        self._tokenizer = tokenizer  # for stop strings only
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
        request = Request(ids, tile, np.array([tile.shape[2:]], np.int32))
        rows = min(self._budget.slots, self._budget.kv_tokens // (len(ids) + self._budget.slots + 1))
        self.generate([request] * rows, [SamplingParams(max_new_tokens=n) for n in range(rows + 1, 1, -1)])
        self.stats = Stats()

    def generate(
        self, requests: Sequence[Request], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """Completions in the order of `requests`; `params` for all of them or one for each.

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
        rows = [Row(request, own, RandomStream(own.seed)) for request, own in zip(requests, each, strict=True)]
        for index, row in enumerate(rows):
            self._check(index, row)
        with self._lock:
            self._scheduler.waiting.extend(rows)
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
        prompt, output = row.num_prompt_tokens, row.params.max_new_tokens
        limit = min(self.config.max_length, self._budget.kv_tokens)
        if prompt + output > limit:
            raise RequestError(
                f"request {index}: {prompt} prompt + {output} output tokens are {prompt + output - limit} over the "
                f"limit of {limit}"
            )
        if prompt > self._budget.prompt_tokens:
            raise RequestError(
                f"request {index}: {prompt} prompt tokens are {prompt - self._budget.prompt_tokens} over the "
                f"{self._budget.prompt_tokens} that the device has memory for"
            )
        if row.params.stop and self._tokenizer is None:
            raise ValueError("stop strings need a tokenizer: give OvisEngine one")

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
        """All rows that run or wait fail."""
        for row in (*self._scheduler.running, *self._scheduler.waiting):
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
            logits, greedy = decoder.step(len(running), max(lengths))
            choice = self._agreed(greedy if self._sampler.is_greedy else self._sampler(logits))
            decoder.advance(choice.ids)
            self._record(running, choice)
        self.stats.steps += 1
        self.stats.row_steps += len(running)
        self.stats.slot_steps += self._scheduler.slots

    def _replace_finished(self) -> None:
        """Waiting rows take free slots until none is free or none waits; a row may be finished by its first token."""
        while True:
            if any(row.has_left for row in self._scheduler.running):
                self._sampler = None
            admitted = self._scheduler.admit()
            for move in self._scheduler.retire():
                self._held_decoder().cache.move(move.source, move.target, move.length)
            if self._scheduler.plan_cache():
                self._allocate()
                continue
            if not admitted:
                return
            self._prefill(admitted)

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

    def _prefill(self, admitted: dict[int, Row]) -> None:
        """Prompts into their slots, and the first token of each row."""
        self._encode_ahead(list(admitted.values()))
        slot_of = {id(row): slot for slot, row in admitted.items()}
        with self._timed("prefill_s"):
            for group in prefill_groups(list(admitted.values()), self._scheduler.budget.prefill_tokens):
                slots = self._tensor([slot_of[id(row)] for row in group])
                self._record(group, self._agreed(self._sampler_of(group)(self._prompt_logits(group, slots))))
        self._sampler = None

    def _prompt_logits(self, group: list[Row], slots: Tensor) -> Tensor:
        """[B, vocab] after the last prompt token of each row."""
        width = group[0].num_prompt_tokens
        embeds = self.model.vte.weight.new_zeros(len(group), width, self.config.language.hidden_size)
        for place, row in zip(embeds, group, strict=True):
            place[: row.num_prompt_tokens] = self.model.embed(self._tensor(row.request.input_ids), row.visual)
            row.visual = None
        position_ids = torch.arange(width, device=self.model.device).expand(len(group), -1)
        hidden = self.model.llm.model(embeds, position_ids, Prefill(self._held_decoder().cache, slots))
        last = self._tensor([row.num_prompt_tokens - 1 for row in group])
        self.stats.prompt_tokens += sum(row.num_prompt_tokens for row in group)
        return self.model.llm.logits(hidden[torch.arange(len(group), device=last.device), last])

    def _encode_ahead(self, admitted: list[Row]) -> None:
        """Visual embeddings of the rows let in, and of those next in line until the passes are full."""
        rows = [row for row in admitted if row.visual is None]
        num_tiles = sum(len(row.request.tiles) for row in rows)
        most = self._scheduler.budget.vision_tiles
        wanted = -(-num_tiles // most) * most
        for row in self._scheduler.waiting:
            if row.visual is None and num_tiles < wanted:
                if num_tiles + len(row.request.tiles) > wanted:
                    break
                rows.append(row)
                num_tiles += len(row.request.tiles)
        with self._timed("vision_s"):
            visual = self._encode([row.request for row in rows])
        counts = [len(row.request.tiles) * self.config.vision.tokens_per_tile for row in rows]
        for row, part in zip(rows, torch.split(visual, counts), strict=True):
            row.visual = part
        self.stats.tiles += num_tiles

    def _encode(self, requests: Sequence[Request]) -> Tensor:
        """Visual embeddings [all tokens, hidden_size] of all tiles, in order; passes cross the borders of rows."""
        parts = [self.model.vte.weight.new_empty(0, self.config.language.hidden_size)]
        tiles = [tile for request in requests for tile in request.tiles]
        sizes = [size for request in requests for size in request.tile_sizes]
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

    def _agreed(self, choice: Choice) -> Choice:
        """Of all ranks: that of the first."""
        return Choice(self.model.shard.of_leader(choice.ids), choice.logprobs)

    def _record(self, rows: Sequence[Row], choice: Choice) -> None:
        # One copy from the device, as float64, which holds both exactly.
        ids, logprobs = torch.stack([part.double() for part in choice]).tolist()
        for row, token_id, logprob in zip(rows, ids, logprobs, strict=True):
            row.append(int(token_id), logprob)
            row.finish_reason = self._finish_reason(row)

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

    def _tensor(self, values: Sequence[int] | NDArray[np.int32]) -> Tensor:
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
