"""Count keys in bounded memory, however many rows there are."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

Json = dict[str, Any]

_MAX_KEYS = 10_000
MAX_KEY_CHARACTERS = 200


class TopCounts:
    """Counts of keys: exact for up to `max_keys` distinct keys; beyond that, the rarest are dropped.

    A count is too low by at most `max_missed`.
    """

    def __init__(self, max_keys: int = _MAX_KEYS) -> None:
        self._max_keys = max_keys
        self._counts: Counter[Any] = Counter()
        self.total = self.max_missed = 0

    def add(self, keys: pa.Array | pa.ChunkedArray) -> None:
        """Count each value except nulls."""
        for pair in pc.value_counts(keys.drop_null()).to_pylist():
            self.add_key(pair["values"], pair["counts"])

    def add_key(self, key: Any, count: int = 1) -> None:
        """Add `count` to the count of one key; text is truncated to MAX_KEY_CHARACTERS."""
        self._counts[key[:MAX_KEY_CHARACTERS] if isinstance(key, str) else key] += count
        self.total += count
        if len(self._counts) > 2 * self._max_keys:
            ordered = self._counts.most_common()
            self.max_missed += ordered[self._max_keys][1]
            self._counts = Counter(dict(ordered[: self._max_keys]))

    def list_top(self, count: int) -> list[tuple[Any, int]]:
        """Return the `count` most frequent keys with their counts; ties are sorted by key."""
        return sorted(self._counts.items(), key=lambda item: (-item[1], str(item[0])))[:count]

    @property
    def num_kept(self) -> int:
        """The number of keys that are kept."""
        return len(self._counts)

    def to_json(self, count: int) -> Json:
        """Return the `count` most frequent keys as `top`.

        `rest` is the total of all other keys; `distinct` is null once keys were dropped.
        """
        top = self.list_top(count)
        distinct = None if self.max_missed else len(self._counts)
        rest = self.total - sum(times for _, times in top)
        return {"top": top, "rest": rest, "distinct": distinct, "max_missed": self.max_missed}
