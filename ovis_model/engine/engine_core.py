"""Continuous batching: when a request finishes, a waiting request takes its slot at the next step.

Knows token ids, not text or images. Knows no threads: a single caller enqueues and steps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer

from ovis_model.engine.calls import EngineOptions, Stats
from ovis_model.engine.clock import make_clock
from ovis_model.engine.decode_step import CudaGraphs, StepRunner, run_eagerly
from ovis_model.engine.memory_plan import describe_budget, halve, plan_for_device
from ovis_model.engine.model_runner import Masks, ModelRunner, answer_choices
from ovis_model.engine.requests import RequestChecks, RequestState, StopRule, make_states
from ovis_model.engine.sampling import Choice
from ovis_model.engine.scheduler import Budget, Scheduler, pack_into_passes, pad_into_passes
from ovis_model.engine.tile_loader import make_tile_loader
from ovis_model.engine.warm_up import run_largest_work
from ovis_model.network.devices import choose_dtype, keep_float32_exact, resolve_device
from ovis_model.network.ovis import Ovis
from ovis_model.network.tensor_parallel import ALONE, Shard
from ovis_model.network.weights import load_model
from ovis_model.tokenizer import load_tokenizer
from ovis_model.types import ConstraintExhausted, EngineDied, Request, RequestError, SamplingParams

if TYPE_CHECKING:
    from ovis_model.config import OvisConfig
    from ovis_model.grammar.guides import Guides

# Faults in CUDA libraries are raised as plain RuntimeErrors. Those that lack memory leave the device usable.
_DEVICE_FAULT = re.compile(r"CUDA error|CUBLAS_STATUS|CUDNN_STATUS")
_OUT_OF_MEMORY = re.compile(r"CUDA error: out of memory|CU(BLAS|DNN)_STATUS_(INTERNAL_ERROR_DEVICE_)?ALLOC")


class EngineCore:
    """One model, or a rank's part of it, with its waiting and running requests."""

    def __init__(
        self,
        model: Ovis,
        *,
        tokenizer: Tokenizer | None = None,
        budget: Budget | None = None,
        make_step_runner: Callable[[], StepRunner] | None = None,
        eos_token_ids: Sequence[int] | None = None,
    ) -> None:
        """Take the arguments of `OvisEngine.from_model`."""
        config = model.config
        keep_float32_exact(model.device, model.dtype)
        self.model, self.stats = model, Stats()
        self._budget = budget or plan_for_device(config, model.dtype, model.device, model.shard)
        limits = self._budget.kv_tokens, self._budget.prompt_tokens
        self._checks = RequestChecks(config, *limits, has_tokenizer=tokenizer is not None)
        self._guides = _make_guides(tokenizer, config) if tokenizer else None
        self._stop_rule = StopRule(config.eos_token_ids if eos_token_ids is None else eos_token_ids, tokenizer)
        self.scheduler = Scheduler(self._budget)
        self._clock = make_clock(model.device)
        tiles = make_tile_loader(model.device, self._budget.vision_tiles * 3 * config.vision.image_size**2)
        default = CudaGraphs if model.device.type == "cuda" else lambda: run_eagerly
        self.runner = ModelRunner(model, make_step_runner or default, tiles)

    def describe(self) -> str:
        """Describe the device and the engine's limits in one line."""
        budget = describe_budget(self.model.config, self.model.dtype, self.scheduler.budget, self.model.pass_dtype)
        return f"{self.model.device.type}: {budget}"

    def enqueue(self, requests: Sequence[Request], params: Sequence[SamplingParams]) -> list[RequestState]:
        """Add requests to the queue. Raise RequestError or ValueError, and add none, if one of them is refused."""
        states = make_states(requests, params)
        for index, state in enumerate(states):
            self._checks.check(index, state)
        for state in states:
            if self._guides and state.params.constraint and not state.params.choices:
                state.guide = self._guides.make_guide(state.params.constraint)  # compiled while the prompt is computed
        self.scheduler.enqueue(states)
        return states

    def step(self) -> None:
        """Replace finished requests, then generate one token of each. Raise EngineDied if the device is lost.

        If the device runs out of memory, the running requests restart with half the budget.
        """
        try:
            self._step()
            self._add_times()
        except RuntimeError as error:
            self._handle(error)

    def _handle(self, error: RuntimeError) -> None:
        """Shrink the budget if memory is short. Raise EngineDied if the device is lost, else `error` itself."""
        if isinstance(error, torch.OutOfMemoryError) or _OUT_OF_MEMORY.search(str(error)):
            if self.model.shard.size > 1:  # the other ranks are in the middle of the step
                raise EngineDied(f"rank {self.model.shard.rank} is out of memory: {error}") from error
            self.shrink(error)
        elif isinstance(error, torch.AcceleratorError) or _DEVICE_FAULT.search(str(error)):
            raise EngineDied(str(error)) from error
        else:
            raise error

    def abandon(self) -> None:
        """Fail all running and waiting requests, but not those that finished in the last step."""
        for state in (*self.scheduler.running, *self.scheduler.waiting):
            if not state.has_left:
                state.error = RequestError("interrupted")
        self.scheduler = Scheduler(self._budget)
        self.runner.release_cache()

    def warm_up(self) -> None:
        """Run the largest passes over tiles and prompts, then decode steps of all batch sizes; reset `stats`.

        If memory is too small, it runs out here and not later. On CUDA this captures the graphs of all batch sizes, and
        the libraries choose kernels for all numbers of tiles. No answer ends at an end-of-text id, whatever the weights
        generate. Call it in the thread that steps the engine: libraries keep what they prepare per thread.
        """
        rule, self._stop_rule = self._stop_rule, StopRule((), None)
        try:
            run_largest_work(self)
        finally:
            self._stop_rule = rule
        self.stats = Stats()

    def agree_on_arrivals(self, num_arrived: int) -> int:
        """Return rank 0's `num_arrived`; assert that all ranks have done the same work."""
        if self.model.shard.size == 1:
            return num_arrived
        work = [self.stats.tiles, self.stats.prompt_tokens, self.stats.steps, self.stats.sequence_steps]
        num_agreed, *work_of_leader = self.model.shard.broadcast(torch.tensor([num_arrived, *work])).tolist()
        assert work == work_of_leader, f"rank {self.model.shard.rank} has done {work}, rank 0 {work_of_leader}"
        return int(num_agreed)

    def shrink(self, error: RuntimeError) -> None:
        """Restart the running requests with half the budget; fail a request that does not even fit alone."""
        self.scheduler.restart_all()
        if self.scheduler.budget.slots > 1:
            self.scheduler.budget = halve(self.scheduler.budget)
        else:
            failed = self.scheduler.waiting.popleft()
            failed.error = RequestError(f"out of device memory even for this request alone: {error}")
            self.scheduler.drop_embeddings([failed.item])
            self.scheduler.budget = self._budget
        self.runner.release_cache()
        torch.cuda.empty_cache()  # what the libraries allocate themselves cannot use blocks that torch keeps

    @torch.inference_mode()
    def _step(self) -> None:
        self._replace_left()
        running = self.scheduler.running
        if not running:
            return
        with self._clock.measure("decode_s"):
            choice = self.runner.decode(running, self._begin_masks(running))
            self.runner.tiles.send_ahead(self.scheduler.list_next_items())  # while the device computes
            self._record(running, choice)
        self.stats.steps += 1
        self.stats.sequence_steps += len(running)
        self.stats.slot_steps += self.scheduler.slots

    def _replace_left(self) -> None:
        """Admit waiting requests to free slots; some may finish at once, by their first token or their choices."""
        while True:
            admitted = self.scheduler.admit()
            self._retire()
            if self.scheduler.plan_cache():
                self.runner.allocate(self.scheduler.slots, self.scheduler.capacity, self.scheduler.pages)
                continue
            if admitted:
                self._prefill(admitted)
            if not admitted or not self.scheduler.is_next_sibling_of_left:
                break
        self._retire()

    def _retire(self) -> None:
        moves = self.scheduler.retire()
        self.runner.move(moves, self.scheduler.read_table())

    def _prefill(self, admitted: list[RequestState]) -> None:
        """Compute the prompts into their slots; generate each request's first token, or answer with its choice."""
        whole, rest = self.scheduler.split_prompts(admitted)
        budget = self.scheduler.budget
        items = self.scheduler.select_items_to_encode(span.state.item for span in whole)
        with self._clock.measure("vision_s"):
            self.runner.encode(items, budget.vision_tiles)
        self.stats.tiles += sum(len(item.tiles) for item in items)
        with self._clock.measure("prefill_s"):
            passes = pack_into_passes(whole, budget.prefill_tokens), pad_into_passes(rest, budget.prefill_tokens)
            for group in chain(*passes):
                choice = self.runner.prefill(group, self._begin_masks([span.state for span in group]))
                self.stats.prompt_tokens += sum(len(span.ids) for span in group)
                if choice is not None:
                    self._record([span.state for span in group if not span.state.params.choices], choice)
            answer_choices(self.runner, [*whole, *rest], budget)
        self.scheduler.drop_embeddings({state.item for state in admitted})

    def _begin_masks(self, states: Sequence[RequestState]) -> Masks | None:
        """Begin to compute the allowed next tokens of constrained requests, while the model runs."""
        answers = [(state.guide, state.output_ids) for state in states if state.guide]
        return self._guides.compute_masks(answers) if self._guides and answers else None

    def _record(self, states: Sequence[RequestState], choice: Choice) -> None:
        # One copy from the device, as float64, which represents ids and float32 exactly.
        ids, logprobs = torch.stack([part.double() for part in choice]).tolist()
        for state, token_id, logprob in zip(states, ids, logprobs, strict=True):
            state.append(int(token_id), logprob)
            state.finish_reason = self._stop_rule.find_finish_reason(state)
            if state.guide and state.guide.error:
                state.error = ConstraintExhausted(state.guide.error)

    def _add_times(self) -> None:
        """Add to the stats what the clock knows by now; all of it when no work is left."""
        is_idle = not self.scheduler.waiting and all(state.has_left for state in self.scheduler.running)
        for name, seconds in self._clock.collect(wait=is_idle):
            setattr(self.stats, name, getattr(self.stats, name) + seconds)


def _make_guides(tokenizer: Tokenizer, config: OvisConfig) -> Guides:
    from ovis_model.grammar.guides import Guides  # an engine without a tokenizer runs without llguidance

    return Guides(tokenizer, config.language.vocab_size, config.eos_token_ids)


def load_core(options: EngineOptions, shard: Shard = ALONE) -> EngineCore:
    """Load the checkpoint. Raise ConfigError, WeightsError or another ValueError."""
    device = resolve_device(options.device, shard)
    if options.num_threads or shard.size > 1:
        torch.set_num_threads(max(1, (options.num_threads or torch.get_num_threads()) // shard.size))
    model = load_model(
        options.directory,
        device=device,
        dtype=choose_dtype(options.dtype, device, options.quantization),
        post_trunk_norm=options.post_trunk_norm,
        shard=shard,
        quantization=options.quantization,
    )
    return EngineCore(model, tokenizer=load_tokenizer(options.directory))
