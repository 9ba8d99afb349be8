"""Error rows are taken out to be tried again, many files become few, and a kill at any moment changes no row."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.errors import LeaseLost
from pipelines.output import compact as rewrite
from pipelines.output import file_swap as exchange
from pipelines.output.compact import Compacted, compact, compact_run, drop_error_rows
from pipelines.output.file_swap import exchange_files, finish_exchange
from pipelines.output.lease import Lease
from pipelines.output.ledger import Ledger, RowRange, count
from pipelines.output.sink import read_results, write_file
from pipelines.storage import store
from tests.support.outputs import make_results


def lease_of(output: Path) -> Lease:
    lease = Lease(str(output))
    lease._write()  # without the thread that a run has
    return lease


def compacted(output: Path, file_bytes: int) -> Compacted:
    return compact(str(output), file_bytes, lease_of(output))


def dropped(output: Path) -> int:
    return drop_error_rows(str(output), lease_of(output))


class Killed(BaseException):
    pass


def write_rows(output: Path, groups: list[list[int]], errors: tuple[int, ...] = (), text_bytes: int = 0) -> None:
    """A file for each group; `text_bytes` of text in each row that do not compress to nothing."""
    rng = random.Random(0)
    for rows in groups:
        results = make_results(sorted(rows), errors)
        if text_bytes:
            texts = pa.array([rng.randbytes(text_bytes // 2).hex() for _ in rows])
            results = results.set_column(4, results.schema.field("text"), texts)
        write_file(str(output / "data"), results)


def rows_of(output: Path) -> list[tuple[str, str]]:
    table = read_results(str(output))
    return list(zip(table.column("id").to_pylist(), table.column("text").to_pylist(), strict=True))


def scattered(num_rows: int, num_files: int, seed: int = 0) -> list[list[int]]:
    """Rows as a run leaves them: roughly in order, the files interleaved."""
    rng = random.Random(seed)
    order = sorted(range(num_rows), key=lambda row: row + rng.uniform(0, 3 * num_rows / num_files))
    return [[int(row) for row in part] for part in np.array_split(order, num_files)]


@pytest.mark.parametrize("file_bytes", [20 << 10, 60 << 10, 1 << 30])
def test_many_files_become_few_in_order(tmp_path: Path, file_bytes: int) -> None:
    write_rows(tmp_path, scattered(500, 40), errors=(7, 300))
    before = rows_of(tmp_path)
    done = compacted(tmp_path, file_bytes)
    assert (done.rows, done.files_before) == (500, 40)
    assert done.files_after == len(list((tmp_path / "data").iterdir())) < 40
    assert rows_of(tmp_path) == before
    in_name_order = [
        row for path in sorted((tmp_path / "data").iterdir()) for row in pq.read_table(path)["id"].to_pylist()
    ]
    assert in_name_order == [f"id-{row}" for row in range(500)]
    ledger = Ledger.read(str(tmp_path / "data"))
    assert (ledger.done, ledger.num_errors) == ((RowRange(0, 500),), 2)
    assert not (tmp_path / "exchange").exists() or not list((tmp_path / "exchange").iterdir())


def test_the_size_of_the_files_is_about_the_one_asked_for(tmp_path: Path) -> None:
    write_rows(tmp_path, scattered(4000, 10), text_bytes=400)
    size = sum(path.stat().st_size for path in (tmp_path / "data").iterdir()) // 4
    compacted(tmp_path, size)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "data").iterdir())]
    assert len(sizes) in (4, 5)
    assert all(0.8 * size < one < 1.2 * size for one in sizes[:-1])


def test_what_is_compact_is_left_alone(tmp_path: Path) -> None:
    write_rows(tmp_path, scattered(100, 5))
    compacted(tmp_path, 1 << 20)
    [path] = (tmp_path / "data").iterdir()
    inode = path.stat().st_ino
    again = compacted(tmp_path, 1 << 20)
    assert (again.files_before, again.files_after) == (1, 1)
    assert path.stat().st_ino == inode


def test_gaps_of_an_unfinished_run_stay_gaps(tmp_path: Path) -> None:
    write_rows(tmp_path, [[0, 1, 5], [2, 9], [7]])
    missing = Ledger.read(str(tmp_path / "data")).missing(12)
    compacted(tmp_path, 1 << 20)
    assert Ledger.read(str(tmp_path / "data")).missing(12) == missing
    assert [id_ for id_, _ in rows_of(tmp_path)] == [f"id-{row}" for row in (0, 1, 2, 5, 7, 9)]


def test_error_rows_become_missing(tmp_path: Path) -> None:
    write_rows(tmp_path, [[0, 1, 2], [3, 4], [5, 6]], errors=(1, 3, 4))
    untouched = (tmp_path / "data" / "rows-000000000005-000000000007.parquet").stat().st_ino
    assert dropped(tmp_path) == 3
    ledger = Ledger.read(str(tmp_path / "data"))
    assert ledger.missing(7) == (RowRange(1, 2), RowRange(3, 5))
    assert ledger.num_errors == 0
    assert (tmp_path / "data" / "rows-000000000005-000000000007.parquet").stat().st_ino == untouched
    assert dropped(tmp_path) == 0


@pytest.mark.parametrize("what", ["compact", "drop"])
def test_a_kill_at_any_step_leaves_the_old_rows_or_the_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Every call of the store is once the last one of its process."""
    for step in range(1000):
        output = tmp_path / str(step)
        write_rows(output, scattered(60, 6), errors=(10, 50))
        old = rows_of(output)
        with monkeypatch.context() as patch:
            kill_at(patch, step)
            try:
                compacted(output, 4 << 10) if what == "compact" else dropped(output)
                was_killed = False
            except Killed:
                was_killed = True
        finish_exchange(str(output))
        new = [row for row in old if row[0] not in ("id-10", "id-50")] if what == "drop" else old
        assert rows_of(output) in (old, new)
        Ledger.read(str(output / "data"))  # no row twice
        assert not list((output / "exchange").glob("*"))
        if not was_killed:
            break
    assert step >= 8
    assert rows_of(output) == new


def kill_at(patch: pytest.MonkeyPatch, step: int) -> None:
    left = step

    def counted(name: str) -> None:
        real = getattr(store, name)

        def call(*arguments: object) -> object:
            nonlocal left
            if left == 0:
                raise Killed(name)
            left -= 1
            return real(*arguments)

        patch.setattr(store, name, call)

    for name in ("write_bytes", "move", "remove"):
        counted(name)


def test_a_file_that_was_not_written_as_it_should_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path, [[0], [1]])
    real = store.write_bytes
    monkeypatch.setattr(exchange.store, "write_bytes", lambda uri, data: real(uri, data[:-1]))
    with pytest.raises(OSError, match="does not hold what was written"):
        compacted(tmp_path, 1 << 20)
    monkeypatch.undo()
    finish_exchange(str(tmp_path))
    assert [id_ for id_, _ in rows_of(tmp_path)] == ["id-0", "id-1"]
    assert len(list((tmp_path / "data").iterdir())) == 2


def test_an_exchange_in_which_a_name_stays(tmp_path: Path) -> None:
    a, b, c = (f"rows-00000000000{i}-x.parquet" for i in range(3))
    (tmp_path / "data").mkdir()
    for name in (a, b, "notes.txt"):
        (tmp_path / "data" / name).write_bytes(b"old")
    exchange_files(str(tmp_path), [(a, b"new"), (c, b"new")], [a, b, "../x", "notes.txt"], lease_of(tmp_path))
    there = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    assert there == {a: b"new", c: b"new", "notes.txt": b"old"}  # whatever a note says, only our files go


def test_a_driver_that_was_taken_over_exchanges_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one undoes what was not committed; this one must not commit to it."""
    write_rows(tmp_path, [[0], [1], [2]])
    lease = lease_of(tmp_path)
    real = store.write_bytes

    def taken_over(uri: str, data: bytes) -> None:
        real(uri, data)
        real(str(tmp_path / "driver.json"), json.dumps({**lease._me, "token": "another", "at_s": 0}).encode())

    monkeypatch.setattr(exchange.store, "write_bytes", taken_over)
    with pytest.raises(LeaseLost):
        compact(str(tmp_path), 1 << 20, lease)
    assert len(rows_of(tmp_path)) == 3


def test_new_files_that_are_gone_replace_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path, [[0], [1], [2]])
    monkeypatch.setattr(Lease, "check", lambda lease: finish_exchange(str(tmp_path)))
    with pytest.raises(OSError, match="nothing was exchanged"):
        compacted(tmp_path, 1 << 20)
    assert len(rows_of(tmp_path)) == 3


def test_files_that_are_large_in_memory_are_cut_by_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite, "_MOST_BYTES", 20_000)
    write_rows(tmp_path, scattered(500, 40))
    before = rows_of(tmp_path)
    compacted(tmp_path, 1 << 30)
    assert rows_of(tmp_path) == before
    assert 2 < len(list((tmp_path / "data").iterdir())) < 40


def test_only_a_run_is_compacted(tmp_path: Path) -> None:
    write_rows(tmp_path, [[0], [1]])
    with pytest.raises(ValueError, match=r"no run\.json"):
        compact_run(str(tmp_path), 1 << 20)
    assert len(os.listdir(tmp_path / "data")) == 2  # noqa: PTH208


def test_memory_is_that_of_the_files_that_interleave(tmp_path: Path) -> None:
    """A long run is compacted without holding it: rows that wait are few although the output is long."""
    write_rows(tmp_path, [list(range(start, start + 50)) for start in range(0, 5000, 50)], text_bytes=1000)
    pool = pa.default_memory_pool()
    held = []
    real = store.write_bytes

    def write(uri: str, data: bytes) -> None:
        held.append(pool.bytes_allocated())
        real(uri, data)

    whole = read_results(str(tmp_path)).nbytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange.store, "write_bytes", write)
        compacted(tmp_path, sum(p.stat().st_size for p in (tmp_path / "data").iterdir()) // 40)
    assert count(Ledger.read(str(tmp_path / "data")).done) == 5000
    assert max(held) < whole / 4
