"""The memory plan: its formulas against allocations counted on the meta device, for all published sizes."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch

from ovis_model.config import SIZES
from ovis_model.engine.kv_cache import Extend, KVCache, compute_bytes_per_token
from ovis_model.engine.memory_plan import (
    _read_cgroup_bytes,
    bound_prefill_bytes,
    bound_transient_bytes,
    bound_vision_bytes,
    bound_widened_bytes,
    describe_budget,
    halve,
    measure_free_bytes,
    plan_budget,
    plan_for_device,
)
from ovis_model.engine.scheduler import CACHED_PER_TOKEN, Budget
from ovis_model.network.attention import PAGE_TOKENS, Sdpa, Varlen
from ovis_model.network.tensor_parallel import ALONE
from ovis_model.network.weights import allocate_model
from tests.support.allocations import META, Allocations, make_shallow
from tests.support.prefills import make_prefill

WEIGHTS_AND_PASSES = pytest.mark.parametrize(
    ("dtype", "passes"),
    [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
    ids=["bfloat16", "float32", "widened"],
)
sizes = pytest.mark.parametrize("size", SIZES)


@WEIGHTS_AND_PASSES
@sizes
def test_a_vision_pass_stays_within_its_formula(size: str, dtype: torch.dtype, passes: torch.dtype) -> None:
    config, tiles = make_shallow(SIZES[size]), 4
    model = allocate_model(config, device=META, dtype=dtype)
    side = config.vision.image_size
    with torch.inference_mode(), Allocations() as allocations:
        model.encode_tiles(torch.empty(tiles, 3, side, side, dtype=passes, device=META))
    assert (
        0.4 < allocations.peak / (bound_vision_bytes(config, passes, tiles) + bound_widened_bytes(dtype, passes)) <= 1
    )


@WEIGHTS_AND_PASSES
@sizes
def test_a_prefill_stays_within_its_formula(size: str, dtype: torch.dtype, passes: torch.dtype) -> None:
    config, rows, width = make_shallow(SIZES[size]), 4, 1024
    model = allocate_model(config, device=META, dtype=dtype)
    cache = KVCache(config.language, slots=rows, capacity=width, device=META, dtype=dtype)
    positions, context = make_prefill(cache, rows, width)
    with torch.inference_mode(), Allocations() as allocations:
        embeds = torch.zeros(1, rows * width, config.language.hidden_size, dtype=passes, device=META)
        hidden = model.llm.model(embeds, positions, context)
        model.llm.compute_logits(hidden[0, width - 1 :: width]).float().softmax(-1)
    planned = bound_prefill_bytes(config, passes, rows * width, rows) + bound_widened_bytes(dtype, passes)
    assert 0.4 < allocations.peak / planned <= 1


@WEIGHTS_AND_PASSES
@sizes
@pytest.mark.parametrize(("rows", "width", "start"), [(64, 24, 3000), (200, 3, 3000), (4, 1000, 0), (2, 2, 30_000)])
def test_an_extension_stays_within_its_formula(
    size: str, dtype: torch.dtype, passes: torch.dtype, rows: int, width: int, start: int
) -> None:
    """New tokens attend to cached ones, each of which counts as `1 / CACHED_PER_TOKEN` of a token."""
    config = make_shallow(SIZES[size])
    model = allocate_model(config, device=META, dtype=dtype)
    cache = KVCache(config.language, slots=4, capacity=start + width, device=META, dtype=dtype)
    starts, slots = torch.full((rows,), start, device=META), torch.zeros(rows, dtype=torch.int64, device=META)
    with torch.inference_mode(), Allocations() as allocations:
        embeds = torch.zeros(rows, width, config.language.hidden_size, dtype=passes, device=META)
        positions = starts[:, None] + torch.arange(width, device=META)
        model.llm.model(embeds, positions, Extend(cache, slots, starts, start, width, slots))
    tokens = rows * (width + start // CACHED_PER_TOKEN)
    assert (
        allocations.peak / (bound_prefill_bytes(config, passes, tokens, 64) + bound_widened_bytes(dtype, passes)) <= 1
    )


@WEIGHTS_AND_PASSES
@sizes
def test_a_plan_fits_and_uses_the_free_memory(size: str, dtype: torch.dtype, passes: torch.dtype) -> None:
    config = SIZES[size]
    for free_gb in (8, 40, 140):
        budget = plan_budget(config, dtype, free_gb * 10**9, passes)
        kv_bytes = budget.kv_tokens * compute_bytes_per_token(config.language, dtype)
        planned = kv_bytes + bound_transient_bytes(config, dtype, budget, passes)
        assert planned <= 0.9 * free_gb * 1e9
        assert planned > 0.85 * free_gb * 1e9 or budget.kv_tokens == budget.slots * config.max_length


class CachingAllocator(Allocations):
    """Model of torch's allocator on CUDA: what is freed stays taken until the cache is emptied or it is used again."""

    def __init__(self, total: int) -> None:
        super().__init__()
        self.total, self.cached = total, Counter[int]()

    def _enter(self, storage: torch.UntypedStorage) -> None:
        if self.cached[storage.nbytes()]:
            self.cached[storage.nbytes()] -= 1
        super()._enter(storage)

    def _leave(self, key: int, nbytes: int) -> None:
        self.cached[nbytes] += 1
        super()._leave(key, nbytes)

    def get_info(self, device: torch.device) -> tuple[int, int]:
        cached = sum(nbytes * count for nbytes, count in self.cached.items())
        return self.total - self.alive - cached, self.total


def test_memory_that_fusing_weights_left_in_torchs_cache_is_planned_with(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = CachingAllocator(85 * 10**9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", allocator.get_info)
    monkeypatch.setattr(torch.cuda, "empty_cache", allocator.cached.clear)
    with allocator:
        model = allocate_model(SIZES["8B"], device=META, dtype=torch.bfloat16)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    counted_as_taken = allocator.get_info(torch.device("cuda"))[0]
    free = measure_free_bytes(torch.device("cuda"))
    assert free == pytest.approx(allocator.total - weights, rel=1e-3)
    assert free - counted_as_taken > 5e9
    planned = [plan_budget(SIZES["8B"], torch.bfloat16, n).kv_tokens for n in (free, counted_as_taken)]
    assert planned[0] > 1.08 * planned[1]


def test_the_cache_is_in_pages_where_a_kernel_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * 10**9, 80 * 10**9))
    found = "ovis_model.engine.memory_plan.find_kernels"
    monkeypatch.setattr(found, lambda device, dtype: Varlen(print, reads_pages=True))
    plan = partial(plan_for_device, SIZES["34B"], torch.bfloat16, torch.device("cuda"), ALONE)
    assert plan().page_tokens == PAGE_TOKENS and plan().kv_tokens % PAGE_TOKENS == 0
    monkeypatch.setattr(found, lambda device, dtype: Sdpa())
    assert plan().page_tokens == 0 and plan().slot_tokens >= 10 * 256 + 640


def test_little_memory_means_smaller_passes() -> None:
    small, large = (plan_budget(SIZES["1B"], torch.bfloat16, free) for free in (10**9, 10**11))
    assert small.vision_tiles < large.vision_tiles and small.prefill_tokens < large.prefill_tokens


def test_too_little_memory_is_refused_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"0\.1 GB are free after loading the weights, too little .* bfloat16"):
        plan_budget(SIZES["8B"], torch.float32, 10**8)


def test_halving_a_budget_of_ones_keeps_it() -> None:
    least = Budget(kv_tokens=10, slots=1, prefill_tokens=1, vision_tiles=1)
    assert halve(least) == least


def test_the_plan_is_described_in_one_line() -> None:
    line = describe_budget(SIZES["1B"], torch.bfloat16, Budget(kv_tokens=1_000_000))
    assert "up to 128 sequences at once in 12.29 GB of keys and values (1000000 tokens)" in line and "\n" not in line


@pytest.mark.parametrize("names", [("memory.max", "memory.current")])
def test_a_containers_memory_limit_counts(tmp_path: Path, names: tuple[str, str]) -> None:
    assert _read_cgroup_bytes(tmp_path) == 1 << 62
    (tmp_path / names[0]).write_text("max\n")
    assert _read_cgroup_bytes(tmp_path) == 1 << 62
    (tmp_path / names[0]).write_text("1000\n")
    (tmp_path / names[1]).write_text("300\n")
    assert _read_cgroup_bytes(tmp_path) == 700


def test_free_memory_of_a_cpu_is_plausible() -> None:
    assert 1e8 < measure_free_bytes(torch.device("cpu")) < 1e13
