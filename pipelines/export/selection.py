"""Choose rows of a run by status, flags, confidence and an SQL expression over their columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.errors import RunError
from pipelines.export.options import ExportOptions
from pipelines.output.ledger import read_entries
from pipelines.report.answers import Answers, to_mask
from pipelines.report.columns import OutputColumns, interpret_columns
from pipelines.storage import store

Json = dict[str, Any]

ROW = "__row"
_ROWS_AT_ONCE = 4096


def list_data_files(output: str) -> list[tuple[str, int, int]]:
    """Return (URI, bytes, first row number) of the files of a run, in the order of their rows."""
    found = [(info, entry) for info, entry in read_entries(store.join(output, "data")) if len(entry.rows)]
    if not found:
        raise RunError(f"{output} holds no rows yet")
    return sorted(((info.uri, info.num_bytes, int(entry.rows[0])) for info, entry in found), key=lambda file: file[2])


def read_output_columns(record: Json, uri: str) -> OutputColumns:
    """Interpret the columns of the run from one of its files."""
    with store.open_file(uri) as file:
        return interpret_columns(record, pq.read_schema(file), {})


def choose_rows(options: ExportOptions, columns: OutputColumns) -> Iterator[pa.Table]:
    """Yield the chosen rows, with their numbers in the column ROW, in row order.

    Raise ValueError for an expression that DuckDB cannot evaluate.
    """
    query = Query(options.where) if options.where else None
    entries = {info.uri: entry for info, entry in read_entries(store.join(options.output, "data"))}
    for uri, _, _ in list_data_files(options.output):
        rows, at = entries[uri].rows, 0
        with store.open_file(uri) as file:
            for batch in pq.ParquetFile(file, pre_buffer=False).iter_batches(_ROWS_AT_ONCE, use_threads=False):
                answers = Answers(columns, rows[at : at + len(batch)], batch)
                table = pa.table({**dict(zip(batch.schema.names, batch.columns, strict=True)), ROW: answers.rows})
                chosen = table.filter(pa.array(_find_wanted(answers, options)))
                yield query.filter(chosen) if query else chosen
                at += len(batch)


def _find_wanted(answers: Answers, options: ExportOptions) -> np.ndarray:
    wanted = np.ones(len(answers.rows), np.bool_)
    if options.status != "all":
        wanted &= answers.is_ok == (options.status == "ok")
    if options.without_flags:
        wanted &= to_mask(pc.equal(pc.list_value_length(answers.flags), 0))
    for task, least in options.min_confidence.items():
        wanted &= np.nan_to_num(answers.confidence[task], nan=-1.0) >= least
    return wanted


def check_confidences(wanted: Mapping[str, float], columns: OutputColumns) -> None:
    """Raise ValueError if a task does not exist."""
    names = [task.name for task in columns.tasks]
    if unknown := sorted(wanted.keys() - set(names)):
        raise ValueError(f"--min-confidence names {', '.join(unknown)}; the tasks are {', '.join(names)}")


class Query:
    """An SQL expression, evaluated by DuckDB over rows in memory; it reads no files."""

    def __init__(self, where: str) -> None:
        try:
            import duckdb
        except ImportError:
            raise ValueError("--where needs DuckDB; pip install 'ovis2-ray[export]'") from None
        self._where, self._error = where, duckdb.Error
        self._connection = duckdb.connect(config={"enable_external_access": "false"})
        self._connection.execute("SET threads = 2")

    def filter(self, table: pa.Table) -> pa.Table:
        """Return the rows for which the expression is true, in their order."""
        self._connection.register("chosen", table)
        try:
            found = self._connection.execute(f"select {ROW} from chosen where ({self._where}\n)").fetchnumpy()[ROW]
        except self._error as error:
            first_line = str(error).splitlines()[0]
            raise ValueError(f"--where {self._where!r}: {first_line}") from None
        finally:
            self._connection.unregister("chosen")
        return table.filter(pc.is_in(table.column(ROW), pa.array(np.asarray(found, np.int64))))
