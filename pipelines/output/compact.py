"""Rewrite the files of a run: without error rows, to retry them; or fewer, larger and sorted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.errors import RunError
from pipelines.output.file_swap import exchange_files, finish_exchange
from pipelines.output.lease import Lease
from pipelines.output.ledger import FileEntry, Ranges, RowRange, count_rows, merge_ranges, read_entries
from pipelines.output.run_record import acquire_lease
from pipelines.output.sink import encode_file, read_file
from pipelines.storage import store
from pipelines.storage.store import FileInfo

Part = tuple[NDArray[np.int64], pa.Table]
"""Row numbers and rows."""
Entry = tuple[FileInfo, FileEntry]

_MOST_BYTES = 1 << 30  # of a file in memory, whatever it is compressed


@dataclass(frozen=True)
class Compacted:
    """Files and bytes of OUTPUT/data before and after."""

    rows: int
    files_before: int
    files_after: int
    bytes_before: int
    bytes_after: int
    output: str


def compact_run(output: str, file_bytes: int) -> Compacted:
    """`compact` of a run that no driver is writing to. Raises ValueError if there is none or one is; OSError."""
    output = store.make_absolute(output)
    if store.find_file(store.join(output, "run.json")) is None:
        raise RunError(f"{output} holds no run (no run.json)")
    with acquire_lease(output) as lease:
        finish_exchange(output)
        return compact(output, file_bytes, lease)


def drop_error_rows(output: str, lease: Lease) -> int:
    """Take the error rows out of OUTPUT/data, where they then are missing -> how many."""
    with_errors = [(info, entry) for info, entry in _entries(output) if entry.num_errors]
    if with_errors:
        new = (encode_file(table, rows) for info, _ in with_errors for rows, table in _without_errors(info))
        exchange_files(output, ((entry.file_name, data) for entry, data in new), _names(with_errors), lease)
    return sum(entry.num_errors for _, entry in with_errors)


def _without_errors(info: FileInfo) -> Iterator[Part]:
    """Nothing if all are."""
    rows, table = read_file(info.uri)
    is_good = pc.not_equal(table.column("status"), "error").to_numpy()
    if is_good.any():
        yield rows[is_good], table.filter(pa.array(is_good))


def compact(output: str, file_bytes: int, lease: Lease) -> Compacted:
    """Rewrite OUTPUT/data as files of about `file_bytes`, sorted by row number.

    No old file goes before all new ones are there and checked. Raises OSError.
    """
    before = _entries(output)
    num_rows, num_bytes = (
        sum(count_rows(entry.ranges) for _, entry in before),
        sum(info.num_bytes for info, _ in before),
    )
    # By what a row takes now: it is compressed, so its length says little.
    rows_per_file = max(1, round(file_bytes * num_rows / max(1, num_bytes)))
    if not _are_compact(before, rows_per_file):
        wanted = merge_ranges(r for _, entry in before for r in entry.ranges)
        exchange_files(output, _files_of(_in_order(before, rows_per_file), wanted), _names(before), lease)
    after = _entries(output)
    return Compacted(num_rows, len(before), len(after), num_bytes, sum(info.num_bytes for info, _ in after), output)


def _are_compact(files: list[Entry], rows_per_file: int) -> bool:
    spans = sorted((entry.ranges[0].start, entry.ranges[-1].stop) for _, entry in files)
    are_few = len(files) <= -(-sum(count_rows(entry.ranges) for _, entry in files) // rows_per_file)
    return are_few and all(left[1] <= right[0] for left, right in pairwise(spans))


def _entries(output: str) -> list[Entry]:
    return read_entries(store.join(output, "data"))


def _names(files: list[Entry]) -> list[str]:
    return [info.uri.rsplit("/", 1)[-1] for info, _ in files]


def _in_order(files: list[Entry], rows_per_file: int) -> Iterator[Part]:
    """All rows, ascending, cut into files. Holds only the files whose ranges interleave, and one to be."""
    waiting: list[Part] = []
    by_first_row = sorted(files, key=lambda file: file[1].ranges[0].start)
    for number, (info, _) in enumerate(by_first_row):
        waiting.append(read_file(info.uri))
        is_last = number + 1 == len(by_first_row)
        next_row = np.inf if is_last else by_first_row[number + 1][1].ranges[0].start
        is_full = sum(len(rows) for rows, _ in waiting) >= rows_per_file
        if is_last or is_full or sum(table.nbytes for _, table in waiting) >= _MOST_BYTES:
            yield from _cut(waiting, rows_per_file, next_row, all_of_it=is_last)


def _cut(waiting: list[Part], rows_per_file: int, next_row: float, *, all_of_it: bool) -> Iterator[Part]:
    """Files of the rows before `next_row`, full ones unless it is the end; what remains stays in `waiting`."""
    schema, rows = waiting[0][1].schema, np.concatenate([rows for rows, _ in waiting])
    order = np.argsort(rows)
    rows, table = rows[order], pa.concat_tables([table for _, table in waiting]).cast(_wide(schema)).take(order)
    most = max(1, min(rows_per_file, len(rows) * _MOST_BYTES // max(1, table.nbytes)))
    while len(rows) >= most and rows[most - 1] < next_row:
        yield rows[:most], table.slice(0, most).cast(schema)
        rows, table = rows[most:], table.slice(most)
    if all_of_it and len(rows):
        yield rows, table.cast(schema)
    waiting[:] = [] if all_of_it or not len(rows) else [(rows, table.cast(schema))]


def _wide(schema: pa.Schema) -> pa.Schema:
    """A column of strings holds 2 GiB at most, and rows of several files are put together in one."""
    wide = {pa.string(): pa.large_string(), pa.binary(): pa.large_binary()}
    return pa.schema([field.with_type(wide.get(field.type, field.type)) for field in schema])


def _files_of(parts: Iterator[Part], wanted: Ranges) -> Iterator[tuple[str, bytes]]:
    """Encoded one by one. Raises AssertionError at the end if they do not hold the rows `wanted`, each once."""
    written: list[RowRange] = []
    for rows, table in parts:
        entry, data = encode_file(table, rows)
        written += entry.ranges
        yield entry.file_name, data
    assert merge_ranges(written) == wanted, f"rows {merge_ranges(written)} instead of {wanted}"
    assert count_rows(written) == count_rows(wanted), f"{count_rows(written)} rows instead of {count_rows(wanted)}"
