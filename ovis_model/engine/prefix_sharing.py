"""What requests of one call share: the pictures of an item, and what prompts about them begin with.

Knows ids, not tensors.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovis_model.types import Request


@dataclass(eq=False)
class Item:
    """Pictures that some requests are about. `visual` holds their embeddings once computed, until no row needs them."""

    tiles: NDArray[np.uint8]
    tile_sizes: NDArray[np.int32]
    visual: Any = None


@dataclass(frozen=True, eq=False)
class Prefix:
    """The first `length` ids of some prompts about `item`, all of its placeholders among them; 0 if they share none."""

    item: Item
    length: int


def prefixes_of(requests: Sequence[Request]) -> list[Prefix]:
    """Of each request; siblings, which have the very same array of tiles, get the same one.

    Siblings that differ before their last placeholder, such as by the system prompt, share the item only. At least the
    last id of a prompt is its own, because what comes next is asked of it.
    """
    items: dict[Hashable, Item] = {}
    members: dict[tuple[Item, bytes], list[int]] = {}
    for index, request in enumerate(requests):
        key = id(request.tiles), request.tile_sizes.tobytes()
        item = items.setdefault(key, Item(request.tiles, request.tile_sizes))
        members.setdefault((item, _to_last_placeholder(request.input_ids).tobytes()), []).append(index)
    prefixes: dict[int, Prefix] = {}
    for (item, _), indexes in members.items():
        prompts = [requests[index].input_ids for index in indexes]
        prefixes.update(dict.fromkeys(indexes, Prefix(item, _num_shared(prompts))))
    return [prefixes[index] for index in range(len(requests))]


def _to_last_placeholder(ids: NDArray[np.int32]) -> NDArray[np.int32]:
    placeholders = np.flatnonzero(ids < 0)
    return ids[: placeholders[-1] + 1] if placeholders.size else ids[:0]


def _num_shared(prompts: Sequence[NDArray[np.int32]]) -> int:
    first, length = prompts[0], min(map(len, prompts)) - 1
    for prompt in prompts[1:]:
        differing = np.flatnonzero(prompt[:length] != first[:length])
        length = int(differing[0]) if differing.size else length
    return length if length >= len(_to_last_placeholder(first)) else 0
