"""Generation with row replacement: a finished row leaves and the next one enters at the next step.

Knows token ids only: no prompts, no pictures.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from ovis_model.checkpoint import fetch_checkpoint
from ovis_model.config import OvisConfig
from ovis_model.kv_cache import DecodeStep, KVCache, Prefill, bytes_per_token
from ovis_model.model import Ovis
from ovis_model.ranks import TensorParallelEngine
from ovis_model.sampling import RandomStream, Sampler
from ovis_model.scheduler import Budget, Row, Scheduler, prefill_groups
from ovis_model.text import cut_at_stop, detokenize, load_tokenizer
from ovis_model.types import Completion, EngineDied, FinishReason, Request, RequestError, SamplingParams
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

    def __init__(self, model: Ovis, *, tokenizer: Tokenizer | None = None, budget: Budget | None = None) -> None:
        self.model = model
        self.config: OvisConfig = model.config
        self.stats = Stats()
        self._budget = budget or Budget(kv_tokens=model.shard.least(_free_kv_tokens(model)))
        self._scheduler = Scheduler(self._budget)
        self._tokenizer = tokenizer  # for stop strings only
        self._cache: KVCache | None = None
        self._sampler: Sampler | None = None
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
        return cls(model, tokenizer=load_tokenizer(directory))

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
        budget = self._scheduler.budget
        needed = row.num_prompt_tokens + row.params.max_new_tokens
        limit = min(self.config.max_length, budget.kv_tokens)
        if needed > limit:
            raise RequestError(
                f"request {index}: {row.num_prompt_tokens} prompt + {row.params.max_new_tokens} output tokens are "
                f"{needed - limit} over the limit of {limit}"
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
        self._cache = self._sampler = None

    def _shrink(self, error: torch.OutOfMemoryError) -> None:
        scheduler = self._scheduler
        scheduler.restart_all()
        if scheduler.budget.slots > 1:
            scheduler.budget = _halved(scheduler.budget)
        else:
            failed = scheduler.waiting.popleft()
            failed.error = RequestError(f"out of device memory on a request of its own: {error}")
            scheduler.budget = self._budget
        self._cache = self._sampler = None

    @torch.inference_mode()
    def _step(self) -> None:
        """Rows enter and leave, then one token of every row."""
        self._replace_finished()
        running = self._scheduler.running
        if not running:
            return
        with self._timed("decode_s"):
            lengths = self._tensor([row.num_cached for row in running])
            step = DecodeStep(self._held_cache(), lengths, max(row.num_cached for row in running))
            ids = self._tensor([row.output_ids[-1] for row in running])
            embeds = self.model.llm.model.embed_tokens(ids[:, None])
            logits = self.model.llm.logits(self.model.llm.model(embeds, lengths[:, None], step)[:, -1])
            self._sampler = self._sampler or self._sampler_of(running)
            self._record(running, self._sampler, logits)
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
                self._held_cache().move(move.source, move.target, move.length)
            if self._scheduler.plan_cache():
                self._allocate()
                continue
            if not admitted:
                return
            self._prefill(admitted)

    def _allocate(self) -> None:
        self._cache = None  # before the next one, not beside it
        self._cache = KVCache(
            self.model.shard.local(self.config.language),
            slots=self._scheduler.slots,
            capacity=self._scheduler.capacity,
            device=self.model.device,
            dtype=self.model.dtype,
        )

    def _held_cache(self) -> KVCache:
        assert self._cache is not None, "rows run without a cache"
        return self._cache

    def _prefill(self, admitted: dict[int, Row]) -> None:
        """Prompts into their slots, and the first token of each row."""
        self._encode_ahead(list(admitted.values()))
        slot_of = {id(row): slot for slot, row in admitted.items()}
        with self._timed("prefill_s"):
            for group in prefill_groups(list(admitted.values()), self._scheduler.budget.prefill_tokens):
                slots = self._tensor([slot_of[id(row)] for row in group])
                self._record(group, self._sampler_of(group), self._prompt_logits(group, slots))
        self._sampler = None

    def _prompt_logits(self, group: list[Row], slots: Tensor) -> Tensor:
        """[B, vocab] after the last prompt token of each row."""
        width = group[0].num_prompt_tokens
        embeds = self.model.vte.weight.new_zeros(len(group), width, self.config.language.hidden_size)
        for place, row in zip(embeds, group, strict=True):
            place[: row.num_prompt_tokens] = self.model.embed(self._tensor(row.request.input_ids), row.visual)
            row.visual = None
        position_ids = torch.arange(width, device=self.model.device).expand(len(group), -1)
        hidden = self.model.llm.model(embeds, position_ids, Prefill(self._held_cache(), slots))
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

    def _record(self, rows: Sequence[Row], sampler: Sampler, logits: Tensor) -> None:
        ids, logprobs = sampler(logits)
        for row, token_id, logprob in zip(
            rows, self.model.shard.of_leader(ids).tolist(), logprobs.tolist(), strict=True
        ):
            row.append(token_id, logprob)
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
        setattr(self.stats, name, getattr(self.stats, name) + perf_counter() - started_s)


def _halved(budget: Budget) -> Budget:
    return replace(
        budget,
        slots=max(1, budget.slots // 2),
        prefill_tokens=max(1, budget.prefill_tokens // 2),
        vision_tiles=max(1, budget.vision_tiles // 2),
    )


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


def _free_kv_tokens(model: Ovis, share: float = 0.5) -> int:
    """How many tokens of keys and values fit in `share` of the memory that is free now; the rest is for activations."""
    if model.device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(model.device)
    else:
        free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // model.shard.size
    token_bytes = bytes_per_token(model.shard.local(model.config.language), model.dtype)
    return max(model.config.max_length, int(free_bytes * share) // token_bytes)
