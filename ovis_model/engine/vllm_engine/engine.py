"""The engine: our embeddings of each prompt, vLLM's tokens. Several threads may call; one thread steps vLLM."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import asdict
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm import SamplingParams as VllmParams

from ovis_model.checkpoint import fetch_checkpoint
from ovis_model.config import OvisConfig, Quantization
from ovis_model.engine.calls import Device, Dtype
from ovis_model.engine.decode_step import run_eagerly
from ovis_model.engine.model_runner import ModelRunner, sample_choices
from ovis_model.engine.requests import RequestChecks, RequestState, StopRule, make_states
from ovis_model.engine.tile_loader import make_tile_loader
from ovis_model.engine.vllm_engine.core import Core, Job, Output, make_params
from ovis_model.engine.vllm_engine.start import plan_memory, prepare_cpu, start_vllm
from ovis_model.engine.vllm_engine.versions import check_kernels, import_vllm
from ovis_model.grammar.guides import Guides
from ovis_model.network.devices import choose_dtype, resolve_device
from ovis_model.network.ovis import Ovis
from ovis_model.network.tensor_parallel import ALONE
from ovis_model.network.uploads import upload
from ovis_model.network.weights import load_embedder
from ovis_model.tokenizer import load_tokenizer
from ovis_model.types import Completion, Request, RequestError, SamplingParams

_TILES_PER_PASS = 16


class VllmEngine:
    """One replica; implements `types.Engine`. The vision part is in this process, on vLLM's first device.

    A sample depends on its seed as vLLM has it, so samples differ from those of `OvisEngine`; greedy answers, choices
    and constraints do not, apart from ties in the last bits.
    """

    def __init__(self, embedder: Ovis, stop_rule: StopRule, core: Core) -> None:
        self.config = embedder.config
        self._embedder, self._core = embedder, core
        assert stop_rule.tokenizer is not None
        self._stop_rule = stop_rule
        self._guides = Guides(stop_rule.tokenizer, self.config.language.vocab_size, self.config.eos_token_ids)
        self._checks = RequestChecks(self.config, core.max_tokens, core.max_tokens, has_tokenizer=True)
        tile_bytes = _TILES_PER_PASS * 3 * self.config.vision.image_size**2
        self._vision = ModelRunner(embedder, lambda: run_eagerly, make_tile_loader(embedder.device, tile_bytes))
        self._vision_lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str,
        device: Device = "auto",
        dtype: Dtype = "auto",
        tensor_parallel: int = 1,
        *,
        revision: str | None = None,
        quantization: Quantization = "none",
        num_threads: int | None = None,
    ) -> VllmEngine:
        """Load "demo", a directory, a hub id or a URI. Raise ValueError that says what to do, also without vLLM.

        FP8 of the decoder is vLLM's, that of the vision tower is ours.
        """
        import_vllm()
        directory = fetch_checkpoint(path_or_id, revision)
        config = OvisConfig.from_directory(directory)
        place = resolve_device(device, ALONE)
        settled = choose_dtype(dtype, place)
        check_kernels(config.language, place.type, quantization)
        if place.type == "cpu":
            prepare_cpu(num_threads, tensor_parallel)
        embedder = load_embedder(directory, device=place, dtype=settled, quantization=quantization)
        arguments = {
            "dtype": str(settled).removeprefix("torch."),
            "tensor_parallel_size": tensor_parallel,
            "quantization": None if quantization == "none" else quantization,
            **plan_memory(place),
        }
        stop_rule = StopRule(config.eos_token_ids, load_tokenizer(directory))
        return cls(embedder, stop_rule, Core(lambda: start_vllm(directory, config, arguments), stop_rule))

    def generate(
        self, requests: Sequence[Request], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """Return completions in the order of `requests`, as `OvisEngine.generate` does."""
        each = [params] * len(requests) if isinstance(params, SamplingParams) else params
        states = make_states(requests, each)
        for index, state in enumerate(states):
            self._checks.check(index, state)
        jobs = [self._make_jobs(state, embeds) for state, embeds in zip(states, self._embed(states), strict=True)]
        try:
            self._core.submit([job for own in jobs for job in own])
            for state, own in zip(states, jobs, strict=True):
                self._finish(state, [job.future.result() for job in own])
        except KeyboardInterrupt:
            self._core.abandon()
            raise
        return [state.make_completion() for state in states]

    def measure(self) -> dict[str, float]:
        """Return totals so far; vLLM's steps, which mix prefill and decoding, count as decoding."""
        return asdict(self._core.stats)

    def rebuild(self) -> bool:
        """Return False: vLLM cannot start twice in a process."""
        return False

    def describe(self) -> str:
        """Describe the device and the engine's limits in one line."""
        return f"vLLM on {self._embedder.device.type}: prompts and answers of up to {self._checks.max_tokens} tokens"

    def close(self) -> None:
        """End the thread that steps vLLM, and vLLM's processes."""
        self._core.close()

    def __enter__(self) -> VllmEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @torch.inference_mode()
    def _embed(self, states: Sequence[RequestState]) -> list[Tensor]:
        """Return the embeddings [T, hidden_size] of each prompt; the images of a group are encoded once."""
        stats = self._core.stats
        with self._vision_lock:
            started_s = perf_counter()
            items = list(dict.fromkeys(state.item for state in states))
            self._vision.encode(items, _TILES_PER_PASS)
            found = [self._embed_one(state) for state in states]
            stats.vision_s += perf_counter() - started_s
            stats.tiles += sum(len(item.tiles) for item in items)
            stats.prompt_tokens += sum(map(len, found))
            return found

    def _embed_one(self, state: RequestState) -> Tensor:
        [ids] = upload(self._embedder.device, state.request.input_ids.astype(np.int64))
        return self._embedder.embed(ids, state.item.visual).clone()

    def _make_jobs(self, state: RequestState, embeds: Tensor) -> list[Job]:
        """Return what vLLM has to generate for a request: its answer, or each of its choices, which are forced."""
        if not state.params.choices:
            return [Job(embeds, self._translate(state.params), state.params.stop)]
        return [
            Job(embeds, make_params(SamplingParams(max_new_tokens=len(choice)), (), {"forced": list(choice)}))
            for choice in state.params.choices
        ]

    def _translate(self, params: SamplingParams) -> VllmParams:
        rule: dict[str, Any] = {}
        if params.constraint:
            rule["constraint"] = [params.constraint.kind, params.constraint.spec]
        if params.repetition_penalty != 1:
            rule["penalty"] = params.repetition_penalty
        return make_params(params, self.config.eos_token_ids, rule)

    def _finish(self, state: RequestState, answers: Sequence[Output]) -> None:
        if state.params.choices:
            logliks = [answer.logprob_sum for answer in answers]
            [index] = sample_choices({state: logliks}).ids.tolist()
            state.choose(index, np.array(logliks))
            return
        [answer] = answers
        for token_id in answer.output_ids:
            state.append(token_id, answer.logprob_sum / len(answer.output_ids))
        state.finish_reason = self._stop_rule.find_finish_reason(state) or "length"
        if state.params.constraint and (fault := self._find_fault(state)):
            state.error = RequestError(fault)

    def _find_fault(self, state: RequestState) -> str:
        """Return why the constraint could not hold this answer; "" if it did."""
        assert state.params.constraint
        guide = self._guides.make_guide(state.params.constraint)
        self._guides.compute_masks([(guide, state.output_ids[:-1])]).result()
        return guide.error
