"""Make ids unique within a run, and skip rows that an extended run already has."""

from __future__ import annotations

import logging
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ovis_model.wording import count_nouns
from pipelines.errors import SourceError
from pipelines.sources.hashes import combine_hashes, hash_places, hash_texts
from pipelines.storage import store

OnDuplicate = Literal["error", "suffix", "skip"]
Tables = Callable[[], Iterable[pa.Table]]
"""Yields the same tables at each call, with the columns id, uri and images of the manifest."""

logger = logging.getLogger(__name__)


class KnownRows:
    """The rows that an extended run already has, as two hashes of 8 bytes per row."""

    def __init__(self, tables: Tables = tuple) -> None:
        self._tables = tables
        hashes = [(hash_texts(table.column("id")), _hash_rows(table)) for table in tables()]
        self._ids = np.sort(_join(ids for ids, _ in hashes))
        self._rows = np.sort(_join(rows for _, rows in hashes))

    def __len__(self) -> int:
        return len(self._ids)

    def has_ids(self, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Return bool[N]: whether the run has an id with this hash."""
        return _is_in_sorted(hashes, self._ids)

    def has_rows(self, table: pa.Table, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Return bool[N]: whether the run has the same id with the same images.

        Two independent 64-bit hashes must match, so that a collision is negligible.
        """
        return self.has_ids(hashes) & _is_in_sorted(_hash_rows(table), self._rows)

    def find_ids(self, candidates: set[str]) -> set[str]:
        """Return the candidates that are ids of the run; this reads its manifest."""
        return {id_ for table in self._tables() for id_ in table.column("id").to_pylist() if id_ in candidates}


@dataclass
class Changes:
    """Changes to a listing, by row number in it: rows to skip and ids to replace."""

    skipped: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    new_ids: dict[int, str] = field(default_factory=dict)

    def apply(self, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Yield the tables of the whole listing, in order, with the changes made."""
        start = 0
        for table in tables:
            numbers = np.arange(start, start + len(table))
            keep = np.ones(len(table), bool)
            first, stop = np.searchsorted(self.skipped, [start, start + len(table)])
            keep[self.skipped[first:stop] - start] = False
            start += len(table)
            if self.new_ids and not self.new_ids.keys().isdisjoint(numbers.tolist()):
                ids = map(self.new_ids.get, numbers.tolist(), table.column("id").to_pylist())
                at = table.column_names.index("id")
                table = table.set_column(at, table.schema.field("id"), pa.array(ids, pa.string()))
            yield table.filter(pa.array(keep))


class IdIndex:
    """The ids of a listing, as one hash of 8 bytes per row."""

    def __init__(self) -> None:
        self._hashes = array("Q")

    def add(self, table: pa.Table) -> None:
        """Add the ids of the next rows."""
        self._hashes.frombytes(hash_texts(table.column("id")).tobytes())

    def resolve_duplicates(self, tables: Tables, on_duplicate: OnDuplicate, known: KnownRows) -> Changes:
        """Return the changes that make every id unique and leave no known row.

        Raise SourceError if ids repeat and `on_duplicate` is "error".
        """
        hashes = _to_numpy(self._hashes)
        is_known, taken = self._compare(tables, known) if len(known) else (np.zeros(len(hashes), bool), set())
        suspicious = np.concatenate([_find_repeated(hashes), hash_texts(pa.array(list(taken), pa.string()))])
        rows = np.flatnonzero(np.isin(hashes, suspicious) & ~is_known) if len(suspicious) else np.empty(0, np.int64)
        ids = list(_read_ids(tables, rows))
        duplicates = _find_duplicates(rows, ids, taken)
        changes = Changes(np.flatnonzero(is_known))
        if duplicates:
            self._apply(on_duplicate, duplicates, changes, Counter([*ids, *taken]))
        return changes

    def _compare(self, tables: Tables, known: KnownRows) -> tuple[NDArray[np.bool_], set[str]]:
        """Return which rows the run has (bool[N]), and which of its ids belong to different images in this listing."""
        hashes, start = _to_numpy(self._hashes), 0
        masks: list[NDArray[np.bool_]] = []
        candidates: set[str] = set()
        for table in tables():
            in_table = hashes[start : start + len(table)]
            start += len(table)
            masks.append(known.has_rows(table, in_table))
            is_other = known.has_ids(in_table) & ~masks[-1]
            candidates.update(table.column("id").filter(pa.array(is_other)).to_pylist())
        return np.concatenate(masks), known.find_ids(candidates) if candidates else set()

    def _apply(
        self, on_duplicate: OnDuplicate, duplicates: dict[int, str], changes: Changes, counts: Counter[str]
    ) -> None:
        shown = ", ".join(f"{store.redact(id_)} ({n} times)" for id_, n in counts.most_common(10) if n > 1)
        match on_duplicate:
            case "error":
                raise SourceError(
                    f"{count_nouns(len(duplicates), 'row repeats', 'rows repeat')} an id; list each file once, choose "
                    f"an --id-column with unique values, or set --on-duplicate-id. The most frequent: {shown}"
                )
            case "skip":
                skipped = count_nouns(len(duplicates), "row")
                logger.warning("skipped %s with the id of an earlier row. The most frequent: %s", skipped, shown)
                changes.skipped = np.union1d(changes.skipped, [*duplicates])
            case "suffix":
                changed = count_nouns(len(duplicates), "repeated id")
                logger.warning("added a suffix to %s. The most frequent: %s", changed, shown)
                changes.new_ids = self._add_suffixes(duplicates)

    def _add_suffixes(self, duplicates: dict[int, str]) -> dict[int, str]:
        """Return {row: `id~2`, `id~3` ...} in the order of the rows, skipping ids that another row has."""
        taken, number = set(self._hashes), Counter[str]()
        new_ids = {}
        for row, id_ in duplicates.items():
            number[id_] += 1
            while _hash(new := f"{id_}~{number[id_] + 1}") in taken:
                number[id_] += 1
            new_ids[row] = new
        return new_ids


def _find_duplicates(rows: NDArray[np.int64], ids: Iterable[str], taken: set[str]) -> dict[int, str]:
    """Return {row: id} of the given rows whose id is taken or repeats that of an earlier row."""
    seen, duplicates = set(taken), {}
    for row, id_ in zip(rows.tolist(), ids, strict=True):
        if id_ in seen:
            duplicates[row] = id_
        seen.add(id_)
    return duplicates


def _read_ids(tables: Tables, rows: NDArray[np.int64]) -> Iterator[str]:
    """Yield the ids of `rows`, which are in ascending order."""
    start = 0
    for table in tables() if len(rows) else ():
        in_table = rows[np.searchsorted(rows, start) : np.searchsorted(rows, start + len(table))]
        yield from table.column("id").take(in_table - start).to_pylist()
        start += len(table)


def _find_repeated(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    sorted_values = np.sort(hashes)
    return np.unique(sorted_values[1:][sorted_values[1:] == sorted_values[:-1]])


def _to_numpy(hashes: array[int]) -> NDArray[np.uint64]:
    return np.frombuffer(hashes, np.uint64)


def _hash_rows(table: pa.Table) -> NDArray[np.uint64]:
    """Hash the id and the image locations of each row, but not the sizes, which may change with the file."""
    texts = (hash_texts(table.column(name)) for name in ("id", "uri"))
    return combine_hashes(*texts, hash_places(table.column("images")))


def _join(hashes: Iterable[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    return np.concatenate([np.empty(0, np.uint64), *hashes])


def _is_in_sorted(values: NDArray[np.uint64], sorted_values: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return bool[N]: whether each value is in the sorted array; `np.isin` would scan all of it for a few values."""
    if not len(sorted_values):
        return np.zeros(len(values), bool)
    positions = np.minimum(np.searchsorted(sorted_values, values), len(sorted_values) - 1)
    found: NDArray[np.bool_] = sorted_values[positions] == values
    return found


def _hash(text: str) -> int:
    return int(hash_texts(pa.array([text]))[0])
