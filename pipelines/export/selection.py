"""Choose rows of a run by status, flags, confidence and an SQL expression over their columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.export.options import ExportOptions
from pipelines.report.answers import Answers, to_mask
from pipelines.report.columns import OutputColumns
from pipelines.report.opened import OpenedRun, OutputFile
from pipelines.storage import store

ROW = "__row"
_ROWS_AT_ONCE = 4096


def sort_files(run: OpenedRun) -> list[OutputFile]:
    """Return the files of a run, of all its parts, in the order of their rows."""
    return sorted((file for file in run.files if len(file[1].rows)), key=lambda file: int(file[1].rows[0]))


def choose_rows(options: ExportOptions, run: OpenedRun) -> Iterator[pa.Table]:
    """Yield the chosen rows, with their numbers in the column ROW, in row order.

    Raise ValueError for an expression that DuckDB cannot evaluate.
    """
    query = Query(options.where) if options.where else None
    for info, entry in sort_files(run):
        rows, at = entry.rows, 0
        with store.open_file(info.uri) as file:
            for batch in pq.ParquetFile(file, pre_buffer=False).iter_batches(_ROWS_AT_ONCE, use_threads=False):
                answers = Answers(run.columns, rows[at : at + len(batch)], batch)
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
