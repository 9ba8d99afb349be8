"""All attention kernels agree with sums written out, in each shape of attention."""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ovis_model.network import attention
from ovis_model.network.attention import (
    PAGE_TOKENS,
    PackedSequences,
    PagedLengths,
    Sdpa,
    Varlen,
    _find_kernels,
    choose_kernels,
    find_fault,
    list_kernels,
)
from tests.support.varlen import make_operator, varlen_attn_2_11, varlen_attn_2_12


def attend_exactly(query: Tensor, key: Tensor, value: Tensor, num_seen: int) -> Tensor:
    """Attend in float64 with one query [heads, D] over the first `num_seen` of the keys [S, kv_heads, D]."""
    groups = query.shape[0] // key.shape[1]
    key, value = (x[:num_seen].repeat_interleave(groups, 1).double() for x in (key, value))
    scores = torch.einsum("hd,shd->hs", query.double(), key) / query.shape[-1] ** 0.5
    return torch.einsum("hs,shd->hd", scores.softmax(-1), value)


def draw_tensor(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def assert_close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), atol=1e-5, rtol=1e-5)


HEADS = pytest.mark.parametrize("heads", [(4, 4), (6, 2), (6, 1)])


def test_attend_all_equals_the_sum_over_all_keys() -> None:
    query, key, value = draw_tensor(2, 5, 4, 8), draw_tensor(2, 5, 4, 8), draw_tensor(2, 5, 4, 8)
    out = choose_kernels(query).attend_all(query, key, value)
    for b in range(2):
        for t in range(5):
            assert_close(out[b, t], attend_exactly(query[b, t], key[b], value[b], num_seen=5))


@HEADS
def test_attend_causal_equals_the_sum_over_earlier_keys(heads: tuple[int, int]) -> None:
    query, key, value = (
        draw_tensor(3, 7, heads[0], 16),
        draw_tensor(3, 7, heads[1], 16),
        draw_tensor(3, 7, heads[1], 16),
    )
    out = choose_kernels(query).attend_causal(query, key, value)
    for b in range(3):
        for t in range(7):
            assert_close(out[b, t], attend_exactly(query[b, t], key[b], value[b], num_seen=t + 1))


@HEADS
def test_attend_packed_equals_each_sequence_alone(heads: tuple[int, int]) -> None:
    sizes = (5, 5, 4, 1, 1)
    query, key, value = (draw_tensor(1, sum(sizes), h, 16) for h in (heads[0], heads[1], heads[1]))
    starts = torch.tensor([0, *sizes]).cumsum(0).int()
    sequences = PackedSequences(sizes, starts.diff(), starts)
    found = [
        kernels.attend_packed(query, key, value, sequences)[0].split(sizes)
        for kernels in (choose_kernels(query), Varlen(partial(varlen_attn_2_12, enable_gqa=True), reads_pages=True))
    ]
    parts = (x[0].split(sizes) for x in (query, key, value))
    for index, (q, k, v) in enumerate(zip(*parts, strict=True)):
        for t in range(len(q)):
            for out in found:
                assert_close(out[index][t], attend_exactly(q[t], k, v, num_seen=t + 1))
        assert torch.equal(found[0][index], choose_kernels(q).attend_causal(q[None], k[None], v[None])[0])


@HEADS
def test_attend_cached_equals_the_sum_over_each_rows_length(heads: tuple[int, int]) -> None:
    lengths = torch.tensor([1, 4, 9], dtype=torch.int32)
    query, key, value = (
        draw_tensor(3, 1, heads[0], 16),
        draw_tensor(3, 9, heads[1], 16),
        draw_tensor(3, 9, heads[1], 16),
    )
    mask = (torch.arange(9) < lengths[:, None])[:, None, None]
    out = choose_kernels(query).attend_cached(query, key, value, lengths, mask)
    for b, num_seen in enumerate(lengths.tolist()):
        assert_close(out[b, 0], attend_exactly(query[b, 0], key[b], value[b], num_seen))


@HEADS
def test_attend_paged_equals_attend_cached_whatever_the_order_of_the_pages(heads: tuple[int, int]) -> None:
    lengths = torch.tensor([1, 4, 12], dtype=torch.int32)
    query, key, value = (
        draw_tensor(3, 1, heads[0], 16),
        draw_tensor(3, 12, heads[1], 16),
        draw_tensor(3, 12, heads[1], 16),
    )
    table = torch.tensor([[2, 5, 8], [1, 4, 0], [3, 7, 6]], dtype=torch.int32)
    pages = [torch.empty(9, 4, heads[1], 16) for _ in range(2)]
    for store, rows in zip(pages, (key, value), strict=True):
        store[table.long()] = rows.view(3, 3, 4, heads[1], 16)
    mask = (torch.arange(12) < lengths[:, None])[:, None, None]
    wanted = choose_kernels(query).attend_cached(query, key, value, lengths, mask)
    assert_close(choose_kernels(query).attend_paged(query, *pages, PagedLengths.build(lengths, table)), wanted)


@HEADS
@pytest.mark.parametrize("mask_values", [1 << 22, 40])
def test_attend_extended_is_causal_over_the_last_tokens_of_each_row(
    monkeypatch: pytest.MonkeyPatch, heads: tuple[int, int], mask_values: int
) -> None:
    """Five new tokens per row; the mask is built for all of them at once, and in pieces."""
    monkeypatch.setattr(attention, "_MASK_VALUES", mask_values)
    lengths = torch.tensor([5, 8, 14], dtype=torch.int32)
    query, key, value = (
        draw_tensor(3, 5, heads[0], 16),
        draw_tensor(3, 14, heads[1], 16),
        draw_tensor(3, 14, heads[1], 16),
    )
    out = choose_kernels(query).attend_extended(query, key, value, lengths)
    for b, length in enumerate(lengths.tolist()):
        for t in range(5):
            assert_close(out[b, t], attend_exactly(query[b, t], key[b], value[b], num_seen=length - 4 + t))


def test_a_cpu_and_float32_use_torchs_kernel() -> None:
    assert list(list_kernels(False, True)) == list(list_kernels(True, False)) == ["sdpa"]
    assert not choose_kernels(torch.zeros(1)).reads_lengths


def test_an_unavailable_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVIS_ATTENTION", "vendor")
    with pytest.raises(ValueError, match="OVIS_ATTENTION=vendor is not available here"):
        _find_kernels.__wrapped__(True, True)
    assert isinstance(_find_kernels.__wrapped__(False, True), Sdpa)


def use_torch_release(monkeypatch: pytest.MonkeyPatch, function: Any, operator: Any) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", function)
    monkeypatch.setattr(attention, "_find_operator", lambda: operator)


def test_the_form_of_torchs_varlen_attention_follows_its_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    """2.11's function takes neither fewer key heads nor lengths; the operator below it takes both, but no pages."""
    use_torch_release(monkeypatch, varlen_attn_2_12, make_operator(takes_lengths=True))
    assert list_kernels(True, True)["varlen"].reads_pages
    use_torch_release(monkeypatch, varlen_attn_2_11, make_operator(takes_lengths=True))
    assert not list_kernels(True, True)["varlen"].reads_pages
    use_torch_release(monkeypatch, varlen_attn_2_11, make_operator(takes_lengths=False))
    assert list(list_kernels(True, True)) == ["sdpa"]


@pytest.mark.parametrize("function", [varlen_attn_2_11, varlen_attn_2_12])
def test_varlen_computes_what_sdpa_does_in_both_forms(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    use_torch_release(monkeypatch, function, make_operator(takes_lengths=True))
    assert find_fault(list_kernels(True, True)["varlen"], torch.device("cpu"), torch.float32) is None


def test_kernels_that_fail_or_compute_something_else_are_found() -> None:
    old = Varlen(partial(varlen_attn_2_11, enable_gqa=True), reads_pages=False)
    fault = find_fault(old, torch.device("cpu"), torch.float32)
    assert fault is not None and "unexpected keyword argument 'enable_gqa'" in fault

    class Zeros(Sdpa):
        def attend_cached(self, query: Tensor, *rest: Tensor) -> Tensor:
            return torch.zeros_like(query)

    fault = find_fault(Zeros(), torch.device("cpu"), torch.float32)
    assert fault is not None and fault.startswith("results differ from float32 by")


def test_flash_attention_4_alone_is_not_taken_for_flash_attention_2(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """FlashAttention 4 installs `flash_attn.cute` only, so `flash_attn` is a package without functions."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    assert importlib.util.find_spec("flash_attn") is not None
    assert "flash" not in list_kernels(True, True)


def test_a_part_of_a_cache_is_read_in_place() -> None:
    """A step that sees only part of each slot must not copy the cache: 128 slots of 8B are 0.7 GB a layer."""
    cache = torch.randn(4, 64, 2, 8)
    seen = []

    def record(query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Tensor:
        seen.append(key)
        return varlen_attn_2_12(query, key, *rest, enable_gqa=True, **options)

    kernels, lengths = Varlen(record, reads_pages=False), torch.tensor([5, 9, 2], dtype=torch.int32)
    query, keys = torch.randn(3, 1, 4, 8), cache[:3, :16]
    found = kernels.attend_cached(query, keys, keys, lengths, torch.zeros(0))
    mask = (torch.arange(16) < lengths[:, None])[:, None, None]
    assert_close(found, Sdpa().attend_cached(query, keys, keys, lengths, mask))
    assert seen[0].data_ptr() == cache.data_ptr()


def test_prompts_never_run_in_cudnn_which_plans_each_new_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles all have one length, so there it may run."""
    used = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def record(*args: Any, **options: Any) -> Tensor:
        used.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*args, **options)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", record)
    kernels = list_kernels(True, False)["sdpa"]
    before = torch.backends.cuda.cudnn_sdp_enabled()
    x, lengths = torch.randn(2, 4, 2, 8), torch.tensor([4, 4], dtype=torch.int32)
    kernels.attend_all(x, x, x)
    kernels.attend_causal(x, x, x)
    kernels.attend_extended(x, x, x, lengths)
    kernels.attend_cached(x[:, :1], x, x, lengths, torch.ones(2, 1, 1, 4, dtype=torch.bool))
    assert used == [before, False, False, False]
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


GPU_HEADS = pytest.mark.parametrize(("heads", "head_dim"), [((6, 6), 64), ((6, 2), 64), ((14, 2), 64), ((28, 4), 128)])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash", "varlen", "sdpa"])
@GPU_HEADS
def test_all_kernels_agree_on_cuda(heads: tuple[int, int], head_dim: int, name: str) -> None:
    """bfloat16 kernels against torch's in float32, over caches longer than any row, as in captured steps."""
    found = list_kernels(True, True).get(name) or pytest.skip(f"{name} is not available")
    query, key, value = (draw_tensor(3, 256, h, head_dim).cuda() for h in (heads[0], heads[1], heads[1]))
    lengths = torch.tensor([1, 40, 256], dtype=torch.int32, device="cuda")
    mask = (torch.arange(256, device="cuda") < lengths[:, None])[:, None, None]
    half, exact = [x.bfloat16() for x in (query, key, value)], Sdpa()
    longer = lengths.clamp(min=20)
    assert_close_in_half(found.attend_causal(*half), exact.attend_causal(query, key, value))
    sizes = (256, 256, 200, 56)
    starts = torch.tensor([0, *sizes], device="cuda").cumsum(0).int()
    rows, sequences = (
        [x.flatten(0, 1)[None] for x in (*half, query, key, value)],
        PackedSequences(sizes, starts.diff(), starts),
    )
    assert_close_in_half(found.attend_packed(*rows[:3], sequences), exact.attend_packed(*rows[3:], sequences))
    assert_close_in_half(
        found.attend_cached(half[0][:, :1], half[1], half[2], lengths, mask),
        exact.attend_cached(query[:, :1], key, value, lengths, mask),
    )
    assert_close_in_half(
        found.attend_extended(half[0][:, :20], half[1], half[2], longer),
        exact.attend_extended(query[:, :20], key, value, longer),
    )
    if heads[0] == heads[1]:
        assert_close_in_half(found.attend_all(*half), exact.attend_all(query, key, value))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash", "varlen", "sdpa"])
@GPU_HEADS
def test_all_kernels_read_long_caches_of_many_rows_on_cuda(heads: tuple[int, int], head_dim: int, name: str) -> None:
    """128 rows of up to 8,192 tokens, in slots and in pages that are out of order."""
    found = list_kernels(True, True).get(name) or pytest.skip(f"{name} is not available")
    rows, capacity = 128, 8192
    draw = torch.Generator("cuda").manual_seed(0)
    lengths = torch.randint(1, capacity + 1, (rows,), generator=draw, device="cuda", dtype=torch.int32)
    query = torch.randn(rows, 1, heads[0], head_dim, generator=draw, device="cuda", dtype=torch.bfloat16)
    shape = rows, capacity, heads[1], head_dim
    keys, values = (torch.randn(shape, generator=draw, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    mask = (torch.arange(capacity, device="cuda") < lengths[:, None])[:, None, None]
    few = slice(0, 8)  # float32 copies of all rows would not fit
    wanted = Sdpa().attend_cached(query[few].float(), keys[few].float(), values[few].float(), lengths[few], mask[few])
    assert_close_in_half(found.attend_cached(query, keys, values, lengths, mask)[few], wanted)
    if not found.reads_pages:
        return
    order = torch.randperm(rows * capacity // PAGE_TOKENS, generator=draw, device="cuda")
    table = order.argsort().int().view(rows, -1)
    pages = [x.view(-1, PAGE_TOKENS, *shape[2:])[order] for x in (keys, values)]
    assert_close_in_half(found.attend_paged(query, *pages, PagedLengths.build(lengths, table))[few], wanted)


def assert_close_in_half(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.float(), wanted, atol=2e-2, rtol=2e-2)
