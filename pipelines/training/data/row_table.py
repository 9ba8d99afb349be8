"""The rows of a training run, frozen once in OUTPUT/rows and read by number; workers map a local copy."""

from __future__ import annotations

import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice
from pathlib import Path

import pyarrow as pa

from pipelines.storage import store
from pipelines.training.data.data_sets import ListedRow
from pipelines.training.data.forms import Dialogue

MAX_ROWS_PER_PART = 1 << 16
_SCHEMA = pa.schema(
    {"data_set": pa.int32(), "uri": pa.string(), "place": pa.string(), "dialogue": pa.string(), "error": pa.string()}
)


def write_rows(output: str, rows: Iterable[ListedRow]) -> int:
    """Write the rows to OUTPUT/rows and return their number."""
    remaining, num_rows = iter(rows), 0
    while some := list(islice(remaining, MAX_ROWS_PER_PART)):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, _SCHEMA) as writer:
            writer.write_table(pa.Table.from_pylist([_to_columns(row) for row in some], _SCHEMA), 1 << 10)
        store.write_bytes(_locate(output, num_rows), sink.getvalue().to_pybytes())
        num_rows += len(some)
    return num_rows


def _to_columns(row: ListedRow) -> dict[str, object]:
    return {**row._asdict(), "dialogue": row.dialogue.to_json() if row.dialogue else ""}


def _locate(output: str, first_row: int) -> str:
    return store.join(output, "rows", f"part-{first_row // MAX_ROWS_PER_PART:05}.arrow")


class RowTable:
    """The rows of a run, as a context manager: files of a store are copied once to a temporary directory."""

    def __init__(self, output: str, num_rows: int) -> None:
        """Map the files of `num_rows` rows. Raise OSError if one cannot be read."""
        self._directory = tempfile.TemporaryDirectory(prefix="ovis2-rows-")
        tables = [self._map(output, start) for start in range(0, num_rows, MAX_ROWS_PER_PART)]
        self._batches = [batch for table in tables for batch in table]
        self._starts = [0, *accumulate(len(batch) for batch in self._batches)]

    def __enter__(self) -> RowTable:
        return self

    def __exit__(self, *exception: object) -> None:
        self._directory.cleanup()

    def __len__(self) -> int:
        return self._starts[-1]

    def get(self, number: int) -> ListedRow:
        """Return a row."""
        at = bisect_right(self._starts, number) - 1
        [values] = self._batches[at].slice(number - self._starts[at], 1).to_pylist()
        dialogue = values.pop("dialogue")
        return ListedRow(dialogue=Dialogue.from_json(dialogue) if dialogue else None, **values)

    def get_dialogues(self, numbers: Sequence[int]) -> list[Dialogue]:
        """Return the dialogues of rows without errors."""
        found = [self.get(number).dialogue for number in numbers]
        return [dialogue for dialogue in found if dialogue is not None]

    def read_column(self, name: str) -> Iterator[pa.Array]:
        """Yield a column, in order."""
        return (batch.column(name) for batch in self._batches)

    def _map(self, output: str, start: int) -> list[pa.RecordBatch]:
        uri = _locate(output, start)
        path = Path(uri)
        if "://" in uri:
            path = Path(self._directory.name, path.name)
            path.write_bytes(store.read_bytes(uri))
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        return [reader.get_batch(number) for number in range(reader.num_record_batches)]
