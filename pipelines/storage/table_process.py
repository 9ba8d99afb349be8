"""Read tables with Arrow in processes of their own: a table that crashes Arrow ends only the process that reads it.

`python -m pipelines.storage.table_process FD PARENT TIMEOUT_S` forks a process for each socket that arrives over FD, so
that Arrow is loaded once. `table_reader` talks to these processes.
"""

from __future__ import annotations

import io
import mmap
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ovis_model.child_process import Json, MessageStream, StreamEnded, end_with_parent
from pipelines.storage.arrow_ipc import read_batch, read_schema, select_columns
from pipelines.storage.parquet_footer import find_encryption
from pipelines.storage.sized_file import SizedFile

_WATCH_EVERY_S = 1.0
_BUFFER_BYTES = 1 << 20  # without a buffer size, Arrow holds whole columns of a row group
_MAX_CELLS_BYTES = 8 << 20
_NO_BYTES = b""

Reply = tuple[Json, Any]
"""A message and the bytes that follow it."""


def main(fd: int, parent: int, timeout_s: int) -> None:
    """Fork a process per socket that arrives, until the parent closes its end or exits. This process has one thread."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # what a crash prints is not for the user
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    control, own = socket.socket(fileno=fd), os.getpid()
    control.settimeout(_WATCH_EVERY_S)
    while os.getppid() == parent:
        try:
            message, fds, *_ = socket.recv_fds(control, 1, 1)
        except TimeoutError:
            continue
        if not message:
            return
        if os.fork() == 0:
            control.close()
            _run_reader(_TimedStream(socket.socket(fileno=fds[0]), timeout_s), own)
        os.close(fds[0])


class _TimedStream(MessageStream):
    """Messages with the process that asks; the system ends this one if it does not answer in time, whatever it does."""

    def __init__(self, connection: socket.socket, timeout_s: int) -> None:
        super().__init__(connection)
        self._timeout_s = timeout_s

    def send(self, message: Json, *payloads: Any) -> None:
        """Send a message and stop the clock."""
        signal.alarm(0)
        super().send(message, *payloads)

    def receive_json(self) -> Json:
        """Wait for a message and start the clock."""
        message = super().receive_json()
        signal.alarm(self._timeout_s)
        return message

    def receive_file(self) -> list[int | None]:
        """Return the descriptor of the next file, None if only the other side can read it; nothing at the end."""
        message, fds, *_ = socket.recv_fds(self._connection, 1, 1)
        return [*fds, None][:1] if message else []


def _run_reader(stream: _TimedStream, parent: int) -> None:
    """Serve one table after another, and end this process when the other side closes the socket."""
    try:
        end_with_parent(parent)
        while fds := stream.receive_file():
            _serve_table(stream, *fds)
            signal.alarm(0)
    except (StreamEnded, ConnectionError):
        pass
    finally:
        os._exit(0)


def _serve_table(stream: MessageStream, fd: int | None) -> None:
    """Answer the requests about one table until it is closed; the first is to open it."""
    given = stream.receive_json()
    with _RemoteFile(stream, given["num_bytes_of_file"]) if fd is None else io.FileIO(fd) as file:
        table = {"parquet": _Parquet, "arrow": _Arrow}[given["form"]](file)
        while (request := stream.receive_json())["action"] != "close":
            stream.send(*_answer(getattr(table, request["action"]), request["arguments"]))


def _answer(action: Any, arguments: Json) -> Reply:
    """Return the reply of an action, or {"damage": reason} or, if the system fails, {"errno": number}."""
    try:
        reply: Reply = action(**arguments)
        return reply
    except (StreamEnded, ConnectionError):
        raise
    except MemoryError:
        return {"damage": "reading it needs more memory than there is"}, _NO_BYTES
    except UnicodeDecodeError:
        return {"damage": "it holds text that is not UTF-8"}, _NO_BYTES
    except Exception as error:
        # On damaged data Arrow may raise any exception, and none of them may end the process.
        number = error.errno if isinstance(error, OSError) else None
        reason = " ".join(str(error).split()) or type(error).__name__
        return {"errno": number} if number else {"damage": reason}, _NO_BYTES


class _Parquet:
    """A Parquet file; its batches are read forward."""

    def __init__(self, file: io.RawIOBase) -> None:
        self._file = file
        self._parquet: Any = None
        self._batches: Iterator[pa.RecordBatch] = iter(())

    def open(self) -> Reply:
        """Return the number of rows of each row group, and the schema. Raise ArrowException or OSError."""
        if encrypted := find_encryption(self._file):
            raise pa.ArrowInvalid(f"{encrypted}; decrypt it first")
        self._parquet = pq.ParquetFile(self._file, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        metadata = self._parquet.metadata
        num_rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        if min(num_rows, default=0) < 0 or sum(num_rows) != metadata.num_rows:
            raise pa.ArrowInvalid("its numbers of rows contradict each other")
        return {"num_rows": num_rows}, _serialize_schema(self._parquet.schema_arrow)

    def find_large_column(self, names: list[str], safe_bytes: int, max_ratio: int) -> Reply:
        """Find a column that unpacks to more than `safe_bytes` and `max_ratio` times its size."""
        schema, metadata = self._parquet.schema, self._parquet.metadata
        wanted = [i for i in range(len(schema)) if schema.column(i).path.partition(".")[0] in names]
        for group in range(metadata.num_row_groups):
            for column in map(metadata.row_group(group).column, wanted):
                packed, unpacked = column.total_compressed_size, column.total_uncompressed_size
                if unpacked > max(safe_bytes, max_ratio * packed):
                    return {"found": [column.path_in_schema, group, packed, unpacked]}, _NO_BYTES
        return {"found": None}, _NO_BYTES

    def select(self, columns: list[str], max_rows: int, groups: list[int] | None) -> Reply:
        """Begin to read these columns of these row groups, None for all, in batches of at most `max_rows`."""
        # One thread: a process that is forked has none of Arrow's.
        self._batches = self._parquet.iter_batches(max_rows, row_groups=groups, columns=columns, use_threads=False)
        return {}, _NO_BYTES

    def next(self) -> Reply:
        """Return the next batch."""
        batch = next(self._batches, None)
        if batch is None:
            return {"is_end": True}, _NO_BYTES
        batch.validate(full=True)  # invalid UTF-8 would otherwise be found at the end of the run
        return {}, _serialize(batch)


class _Arrow:
    """A stream of Arrow's IPC format."""

    def __init__(self, file: io.RawIOBase) -> None:
        self._file = _map_file(file) if isinstance(file, io.FileIO) else pa.PythonFile(file, mode="r")
        self._schema: Any = None
        self._column: tuple[int, str] | None = None
        self._cells: Any = None

    def open(self) -> Reply:
        """Return the schema; the file is then at the first batch. Raise ArrowException or OSError."""
        if not self._file.size():
            raise pa.ArrowInvalid("it is empty")
        self._schema = read_schema(self._file)
        return {}, _serialize_schema(self._schema)

    def check_rows(self) -> Reply:
        """Return whether there are any rows."""
        begin = self._file.tell()
        has_rows = self._read_batch() is not None
        self._file.seek(begin)
        return {"has_rows": has_rows}, _NO_BYTES

    def next(self, columns: list[str]) -> Reply:
        """Return these columns of the next batch that has rows, and the byte range of its message."""
        if (found := self._read_batch()) is None:
            return {"is_end": True}, _NO_BYTES
        begin, batch = found
        return {"range": [begin, self._file.tell() - begin]}, _serialize(select_columns(batch, columns))

    def _read_batch(self) -> tuple[int, pa.RecordBatch] | None:
        """Return (offset, batch) of the next batch that has rows, None at the end."""
        while True:
            begin = self._file.tell()
            try:
                batch = read_batch(pa.ipc.read_message(self._file), self._schema)
            except EOFError:
                break
            if len(batch):
                return begin, batch
        if self._file.tell() == begin:
            raise pa.ArrowInvalid("truncated: it has no end mark")
        return None

    def read_cells(self, offset: int, column: str, row: int, max_rows: int) -> Reply:
        """Return cells of a column from `row` of the batch at byte `offset` on."""
        if self._column != (offset, column):
            self._column = None
            self._file.seek(offset)
            batch = read_batch(pa.ipc.read_message(self._file), self._schema)
            self._cells = select_columns(batch, [column])
            self._column = (offset, column)
        cells = self._cells.slice(row, max_rows)
        while len(cells) > 1 and cells.nbytes > _MAX_CELLS_BYTES:
            cells = cells.slice(0, len(cells) // 2)
        return {}, _serialize(cells)


def _map_file(file: io.FileIO) -> Any:
    """Map a local file into memory: only the pages that are used are read."""
    is_empty = not file.seek(0, io.SEEK_END)
    return pa.BufferReader(b"" if is_empty else pa.py_buffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)))


def _serialize_schema(schema: pa.Schema) -> Any:
    _check_names(schema)
    return schema.serialize()


def _check_names(fields: Iterable[pa.Field]) -> None:
    """Raise UnicodeDecodeError if a name cannot be read, also within a type."""
    for field in fields:
        assert field.name is not None
        _check_names(field.type.field(i) for i in range(field.type.num_fields))


def _serialize(batch: pa.RecordBatch) -> Any:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:  # with the values of dictionaries
        writer.write_batch(batch)
    return sink.getvalue()


class _RemoteFile(SizedFile):
    """A file that the other side of the stream reads, as only that has the credentials of its store."""

    def __init__(self, stream: MessageStream, num_bytes: int) -> None:
        super().__init__(num_bytes)
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        """Return bytes. Raise OSError if the other side cannot read them; it knows why."""
        left = max(0, self._num_bytes - self._at)
        self._stream.send({"read": [self._at, left if size < 0 else min(size, left)]})
        reply = self._stream.receive_json()
        data = self._stream.receive(reply["num_bytes"]).tobytes()
        if reply["is_faulty"]:
            raise OSError("the file cannot be read")
        self._at += len(data)
        return data


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
