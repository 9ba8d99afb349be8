"""Files by URI, local or in an object store: list, read, write at once, remove. The only module that knows fsspec."""

from __future__ import annotations

import os
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

TEMPORARY_SUFFIX = ".tmp"

READ_ATTEMPTS, _FIRST_PAUSE_S = 3, 0.2
_EXTRAS = {
    "http": "http",
    "https": "http",
    "s3": "s3",
    "gs": "gcs",
    "gcs": "gcs",
    "az": "azure",
    "abfs": "azure",
    "abfss": "azure",
}
# Trying again cannot help against these.
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


@dataclass(frozen=True)
class FileInfo:
    uri: str
    num_bytes: int
    is_regular: bool = True  # False for a pipe, a socket or a device, which may never end


class StoreError(ValueError):
    """A URI that cannot be used, and what to do about it."""


def open_store(uri: str) -> tuple[Any, str]:
    """The file system of `uri` and its path there; a local path becomes absolute. Raises StoreError."""
    if "://" not in uri:
        local = LocalFileSystem()
        return local, local._strip_protocol(uri)
    protocol = uri.split("://", 1)[0]
    try:
        # Not fsspec's url_to_fs: it takes a `::` in a name for a chain of file systems.
        kind = fsspec.get_filesystem_class(protocol)
        return kind(**kind._get_kwargs_from_urls(uri)), kind._strip_protocol(uri)
    except ImportError as error:
        install = f"; pip install 'ovis2-ray[{_EXTRAS[protocol]}]'" if protocol in _EXTRAS else ""
        raise StoreError(f"{uri}: {error}{install}") from error
    except ValueError as error:
        raise StoreError(f"{uri}: {error}") from error


@contextmanager
def _faults_as_os_errors() -> Iterator[None]:
    """Each store's client has exceptions of its own: whoever uses a store handles OSError."""
    try:
        yield
    except (OSError, StoreError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def settings() -> dict[str, Any]:
    """What this process has set for its stores, as JSON, for `use_settings` in another."""
    return dict(fsspec.config.conf)


def use_settings(given: dict[str, Any]) -> None:
    fsspec.config.conf.update(given)


def absolute_uri(uri: str) -> str:
    """A local path as an absolute one, any other URI unchanged: what a process elsewhere can open."""
    fs, path = open_store(uri)
    return path if isinstance(fs, LocalFileSystem) else uri


def join(uri: str, *names: str) -> str:
    return "/".join([uri.rstrip("/"), *names])


def list_files(uri: str) -> list[FileInfo]:
    """All files below a directory, sorted by name, links followed; nothing if it does not exist. Raises OSError."""
    fs, path = open_store(uri)
    if isinstance(fs, LocalFileSystem):
        return sorted(_walk(path), key=lambda info: info.uri)
    with _faults_as_os_errors():
        found: dict[str, dict[str, Any]] = fs.find(path, detail=True)
    return [_info(fs, name, found[name]) for name in sorted(found)]


def glob_files(uri: str) -> list[FileInfo]:
    """The files that match, without directories, sorted by name. Raises OSError."""
    fs, path = open_store(uri)
    with _faults_as_os_errors():
        found: dict[str, dict[str, Any]] = fs.glob(path, detail=True)
    return [_info(fs, name, found[name]) for name in sorted(found) if found[name]["type"] != "directory"]


def find_file(uri: str) -> FileInfo | None:
    """What is at `uri` unless that is a directory or nothing. Raises OSError."""
    fs, path = open_store(uri)
    with _faults_as_os_errors():
        return _info(fs, path, fs.info(path)) if fs.exists(path) and not fs.isdir(path) else None


def is_directory(uri: str) -> bool:
    """Raises OSError."""
    fs, path = open_store(uri)
    with _faults_as_os_errors():
        return bool(fs.isdir(path))


def read_bytes(uri: str, start: int | None = None, stop: int | None = None) -> bytes:
    """The whole file or bytes `start` up to `stop`, fewer if it ends before.

    Raises OSError; faults that may pass are tried again twice.
    """
    fs, path = open_store(uri)
    if isinstance(fs, LocalFileSystem) and not stat.S_ISREG(Path(path).stat().st_mode):
        raise OSError(f"{path} is not a regular file")  # a pipe may never end
    for attempt in range(1, READ_ATTEMPTS + 1):
        try:
            with _faults_as_os_errors():
                data: bytes = fs.cat_file(path, start=start, end=stop)
            return data
        except _FINAL:
            raise
        except OSError:
            if attempt == READ_ATTEMPTS:
                raise
            time.sleep(pause_s(attempt))
    raise AssertionError("unreachable")


def pause_s(attempt: int) -> float:
    """How long to wait after the first, second ... attempt failed."""
    return float(_FIRST_PAUSE_S * 2 ** (attempt - 1))


def open_file(uri: str, block_bytes: int | None = None) -> Any:
    """A binary file object that reads the parts it is asked for, from an object store in blocks of this size.

    Raises OSError.
    """
    fs, path = open_store(uri)
    with _faults_as_os_errors():
        return fs.open(path, "rb", **({"block_size": block_bytes} if block_bytes else {}))


def write_bytes(uri: str, data: bytes) -> None:
    """All of `data` or nothing appears at `uri`, whenever the process dies: renamed locally, one put elsewhere.

    Raises OSError.
    """
    fs, path = open_store(uri)
    if not isinstance(fs, LocalFileSystem):
        with _faults_as_os_errors():
            fs.pipe_file(path, data)
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def remove(uri: str) -> None:
    """One file; fine if it is gone. Raises OSError."""
    fs, path = open_store(uri)
    with _faults_as_os_errors():
        if fs.exists(path):
            fs.rm_file(path)


def _info(fs: Any, name: str, info: dict[str, Any]) -> FileInfo:
    if isinstance(fs, LocalFileSystem):
        return _local_info(name)
    return FileInfo(fs.unstrip_protocol(name), int(info.get("size") or 0))


def _walk(directory: str) -> Iterator[FileInfo]:
    """fsspec's own walk does not follow links to directories, and passes over those that it may not read."""
    seen = {os.path.realpath(directory)}
    for parent, directories, names in os.walk(directory, followlinks=True, onerror=_raise_unless_missing):
        directories[:] = [name for name in directories if _is_new(f"{parent}/{name}", seen)]
        yield from (_local_info(f"{parent}/{name}") for name in names)


def _is_new(directory: str, seen: set[str]) -> bool:
    """A link to a directory that was walked already, such as a parent, would never end."""
    real = os.path.realpath(directory)
    is_new = real not in seen
    seen.add(real)
    return is_new


def _local_info(path: str) -> FileInfo:
    """A link counts as what it leads to; one that leads nowhere is found missing when it is read."""
    try:
        status = Path(path).stat()
    except OSError:
        return FileInfo(path, 0)
    return FileInfo(path, status.st_size, stat.S_ISREG(status.st_mode))


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
