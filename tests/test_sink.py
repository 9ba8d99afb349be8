"""Output files appear whole, hold each row once and name their rows; late and repeated rows are handled."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.errors import LeaseLost
from pipelines.output import sink
from pipelines.output.lease import Lease
from pipelines.output.ledger import Ledger, RowRange
from pipelines.output.sink import Sink, read_results, remove_temporaries, write_file
from pipelines.storage import store
from tests.support.outputs import make_results


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


def make_sink(data: Path, ledger: Ledger, *, rows_per_file: int) -> Sink:
    lease = Lease(str(data.parent))
    lease._write()  # without the renewing thread of a run
    return Sink(str(data), ledger, lease, rows_per_file=rows_per_file)


def test_rows_come_back_once_and_in_order(data: Path) -> None:
    ledger = Ledger()
    with make_sink(data, ledger, rows_per_file=4) as out:
        for rows in ([7, 3], [0, 1, 9], [1, 7, 2], [8, 5, 4, 6], [3]):
            out.add(make_results(rows))
    assert read_results(str(data.parent)).column("id").to_pylist() == [f"id-{row}" for row in range(10)]
    assert ledger.done == Ledger.read(str(data)).done == ((0, 10),)
    assert all(pq.read_metadata(file).num_rows <= 4 for file in data.iterdir())


def test_add_returns_the_new_rows(data: Path) -> None:
    out = make_sink(data, Ledger(done=(RowRange(0, 2),)), rows_per_file=100)
    assert out.add(make_results([1, 2, 3])).column("row").to_pylist() == [2, 3]
    assert out.add(make_results([3, 4])).column("row").to_pylist() == [4]


def test_finished_rows_are_written_even_if_no_more_arrive(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink, "FLUSH_S", 0.2)
    with make_sink(data, Ledger(), rows_per_file=1000) as out:
        out.add(make_results([0]))
        deadline_s = time.monotonic() + 60
        while not any(data.glob("*.parquet")):
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        assert len(list(data.iterdir())) == 1


def test_an_interrupt_during_exit_loses_no_row(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: threading.Thread) -> None:
        raise KeyboardInterrupt

    out = make_sink(data, Ledger(), rows_per_file=1000)
    with pytest.raises(KeyboardInterrupt), out:
        out.add(make_results([0, 1]))
        monkeypatch.setattr(threading.Thread, "join", interrupt)
    assert len(read_results(str(data.parent))) == 2


def test_a_driver_that_was_replaced_writes_nothing(data: Path) -> None:
    out = make_sink(data, Ledger(), rows_per_file=1)
    make_sink(data, Ledger(), rows_per_file=1)  # takes the lease over
    with pytest.raises(LeaseLost):
        out.add(make_results([0]))
    assert not data.exists()


def test_the_same_rows_give_the_same_name(data: Path) -> None:
    assert (
        write_file(str(data), make_results([1, 3])).file_name == write_file(str(data), make_results([1, 3])).file_name
    )
    assert len(list(data.iterdir())) == 1


def test_a_failed_write_leaves_no_file(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_file(str(data), make_results([0]))
    assert list(data.iterdir()) == []


def test_temporaries_of_a_killed_writer_are_removed(data: Path) -> None:
    data.mkdir()
    (data / f".rows-0-1.parquet.abc{store.TEMPORARY_SUFFIX}").write_bytes(b"half")
    write_file(str(data), make_results([0]))
    remove_temporaries(str(data))
    assert len(list(data.iterdir())) == 1


def test_rows_come_back_from_an_object_store() -> None:
    write_file("memory://bucket/data", make_results([0, 1]))
    assert read_results("memory://bucket").column("text").to_pylist() == ["text 0", "text 1"]
