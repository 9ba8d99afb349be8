"""Tables are read in other processes: what crashes or hangs Arrow costs one shard or one row group."""

from __future__ import annotations

import base64
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.parquet import encryption

from pipelines.errors import SourceError, TableError
from pipelines.media.fetch import Fetcher
from pipelines.storage import table_reader
from pipelines.storage.table_reader import TableProcesses, get_processes
from tests.support.fetched import fetch_images
from tests.support.parquet_files import write
from tests.support.processes import is_alive
from tests.support.roots import ROOT
from tests.support.rows import list_input
from tests.support.tars import write_tar

READER = """
import os, sys, time
from pipelines.storage import table_process

class Parquet(table_process._Parquet):
    def select(self, columns, max_rows, groups, first_row):
        if groups == [1]:
            os.abort()
        return super().select(columns, max_rows, groups, first_row)

def find_encryption(file):
    file.seek(0)
    if b"hang" in file.read():
        time.sleep(100)

table_process._Parquet = Parquet
table_process.find_encryption = find_encryption
table_process.main(*map(int, sys.argv[1:]))
"""
"""A process that aborts on the second row group of a file and hangs on one that contains "hang"."""


class _Keys(encryption.KmsClient):
    def __init__(self, _: object) -> None:
        super().__init__()

    def wrap_key(self, key: bytes, _: str) -> bytes:
        return base64.b64encode(key)


def write_encrypted(path: Path, table: dict[str, list[object]], *, is_footer_plain: bool) -> Path:
    """Write a table whose columns are encrypted, and whose footer is unless `is_footer_plain`."""
    config = encryption.EncryptionConfiguration(
        "footer", column_keys={"key": [*table]}, plaintext_footer=is_footer_plain
    )
    factory = encryption.CryptoFactory(_Keys)
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), config)
    with pq.ParquetWriter(path, pa.table(table).schema, encryption_properties=properties) as writer:
        writer.write_table(pa.table(table))
    return path


@pytest.fixture
def processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TableProcesses]:
    """Let files be read by the process above, for at most a second."""
    (tmp_path / "bad_reader.py").write_text(READER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(table_reader, "_MODULE", "bad_reader")
    with TableProcesses(timeout_s=1) as processes:
        monkeypatch.setattr("pipelines.media.readers.get_processes", lambda: processes)
        yield processes


@pytest.mark.parametrize(("is_footer_plain", "what"), [(True, "it has encrypted columns"), (False, "it is encrypted")])
def test_an_encrypted_table_is_an_error_row_that_says_so(tmp_path: Path, is_footer_plain: bool, what: str) -> None:
    table: dict[str, list[object]] = {"image": [b"1", b"2"], "c": [1, 2]}
    bad = write_encrypted(tmp_path / "b.parquet", table, is_footer_plain=is_footer_plain)
    good = [write(tmp_path / f"{name}.parquet", table) for name in "ac"]
    rows = list_input(good[0], bad, good[1], keep_columns=("c",))
    assert [row["error"] for row in rows if row["uri"] == str(bad)] == [
        f"cannot read {bad} as Parquet: {what}; decrypt it first"
    ]
    assert [row["kept"]["c"] for row in rows] == [1, 2, None, 1, 2]
    with pytest.raises(SourceError, match=f"^cannot read .*b.parquet as Parquet: {what}; decrypt it first$"):
        list_input(bad)


def test_a_table_that_aborts_arrow_is_an_error_row(tmp_path: Path) -> None:
    """Encryption is not looked for behind a name of 5 MB; Arrow aborts on the encrypted column."""
    bad = write_encrypted(tmp_path / "b.parquet", {"n" * 5_000_000: [1], "image": [b"1"]}, is_footer_plain=True)
    good = [write(tmp_path / f"{name}.parquet", {"image": [b"1"]}) for name in "acdefgh"]
    rows = list_input(good[0], bad, *good[1:])
    assert [row["error"] for row in rows if row["error"]] == [
        f"cannot read {bad} as Parquet: reading it crashes Arrow's reader"
    ]
    assert [row["id"] for row in rows if not row["error"]] == [f"{path}#0" for path in good]
    assert fetch_images([row for row in rows if not row["error"]]) == [[b"1"]] * 7


def test_an_encrypted_table_next_to_a_tar_is_named(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [("1.jpg", b"1")])
    write_encrypted(tmp_path / "a.parquet", {"key": ["1"], "c": [1]}, is_footer_plain=True)
    with pytest.raises(SourceError, match=r"a\.parquet as Parquet: it has encrypted columns; decrypt it first"):
        list_input(tar, keep_columns=("c",))


@pytest.mark.usefixtures("processes")
def test_pages_that_crash_the_reader_cost_their_row_group(tmp_path: Path) -> None:
    values = [bytes([i]) * 100 for i in range(60)]
    rows = list_input(write(tmp_path / "a.parquet", {"image": values}, row_group_size=20))
    rows += list_input(write(tmp_path / "b.parquet", {"image": values[:20]}))
    fetcher, outcomes = Fetcher(), []
    for row in rows:
        try:
            outcomes.append(fetch_images([row], fetcher)[0])
        except OSError as error:
            outcomes.append(["crashes Arrow's reader" in str(error) or "cannot be read from row 20 on" in str(error)])
    assert outcomes == [[v] for v in values[:20]] + [[True]] * 20 + [[v] for v in values[40:] + values[:20]]


@pytest.mark.parametrize("order", ["forward", "every fourth unit", "backward"])
@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_cells_of_any_size_arrive_unchanged(form: str, order: str, tmp_path: Path) -> None:
    """Small cells travel together, large ones through shared memory, the largest batch through the socket."""
    values = [bytes([i % 251]) * (i * i * 7 % 60_000 + (3 << 20) * (i in (70, 71, 72))) for i in range(300)]
    path = tmp_path / f"a.{form}"
    if form == "parquet":
        write(path, {"image": values, "kept": values}, row_group_size=110)
    else:
        with pa.ipc.new_stream(path, pa.schema({"image": pa.binary(), "kept": pa.binary()})) as writer:
            writer.write_table(pa.table({"image": values, "kept": values}), max_chunksize=90)
    rows = list_input(path, image_column="image", keep_columns=("kept",))
    assert [row["kept"]["kept"] for row in rows] == values
    numbers = [i for i in range(300) if order != "every fourth unit" or i // 8 % 4 == 1]
    numbers = numbers[::-1] if order == "backward" else numbers
    assert fetch_images([rows[i] for i in numbers]) == [[values[i]] for i in numbers]


def test_damage_after_small_batches_is_reported_after_them(tmp_path: Path) -> None:
    text = pa.array([b"x"] * 63 + [b"\xff"]).view(pa.string())
    path = write(tmp_path / "a.parquet", {"text": text})
    with TableProcesses() as processes, processes.open_parquet(str(path)) as file:
        batches = file.iter_batches(["text"], 16)
        assert [len(next(batches)) for _ in range(3)] == [16] * 3
        with pytest.raises(TableError, match="UTF"):
            next(batches)


def test_a_table_that_hangs_the_reader_is_given_up(processes: TableProcesses, tmp_path: Path) -> None:
    bad = write(tmp_path / "b.parquet", {"image": [b"hang"]}, compression="none")
    with pytest.raises(TableError, match="reading it takes longer than 1 s"):
        processes.open_parquet(str(bad))
    with processes.open_parquet(str(write(tmp_path / "a.parquet", {"image": [b"1"]}))) as file:
        assert file.num_rows == [1]


def test_readers_that_were_killed_are_replaced(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.parquet", {"image": [b"1"]}))
    with TableProcesses() as processes:
        processes.open_parquet(path).close()
        assert processes._starter is not None
        for pid in find_children(processes._starter.pid):
            kill(pid)
        while table_reader._is_connected(processes._idle[0]):  # the kernel may close it a moment later
            time.sleep(0.01)
        processes.open_parquet(path).close()
        kill(processes._starter.pid)
        processes._starter.wait()
        with processes.open_parquet(path) as file:
            assert file.num_rows == [1]


def test_readers_end_with_the_process_that_uses_them(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": [b"1"]})
    program = (
        "import time\n"
        "from pipelines.storage.table_reader import get_processes\n"
        f"table = get_processes().open_parquet({str(path)!r})\n"
        "print(get_processes()._starter.pid, flush=True)\n"
        "time.sleep(30)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        starter = int(parent.stdout.readline())
        pids = [starter, *find_children(starter)]
        assert len(pids) == 2
        parent.kill()
        deadline_s = time.monotonic() + 20
        while any(map(is_alive, pids)):
            assert time.monotonic() < deadline_s
            time.sleep(0.05)


def find_children(pid: int) -> list[int]:
    stats = [path.read_text() for path in Path("/proc").glob("[0-9]*/stat")]
    return [int(stat.split()[0]) for stat in stats if int(stat.rpartition(")")[2].split()[1]) == pid]


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    while is_alive(pid):
        time.sleep(0.01)


def test_all_of_a_process_share_the_readers() -> None:
    assert get_processes() is get_processes()
