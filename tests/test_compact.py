"""Compacting and dropping error rows: many files become few, and a kill at any step changes no row."""

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
from pipelines.output import compact as compact_module
from pipelines.output import file_swap
from pipelines.output.compact import Compacted, compact, compact_run, drop_error_rows
from pipelines.output.file_swap import commit_exchange, finish_exchange
from pipelines.output.lease import Lease
from pipelines.output.ledger import Ledger, RowRange, count_rows
from pipelines.output.sink import read_results, write_file
from pipelines.storage import store
from tests.support.outputs import make_results


def write_lease(output: Path) -> Lease:
    lease = Lease(str(output))
    lease._write()  # without the thread that renews it in a run
    return lease


def compact_with_lease(output: Path, file_bytes: int) -> Compacted:
    return compact(str(output), file_bytes, write_lease(output))


def drop_with_lease(output: Path) -> int:
    return drop_error_rows(str(output), write_lease(output))


class Killed(BaseException):
    pass


def write_rows(output: Path, groups: list[list[int]], errors: tuple[int, ...] = (), text_bytes: int = 0) -> None:
    """Write one file per group, with `text_bytes` of random text in each row, which barely compresses."""
    rng = random.Random(0)
    for rows in groups:
        results = make_results(sorted(rows), errors)
        if text_bytes:
            texts = pa.array([rng.randbytes(text_bytes // 2).hex() for _ in rows])
            results = results.set_column(4, results.schema.field("text"), texts)
        write_file(str(output / "data"), results)


def read_rows(output: Path) -> list[tuple[str, str]]:
    table = read_results(str(output))
    return list(zip(table.column("id").to_pylist(), table.column("text").to_pylist(), strict=True))


def scatter_rows(num_rows: int, num_files: int, seed: int = 0) -> list[list[int]]:
    """Spread rows over files the way a run does: roughly in order, the files interleaved."""
    rng = random.Random(seed)
    order = sorted(range(num_rows), key=lambda row: row + rng.uniform(0, 3 * num_rows / num_files))
    return [[int(row) for row in part] for part in np.array_split(order, num_files)]


@pytest.mark.parametrize("file_bytes", [20 << 10, 60 << 10, 1 << 30])
def test_compacted_files_hold_the_same_rows_in_order(tmp_path: Path, file_bytes: int) -> None:
    write_rows(tmp_path, scatter_rows(500, 40), errors=(7, 300))
    before = read_rows(tmp_path)
    done = compact_with_lease(tmp_path, file_bytes)
    assert (done.rows, done.files_before) == (500, 40)
    assert done.files_after == len(list((tmp_path / "data").iterdir())) < 40
    assert read_rows(tmp_path) == before
    in_name_order = [
        row for path in sorted((tmp_path / "data").iterdir()) for row in pq.read_table(path)["id"].to_pylist()
    ]
    assert in_name_order == [f"id-{row}" for row in range(500)]
    ledger = Ledger.read(str(tmp_path / "data"))
    assert (ledger.done, ledger.num_errors) == ((RowRange(0, 500),), 2)
    assert not (tmp_path / "exchange").exists() or not list((tmp_path / "exchange").iterdir())


def test_files_are_about_as_large_as_requested(tmp_path: Path) -> None:
    write_rows(tmp_path, scatter_rows(4000, 10), text_bytes=400)
    size = sum(path.stat().st_size for path in (tmp_path / "data").iterdir()) // 4
    compact_with_lease(tmp_path, size)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "data").iterdir())]
    assert len(sizes) in (4, 5)
    assert all(0.8 * size < one < 1.2 * size for one in sizes[:-1])


def test_a_compact_file_is_not_rewritten(tmp_path: Path) -> None:
    write_rows(tmp_path, scatter_rows(100, 5))
    compact_with_lease(tmp_path, 1 << 20)
    [path] = (tmp_path / "data").iterdir()
    inode = path.stat().st_ino
    again = compact_with_lease(tmp_path, 1 << 20)
    assert (again.files_before, again.files_after) == (1, 1)
    assert path.stat().st_ino == inode


def test_missing_rows_of_an_unfinished_run_stay_missing(tmp_path: Path) -> None:
    write_rows(tmp_path, [[0, 1, 5], [2, 9], [7]])
    missing = Ledger.read(str(tmp_path / "data")).find_missing(12)
    compact_with_lease(tmp_path, 1 << 20)
    assert Ledger.read(str(tmp_path / "data")).find_missing(12) == missing
    assert [id_ for id_, _ in read_rows(tmp_path)] == [f"id-{row}" for row in (0, 1, 2, 5, 7, 9)]


def test_dropped_error_rows_become_missing(tmp_path: Path) -> None:
    write_rows(tmp_path, [[0, 1, 2], [3, 4], [5, 6]], errors=(1, 3, 4))
    untouched = (tmp_path / "data" / "rows-000000000005-000000000007.parquet").stat().st_ino
    assert drop_with_lease(tmp_path) == 3
    ledger = Ledger.read(str(tmp_path / "data"))
    assert ledger.find_missing(7) == (RowRange(1, 2), RowRange(3, 5))
    assert ledger.num_errors == 0
    assert (tmp_path / "data" / "rows-000000000005-000000000007.parquet").stat().st_ino == untouched
    assert drop_with_lease(tmp_path) == 0


@pytest.mark.parametrize("action", ["compact", "drop"])
def test_a_kill_at_any_step_leaves_the_old_rows_or_the_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    """Each step kills the process before another of its calls to the store."""
    for step in range(1000):
        output = tmp_path / str(step)
        write_rows(output, scatter_rows(60, 6), errors=(10, 50))
        old = read_rows(output)
        with monkeypatch.context() as patch:
            kill_at(patch, step)
            try:
                compact_with_lease(output, 4 << 10) if action == "compact" else drop_with_lease(output)
                was_killed = False
            except Killed:
                was_killed = True
        finish_exchange(str(output))
        new = [row for row in old if row[0] not in ("id-10", "id-50")] if action == "drop" else old
        assert read_rows(output) in (old, new)
        Ledger.read(str(output / "data"))  # raises if a row is there twice
        assert not list((output / "exchange").glob("*"))
        if not was_killed:
            break
    assert step >= 8
    assert read_rows(output) == new


def kill_at(patch: pytest.MonkeyPatch, step: int) -> None:
    left = step

    def patch_call(name: str) -> None:
        real = getattr(store, name)

        def call(*arguments: object) -> object:
            nonlocal left
            if left == 0:
                raise Killed(name)
            left -= 1
            return real(*arguments)

        patch.setattr(store, name, call)

    for name in ("write_bytes", "move", "remove"):
        patch_call(name)


def test_a_badly_written_file_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path, [[0], [1]])
    real = store.write_bytes
    monkeypatch.setattr(file_swap.store, "write_bytes", lambda uri, data: real(uri, data[:-1]))
    with pytest.raises(OSError, match="differs from what was written"):
        compact_with_lease(tmp_path, 1 << 20)
    monkeypatch.undo()
    finish_exchange(str(tmp_path))
    assert [id_ for id_, _ in read_rows(tmp_path)] == ["id-0", "id-1"]
    assert len(list((tmp_path / "data").iterdir())) == 2


def test_an_exchange_replaces_equal_names_and_removes_only_our_files(tmp_path: Path) -> None:
    a, b, c = (f"rows-00000000000{i}-x.parquet" for i in range(3))
    (tmp_path / "data").mkdir()
    for name in (a, b, "notes.txt"):
        (tmp_path / "data" / name).write_bytes(b"old")
    new, old = [(f"data/{a}", b"new"), (f"data/{c}", b"new")], [f"data/{a}", f"data/{b}", "../x", "data/notes.txt"]
    commit_exchange(str(tmp_path), new, old, write_lease(tmp_path))
    finish_exchange(str(tmp_path))
    contents = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    assert contents == {a: b"new", c: b"new", "notes.txt": b"old"}  # whatever the note of an exchange names


def test_a_driver_without_its_lease_exchanges_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other driver undoes what was not committed, so this one must not commit afterwards."""
    write_rows(tmp_path, [[0], [1], [2]])
    lease = write_lease(tmp_path)
    real = store.write_bytes

    def write_and_lose_lease(uri: str, data: bytes) -> None:
        real(uri, data)
        real(str(tmp_path / "driver.json"), json.dumps({**lease._me, "token": "another", "at_s": 0}).encode())

    monkeypatch.setattr(file_swap.store, "write_bytes", write_and_lose_lease)
    with pytest.raises(LeaseLost):
        compact(str(tmp_path), 1 << 20, lease)
    assert len(read_rows(tmp_path)) == 3


def test_new_files_that_vanish_replace_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path, [[0], [1], [2]])
    monkeypatch.setattr(Lease, "check", lambda lease: finish_exchange(str(tmp_path)))
    with pytest.raises(OSError, match="is unchanged"):
        compact_with_lease(tmp_path, 1 << 20)
    assert len(read_rows(tmp_path)) == 3


def test_files_are_also_limited_by_their_size_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact_module, "_MAX_BYTES", 20_000)
    write_rows(tmp_path, scatter_rows(500, 40))
    before = read_rows(tmp_path)
    compact_with_lease(tmp_path, 1 << 30)
    assert read_rows(tmp_path) == before
    assert 2 < len(list((tmp_path / "data").iterdir())) < 40


def test_a_directory_without_run_json_is_not_compacted(tmp_path: Path) -> None:
    write_rows(tmp_path, [[0], [1]])
    with pytest.raises(ValueError, match=r"no run\.json"):
        compact_run(str(tmp_path), 1 << 20)
    assert len(os.listdir(tmp_path / "data")) == 2  # noqa: PTH208


def test_compacting_holds_only_the_rows_of_interleaved_files(tmp_path: Path) -> None:
    """A long output is compacted without holding it in memory, since few rows wait at a time."""
    write_rows(tmp_path, [list(range(start, start + 50)) for start in range(0, 5000, 50)], text_bytes=1000)
    pool = pa.default_memory_pool()
    held = []
    real = store.write_bytes

    def write(uri: str, data: bytes) -> None:
        held.append(pool.bytes_allocated())
        real(uri, data)

    whole = read_results(str(tmp_path)).nbytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_swap.store, "write_bytes", write)
        compact_with_lease(tmp_path, sum(p.stat().st_size for p in (tmp_path / "data").iterdir()) // 40)
    assert count_rows(Ledger.read(str(tmp_path / "data")).done) == 5000
    assert max(held) < whole / 4
