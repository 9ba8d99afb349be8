"""Read the columns that img2dataset and others store next to a tar, in a Parquet file of the same name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipelines.sources.rows import ROWS_PER_CHUNK, raise_source_errors
from pipelines.sources.tables import check_ratio
from pipelines.storage import store
from pipelines.storage.table_reader import get_processes

_TAR_SUFFIXES = (".tar.gz", ".tgz", ".tar")
_KEY = "key"


def get_stem(uri: str) -> str | None:
    """Return the name of a tar without its suffix, None if it is not named as a tar."""
    suffix = next((suffix for suffix in _TAR_SUFFIXES if uri.lower().endswith(suffix)), None)
    return uri[: -len(suffix)] if suffix else None


@dataclass(frozen=True)
class Companion:
    """A Parquet file next to a tar: its columns, and the `wanted` ones of each key."""

    uri: str
    names: frozenset[str]
    wanted: frozenset[str]

    @classmethod
    def find(cls, tar_uri: str, wanted: frozenset[str]) -> Companion | None:
        """Return the file `NAME.parquet` next to `NAME.tar` if it has a column `key`. Raise SourceError."""
        stem = get_stem(tar_uri)
        if not wanted or stem is None or store.find_file(uri := f"{stem}.parquet") is None:
            return None
        with raise_source_errors(uri, " as Parquet"), get_processes().open_parquet(uri) as file:
            names = frozenset(file.schema.names)
        return cls(uri, names, names & wanted) if _KEY in names else None

    def read_rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (key, values of the wanted columns) per row, a batch in memory at a time. Raise SourceError."""
        columns = sorted(self.wanted | {_KEY})
        with raise_source_errors(self.uri, " as Parquet"), get_processes().open_parquet(self.uri) as file:
            check_ratio(self.uri, file, columns)
            for batch in file.iter_batches(columns, ROWS_PER_CHUNK):
                for values in batch.to_pylist():
                    yield str(values[_KEY]), {name: values[name] for name in self.wanted}
