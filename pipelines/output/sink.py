"""Write results atomically to Parquet files with their row numbers in the footer, and read them again."""

from __future__ import annotations

import io
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines import schema
from pipelines.output.lease import Lease
from pipelines.output.ledger import FOOTER_KEY, FileEntry, Ledger, to_ranges
from pipelines.output.manifest import KeptColumns
from pipelines.output.parts import list_output_parts
from pipelines.storage import store

FLUSH_S = 30.0  # how much finished work a killed run may lose


class Sink:
    """A context manager that collects result rows in the driver and writes them to `data_uri`.

    `ledger` records which rows are written. There is one writer: results are text of about 1 KB per row, so one process
    keeps up with thousands of rows per second, and it alone knows what has arrived, when to write and how far the run
    is. Inside the context a thread writes rows that have waited for FLUSH_S; on exit all waiting rows are written,
    whatever ends the run.
    """

    def __init__(
        self, data_uri: str, ledger: Ledger, lease: Lease, *, rows_per_file: int, kept: KeptColumns | None = None
    ) -> None:
        self._data_uri, self._ledger, self._lease = data_uri, ledger, lease
        self._rows_per_file, self._kept = rows_per_file, kept
        self._waiting: list[pa.Table] = []
        self._oldest_s = 0.0  # when the first waiting row arrived
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._fault: Exception | None = None
        self._thread = threading.Thread(target=self._flush_late_rows, name="flush", daemon=True)

    def __enter__(self) -> Sink:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        try:
            self._thread.join()
            self.flush()
        except KeyboardInterrupt:  # during exit, when all rows have arrived
            self.flush()
            raise
        if self._fault is not None and exception[0] is None:
            raise self._fault

    def add(self, results: pa.Table) -> pa.Table:
        """Take rows of the result schema, write those that are due and return those that are new.

        A stage that runs again after its process died may hand over the same rows again. Raise OSError or LeaseError
        if rows cannot be written.
        """
        with self._lock:
            if self._fault is not None:
                raise self._fault
            rows = results.column(schema.ROW).to_numpy()
            is_new = self._ledger.find_new(rows) & ~np.isin(rows, self._list_waiting_rows())
            new = results.filter(is_new)
            self._oldest_s = self._oldest_s if self._waiting else time.monotonic()
            self._waiting.append(new)
            if sum(map(len, self._waiting)) >= self._rows_per_file:
                self.flush()
            return new

    def flush(self) -> None:
        """Write all waiting rows."""
        with self._lock:
            if not self._waiting:
                return
            self._lease.check()
            table = pa.concat_tables(self._waiting).sort_by(schema.ROW)
            while len(table):
                self._ledger.add(write_file(self._data_uri, table.slice(0, self._rows_per_file), self._kept))
                table = table.slice(self._rows_per_file)
                self._waiting = [table]  # after a failure, no written row is still waiting
            self._waiting.clear()

    def _flush_late_rows(self) -> None:
        while not self._closed.wait(min(1.0, FLUSH_S / 2)):
            try:
                with self._lock:
                    if self._waiting and time.monotonic() - self._oldest_s > FLUSH_S:
                        self.flush()
            except Exception as fault:  # `add` raises it in the thread that hands over rows
                self._fault = fault
                return

    def _list_waiting_rows(self) -> np.ndarray:
        return np.concatenate([np.empty(0, np.int64), *(t.column(schema.ROW).to_numpy() for t in self._waiting)])


def write_file(data_uri: str, results: pa.Table, kept: KeptColumns | None = None) -> FileEntry:
    """Write rows of the result schema, sorted by row number, and their kept columns to one file."""
    rows = results.column(schema.ROW).to_numpy()
    table = results.drop_columns([schema.ROW])
    if kept is not None:
        # Read from the manifest: the columns keep their types, and the stages carry less.
        table = pa.table([*table.columns, *kept.read(rows)], schema=pa.schema([*table.schema, *kept.schema]))
    entry, data = encode_file(table, rows)
    store.write_bytes(store.join(data_uri, entry.file_name), data)
    return entry


def encode_file(table: pa.Table, rows: NDArray[np.int64]) -> tuple[FileEntry, bytes]:
    """Encode an output table and its ascending row numbers as a Parquet file whose footer records the numbers."""
    entry = FileEntry(to_ranges(rows), pc.sum(pc.equal(table.column("status"), "error")).as_py() or 0)
    buffer = io.BytesIO()
    marked = table.replace_schema_metadata({FOOTER_KEY: entry.to_json().encode()})
    pq.write_table(marked, buffer, compression="zstd")
    return entry, buffer.getvalue()


def read_file(uri: str) -> tuple[NDArray[np.int64], pa.Table]:
    """Return the row numbers of an output file, ascending, and its rows."""
    table = store.read_parquet(uri)
    entry = FileEntry.from_json(table.schema.metadata[FOOTER_KEY])
    return entry.rows, table.replace_schema_metadata(None)


def read_results(output: str) -> pa.Table:
    """Return all rows of a run in the order of the input; of a divided run, those of all parts."""
    files = [
        (FileEntry(to_ranges(rows), 0).place(part.pieces).rows, table)
        for part in list_output_parts(output)
        for info in store.list_files(store.join(part.output, "data"))
        if info.uri.endswith(".parquet")
        for rows, table in [read_file(info.uri)]
    ]
    whole = pa.concat_tables([table for _, table in files] or [schema.OUTPUT.empty_table()])
    return whole.take(np.argsort(np.concatenate([np.empty(0, np.int64), *(rows for rows, _ in files)])))


def remove_temporaries(data_uri: str) -> None:
    """Remove the temporary files that a killed writer left."""
    for info in store.list_files(data_uri):
        if info.uri.endswith(store.TEMPORARY_SUFFIX):
            store.remove(info.uri)
