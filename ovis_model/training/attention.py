"""Let the examples of a batch attend, each to its own tokens, although all of them stand in one row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ovis_model.network.attention import choose_kernels

_MAX_PADDED = 1.25
"""Examples attend together if padding them to one length makes at most this many times as many tokens."""


class PackedContext:
    """An `AttentionContext` in which each token of a row sees the tokens before it in its example.

    The tokens of each example are copied next to each other and padded on the right, for attention alone.
    """

    def __init__(self, order: Tensor, lengths: Sequence[int], num_tokens: int) -> None:
        """Take `order` int64[M] and `lengths` of a `Batch`, and the length of its row."""
        examples = torch.split(order, list(lengths))
        self._is_one_row, self._groups = len(lengths) == 1, []
        self._outputs = torch.empty(num_tokens, dtype=torch.int64, device=order.device)
        start = 0
        for members in _group_lengths(lengths):
            group = pad_sequence([examples[i] for i in members], batch_first=True)
            for number, i in enumerate(members):
                begin = start + number * group.shape[1]
                self._outputs[examples[i]] = torch.arange(begin, begin + lengths[i], device=order.device)
            self._groups.append(group)
            start += group.numel()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend within each example: [1, T, heads, head_dim] and keys of their own number of heads."""
        attend = choose_kernels(query).attend_causal
        if self._is_one_row:
            return attend(query, key, value)
        parts = [attend(query[0, group], key[0, group], value[0, group]) for group in self._groups]
        return torch.cat([part.flatten(0, 1) for part in parts])[None, self._outputs]


def _group_lengths(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield the numbers of examples of similar lengths, longest first."""
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        total = sum(lengths[j] for j in group) + lengths[i]
        if group and lengths[group[0]] * (len(group) + 1) > _MAX_PADDED * total:
            yield group
            group = []
        group.append(i)
    if group:
        yield group
