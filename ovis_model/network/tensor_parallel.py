"""Tensor parallelism: the part of the model that a rank holds, and the exchange between ranks.

As in Megatron-LM (arXiv:1909.08053): query, key, value, gate and up projections are cut by output rows, the output and
down projections by input columns, whose sums are then added over the ranks; the embedding table and the output matrix
are cut by the vocabulary. Key-value heads that are fewer than the ranks are held by several of them. The vision tower,
its head and the visual embedding table are whole on every rank, and the tiles of a pass are dealt out instead: the
head's 65,531 outputs have no common divisor with any number of ranks, a tile needs none of its neighbours, and one
exchange of 256 embeddings a tile replaces two in each of 24 blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ovis_model.config import LanguageConfig
from ovis_model.types import EngineDied

_COLLECTIVE_TIMEOUT = timedelta(hours=1)  # who watches the ranks gives them up long before


@dataclass(frozen=True)
class Part:
    """Part `index` of `count` equal ones along dimension `dim` of a weight."""

    dim: int = 0
    index: int = 0
    count: int = 1

    def to_whole_shape(self, part: tuple[int, ...]) -> tuple[int, ...]:
        """Of a part's shape."""
        return tuple(size * self.count if dim == self.dim else size for dim, size in enumerate(part))

    def to_slices(self, part: tuple[int, ...]) -> tuple[slice, ...]:
        """Where in the whole the part of this shape is."""
        at = self.index * part[self.dim]
        return tuple(slice(at, at + n) if dim == self.dim else slice(None) for dim, n in enumerate(part))


WHOLE = Part()


@dataclass(frozen=True)
class Shard:
    """Rank `rank` of `size`. With one rank nothing is cut and nothing is exchanged.

    `on_exchange` is called whenever this rank is about to wait for the others: a sign of life.
    """

    rank: int = 0
    size: int = 1
    on_exchange: Callable[[], None] = lambda: None

    def make_part(self, dim: int) -> Part:
        return Part(dim, self.rank, self.size)

    def make_kv_part(self, num_kv_heads: int) -> Part:
        """Rows of the key or value projection: one head is the least, and neighbouring ranks share it."""
        count = min(self.size, num_kv_heads)
        return Part(0, self.rank * count // self.size, count)

    def to_local(self, config: LanguageConfig) -> LanguageConfig:
        """As the key-value cache of this rank sees it."""
        return replace(config, num_key_value_heads=max(1, config.num_key_value_heads // self.size))

    def sum(self, x: Tensor) -> Tensor:
        """Over the ranks, in place."""
        if self.size > 1:
            with self._exchange():
                dist.all_reduce(x)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Return the ranks' [..., n] side by side: [..., size * n], bitwise the same everywhere."""
        return x if self.size == 1 else torch.cat(self._collect(x), dim=-1)

    def distribute(self, tiles: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """Encode [N, ...] -> [N, ...], each rank doing its part of the N; the last one may do some for nothing."""
        if self.size == 1:
            return encode(tiles)
        share = -(-len(tiles) // self.size)
        padded = F.pad(tiles, (*[0] * (2 * tiles.dim() - 1), self.size * share - len(tiles)))
        mine = encode(padded[self.rank * share : (self.rank + 1) * share])
        return torch.cat(self._collect(mine))[: len(tiles)]

    def broadcast(self, x: Tensor) -> Tensor:
        """Replace `x` by rank 0's, in place: for what each rank computes, and all must agree on."""
        if self.size > 1:
            with self._exchange():
                dist.broadcast(x, src=0)
        return x

    def reduce_min(self, value: int) -> int:
        """Return the smallest of the ranks' values."""
        smallest = torch.tensor(value)
        if self.size > 1:
            with self._exchange():
                dist.all_reduce(smallest, dist.ReduceOp.MIN)
        return int(smallest)

    def _collect(self, x: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        with self._exchange():
            dist.all_gather(parts, x.contiguous())
        return parts

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        self.on_exchange()
        try:
            yield
        except RuntimeError as error:
            raise EngineDied(f"rank {self.rank} of {self.size} lost the others: {error}") from error


ALONE = Shard()


@contextmanager
def join_ranks(rank: int, size: int, meeting_point: Path, on_exchange: Callable[[], None]) -> Iterator[Shard]:
    """This process as a rank, while the context lasts; all ranks are on one machine and see the file `meeting_point`.

    The file must not exist before, so nothing is shared with other groups: no port, no name. Tensors on a CPU travel
    by gloo, those on a GPU by NCCL, which starts with its first tensor.
    """
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(
        backend, init_method=meeting_point.as_uri(), rank=rank, world_size=size, timeout=_COLLECTIVE_TIMEOUT
    )
    try:
        yield Shard(rank, size, on_exchange)
    finally:
        dist.destroy_process_group()


class ShardedLinear(nn.Linear):
    """A rank's `part` of a linear layer of the given sizes."""

    def __init__(self, in_features: int, out_features: int, part: Part, *, bias: bool = False) -> None:
        sizes = [out_features, in_features]
        sizes[part.dim] //= part.count
        super().__init__(sizes[1], sizes[0], bias=bias)
        self.part = part


class ShardedEmbedding(nn.Embedding):
    """A rank's rows of an embedding table; looks up any id, with the help of the others."""

    def __init__(self, num_embeddings: int, embedding_dim: int, shard: Shard) -> None:
        super().__init__(num_embeddings // shard.size, embedding_dim)
        self.part, self._shard = shard.make_part(0), shard

    def forward(self, ids: Tensor) -> Tensor:
        """int64[...] -> [..., embedding_dim]"""
        if self.part.count == 1:
            return super().forward(ids)
        local = ids - self.part.index * self.num_embeddings
        is_mine = (local >= 0) & (local < self.num_embeddings)
        rows = super().forward(local.clamp(0, self.num_embeddings - 1))
        return self._shard.sum(rows.masked_fill(~is_mine[..., None], 0))
