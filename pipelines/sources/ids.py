"""Make ids unique within a run, and leave out rows that an extended run has already."""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.errors import SourceError
from pipelines.storage import store

OnDuplicate = Literal["error", "suffix", "skip"]
Tables = Callable[[], Iterable[pa.Table]]
"""Gives, each time, the same tables with the columns id, uri and images of the manifest."""

logger = logging.getLogger(__name__)


class KnownRows:
    """The rows of a run that is extended: 16 bytes each in memory."""

    def __init__(self, tables: Tables = tuple) -> None:
        self._tables = tables
        ids, rows = array("Q"), array("Q")
        for table in tables():
            ids.extend(_hashes(table))
            rows.extend(_row_hashes(table))
        self._ids, self._rows = np.sort(_numbers(ids)), np.sort(_numbers(rows))

    def __len__(self) -> int:
        return len(self._ids)

    def has_ids(self, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        return _is_among(hashes, self._ids)

    def has_rows(self, table: pa.Table, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """bool[N]: the same id at the same place. Two independent hashes of 64 bits agree by chance for nobody."""
        return self.has_ids(hashes) & _is_among(_numbers(_row_hashes(table)), self._rows)

    def find_ids(self, candidates: set[str]) -> set[str]:
        return {id_ for table in self._tables() for id_ in table.column("id").to_pylist() if id_ in candidates}


@dataclass
class Changes:
    """To a listing: which rows to leave out and which ids to replace, by their number in it."""

    left_out: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    replaced: dict[int, str] = field(default_factory=dict)

    def apply(self, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        start = 0
        for table in tables:
            numbers = np.arange(start, start + len(table))
            keep = np.ones(len(table), bool)
            first, stop = np.searchsorted(self.left_out, [start, start + len(table)])
            keep[self.left_out[first:stop] - start] = False
            start += len(table)
            if not self.replaced.keys().isdisjoint(numbers.tolist()):
                ids = map(self.replaced.get, numbers.tolist(), table.column("id").to_pylist())
                at = table.column_names.index("id")
                table = table.set_column(at, table.schema.field("id"), pa.array(ids, pa.string()))
            yield table.filter(pa.array(keep))


class IdIndex:
    """The ids of a listing, 8 bytes each in memory."""

    def __init__(self) -> None:
        self._hashes = array("Q")

    def add(self, table: pa.Table) -> None:
        self._hashes.extend(_hashes(table))

    def resolve_duplicates(self, tables: Tables, on_duplicate: OnDuplicate, known: KnownRows) -> Changes:
        """Return the changes after which every id is unique and none is known. Raises SourceError."""
        hashes = _numbers(self._hashes)
        is_known, taken = self._compare(tables, known) if len(known) else (np.zeros(len(hashes), bool), set())
        suspicious = np.concatenate([_repeated(hashes), np.array([*map(_hash, taken)], np.uint64)])
        rows = np.flatnonzero(np.isin(hashes, suspicious) & ~is_known) if len(suspicious) else np.empty(0, np.int64)
        ids = list(_ids_at(tables, rows))
        duplicates = _duplicates(rows, ids, taken)
        changes = Changes(np.flatnonzero(is_known))
        if duplicates:
            self._apply(on_duplicate, duplicates, changes, Counter([*ids, *taken]))
        return changes

    def _compare(self, tables: Tables, known: KnownRows) -> tuple[NDArray[np.bool_], set[str]]:
        """Return which rows the run has (bool[N]), and which of its ids stand for something else here."""
        hashes, start = _numbers(self._hashes), 0
        masks: list[NDArray[np.bool_]] = []
        candidates: set[str] = set()
        for table in tables():
            here = hashes[start : start + len(table)]
            start += len(table)
            masks.append(known.has_rows(table, here))
            elsewhere = known.has_ids(here) & ~masks[-1]
            candidates.update(table.column("id").filter(pa.array(elsewhere)).to_pylist())
        return np.concatenate(masks), known.find_ids(candidates) if candidates else set()

    def _apply(
        self, on_duplicate: OnDuplicate, duplicates: dict[int, str], changes: Changes, counts: Counter[str]
    ) -> None:
        shown = ", ".join(f"{store.redact(id_)} ({n} times)" for id_, n in counts.most_common(10) if n > 1)
        match on_duplicate:
            case "error":
                raise SourceError(
                    f"{len(duplicates)} rows repeat an id; list each file once, choose an --id-column whose values "
                    f"are unique, or see --on-duplicate-id. The most frequent: {shown}"
                )
            case "skip":
                logger.warning(
                    "left out %d rows whose id an earlier row has. The most frequent: %s", len(duplicates), shown
                )
                changes.left_out = np.union1d(changes.left_out, [*duplicates])
            case "suffix":
                logger.warning("%d rows repeat an id and got a suffix. The most frequent: %s", len(duplicates), shown)
                changes.replaced = self._with_suffixes(duplicates)

    def _with_suffixes(self, duplicates: dict[int, str]) -> dict[int, str]:
        """Return `id~2`, `id~3` ... in the order of the rows, skipping ids that another row has."""
        taken, number = set(self._hashes), Counter[str]()
        replaced = {}
        for row, id_ in duplicates.items():
            number[id_] += 1
            while _hash(new := f"{id_}~{number[id_] + 1}") in taken:
                number[id_] += 1
            replaced[row] = new
        return replaced


def _duplicates(rows: NDArray[np.int64], ids: Iterable[str], taken: set[str]) -> dict[int, str]:
    """Return the given rows whose id is taken or equals that of an earlier one."""
    seen, duplicates = set(taken), {}
    for row, id_ in zip(rows.tolist(), ids, strict=True):
        if id_ in seen:
            duplicates[row] = id_
        seen.add(id_)
    return duplicates


def _ids_at(tables: Tables, rows: NDArray[np.int64]) -> Iterator[str]:
    """Yield the ids of these rows, given in ascending order."""
    start = 0
    for table in tables() if len(rows) else ():
        here = rows[np.searchsorted(rows, start) : np.searchsorted(rows, start + len(table))]
        yield from table.column("id").take(here - start).to_pylist()
        start += len(table)


def _repeated(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    ordered = np.sort(hashes)
    return np.unique(ordered[1:][ordered[1:] == ordered[:-1]])


def _numbers(hashes: array[int]) -> NDArray[np.uint64]:
    return np.frombuffer(hashes, np.uint64)


def _hashes(table: pa.Table) -> array[int]:
    return array("Q", map(_hash, table.column("id").to_pylist()))


def _row_hashes(table: pa.Table) -> array[int]:
    """Hash each row's id and where its images are, but not their sizes, which may change with the file."""
    images = table.column("images").to_pylist()
    places = ([(i["kind"], i["uri"], i["offset"], i["member"], i["row"]) for i in each] for each in images)
    rows = zip(table.column("id").to_pylist(), table.column("uri").to_pylist(), places, strict=True)
    return array("Q", (_hash(repr(row)) for row in rows))


def _is_among(values: NDArray[np.uint64], ordered: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """bool[N]; `np.isin` would look at all of `ordered` for a few values."""
    if not len(ordered):
        return np.zeros(len(values), bool)
    found: NDArray[np.bool_] = ordered[np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)] == values
    return found


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
