"""Open tables in other processes, so that a table that crashes Arrow cannot end this one."""

from __future__ import annotations

import io
import mmap
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, Literal, NamedTuple, Self

import pyarrow as pa

from ovis_model.child_process import ChildProcess, Json, MessageStream, StreamEnded
from pipelines.errors import TableError
from pipelines.storage import store

TIMEOUT_S = 600
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # a process with more must not be forked
_MAPPED_BLOCK_BYTES = 4 << 20
_MODULE = "pipelines.storage.table_process"
_MEMORY_BYTES = 4 << 20  # larger messages go through the socket; the pages are used from the first one on
_MAX_IDLE = 4  # while shards are listed, one is closed at a time


@cache
def get_processes() -> TableProcesses:
    """Return the processes that all of this process shares: loading Arrow takes a fifth of a second."""
    return TableProcesses()


class TableProcesses:
    """Processes that read tables: started when a table is opened, then used for others. Any thread may open tables.

    What the content of a table causes is a TableError, also a crash or an answer that takes longer than `timeout_s`. A
    file that cannot be accessed raises OSError or StoreFault.
    """

    def __init__(self, *, timeout_s: int = TIMEOUT_S) -> None:
        self.timeout_s = timeout_s
        self._lock = threading.Lock()
        self._starter: ChildProcess | None = None
        self._idle: list[_Link] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def open_parquet(self, uri: str, block_bytes: int | None = None) -> ParquetTable:
        """Open a Parquet file; a store is read in blocks of `block_bytes`."""
        return ParquetTable(_Connection(self, uri, "parquet", block_bytes))

    def open_arrow(self, uri: str) -> ArrowTable:
        """Open an Arrow stream, mapped into memory if it is local."""
        return ArrowTable(_Connection(self, uri, "arrow", _MAPPED_BLOCK_BYTES))

    def __del__(self) -> None:
        self.close()

    def connect(self) -> _Link:
        """Return the link to an idle process, or else to a new one."""
        with self._lock:
            if self._starter is None or self._starter.poll() is not None:
                while self._idle:  # readers end soon after the process that started them
                    self._idle.pop().socket.close()
                if self._starter is not None:
                    self._starter.close()
                self._starter = ChildProcess(_MODULE, self.timeout_s, environment=_ONE_THREAD)
            while self._idle:
                if _is_connected(link := self._idle.pop()):
                    return link
                link.socket.close()
            return _start_reader(self._starter)

    def give_back(self, link: _Link) -> None:
        """Keep the process at the other end of `link` for the next table."""
        with self._lock:
            if self._starter is not None and len(self._idle) < _MAX_IDLE:
                self._idle.append(link)
                return
        link.socket.close()

    def close(self) -> None:
        """End all processes; opening a table later starts new ones."""
        with self._lock:
            idle, self._idle = self._idle, []
            starter, self._starter = self._starter, None
        for link in idle:
            link.socket.close()
        if starter is not None:
            starter.close()


class _Link(NamedTuple):
    """A socket to a process that reads tables, and memory into which it writes batches for this one."""

    socket: socket.socket
    memory: mmap.mmap


def _start_reader(starter: ChildProcess) -> _Link:
    with os.fdopen(os.memfd_create("table"), "r+b") as file:
        file.truncate(_MEMORY_BYTES)
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(starter.socket, [b"+"], [theirs.fileno(), file.fileno()])
        return _Link(ours, mmap.mmap(file.fileno(), _MEMORY_BYTES, prot=mmap.PROT_READ))


def _is_connected(link: _Link) -> bool:
    """Return whether the process at the other end of an idle link still runs."""
    try:
        return link.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
    except BlockingIOError:
        return True
    except ConnectionError:
        return False


Ask = Callable[..., tuple[Json, pa.Buffer]]
"""`_Connection.ask` or `_Connection.borrow`."""


class _Connection:
    """An open file, and the process that reads its content as a table; one thread at a time may use it."""

    def __init__(
        self, processes: TableProcesses, uri: str, form: Literal["parquet", "arrow"], block_bytes: int | None
    ) -> None:
        self._link: _Link | None = None
        self._file, self._processes, self._form = store.open_file(uri, block_bytes), processes, form
        self._is_waiting = self._is_late = False
        self._fault: Exception | None = None
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    def open(self) -> tuple[Json, pa.Buffer]:
        """Return what `ask("open")` returns; try twice, as an idle process may have been killed from outside."""
        try:
            return self.ask("open")
        except TableError as error:
            if not isinstance(error.__cause__, StreamEnded | ConnectionError) or self._is_late:
                raise
        if self._link is not None:
            self._link.socket.close()
        self._connect()
        return self.ask("open")

    def _connect(self) -> None:
        self._link = self._processes.connect()
        self._hand_over(self._form)

    def ask(self, action: str, **arguments: Any) -> tuple[Json, pa.Buffer]:
        """Return the reply to a request, and the bytes that follow it. Raise TableError, OSError or StoreFault."""
        reply, data = self.borrow(action, **arguments)
        return reply, pa.py_buffer(bytes(data)) if reply["num_shared"] else data

    def borrow(self, action: str, **arguments: Any) -> tuple[Json, pa.Buffer]:
        """Return what `ask` returns, without copying the bytes: the next request may overwrite them."""
        started_s = time.monotonic()
        try:
            reply, data = self._talk({"action": action, "arguments": arguments})
        except (StreamEnded, ConnectionError) as error:
            timeout_s = self._processes.timeout_s
            self._is_late = time.monotonic() - started_s > timeout_s
            how = f"takes longer than {timeout_s} s" if self._is_late else "crashes Arrow's reader"
            raise TableError(f"reading it {how}") from error
        if self._fault is not None:
            raise self._fault
        if "errno" in reply:
            raise OSError(reply["errno"], "the file cannot be read")
        if "damage" in reply:
            raise TableError(reply["damage"])
        return reply, data

    def close(self) -> None:
        """Close the file; the process is kept if it waits for a request."""
        if self._link is None:
            return
        self._file.close()
        try:
            if self._is_waiting:
                MessageStream(self._link.socket).send({"action": "close"})
                self._processes.give_back(self._link)
            else:
                self._link.socket.close()
        except OSError:
            self._link.socket.close()
        self._link = None

    def __del__(self) -> None:
        self.close()

    def _hand_over(self, form: str) -> None:
        """Send the file; one that is not local stays here, where its store is known."""
        assert self._link is not None
        fds = list[int]()
        with suppress(io.UnsupportedOperation):
            fds.append(self._file.fileno())
        socket.send_fds(self._link.socket, [b"+"], fds)
        MessageStream(self._link.socket).send({"form": form, "num_bytes_of_file": self._file.seek(0, io.SEEK_END)})

    def _talk(self, request: Json) -> tuple[Json, pa.Buffer]:
        """Send a request; read the file for the process until it replies."""
        assert self._link is not None
        stream, self._is_waiting, self._fault = MessageStream(self._link.socket), False, None
        stream.send(request)
        while "read" in (reply := stream.receive_json()):
            data = self._read(*reply["read"])
            stream.send({"is_faulty": data is None}, data or b"")
        if num_shared := reply["num_shared"]:
            data = pa.py_buffer(memoryview(self._link.memory)[:num_shared])
        else:
            data = pa.py_buffer(stream.receive([sum(reply["num_bytes"])]))
        self._is_waiting = True
        return reply, data

    def _read(self, at: int, num_bytes: int) -> bytes | None:
        """Return bytes of the file, None after a fault, which `ask` raises once the process has replied."""
        try:
            self._file.seek(at)
            data: bytes = self._file.read(num_bytes)
        except Exception as error:
            self._fault = self._fault or error
            return None
        return data


class _Table:
    """A table that another process reads, as a context manager."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        try:
            self._description, schema = connection.open()
            self.schema = pa.ipc.read_schema(schema)
        except BaseException:
            connection.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; the process can read another."""
        self._connection.close()


class ParquetTable(_Table):
    """A Parquet file."""

    @property
    def num_rows(self) -> list[int]:
        """The number of rows of each row group."""
        numbers: list[int] = self._description["num_rows"]
        return numbers

    def find_large_column(self, names: Sequence[str], safe_bytes: int, max_ratio: int) -> LargeColumn | None:
        """Return one of the columns that unpacks to more than `safe_bytes` and `max_ratio` times its size."""
        arguments = {"names": list(names), "safe_bytes": safe_bytes, "max_ratio": max_ratio}
        found = self._connection.ask("find_large_column", **arguments)[0]["found"]
        return LargeColumn(*found) if found else None

    def iter_batches(
        self, columns: Sequence[str], max_rows: int, groups: Sequence[int] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Yield these columns in batches of at most `max_rows` rows, of these row groups or of all."""
        if not columns:
            yield from _make_empty_batches(
                self.num_rows if groups is None else [self.num_rows[i] for i in groups], max_rows
            )
            return
        for _, batch in self._iter_numbered(self._connection.ask, columns, max_rows, groups, 0):
            yield batch

    def iter_cells(self, column: str, max_rows: int, group: int, first_row: int = 0) -> Iterator[tuple[int, pa.Array]]:
        """Yield (row, up to `max_rows` cells from there on) of a row group, the first with `first_row`.

        Cells are lost when the next ones are asked for.
        """
        for row, batch in self._iter_numbered(self._connection.borrow, [column], max_rows, [group], first_row):
            yield row, batch.column(0)

    def _iter_numbered(
        self, ask: Ask, columns: Sequence[str], max_rows: int, groups: Sequence[int] | None, first_row: int
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        wanted = {"columns": list(columns), "max_rows": max_rows, "groups": groups, "first_row": first_row}
        reply, data = ask("select", **wanted)
        row = reply["num_skipped"]
        while True:
            for batch in _deserialize(data):
                yield row, batch
                row += len(batch)
            if reply["is_end"]:
                return
            reply, data = ask("next")


class LargeColumn(NamedTuple):
    """A column of a row group, with its sizes in the file and unpacked."""

    name: str
    group: int
    packed_bytes: int
    unpacked_bytes: int


class ArrowTable(_Table):
    """A stream in Arrow's IPC format."""

    def has_rows(self) -> bool:
        """Return whether there are any rows; to be asked before the batches are read."""
        return bool(self._connection.ask("check_rows")[0]["has_rows"])

    def iter_batches(self, columns: Sequence[str]) -> Iterator[tuple[int, int, pa.RecordBatch]]:
        """Yield (offset, number of bytes, these columns) of each batch that has rows."""
        reply, data = self._connection.ask("select", columns=list(columns))
        yield from _locate(reply, data)
        while not reply["is_end"]:
            reply, data = self._connection.ask("next")
            yield from _locate(reply, data)

    def read_cells(self, offset: int, column: str, row: int, max_rows: int) -> pa.Array:
        """Return up to `max_rows` cells from `row` on, of the batch at byte `offset`; none beyond its end.

        They are lost when the next ones are asked for.
        """
        _, data = self._connection.borrow("read_cells", offset=offset, column=column, row=row, max_rows=max_rows)
        [batch] = _deserialize(data)
        return batch.column(0)


def _make_empty_batches(num_rows: Sequence[int], max_rows: int) -> Iterator[pa.RecordBatch]:
    """Yield batches without columns for all rows, of which the file says nothing else."""
    total = sum(num_rows)
    nulls = pa.record_batch([pa.nulls(min(total, max_rows))], [""]).select([])
    for first in range(0, total, max_rows):
        yield nulls.slice(0, min(max_rows, total - first))


def _locate(reply: Json, data: pa.Buffer) -> Iterator[tuple[int, int, pa.RecordBatch]]:
    for (offset, num_bytes), batch in zip(reply["ranges"], _deserialize(data), strict=True):
        yield offset, num_bytes, batch


def _deserialize(data: pa.Buffer) -> Iterator[pa.RecordBatch]:
    return iter(pa.ipc.open_stream(data)) if data.size else iter(())
