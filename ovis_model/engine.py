"""Batched generation: requests in, completions out; tiles to visual tokens, prefill, decode steps.

Knows token ids only: no prompts, no pictures.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from ovis_model.attention import CausalPadding
from ovis_model.checkpoint import fetch_checkpoint
from ovis_model.config import OvisConfig
from ovis_model.kv_cache import KVCache, bytes_per_token
from ovis_model.model import Ovis
from ovis_model.sampling import Sampler
from ovis_model.text import cut_at_stop, detokenize, load_tokenizer
from ovis_model.types import Completion, EngineDied, FinishReason, Request, RequestError, SamplingParams
from ovis_model.weights import load_model

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What one pass over the device may hold, so that the largest one fits by construction."""

    kv_tokens: int  # of all rows that decode side by side, padding included
    rows: int = 128
    prefill_tokens: int = 16384
    vision_tiles: int = 16  # a tile of a published size takes about 0.1 GB in the visual head


class OvisEngine:
    """One replica of the model on one device. See `types.Engine`."""

    def __init__(self, model: Ovis, *, tokenizer: Tokenizer | None = None, budget: Budget | None = None) -> None:
        self.model = model
        self.config: OvisConfig = model.config
        self.budget = budget or Budget(kv_tokens=_free_kv_tokens(model))
        self._tokenizer = tokenizer  # for stop strings only

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
    ) -> OvisEngine:
        """Load "demo", a directory, a hub id or a URI. `auto` is CUDA in bfloat16 if there is one, else CPU in float32.

        Raises CheckpointError, ConfigError or WeightsError, all ValueErrors that say what to do.
        """
        if tensor_parallel != 1:
            raise ValueError(f"tensor_parallel={tensor_parallel} is not supported yet; use 1")
        target = _device(device)
        directory = fetch_checkpoint(path_or_id, revision)
        model = load_model(directory, device=target, dtype=_dtype(dtype, target), post_trunk_norm=post_trunk_norm)
        return cls(model, tokenizer=load_tokenizer(directory))

    def generate(
        self, requests: Sequence[Request], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """Completions in the order of `requests`; `params` for all of them or one for each.

        In float32 a row's tokens are those that it gets alone. Raises RequestError naming the first request that can
        never be generated, EngineDied when the device is lost.
        """
        rows = _rows(requests, params)
        for index, row in enumerate(rows):
            self._check(index, row)
        for batch in self._batches(rows):
            self._run(batch)
        return [row.completion() for row in rows]

    def _check(self, index: int, row: _Row) -> None:
        needed = row.num_prompt_tokens + row.params.max_new_tokens
        limit = min(self.config.max_length, self.budget.kv_tokens)
        if needed > limit:
            raise RequestError(
                f"request {index}: {row.num_prompt_tokens} prompt + {row.params.max_new_tokens} output tokens are "
                f"{needed - limit} over the limit of {limit}"
            )
        if row.params.stop and self._tokenizer is None:
            raise ValueError("stop strings need a tokenizer: give OvisEngine one")

    def _batches(self, rows: Sequence[_Row]) -> Iterator[list[_Row]]:
        """Rows of like length together: a batch is as wide as its longest row."""
        batch: list[_Row] = []
        for row in sorted(rows, key=lambda row: -row.num_tokens_at_most):
            width = batch[0].num_tokens_at_most if batch else 0
            if len(batch) == self.budget.rows or width * (len(batch) + 1) > self.budget.kv_tokens:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _run(self, batch: list[_Row]) -> None:
        """Generate all rows of `batch`, in halves if the device says that it is too large after all."""
        try:
            self._decode(batch)
            return
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise RequestError(f"out of device memory on a request of its own: {error}") from error
        except torch.AcceleratorError as error:
            raise EngineDied(str(error)) from error
        half = len(batch) // 2
        for part in (batch[:half], batch[half:]):
            self._run([row.restarted() for row in part])

    @torch.inference_mode()
    def _decode(self, batch: list[_Row]) -> None:
        width = max(row.num_prompt_tokens for row in batch)
        left_pad = torch.tensor([width - row.num_prompt_tokens for row in batch], dtype=torch.int32)
        left_pad = left_pad.to(self.model.device)
        capacity = width + max(row.params.max_new_tokens for row in batch)
        kv_cache = self._allocate(len(batch), capacity)
        sampler = Sampler([row.params for row in batch], self.config.language.vocab_size, self.model.device)
        logits = self._prefill(batch, left_pad, width, kv_cache)
        while True:
            ids, logprobs = sampler(logits)
            self._record(batch, ids.tolist(), logprobs.tolist())
            if all(row.finish_reason for row in batch):
                return
            logits = self._step(ids, left_pad, kv_cache)

    def _allocate(self, rows: int, capacity: int) -> KVCache:
        return KVCache.allocate(
            self.config.language,
            rows=rows,
            capacity=capacity,
            device=self.model.device,
            dtype=self.model.dtype,
        )

    def _prefill(self, batch: list[_Row], left_pad: Tensor, width: int, kv_cache: KVCache) -> Tensor:
        """Prompts into the cache, a few rows at a time -> logits [B, vocab] after each row's last token."""
        rows_at_once = max(1, self.budget.prefill_tokens // width)
        logits = []
        for start in range(0, len(batch), rows_at_once):
            part = batch[start : start + rows_at_once]
            pad = left_pad[start : start + len(part)]
            embeds = self._left_padded(self._embed([row.request for row in part]), width)
            position_ids = (torch.arange(width, device=pad.device) - pad[:, None]).clamp(min=0)
            causal = CausalPadding.prefill(pad, width)
            view = kv_cache.rows(start, start + len(part))
            logits.append(self.model(embeds, position_ids, causal, view, last_only=True)[:, -1])
        kv_cache.length = width
        return torch.cat(logits)

    def _step(self, ids: Tensor, left_pad: Tensor, kv_cache: KVCache) -> Tensor:
        """One token of every row, int64[B] -> logits [B, vocab]."""
        embeds = self.model.llm.model.embed_tokens(ids[:, None])
        causal = CausalPadding.decode(left_pad, kv_cache.length + 1)
        position_ids = kv_cache.length - left_pad[:, None]
        logits: Tensor = self.model(embeds, position_ids, causal, kv_cache)
        return logits[:, -1]

    def _embed(self, requests: Sequence[Request]) -> list[Tensor]:
        """The embeddings [T, hidden_size] of each prompt; tiles of all requests share the passes over the tower."""
        visual = self._encode(requests)
        counts = [len(request.tiles) * self.config.vision.tokens_per_tile for request in requests]
        device = self.model.device
        return [
            self.model.embed(torch.from_numpy(request.input_ids.astype(np.int64)).to(device), part)
            for request, part in zip(requests, torch.split(visual, counts), strict=True)
        ]

    def _encode(self, requests: Sequence[Request]) -> Tensor:
        """Visual embeddings [all tokens, hidden_size] of all tiles, in order."""
        parts = [self.model.vte.weight.new_empty(0, self.config.language.hidden_size)]
        tiles = [tile for request in requests for tile in request.tiles]
        sizes = [size for request in requests for size in request.tile_sizes]
        for start in range(0, len(tiles), self.budget.vision_tiles):
            chunk = slice(start, start + self.budget.vision_tiles)
            pixels = self.model.normalize(self._to_device(tiles[chunk]), self._to_device(sizes[chunk]))
            parts.append(self.model.encode_tiles(pixels).flatten(0, 1))
        return torch.cat(parts)

    def _to_device(self, arrays: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(arrays)).to(self.model.device)

    def _left_padded(self, embeds: Sequence[Tensor], width: int) -> Tensor:
        padded = embeds[0].new_zeros(len(embeds), width, embeds[0].shape[1])
        for row, embed in enumerate(embeds):
            padded[row, width - len(embed) :] = embed
        return padded

    def _record(self, batch: list[_Row], ids: list[int], logprobs: list[float]) -> None:
        for row, token_id, logprob in zip(batch, ids, logprobs, strict=True):
            if not row.finish_reason:
                row.append(token_id, logprob)
                row.finish_reason = self._finish_reason(row)

    def _finish_reason(self, row: _Row) -> FinishReason | None:
        if row.output_ids[-1] in self.config.eos_token_ids or self._is_stopped(row):
            return "stop"
        return "length" if len(row.output_ids) == row.params.max_new_tokens else None

    def _is_stopped(self, row: _Row) -> bool:
        if not row.params.stop or self._tokenizer is None:
            return False
        # A character takes up to four byte tokens: only the tail can newly hold a stop string.
        tail = row.output_ids[-4 * (max(map(len, row.params.stop)) + 1) :]
        text = detokenize(self._tokenizer, tail)
        return cut_at_stop(text, row.params.stop) != text


@dataclass
class _Row:
    """A request on its way to a completion."""

    request: Request
    params: SamplingParams
    output_ids: list[int] = field(default_factory=list)
    logprob_sum: float = 0.0
    finish_reason: FinishReason | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.input_ids)

    @property
    def num_tokens_at_most(self) -> int:
        return self.num_prompt_tokens + self.params.max_new_tokens

    def append(self, token_id: int, logprob: float) -> None:
        self.output_ids.append(token_id)
        self.logprob_sum += logprob

    def restarted(self) -> _Row:
        self.output_ids, self.logprob_sum, self.finish_reason = [], 0.0, None
        return self

    def completion(self) -> Completion:
        assert self.finish_reason is not None, "a row left the engine unfinished"
        mean = self.logprob_sum / len(self.output_ids) if self.params.logprobs else float("nan")
        return Completion(np.array(self.output_ids, dtype=np.int32), self.finish_reason, mean)


def _rows(requests: Sequence[Request], params: SamplingParams | Sequence[SamplingParams]) -> list[_Row]:
    each = [params] * len(requests) if isinstance(params, SamplingParams) else params
    if len(each) != len(requests):
        raise ValueError(f"{len(each)} sampling parameters for {len(requests)} requests; give one, or one for each")
    return [_Row(request, own) for request, own in zip(requests, each, strict=True)]


def _device(name: Device) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda', but torch sees no CUDA device; use device='cpu' or check the driver")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _dtype(name: Dtype, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def _free_kv_tokens(model: Ovis, share: float = 0.5) -> int:
    """How many tokens of keys and values fit in `share` of the memory that is free now; the rest is for activations."""
    if model.device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(model.device)
    else:
        free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(
        model.config.max_length,
        int(free_bytes * share) // bytes_per_token(model.config.language, model.dtype),
    )
