"""Rewrite the files of a run: without error rows so that they are retried, or into fewer, larger, sorted files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ovis_model.wording import count_nouns
from pipelines.errors import RunError
from pipelines.output.file_swap import commit_exchange, finish_exchange
from pipelines.output.lease import Lease
from pipelines.output.ledger import FileEntry, Ranges, RowRange, count_rows, merge_ranges, read_entries
from pipelines.output.parts import OutputPart, list_output_parts
from pipelines.output.run_record import acquire_lease
from pipelines.output.sink import encode_file, read_file
from pipelines.storage import store
from pipelines.storage.preflight import check_stores
from pipelines.storage.store import FileInfo

Part = tuple[NDArray[np.int64], pa.Table]
"""Row numbers, and the rows with these numbers."""
Entry = tuple[FileInfo, FileEntry]
"""An output file, and what its footer records."""

_MAX_BYTES = 1 << 30  # per file in memory, uncompressed


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
    """Compact a run that no driver is writing to.

    Raise RunError if OUTPUT holds no run, LeaseError if a driver is writing to it, OSError if its files cannot be used.
    """
    output = store.make_absolute(output)
    check_stores([output])
    if (parts := list_output_parts(output)) != [OutputPart(output)]:
        return _sum_up([compact_run(part.output, file_bytes) for part in parts], output)
    if store.find_file(store.join(output, "run.json")) is None:
        raise RunError(f"{output} holds no run (no run.json)")
    with acquire_lease(output) as lease:
        finish_exchange(output)
        return compact(output, file_bytes, lease)


def _sum_up(compacted: Sequence[Compacted], output: str) -> Compacted:
    counts = ("rows", "files_before", "files_after", "bytes_before", "bytes_after")
    return Compacted(**{name: sum(getattr(part, name) for part in compacted) for name in counts}, output=output)


def drop_error_rows(output: str, lease: Lease) -> int:
    """Remove the error rows from OUTPUT/data, so that the next run does them again. Return how many there were."""
    with_errors = [(info, entry) for info, entry in _read_entries(output) if entry.num_errors]
    if with_errors:
        new = (encode_file(table, rows) for info, _ in with_errors for rows, table in _drop_errors(info))
        commit_exchange(output, ((_locate(entry), data) for entry, data in new), _list_paths(with_errors), lease)
        finish_exchange(output)
    return sum(entry.num_errors for _, entry in with_errors)


def _drop_errors(info: FileInfo) -> Iterator[Part]:
    """Yield the file's rows without its error rows, or nothing if all are error rows."""
    rows, table = read_file(info.uri)
    is_good = pc.not_equal(table.column("status"), "error").to_numpy()
    if is_good.any():
        yield rows[is_good], table.filter(pa.array(is_good))


def compact(output: str, file_bytes: int, lease: Lease) -> Compacted:
    """Rewrite OUTPUT/data as files of about `file_bytes`, sorted by row number.

    Old files are removed only when all new files are written and checked. Raise OSError if a file cannot be used.
    """
    before = _read_entries(output)
    num_rows, num_bytes = (
        sum(count_rows(entry.ranges) for _, entry in before),
        sum(info.num_bytes for info, _ in before),
    )
    # From the compressed bytes per row: the length of a row in memory predicts little.
    rows_per_file = max(1, round(file_bytes * num_rows / max(1, num_bytes)))
    if not _are_compact(before, rows_per_file):
        wanted = merge_ranges(r for _, entry in before for r in entry.ranges)
        commit_exchange(output, _encode_files(_read_sorted(before, rows_per_file), wanted), _list_paths(before), lease)
        finish_exchange(output)
    after = _read_entries(output)
    return Compacted(num_rows, len(before), len(after), num_bytes, sum(info.num_bytes for info, _ in after), output)


def _are_compact(files: list[Entry], rows_per_file: int) -> bool:
    spans = sorted((entry.ranges[0].start, entry.ranges[-1].stop) for _, entry in files)
    are_few = len(files) <= -(-sum(count_rows(entry.ranges) for _, entry in files) // rows_per_file)
    return are_few and all(left[1] <= right[0] for left, right in pairwise(spans))


def _read_entries(output: str) -> list[Entry]:
    return read_entries(store.join(output, "data"))


def _list_paths(files: list[Entry]) -> list[str]:
    return [f"data/{info.uri.rsplit('/', 1)[-1]}" for info, _ in files]


def _locate(entry: FileEntry) -> str:
    return f"data/{entry.file_name}"


def _read_sorted(files: list[Entry], rows_per_file: int) -> Iterator[Part]:
    """Yield all rows in ascending order, cut into files.

    Only the files whose ranges interleave and one new file are in memory.
    """
    waiting: list[Part] = []
    by_first_row = sorted(files, key=lambda file: file[1].ranges[0].start)
    for number, (info, _) in enumerate(by_first_row):
        waiting.append(read_file(info.uri))
        is_last = number + 1 == len(by_first_row)
        next_row = np.inf if is_last else by_first_row[number + 1][1].ranges[0].start
        is_full = sum(len(rows) for rows, _ in waiting) >= rows_per_file
        if is_last or is_full or sum(table.nbytes for _, table in waiting) >= _MAX_BYTES:
            yield from _cut(waiting, rows_per_file, next_row, is_last=is_last)


def _cut(waiting: list[Part], rows_per_file: int, next_row: float, *, is_last: bool) -> Iterator[Part]:
    """Yield full files of the rows before `next_row`, at the end also the rest; other rows stay in `waiting`."""
    schema, rows = waiting[0][1].schema, np.concatenate([rows for rows, _ in waiting])
    order = np.argsort(rows)
    rows, table = (
        rows[order],
        pa.concat_tables([table for _, table in waiting]).cast(_widen_strings(schema)).take(order),
    )
    max_rows = max(1, min(rows_per_file, len(rows) * _MAX_BYTES // max(1, table.nbytes)))
    while len(rows) >= max_rows and rows[max_rows - 1] < next_row:
        yield rows[:max_rows], table.slice(0, max_rows).cast(schema)
        rows, table = rows[max_rows:], table.slice(max_rows)
    if is_last and len(rows):
        yield rows, table.cast(schema)
    waiting[:] = [] if is_last or not len(rows) else [(rows, table.cast(schema))]


def _widen_strings(schema: pa.Schema) -> pa.Schema:
    """Widen strings to large strings: the rows of several files may exceed the 2 GiB limit of a string column."""
    wide = {pa.string(): pa.large_string(), pa.binary(): pa.large_binary()}
    return pa.schema([field.with_type(wide.get(field.type, field.type)) for field in schema])


def _encode_files(parts: Iterator[Part], wanted: Ranges) -> Iterator[tuple[str, bytes]]:
    """Yield the path in OUTPUT and the content of each file, encoded one at a time.

    Raise AssertionError at the end unless the files hold exactly the rows `wanted`, each once.
    """
    written: list[RowRange] = []
    for rows, table in parts:
        entry, data = encode_file(table, rows)
        written += entry.ranges
        yield _locate(entry), data
    assert merge_ranges(written) == wanted, f"wrote rows {merge_ranges(written)} instead of {wanted}"
    assert count_rows(written) == count_rows(wanted), (
        f"wrote {count_nouns(count_rows(written), 'row')} instead of {count_rows(wanted)}"
    )
