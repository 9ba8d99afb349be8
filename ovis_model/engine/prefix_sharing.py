"""Find what requests of one call share: the images of a group, and the beginning of its prompts.

Knows ids, not tensors.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovis_model.types import Request


@dataclass(eq=False)
class Item:
    """The images of one or more requests.

    `visual` holds their embeddings, from the vision pass until no waiting request needs them, and `sent` the tiles
    that are on the device before that pass.
    """

    tiles: NDArray[np.uint8]
    tile_sizes: NDArray[np.int32]
    visual: Any = None
    sent: Any = None

    def has_images_of(self, request: Request) -> bool:
        """Return whether the contents are equal; free of cost if the arrays are the same objects."""
        pairs = ((self.tiles, request.tiles), (self.tile_sizes, request.tile_sizes))
        return all(own is other or np.array_equal(own, other) for own, other in pairs)


@dataclass(frozen=True, eq=False)
class Prefix:
    """The first `length` ids of one or more prompts about `item`, including all placeholders; 0 if none are shared."""

    item: Item
    length: int


def find_prefixes(requests: Sequence[Request]) -> list[Prefix]:
    """Return the prefix of each request; siblings, the requests of one `group`, get the same object.

    Siblings that differ before their last placeholder, e.g. in the system prompt, share only the item. The last id of a
    prompt is never shared, because the next token is predicted from it. Raise ValueError if the requests of a group
    have different images.
    """
    members: dict[tuple[Item, bytes], list[int]] = {}
    for index, item in enumerate(_group_items(requests)):
        members.setdefault((item, _cut_after_placeholders(requests[index].input_ids).tobytes()), []).append(index)
    prefixes: dict[int, Prefix] = {}
    for (item, _), indexes in members.items():
        prompts = [requests[index].input_ids for index in indexes]
        prefixes.update(dict.fromkeys(indexes, Prefix(item, _count_shared(prompts))))
    return [prefixes[index] for index in range(len(requests))]


def _group_items(requests: Sequence[Request]) -> Iterator[Item]:
    items: dict[Hashable, Item] = {}
    for index, request in enumerate(requests):
        item = Item(request.tiles, request.tile_sizes)
        if request.group is not None:
            item = items.setdefault(request.group, item)
        if not item.has_images_of(request):
            raise ValueError(
                f"request {index} differs in its images from the first request of its group {request.group!r}; "
                "give it another group or None"
            )
        yield item


def _cut_after_placeholders(ids: NDArray[np.int32]) -> NDArray[np.int32]:
    placeholders = np.flatnonzero(ids < 0)
    return ids[: placeholders[-1] + 1] if placeholders.size else ids[:0]


def _count_shared(prompts: Sequence[NDArray[np.int32]]) -> int:
    first, length = prompts[0], min(map(len, prompts)) - 1
    for prompt in prompts[1:]:
        differing = np.flatnonzero(prompt[:length] != first[:length])
        length = int(differing[0]) if differing.size else length
    return length if length >= len(_cut_after_placeholders(first)) else 0
