"""Tensor parallelism: the part of the model that a rank holds, and the exchange between ranks.

The cut is that of Megatron-LM (arXiv:1909.08053). Query, key, value, gate and up projections are cut by output rows.
The output and down projections are cut by input columns, and their results are summed over the ranks. The embedding
table and the output matrix are cut by the vocabulary. If there are fewer key-value heads than ranks, several ranks hold
the same head.

Every rank holds the whole vision tower, its head and the visual embedding table; the tiles of a pass are distributed
instead. The head's 65,531 outputs have no common divisor with any number of ranks, tiles do not depend on each other,
and one exchange of 256 embeddings per tile replaces two exchanges in each of 24 blocks.
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

_COLLECTIVE_TIMEOUT = timedelta(hours=1)  # far longer than the owner of the ranks waits for a sign of life


@dataclass(frozen=True)
class Part:
    """Part `index` of `count` equal parts of a weight along its dimension `dim`."""

    dim: int = 0
    index: int = 0
    count: int = 1

    def to_whole_shape(self, part: tuple[int, ...]) -> tuple[int, ...]:
        """Convert the shape of a part to the shape of the whole weight."""
        return tuple(size * self.count if dim == self.dim else size for dim, size in enumerate(part))

    def to_slices(self, part: tuple[int, ...]) -> tuple[slice, ...]:
        """Return where in the whole weight the part of this shape is."""
        at = self.index * part[self.dim]
        return tuple(slice(at, at + n) if dim == self.dim else slice(None) for dim, n in enumerate(part))


WHOLE = Part()


@dataclass(frozen=True)
class Shard:
    """Rank `rank` of `size`. A single rank cuts and exchanges nothing.

    `on_exchange` is called each time before this rank waits for the others; it may send a sign of life.
    """

    rank: int = 0
    size: int = 1
    on_exchange: Callable[[], None] = lambda: None

    def make_part(self, dim: int) -> Part:
        """Return this rank's part of a weight that is cut along `dim`."""
        return Part(dim, self.rank, self.size)

    def make_kv_part(self, num_kv_heads: int) -> Part:
        """Return this rank's rows of the key or value projection: at least one head, shared by neighbouring ranks."""
        count = min(self.size, num_kv_heads)
        return Part(0, self.rank * count // self.size, count)

    def to_local(self, config: LanguageConfig) -> LanguageConfig:
        """Return the configuration with the key-value heads of this rank only, for its cache."""
        return replace(config, num_key_value_heads=max(1, config.num_key_value_heads // self.size))

    def sum(self, x: Tensor) -> Tensor:
        """Sum `x` over the ranks, in place."""
        if self.size > 1:
            with self._exchange():
                dist.all_reduce(x)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Concatenate the ranks' [..., n] to [..., size * n], bitwise the same on every rank."""
        return x if self.size == 1 else torch.cat(self._collect(x), dim=-1)

    def distribute(self, tiles: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """Encode tiles [N, ...] -> [N, ...] with each rank encoding its share; the last share may include padding."""
        if self.size == 1:
            return encode(tiles)
        share = -(-len(tiles) // self.size)
        padded = F.pad(tiles, (*[0] * (2 * tiles.dim() - 1), self.size * share - len(tiles)))
        mine = encode(padded[self.rank * share : (self.rank + 1) * share])
        return torch.cat(self._collect(mine))[: len(tiles)]

    def broadcast(self, x: Tensor) -> Tensor:
        """Replace `x` by rank 0's value, in place, so that all ranks continue with the same values."""
        if self.size > 1:
            with self._exchange():
                dist.broadcast(x, src=0)
        return x

    def reduce_min(self, value: int) -> int:
        """Return the minimum of the ranks' values."""
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
    """Make this process a rank while the context lasts; all ranks run on one machine and meet at `meeting_point`.

    That file must not exist before, so that groups share no port and no name. CPU tensors are exchanged with gloo and
    GPU tensors with NCCL, which starts at the first exchange.
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
    """A rank's rows of an embedding table; the ranks look up ids together."""

    def __init__(self, num_embeddings: int, embedding_dim: int, shard: Shard) -> None:
        super().__init__(num_embeddings // shard.size, embedding_dim)
        self.part, self._shard = shard.make_part(0), shard

    def forward(self, ids: Tensor) -> Tensor:
        """Look up any ids: int64[...] -> [..., embedding_dim]."""
        if self.part.count == 1:
            return super().forward(ids)
        local = ids - self.part.index * self.num_embeddings
        is_mine = (local >= 0) & (local < self.num_embeddings)
        rows = super().forward(local.clamp(0, self.num_embeddings - 1))
        return self._shard.sum(rows.masked_fill(~is_mine[..., None], 0))
