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
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ovis_model.child_process import Json, MessageStream, StreamEnded, end_with_parent
from pipelines.storage.arrow_ipc import read_batch, read_schema, select_columns
from pipelines.storage.parquet_footer import find_encryption
from pipelines.storage.sized_file import SizedFile

_WATCH_EVERY_S = 1.0
_BUFFER_BYTES = 1 << 20  # without a buffer size, Arrow holds whole columns of a row group
_MESSAGE_BYTES, _MAX_BATCHES = 1 << 20, 64  # that travel together: a message costs as much as copying 500 KB
_MIN_SHARED_BYTES = 16 << 10

Reply = tuple[Json, Sequence[Any]]
"""A message, and the buffers that follow it."""


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
            message, fds, *_ = socket.recv_fds(control, 1, 2)
        except TimeoutError:
            continue
        if not message:
            return
        if os.fork() == 0:
            control.close()
            _run_reader(_TimedStream(socket.socket(fileno=fds[0]), timeout_s), _Shared(fds[1]), own)
        for fd in fds:
            os.close(fd)


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


class _Shared:
    """Memory that the process which asks reads too: it saves copying batches into a socket and out of it."""

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, 0)

    def hold(self, buffers: Sequence[Any]) -> int:
        """Copy the buffers into the memory -> their size; 0, without a copy, if they are too small or too large."""
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        total = sum(view.nbytes for view in views)
        if not _MIN_SHARED_BYTES <= total <= len(self._memory):
            return 0
        at = 0
        for view in views:
            self._memory[at : at + view.nbytes] = view
            at += view.nbytes
        return total


def _run_reader(stream: _TimedStream, shared: _Shared, parent: int) -> None:
    """Serve one table after another, and end this process when the other side closes the socket."""
    try:
        end_with_parent(parent)
        while fds := stream.receive_file():
            _serve_table(stream, shared, *fds)
            signal.alarm(0)
    except (StreamEnded, ConnectionError):
        pass
    finally:
        os._exit(0)


def _serve_table(stream: MessageStream, shared: _Shared, fd: int | None) -> None:
    """Answer the requests about one table until it is closed; the first is to open it."""
    given = stream.receive_json()
    with _RemoteFile(stream, given["num_bytes_of_file"]) if fd is None else io.FileIO(fd) as file:
        table = {"parquet": _Parquet, "arrow": _Arrow}[given["form"]](file)
        while (request := stream.receive_json())["action"] != "close":
            reply, buffers = _answer(getattr(table, request["action"]), request["arguments"])
            num_shared = shared.hold(buffers)
            stream.send({**reply, "num_shared": num_shared}, *(() if num_shared else buffers))


def _answer(action: Any, arguments: Json) -> Reply:
    """Return the reply of an action, or {"damage": reason} or, if the system fails, {"errno": number}."""
    try:
        reply: Reply = action(**arguments)
        return reply
    except (StreamEnded, ConnectionError):
        raise
    except MemoryError:
        return {"damage": "reading it needs more memory than there is"}, ()
    except UnicodeDecodeError:
        return {"damage": "it holds text that is not UTF-8"}, ()
    except Exception as error:
        # On damaged data Arrow may raise any exception, and none of them may end the process.
        number = error.errno if isinstance(error, OSError) else None
        reason = " ".join(str(error).split()) or type(error).__name__
        return {"errno": number} if number else {"damage": reason}, ()


class _Located(NamedTuple):
    """A batch, and the offset and size of its message."""

    batch: pa.RecordBatch
    at: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Size of the batch."""
        size: int = self.batch.nbytes
        return size


class _Batches:
    """Batches, also `_Located` ones, in the order of the file, taken so many at a time that they fill a message."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches = batches
        self._fault: Exception | None = None  # of the batch after those that were taken

    def take(self) -> tuple[list[Any], bool]:
        """Return the next batches, and whether they are the last. Raise what reading the first one raises."""
        if self._fault is not None:
            raise self._fault
        taken, num_bytes = list[Any](), 0
        try:
            while len(taken) < _MAX_BATCHES and num_bytes < _MESSAGE_BYTES:
                taken.append(next(self._batches))
                num_bytes += taken[-1].nbytes
        except StopIteration:
            return taken, True
        except Exception as error:
            if not taken:
                raise
            self._fault = error
        return taken, False


class _Parquet:
    """A Parquet file; its batches are read forward."""

    def __init__(self, file: io.RawIOBase) -> None:
        self._file = file
        self._parquet: Any = None
        self._batches = _Batches(iter(()))

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
                    return {"found": [column.path_in_schema, group, packed, unpacked]}, ()
        return {"found": None}, ()

    def select(self, columns: list[str], max_rows: int, groups: list[int] | None, first_row: int) -> Reply:
        """Return the first batches of these columns of these row groups, None for all; each has up to `max_rows`.

        Leave out those before that of `first_row`, and return the number of their rows.
        """
        # One thread: a process that is forked has none of Arrow's.
        batches = self._parquet.iter_batches(max_rows, row_groups=groups, columns=columns, use_threads=False)
        num_skipped, batches = _skip_batches(batches, first_row)
        self._batches = _Batches(map(_validate, batches))
        reply, buffers = self.next()
        return {**reply, "num_skipped": num_skipped}, buffers

    def next(self) -> Reply:
        """Return the next batches, and whether they are the last."""
        batches, is_end = self._batches.take()
        return {"is_end": is_end}, _serialize(batches)


class _Arrow:
    """A stream of Arrow's IPC format."""

    def __init__(self, file: io.RawIOBase) -> None:
        self._file = _map_file(file) if isinstance(file, io.FileIO) else pa.PythonFile(file, mode="r")
        self._schema: Any = None
        self._column: tuple[int, str] | None = None
        self._cells: Any = None
        self._batches = _Batches(iter(()))

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
        return {"has_rows": has_rows}, ()

    def select(self, columns: list[str]) -> Reply:
        """Return these columns of the first batches that have rows, with the byte ranges of their messages."""
        self._batches = _Batches(self._select_columns(columns))
        return self.next()

    def next(self) -> Reply:
        """Return the next batches and their byte ranges, and whether they are the last."""
        found, is_end = self._batches.take()
        return {"ranges": [batch.at for batch in found], "is_end": is_end}, _serialize([batch.batch for batch in found])

    def _select_columns(self, columns: list[str]) -> Iterator[_Located]:
        while (found := self._read_batch()) is not None:
            begin, batch = found
            yield _Located(select_columns(batch, columns), (begin, self._file.tell() - begin))

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
        while len(cells) > 1 and cells.nbytes > _MESSAGE_BYTES:
            cells = cells.slice(0, -(-len(cells) // 2))
        return {}, _serialize([cells])


def _skip_batches(batches: Iterator[pa.RecordBatch], first_row: int) -> tuple[int, Iterator[pa.RecordBatch]]:
    """Return the number of rows before the batch with `first_row`, and the batches from there on."""
    num_skipped = 0
    for batch in batches if first_row else ():
        if num_skipped + len(batch) > first_row:
            return num_skipped, chain([batch], batches)
        num_skipped += len(batch)
    return num_skipped, batches


def _validate(batch: pa.RecordBatch) -> pa.RecordBatch:
    batch.validate(full=True)  # invalid UTF-8 would otherwise be found at the end of the run
    return batch


def _map_file(file: io.FileIO) -> Any:
    """Map a local file into memory: only the pages that are used are read."""
    is_empty = not file.seek(0, io.SEEK_END)
    return pa.BufferReader(b"" if is_empty else pa.py_buffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)))


def _serialize_schema(schema: pa.Schema) -> Sequence[Any]:
    _check_names(schema)
    return [schema.serialize()]


def _check_names(fields: Iterable[pa.Field]) -> None:
    """Raise UnicodeDecodeError if a name cannot be read, also within a type."""
    for field in fields:
        assert field.name is not None
        _check_names(field.type.field(i) for i in range(field.type.num_fields))


def _serialize(batches: Sequence[pa.RecordBatch]) -> Sequence[Any]:
    """Return the buffers of a stream, without a copy of the data; nothing for no batches."""
    if not batches:
        return ()
    sink = _Buffers()
    with pa.ipc.new_stream(pa.PythonFile(sink, mode="w"), batches[0].schema) as writer:  # with values of dictionaries
        for batch in batches:
            writer.write_batch(batch)
    return sink.buffers


class _Buffers(io.RawIOBase):
    """A file that keeps what is written to it."""

    def __init__(self) -> None:
        self.buffers = list[Any]()

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, data: Any) -> int:
        """Keep a buffer."""
        self.buffers.append(data)
        return len(data)


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
