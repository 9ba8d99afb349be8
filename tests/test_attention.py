"""All kernels behind the three shapes of attention agree with sums written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ovis_model.network import attention
from ovis_model.network.attention import Sdpa, _find_kernels, choose_kernels, list_kernels


def reference(query: Tensor, key: Tensor, value: Tensor, num_seen: int) -> Tensor:
    """One query [heads, D] over the first `num_seen` of keys [S, kv_heads, D], in float64."""
    groups = query.shape[0] // key.shape[1]
    key, value = (x[:num_seen].repeat_interleave(groups, 1).double() for x in (key, value))
    scores = torch.einsum("hd,shd->hs", query.double(), key) / query.shape[-1] ** 0.5
    return torch.einsum("hs,shd->hd", scores.softmax(-1), value)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def assert_close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)


HEADS = pytest.mark.parametrize("heads", [(4, 4), (6, 2), (6, 1)])


def test_attend_all() -> None:
    query, key, value = random(2, 5, 4, 8), random(2, 5, 4, 8), random(2, 5, 4, 8)
    out = choose_kernels(query).attend_all(query, key, value)
    for b in range(2):
        for t in range(5):
            assert_close(out[b, t], reference(query[b, t], key[b], value[b], num_seen=5))


@HEADS
def test_attend_causal(heads: tuple[int, int]) -> None:
    query, key, value = random(3, 7, heads[0], 16), random(3, 7, heads[1], 16), random(3, 7, heads[1], 16)
    out = choose_kernels(query).attend_causal(query, key, value)
    for b in range(3):
        for t in range(7):
            assert_close(out[b, t], reference(query[b, t], key[b], value[b], num_seen=t + 1))


@HEADS
def test_attend_cached(heads: tuple[int, int]) -> None:
    lengths = torch.tensor([1, 4, 9], dtype=torch.int32)
    query, key, value = random(3, 1, heads[0], 16), random(3, 9, heads[1], 16), random(3, 9, heads[1], 16)
    mask = (torch.arange(9) < lengths[:, None])[:, None, None]
    out = choose_kernels(query).attend_cached(query, key, value, lengths, mask)
    for b, num_seen in enumerate(lengths.tolist()):
        assert_close(out[b, 0], reference(query[b, 0], key[b], value[b], num_seen))


@HEADS
@pytest.mark.parametrize("mask_values", [1 << 22, 40])
def test_attend_extended(monkeypatch: pytest.MonkeyPatch, heads: tuple[int, int], mask_values: int) -> None:
    """Five new tokens a row; the mask of all of them at once, and in pieces."""
    monkeypatch.setattr(attention, "_MASK_VALUES", mask_values)
    lengths = torch.tensor([5, 8, 14], dtype=torch.int32)
    query, key, value = random(3, 5, heads[0], 16), random(3, 14, heads[1], 16), random(3, 14, heads[1], 16)
    out = choose_kernels(query).attend_extended(query, key, value, lengths)
    for b, length in enumerate(lengths.tolist()):
        for t in range(5):
            assert_close(out[b, t], reference(query[b, t], key[b], value[b], num_seen=length - 4 + t))


def test_on_a_cpu_and_in_float32_torch_computes_it() -> None:
    assert list(list_kernels(False)) == ["sdpa"]
    assert not choose_kernels(torch.zeros(1)).reads_lengths


def test_kernels_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVIS_ATTENTION", "vendor")
    with pytest.raises(ValueError, match="OVIS_ATTENTION=vendor is not to be had here"):
        _find_kernels.__wrapped__(True)
    assert isinstance(_find_kernels.__wrapped__(False), Sdpa)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash", "varlen", "sdpa"])
@HEADS
def test_all_kernels_agree_on_cuda(heads: tuple[int, int], name: str) -> None:
    """In bfloat16, against torch's in float32; caches longer than any row, as captured steps see them."""
    if name not in list_kernels(True):
        pytest.skip(f"{name} is not installed")
    found = list_kernels(True)[name]
    query, key, value = (random(3, 256, h, 64).cuda() for h in (heads[0], heads[1], heads[1]))
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
