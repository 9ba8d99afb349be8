"""The engine equals the original model's outputs, however requests are batched; float32 on a CPU."""

from __future__ import annotations

import gc
import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ovis_model.config import Layout
from ovis_model.engine.decode_step import BatchStepper, Decoded
from ovis_model.engine.engine import OvisEngine
from ovis_model.engine.engine_core import EngineCore
from ovis_model.engine.kv_cache import DecodeStep, KVCache
from ovis_model.engine.scheduler import Budget
from ovis_model.inputs.processor import Processor
from ovis_model.tokenizer import cut_at_stop
from ovis_model.types import EngineDied, Request, RequestError, SamplingParams
from tests.support.engines import (
    GREEDY,
    PARAMS,
    compute_logits,
    generate_alone,
    generate_ids,
    load_engine,
    load_greedy_ids,
    make_golden_requests,
    normalize_tiles,
)
from tests.support.golden_data import CHECKPOINTS, LAYOUTS, checkpoint_dir, load_expected, load_expected_arrays

both_layouts = pytest.mark.parametrize("layout", LAYOUTS)
both_checkpoints = pytest.mark.parametrize("checkpoint", CHECKPOINTS)


@both_layouts
@both_checkpoints
def test_greedy_ids_equal_the_originals_alone_and_in_one_batch(checkpoint: str, layout: Layout) -> None:
    engine, requests = load_engine(checkpoint, layout), make_golden_requests(checkpoint)
    assert [generate_ids(engine, [request])[0] for request in requests] == load_greedy_ids(checkpoint)
    assert generate_ids(engine, requests) == load_greedy_ids(checkpoint)


@both_checkpoints
def test_order_batch_and_budget_do_not_change_the_ids(checkpoint: str) -> None:
    requests, wanted = make_golden_requests(checkpoint), load_greedy_ids(checkpoint)
    rng = random.Random(7)
    gathering = Budget(kv_tokens=2000, slots=8, min_prefill_tokens=10_000)
    small = Budget(kv_tokens=4000, prefill_tokens=100, vision_tiles=2)
    for budget in (Budget(kv_tokens=600, slots=3), small, gathering):
        engine = OvisEngine.from_model(load_engine(checkpoint).model, budget=budget)
        for _ in range(3):
            order = rng.choices(range(len(requests)), k=13)
            assert generate_ids(engine, [requests[i] for i in order]) == [wanted[i] for i in order]


@both_layouts
@both_checkpoints
def test_last_logits_equal_the_originals(checkpoint: str, layout: Layout) -> None:
    model = load_engine(checkpoint, layout).model
    for index, request in enumerate(make_golden_requests(checkpoint)):
        wanted = load_expected_arrays(checkpoint)[f"{checkpoint}_{index}_last_logits"]
        np.testing.assert_allclose(compute_logits(model, request)[-1], wanted, atol=1e-5, rtol=0)


@both_layouts
@both_checkpoints
def test_visual_tokens_equal_the_originals(checkpoint: str, layout: Layout) -> None:
    model, arrays = load_engine(checkpoint, layout).model, load_expected_arrays(checkpoint)
    for index, request in enumerate(make_golden_requests(checkpoint)):
        if len(request.tiles):
            with torch.inference_mode():
                maxima = model.visual_tokenizer(normalize_tiles(model, request)).max(-1)
            assert np.array_equal(maxima.indices, arrays[f"{checkpoint}_{index}_visual_argmax"])
            np.testing.assert_allclose(maxima.values, arrays[f"{checkpoint}_{index}_visual_maxprob"], atol=1e-5, rtol=0)


@both_checkpoints
def test_scoring_in_one_pass_agrees_with_decoding(checkpoint: str) -> None:
    """The decoded tokens' log-probabilities are recomputed without a cache, which covers cache, mask and positions."""
    engine, requests = load_engine(checkpoint), make_golden_requests(checkpoint)
    for request, completion in zip(requests, engine.generate(requests, GREEDY), strict=True):
        ids = np.concatenate([request.input_ids, completion.output_ids[:-1]])
        whole = Request(ids, request.tiles, request.tile_sizes)
        logits = compute_logits(engine.model, whole)[len(request.input_ids) - 1 :]
        scores = logits.log_softmax(-1).gather(1, torch.from_numpy(completion.output_ids).long()[:, None])
        assert completion.mean_logprob == pytest.approx(float(scores.mean()), abs=1e-4)


@both_checkpoints
def test_finish_reasons_follow_the_last_token_and_the_limit(checkpoint: str) -> None:
    engine = load_engine(checkpoint)
    for completion in engine.generate(make_golden_requests(checkpoint), GREEDY):
        ended = completion.output_ids[-1] in engine.config.eos_token_ids
        assert completion.finish_reason == ("stop" if ended else "length")
        assert ended or len(completion.output_ids) == 48


@settings(max_examples=25, deadline=None)
@given(data=st.data(), slots=st.integers(1, 16))
def test_requests_that_enter_and_leave_generate_what_they_do_alone(data: st.DataObject, slots: int) -> None:
    """Requests are greedy, penalised and sampled, of any length, in any order, over any number of slots."""
    requests = make_golden_requests("tiny56-tied")
    picked = data.draw(st.lists(st.tuples(st.integers(0, 7), st.sampled_from(sorted(PARAMS))), min_size=1, max_size=24))
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=len(picked), max_size=len(picked)))
    params = [replace(PARAMS[kind], max_new_tokens=n) for (_, kind), n in zip(picked, lengths, strict=True)]
    engine = OvisEngine.from_model(load_engine("tiny56-tied").model, budget=Budget(kv_tokens=200 * slots, slots=slots))
    found = engine.generate([requests[i] for i, _ in picked], params)
    for completion, (index, kind), length in zip(found, picked, lengths, strict=True):
        assert completion.output_ids.tolist() == generate_alone(index, kind)[:length]


def test_another_seed_samples_other_tokens() -> None:
    assert generate_alone(0, "sampled") != generate_alone(0, "other seed")


def test_a_stop_string_ends_a_request_and_is_cut() -> None:
    checkpoint = "tiny56-tied"
    directory = str(checkpoint_dir(checkpoint))
    engine, processor = load_engine(checkpoint), Processor.from_pretrained(directory)
    request, text = make_golden_requests(checkpoint)[0], load_expected(checkpoint)["generation"][0]["greedy_text"]
    stop = text[10:14]
    [completion] = engine.generate([request], SamplingParams(max_new_tokens=48, stop=(stop,)))
    assert completion.finish_reason == "stop"
    assert len(completion.output_ids) < 48
    assert cut_at_stop(processor.detokenize(completion.output_ids), (stop,)) == text[: text.index(stop)]


def test_threads_share_the_slots_and_get_their_own_rows() -> None:
    checkpoint = "tiny56-tied"
    engine = OvisEngine.from_model(load_engine(checkpoint).model, budget=Budget(kv_tokens=4000, slots=4))
    requests, wanted = make_golden_requests(checkpoint), load_greedy_ids(checkpoint)
    orders = [random.Random(seed).sample(range(len(requests)), k=len(requests)) for seed in range(5)]
    with ThreadPoolExecutor(len(orders)) as pool:
        found = list(pool.map(lambda order: generate_ids(engine, [requests[i] for i in order]), orders))
    assert found == [[wanted[i] for i in order] for order in orders]
    assert engine.stats.sequence_steps > 0.9 * engine.stats.slot_steps


def test_slots_stay_full_until_few_requests_are_left() -> None:
    """Only the steps count in which more requests than slots are left."""
    checkpoint, slots = "tiny56-tied", 8
    budget = Budget(kv_tokens=4000, slots=slots)
    engine = EngineCore(load_engine(checkpoint).model, budget=budget, eos_token_ids=())
    lengths = random.Random(5).choices([2, 5, 9, 20, 60], k=150)
    requests = [make_golden_requests(checkpoint)[i % 8] for i in range(len(lengths))]
    rows = engine.enqueue(requests, [SamplingParams(max_new_tokens=n) for n in lengths])
    while sum(not row.has_left for row in rows) > slots:
        engine.step()
    assert engine.stats.sequence_steps >= 0.95 * engine.stats.slot_steps
    while not all(row.has_left for row in rows):
        engine.step()
    assert [len(row.output_ids) for row in rows] == lengths


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from Linux' /proc")
def test_memory_does_not_grow_over_two_thousand_requests() -> None:
    checkpoint = "tiny56-tied"
    engine = OvisEngine.from_model(load_engine(checkpoint).model, budget=Budget(kv_tokens=4000, slots=16))
    requests = [make_golden_requests(checkpoint)[i % 8] for i in range(100)]
    params = [SamplingParams(max_new_tokens=1 + i % 2) for i in range(100)]
    sizes_bytes = []
    for _ in range(20):
        engine.generate(requests, params)
        gc.collect()
        sizes_bytes.append(read_resident_bytes())
    assert max(sizes_bytes[5:]) < max(sizes_bytes[:5]) + 8 * 2**20
    assert not engine.backend.core.scheduler.waiting


def read_resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_out_of_memory_halves_the_batch_then_fails_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device runs out of memory on batches of more than two requests, later on every batch."""
    checkpoint = "tiny56-tied"
    requests, wanted = make_golden_requests(checkpoint), load_greedy_ids(checkpoint)
    engine = OvisEngine.from_model(load_engine(checkpoint).model, budget=Budget(kv_tokens=4000, slots=8))
    step, max_rows = DecodeStep.__init__, 2

    def run_out_of_memory(self: DecodeStep, cache: KVCache, lengths: torch.Tensor, longest: int) -> None:
        if len(lengths) > max_rows:
            raise torch.OutOfMemoryError("too many rows")
        step(self, cache, lengths, longest)

    monkeypatch.setattr(DecodeStep, "__init__", run_out_of_memory)
    assert generate_ids(engine, requests) == wanted
    max_rows = 0
    with pytest.raises(RequestError, match="out of device memory even for this request alone"):
        engine.generate(requests, GREEDY)


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: out of memory\nCUDA ...",
    ],
)
@pytest.mark.parametrize("page_tokens", [0, 16])
def test_libraries_that_lack_memory_halve_the_batch_too(
    monkeypatch: pytest.MonkeyPatch, message: str, page_tokens: int
) -> None:
    """CuBLAS allocates its workspace itself and raises a plain RuntimeError."""
    checkpoint = "tiny56-tied"
    requests, wanted = make_golden_requests(checkpoint), load_greedy_ids(checkpoint)
    budget = Budget(kv_tokens=4000, slots=8, page_tokens=page_tokens)
    engine = OvisEngine.from_model(load_engine(checkpoint).model, budget=budget)
    step = BatchStepper.step

    def fail(self: BatchStepper, rows: int, longest: int) -> Decoded:
        if rows > 2:
            raise RuntimeError(message)
        return step(self, rows, longest)

    monkeypatch.setattr(BatchStepper, "step", fail)
    assert generate_ids(engine, requests) == wanted


def test_other_faults_of_the_device_end_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = OvisEngine.from_model(load_engine("tiny56-tied").model, budget=Budget(kv_tokens=4000, slots=8))

    def fail(self: BatchStepper, rows: int, longest: int) -> Decoded:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`")

    monkeypatch.setattr(BatchStepper, "step", fail)
    with pytest.raises(EngineDied, match="EXECUTION_FAILED"):
        engine.generate(make_golden_requests("tiny56-tied")[:1], GREEDY)


def test_a_request_over_the_models_limit_is_refused_with_the_excess() -> None:
    engine = load_engine("tiny56-tied")
    request = Request(np.ones(30000, np.int32), np.zeros((0, 3, 56, 56), np.uint8), np.zeros((0, 2), np.int32))
    with pytest.raises(RequestError, match=r"30000 prompt \+ 3000 output tokens are 232 over the limit of 32768"):
        engine.generate([request], SamplingParams(max_new_tokens=3000))


def test_a_prompt_over_the_devices_limit_is_refused_with_the_excess() -> None:
    budget = Budget(kv_tokens=4000, prompt_tokens=100)
    engine = OvisEngine.from_model(load_engine("tiny56-tied").model, budget=budget)
    request = Request(np.ones(130, np.int32), np.zeros((0, 3, 56, 56), np.uint8), np.zeros((0, 2), np.int32))
    with pytest.raises(RequestError, match="130 prompt tokens are 30 over the 100 that fit in the device's memory"):
        engine.generate([request], GREEDY)


def test_an_invalid_prompt_is_refused_and_the_engine_keeps_working() -> None:
    engine, request = load_engine("tiny56-tied"), make_golden_requests("tiny56-tied")[0]
    for ids, message in (
        (request.input_ids[:0], "request 1: the prompt is empty"),
        (np.array([5, 640], np.int32), "request 1: prompt ids range from 5 to 640; the model has 640"),
        (np.array([5, -306], np.int32), "request 1: prompt ids range from -306 to 5"),
        (np.array([5, 6], np.int32), r"request 1: 0 placeholders for \d+ visual tokens"),
    ):
        with pytest.raises(RequestError, match=message):
            engine.generate([request, replace(request, input_ids=ids)], GREEDY)
    assert generate_ids(engine, [request]) == load_greedy_ids("tiny56-tied")[:1]


def test_abandoning_fails_only_unfinished_requests() -> None:
    engine, request = EngineCore(load_engine("tiny56-tied").model), make_golden_requests("tiny56-tied")[0]
    rows = engine.enqueue([request] * 3, [replace(GREEDY, max_new_tokens=n) for n in (2, 9, 9)])
    engine.step()
    engine.abandon()
    assert rows[0].make_completion().finish_reason == "length"
    for row in rows[1:]:
        with pytest.raises(RequestError, match="interrupted"):
            row.make_completion()


def test_no_requests_give_no_completions() -> None:
    assert load_engine("tiny56-tied").generate([], GREEDY) == []


def test_a_wrong_number_of_sampling_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="1 sampling parameters for 8 requests"):
        load_engine("tiny56-tied").generate(make_golden_requests("tiny56-tied"), [GREEDY])


def test_a_bfloat16_model_generates_on_a_cpu() -> None:
    directory = str(checkpoint_dir("tiny112-untied"))
    engine = OvisEngine.from_pretrained(directory, device="cpu", dtype="bfloat16")
    completions = engine.generate(make_golden_requests("tiny112-untied"), SamplingParams(max_new_tokens=4))
    assert all(len(completion.output_ids) for completion in completions)
