"""Count the rows of a listing by kind and size, and spread a sample over them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.sources.listing import KeyGroups, RowListing

Json = dict[str, Any]

_NAMES = {"file": "files", "tar": "members of tars", "tgz": "members of tar.gz", "cell": "cells of tables"}
_SHARES = (0.05, 0.5, 0.95)


def describe_contents(listing: RowListing) -> Json:
    """Return rows by kind of their first image, bytes as far as listed, and how many ids were skipped as duplicates."""
    kinds: dict[str, list[NDArray[Any]]] = {}
    for table in listing.read_tables():
        for kind, sizes in _split_by_kind(table):
            kinds.setdefault(kind, []).append(sizes)
    return {
        "rows": listing.num_rows,
        "duplicate_ids": listing.num_skipped,
        "kinds": {kind: _describe_sizes(np.concatenate(sizes)) for kind, sizes in sorted(kinds.items())},
    }


def _split_by_kind(table: pa.Table) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield each kind in the table with the listed bytes of the first image of its rows, -1 if unknown."""
    first = pc.list_element(_pad_empty(table.column("images").combine_chunks()), 0)
    kinds = np.array(pc.struct_field(first, "kind").to_pylist(), object)
    sizes = pc.struct_field(first, "num_bytes").to_numpy(zero_copy_only=False)
    kinds[kinds == None] = "text without image"  # noqa: E711  (element by element)
    kinds[pc.not_equal(table.column("error"), "").to_numpy(zero_copy_only=False)] = "unreadable when listed"
    for kind in set(kinds.tolist()):
        yield _NAMES.get(kind, kind), sizes[kinds == kind]


def _pad_empty(images: pa.Array) -> pa.Array:
    """Return null in place of empty lists, of which no element can be taken."""
    is_empty = pc.equal(pc.list_value_length(images), 0)
    return pc.if_else(is_empty, pa.scalar(None, images.type), images) if pc.any(is_empty).as_py() else images


def _describe_sizes(sizes: NDArray[Any]) -> Json:
    known = sizes[sizes >= 0]
    found: Json = {"rows": len(sizes)}
    return found | ({"bytes": int(known.sum()), "bytes_per_row": describe_quantiles(known)} if len(known) else {})


def describe_quantiles(values: NDArray[Any]) -> Json:
    """Return {"p5", "p50", "p95", "mean"} of some numbers; empty without any."""
    if not len(values):
        return {}
    quantiles = {f"p{share * 100:.0f}": float(np.quantile(values, share)) for share in _SHARES}
    return {name: round(value, 3) for name, value in {**quantiles, "mean": float(np.mean(values))}.items()}


def spread(length: int, count: int) -> NDArray[np.int64]:
    """Return at most `count` of the numbers below `length`, evenly spread and ascending."""
    return np.unique(np.linspace(0, max(0, length - 1), min(count, length)).astype(np.int64))


@dataclass(frozen=True)
class PartOfListing:
    """Some rows of a listing, in its order; `listing` stays open until this part is closed."""

    listing: RowListing
    rows: NDArray[np.int64]

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return len(self.rows)

    @property
    def num_skipped(self) -> int:
        """The number of rows that the whole listing leaves out."""
        return self.listing.num_skipped

    @property
    def kept(self) -> pa.Schema:
        """The kept columns of the whole listing."""
        return self.listing.kept

    @property
    def groups(self) -> KeyGroups:
        """The key groups of the whole listing."""
        return self.listing.groups

    def read_tables(self) -> Iterator[pa.Table]:
        """Yield the rows as `Listing.read_tables` does."""
        start = 0
        for table in self.listing.read_tables():
            mine = self.rows[(self.rows >= start) & (self.rows < start + len(table))] - start
            start += len(table)
            if len(mine):
                yield table.take(mine)

    def __enter__(self) -> PartOfListing:
        return self

    def __exit__(self, *exception: object) -> None:
        """Leave the listing open: its owner closes it."""
