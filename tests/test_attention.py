"""All kernels behind `attend` agree, whatever the padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ovis_model.attention import CausalPadding, attend


def reference(query: Tensor, key: Tensor, value: Tensor, left_pad: list[int] | None) -> Tensor:
    """Row by row, without a mask: softmax over the keys that a query may see."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1).double() for x in (key, value))
    out = torch.zeros_like(query, dtype=torch.float64)
    first_query = key.shape[2] - query.shape[2]
    for b in range(query.shape[0]):
        for t in range(query.shape[2]):
            seen = slice(0, key.shape[2]) if left_pad is None else slice(left_pad[b], first_query + t + 1)
            scores = torch.einsum("hd,hsd->hs", query[b, :, t].double(), key[b, :, seen]) / query.shape[-1] ** 0.5
            out[b, :, t] = torch.einsum("hs,hsd->hd", scores.softmax(-1), value[b, :, seen])
    return out


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("left_pad", [[0, 0, 0], [0, 3, 6]])
def test_prefill_and_decode(heads: tuple[int, int], left_pad: list[int]) -> None:
    pad = torch.tensor(left_pad, dtype=torch.int32)
    query, key, value = random(3, heads[0], 7, 16), random(3, heads[1], 7, 16), random(3, heads[1], 7, 16)
    whole = attend(query, key, value, CausalPadding.prefill(pad, 7))
    wanted = reference(query, key, value, left_pad)
    for b, start in enumerate(left_pad):
        torch.testing.assert_close(whole[b, :, start:].double(), wanted[b, :, start:], atol=1e-5, rtol=1e-5)
    assert whole.isfinite().all()
    last = attend(query[:, :, -1:], key, value, CausalPadding.decode(pad, 7))
    torch.testing.assert_close(last.double(), wanted[:, :, -1:], atol=1e-5, rtol=1e-5)


def test_full_attention() -> None:
    query, key, value = random(2, 4, 5, 8), random(2, 4, 5, 8), random(2, 4, 5, 8)
    torch.testing.assert_close(
        attend(query, key, value).double(), reference(query, key, value, None), atol=1e-5, rtol=1e-5
    )


@pytest.mark.gpu
def test_flash_attention_agrees() -> None:
    """In bfloat16 on CUDA, where flash-attn is installed; against torch's kernels in float32."""
    pytest.importorskip("flash_attn")
    pad = torch.tensor([0, 3, 6], dtype=torch.int32, device="cuda")
    query, key, value = (random(3, h, 7, 64).cuda() for h in (6, 2, 2))
    for causal, rows in ((CausalPadding.prefill(pad, 7), slice(6, 7)), (None, slice(0, 7))):
        if causal is None:
            key, value = key.repeat_interleave(3, 1), value.repeat_interleave(3, 1)
        flash = attend(query.bfloat16(), key.bfloat16(), value.bfloat16(), causal)
        exact = attend(query, key, value, causal)
        torch.testing.assert_close(flash[:, :, rows].float(), exact[:, :, rows], atol=2e-2, rtol=2e-2)
