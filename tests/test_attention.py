"""All attention kernels agree with sums written out, in each shape of attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ovis_model.network import attention
from ovis_model.network.attention import Sdpa, _find_kernels, choose_kernels, list_kernels


def attend_exactly(query: Tensor, key: Tensor, value: Tensor, num_seen: int) -> Tensor:
    """Attend in float64 with one query [heads, D] over the first `num_seen` of the keys [S, kv_heads, D]."""
    groups = query.shape[0] // key.shape[1]
    key, value = (x[:num_seen].repeat_interleave(groups, 1).double() for x in (key, value))
    scores = torch.einsum("hd,shd->hs", query.double(), key) / query.shape[-1] ** 0.5
    return torch.einsum("hs,shd->hd", scores.softmax(-1), value)


def draw_tensor(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def assert_close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)


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
    assert list(list_kernels(False)) == ["sdpa"]
    assert not choose_kernels(torch.zeros(1)).reads_lengths


def test_an_unavailable_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVIS_ATTENTION", "vendor")
    with pytest.raises(ValueError, match="OVIS_ATTENTION=vendor is not available here"):
        _find_kernels.__wrapped__(True)
    assert isinstance(_find_kernels.__wrapped__(False), Sdpa)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash", "varlen", "sdpa"])
@HEADS
def test_all_kernels_agree_on_cuda(heads: tuple[int, int], name: str) -> None:
    """bfloat16 kernels against torch's in float32, over caches longer than any row, as in captured steps."""
    if name not in list_kernels(True):
        pytest.skip(f"{name} is not installed")
    found = list_kernels(True)[name]
    query, key, value = (draw_tensor(3, 256, h, 64).cuda() for h in (heads[0], heads[1], heads[1]))
    lengths = torch.tensor([1, 40, 256], dtype=torch.int32, device="cuda")
    mask = (torch.arange(256, device="cuda") < lengths[:, None])[:, None, None]
    half, exact = [x.bfloat16() for x in (query, key, value)], Sdpa()
    pairs = [
        (found.attend_causal(*half), exact.attend_causal(query, key, value)),
        (
            found.attend_cached(half[0][:, :1], half[1], half[2], lengths, mask),
            exact.attend_cached(query[:, :1], key, value, lengths, mask),
        ),
        (
            found.attend_extended(half[0][:, :20], half[1], half[2], lengths.clamp(min=20)),
            exact.attend_extended(query[:, :20], key, value, lengths.clamp(min=20)),
        ),
    ]
    if heads[0] == heads[1]:
        pairs.append((found.attend_all(*half), exact.attend_all(query, key, value)))
    for half_result, wanted in pairs:
        torch.testing.assert_close(half_result.float(), wanted, atol=2e-2, rtol=2e-2)
