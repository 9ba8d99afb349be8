"""The thread that starts and steps vLLM, and the jobs that it works on."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from queue import SimpleQueue
from time import perf_counter
from typing import Any

from torch import Tensor
from vllm import SamplingParams as VllmParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from ovis_model.engine.calls import Abandon, Close, Stats
from ovis_model.engine.requests import StopRule
from ovis_model.engine.vllm_engine.start import MAX_SEQUENCES
from ovis_model.types import EngineDied, RequestError, SamplingParams


@dataclass(frozen=True)
class Output:
    """The token ids of an answer, and the sum of their log-probabilities; NaN if they were not asked for."""

    output_ids: list[int]
    logprob_sum: float


@dataclass(eq=False)
class Job:
    """One request of vLLM. The strings of `stop` end it here, as vLLM has no tokenizer."""

    embeds: Tensor
    params: VllmParams
    stop: Sequence[str] = ()
    future: Future[Output] = field(default_factory=Future)


class Core:
    """The thread that starts vLLM, and steps it while there are requests.

    Both must be one thread: the number of OpenMP threads, which kernels for CPUs rely on, is a property of a thread.
    """

    def __init__(self, start: Callable[[], LLMEngine], stop_rule: StopRule) -> None:
        """Start vLLM; raise what it raises."""
        self._stop_rule = stop_rule
        self._inbox, self._fault = SimpleQueue[Sequence[Job] | Abandon | Close](), ""
        self.stats = Stats()
        self._jobs: dict[str, Job] = {}
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

    def submit(self, jobs: Sequence[Job]) -> None:
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
        self.stats.sequence_steps += min(len(self._jobs), MAX_SEQUENCES)
        self.stats.slot_steps += MAX_SEQUENCES
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

    def _add(self, job: Job) -> None:
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
            job.future.set_result(Output(ids, math.nan if logprob_sum is None else logprob_sum))

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


def make_params(params: SamplingParams, eos_token_ids: Sequence[int], rule: dict[str, Any]) -> VllmParams:
    """Translate sampling parameters; `rule` is what `AnswerRules` reads."""
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
