"""Write out torch's attention for sequences of different lengths, with the signatures of 2.11 and 2.12."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def varlen_attn_2_11(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    raise AssertionError("this function cannot attend with fewer key heads than query heads")


def varlen_attn_2_12(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """Attend one sequence at a time; [T, heads, head_dim] like the real function."""
    assert enable_gqa and cu_seq_q.dtype == cu_seq_k.dtype == seqused_k.dtype == torch.int32
    assert block_table is None or (num_splits == 1 and block_table.dtype == torch.int32)
    out = torch.empty_like(query)
    for b, length in enumerate(seqused_k.tolist()):
        rows = slice(int(cu_seq_q[b]), int(cu_seq_q[b + 1]))
        keys, values = (_read(store, b, length, cu_seq_k, block_table) for store in (key, value))
        out[rows] = _attend(query[rows], keys, values, is_causal=window_size == (-1, 0))
    return out


def _read(store: Tensor, b: int, length: int, cu_seq_k: Tensor, block_table: Tensor | None) -> Tensor:
    if block_table is None:
        return store[int(cu_seq_k[b]) :][:length]
    return store[block_table[b].long()].flatten(0, 1)[:length]


def _attend(query: Tensor, keys: Tensor, values: Tensor, *, is_causal: bool) -> Tensor:
    groups = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(groups, 1) for x in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query, keys) / query.shape[-1] ** 0.5
    if is_causal:  # aligned to the last key
        last = torch.arange(len(query)) + len(keys) - len(query)
        scores = scores.masked_fill(torch.arange(len(keys)) > last[:, None], float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)


def make_operator(*, takes_lengths: bool) -> Any:
    """Make an operator like `torch.ops.aten._flash_attention_forward`, with its schema."""

    def operator(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cum_seq_q: Tensor,
        cum_seq_k: Tensor,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        return_debug_mask: bool,
        *,
        window_size_left: int,
        window_size_right: int,
        seqused_k: Tensor,
    ) -> tuple[Tensor, None]:
        assert dropout_p == 0 and not return_debug_mask and is_causal == (window_size_right == 0)
        sizes = (cum_seq_q, cum_seq_k, max_q, max_k)
        window_size = window_size_left, window_size_right
        found = varlen_attn_2_12(
            query, key, value, *sizes, window_size=window_size, enable_gqa=True, seqused_k=seqused_k
        )
        return found, None

    names = ["query", "key", "value", *(["seqused_k"] if takes_lengths else [])]
    schema = SimpleNamespace(arguments=[SimpleNamespace(name=name) for name in names])
    operator.default = SimpleNamespace(_schema=schema)  # type: ignore[attr-defined]
    return operator
