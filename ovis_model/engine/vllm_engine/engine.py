"""The engine: our embeddings of each prompt, vLLM's tokens. Several threads may call; one thread steps vLLM."""

from __future__ import annotations

import math
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # no embedding crosses a border between processes
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm import SamplingParams as VllmParams
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from ovis_model.checkpoint import fetch_checkpoint
from ovis_model.config import OvisConfig
from ovis_model.engine.calls import Abandon, Close, Device, Dtype, Stats
from ovis_model.engine.decode_step import run_eagerly
from ovis_model.engine.model_runner import ModelRunner, sample_choices
from ovis_model.engine.requests import RequestChecks, RequestState, StopRule, make_states
from ovis_model.engine.tile_loader import make_tile_loader
from ovis_model.engine.vllm_engine.language import register, write_model_directory
from ovis_model.engine.vllm_engine.rules import CHECKPOINT, AnswerRules
from ovis_model.engine.vllm_engine.versions import check_shapes, check_vllm
from ovis_model.grammar.guides import Guides
from ovis_model.network.devices import choose_dtype, resolve_device
from ovis_model.network.ovis import Ovis
from ovis_model.network.tensor_parallel import ALONE
from ovis_model.network.uploads import upload
from ovis_model.network.weights import load_embedder
from ovis_model.tokenizer import load_tokenizer
from ovis_model.types import Completion, EngineDied, Request, RequestError, SamplingParams

_TILES_PER_PASS = 16
_CPU_CACHE_GB = 4
_GPU_SHARE = 0.92  # of a GPU's memory, for everything of this process
_VISION_BYTES = 3 << 30  # of passes over tiles
_MAX_SEQUENCES = 256


class VllmEngine:
    """One replica; implements `types.Engine`. The vision part is in this process, on vLLM's first device.

    A sample depends on its seed as vLLM has it, so samples differ from those of `OvisEngine`; greedy answers, choices
    and constraints do not, apart from ties in the last bits.
    """

    def __init__(self, embedder: Ovis, stop_rule: StopRule, core: _Core) -> None:
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
        num_threads: int | None = None,
    ) -> VllmEngine:
        """Load "demo", a directory, a hub id or a URI. Raise ValueError that says what to do, also without vLLM."""
        check_vllm()
        directory = fetch_checkpoint(path_or_id, revision)
        config = OvisConfig.from_directory(directory)
        place = resolve_device(device, ALONE)
        settled = choose_dtype(dtype, place)
        check_shapes(config.language, place.type, tensor_parallel)
        if place.type == "cpu":
            _prepare_cpu(num_threads)
        embedder = load_embedder(directory, device=place, dtype=settled)
        arguments = {
            "dtype": str(settled).removeprefix("torch."),
            "tensor_parallel_size": tensor_parallel,
            "additional_config": {CHECKPOINT: str(directory)},
            **_plan_memory(place),
        }
        stop_rule = StopRule(config.eos_token_ids, load_tokenizer(directory))
        return cls(embedder, stop_rule, _Core(lambda: _start_vllm(directory, config, arguments), stop_rule))

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

    def _make_jobs(self, state: RequestState, embeds: Tensor) -> list[_Job]:
        """Return what vLLM has to generate for a request: its answer, or each of its choices, which are forced."""
        if not state.params.choices:
            return [_Job(embeds, self._translate(state.params), state.params.stop)]
        return [
            _Job(embeds, _make_params(SamplingParams(max_new_tokens=len(choice)), (), {"forced": list(choice)}))
            for choice in state.params.choices
        ]

    def _translate(self, params: SamplingParams) -> VllmParams:
        rule: dict[str, Any] = {}
        if params.constraint:
            rule["constraint"] = [params.constraint.kind, params.constraint.spec]
        if params.repetition_penalty != 1:
            rule["penalty"] = params.repetition_penalty
        return _make_params(params, self.config.eos_token_ids, rule)

    def _finish(self, state: RequestState, answers: Sequence[_Answer]) -> None:
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


@dataclass(frozen=True)
class _Answer:
    output_ids: list[int]
    logprob_sum: float


@dataclass(eq=False)
class _Job:
    """One request of vLLM. The strings of `stop` end it here, as vLLM has no tokenizer."""

    embeds: Tensor
    params: VllmParams
    stop: Sequence[str] = ()
    future: Future[_Answer] = field(default_factory=Future)


def _start_vllm(directory: Path, config: OvisConfig, arguments: dict[str, Any]) -> LLMEngine:
    register()
    with tempfile.TemporaryDirectory(prefix="ovis2-vllm-") as model:
        write_model_directory(Path(model), directory, config)
        settings = EngineArgs(
            model=model,
            max_model_len=config.max_length,
            max_num_seqs=_MAX_SEQUENCES,
            enable_prompt_embeds=True,
            enable_prefix_caching=True,
            async_scheduling=False,  # the rules need the ids of all earlier tokens
            skip_tokenizer_init=True,
            logprobs_mode="raw_logprobs",
            logits_processors=[AnswerRules],
            disable_log_stats=True,
            seed=0,
            **arguments,
        )
        return LLMEngine.from_engine_args(settings, enable_multiprocessing=False)


class _Core:
    """The thread that starts vLLM, and steps it while there are requests.

    Both must be one thread: the number of OpenMP threads, which kernels for CPUs rely on, is a property of a thread.
    """

    def __init__(self, start: Callable[[], LLMEngine], stop_rule: StopRule) -> None:
        """Start vLLM; raise what it raises."""
        self._stop_rule = stop_rule
        self._inbox, self._fault = SimpleQueue[Sequence[_Job] | Abandon | Close](), ""
        self.stats = Stats()
        self._jobs: dict[str, _Job] = {}
        self._numbers = count()
        self._lock = threading.Lock()
        started: Future[LLMEngine] = Future()
        self._thread = threading.Thread(target=self._run, args=(start, started), name="vllm", daemon=True)
        self._thread.start()
        self._engine = started.result()

    @property
    def max_tokens(self) -> int:
        """Maximum of prompt and answer: what the model and the cache hold."""
        config = self._engine.vllm_config
        cached: int = config.cache_config.num_gpu_blocks * config.cache_config.block_size
        limit: int = config.model_config.max_model_len
        return min(limit, cached)

    def submit(self, jobs: Sequence[_Job]) -> None:
        """Hand jobs to the thread; their futures get the answers."""
        with self._lock:
            if self._fault:
                raise EngineDied(self._fault)
            self._inbox.put(jobs)

    def abandon(self) -> None:
        """Fail all jobs so far."""
        self._inbox.put(Abandon())

    def close(self) -> None:
        """End the thread."""
        self._inbox.put(Close())
        self._thread.join()

    def _run(self, start: Callable[[], LLMEngine], started: Future[LLMEngine]) -> None:
        try:
            self._engine = start()
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(self._engine)
        try:
            while self._receive():
                if self._jobs:
                    self._step()
            self._end("the engine is closed")
            self._engine.engine_core.shutdown()
        except Exception as error:
            self._end(f"vLLM: {type(error).__name__}: {error}")

    def _step(self) -> None:
        started_s = perf_counter()
        outputs = self._engine.step()
        self.stats.decode_s += perf_counter() - started_s
        self.stats.steps += 1
        self.stats.sequence_steps += min(len(self._jobs), _MAX_SEQUENCES)
        self.stats.slot_steps += _MAX_SEQUENCES
        for output in outputs:
            self._follow(output)

    def _receive(self) -> bool:
        """Add the jobs that have arrived, and wait for some if there is no work; return False to end."""
        while not self._jobs or not self._inbox.empty():
            match self._inbox.get():
                case Close():
                    return False
                case Abandon():
                    self._abort_all()
                case jobs:
                    for job in jobs:
                        self._add(job)
        return True

    def _add(self, job: _Job) -> None:
        number = str(next(self._numbers))
        self._engine.add_request(number, {"prompt_embeds": job.embeds}, job.params)
        self._jobs[number] = job

    def _follow(self, output: Any) -> None:
        job, [answer] = self._jobs[output.request_id], output.outputs
        ids = list(answer.token_ids)
        if output.finished or (ids and self._stop_rule.has_stop_string(ids, job.stop)):
            if not output.finished:
                self._engine.abort_request([output.request_id])
            del self._jobs[output.request_id]
            logprob_sum = answer.cumulative_logprob
            job.future.set_result(_Answer(ids, math.nan if logprob_sum is None else logprob_sum))

    def _abort_all(self) -> None:
        self._engine.abort_request([*self._jobs])
        self._fail_jobs(RequestError("interrupted"))

    def _end(self, fault: str) -> None:
        """Fail all jobs, and those that arrive from now on."""
        with self._lock:
            self._fault = fault
        while not self._inbox.empty():
            if not isinstance(late := self._inbox.get(), Abandon | Close):
                self._jobs.update({str(next(self._numbers)): job for job in late})
        self._fail_jobs(EngineDied(fault))

    def _fail_jobs(self, error: Exception) -> None:
        for job in self._jobs.values():
            job.future.set_exception(error)
        self._jobs = {}


def _make_params(params: SamplingParams, eos_token_ids: Sequence[int], rule: dict[str, Any]) -> VllmParams:
    return VllmParams(
        max_tokens=params.max_new_tokens,
        temperature=params.temperature,
        top_p=params.top_p if params.temperature else 1.0,
        top_k=params.top_k if params.temperature else 0,
        seed=params.seed if params.temperature else None,
        stop_token_ids=list(eos_token_ids),
        ignore_eos=True,
        detokenize=False,
        logprobs=0 if params.logprobs else None,
        extra_args=rule or None,
        output_kind=RequestOutputKind.CUMULATIVE if params.stop else RequestOutputKind.FINAL_ONLY,
    )


def _prepare_cpu(num_threads: int | None) -> None:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(_CPU_CACHE_GB))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # replicas share the cores
    if num_threads:
        os.environ["OMP_NUM_THREADS"] = str(num_threads)
        torch.set_num_threads(num_threads)


def _plan_memory(device: torch.device) -> dict[str, Any]:
    """Return vLLM's share of the GPU: what the embedder and its passes leave free."""
    if device.type != "cuda":
        return {"enforce_eager": True}
    free, total = torch.cuda.mem_get_info(device)
    share = min(_GPU_SHARE, (free - _VISION_BYTES) / total)
    if share <= 0:
        raise ValueError(f"vLLM needs more than the {free / 1e9:.1f} GB that are free on the GPU")
    return {"gpu_memory_utilization": share}
