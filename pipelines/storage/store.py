"""Files by URI, local or in an object store, through fsspec: list, read, write atomically, remove.

A fault of one file raises OSError; a fault of the store that persists through all retries raises StoreFault.
"""

from __future__ import annotations

import bisect
import logging
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from ovis_model.wording import count_nouns
from pipelines.errors import FinalFault, StoreError, StoreFault
from pipelines.storage.credentials import explain_refusal
from pipelines.storage.retries import Retries, is_final

TEMPORARY_SUFFIX = ".tmp"
RETRIES = Retries(max_attempts=8)  # pauses of 16 to 32 s in total: the whole run depends on the store
WEB_RETRIES = Retries(max_attempts=5)  # fewer: a web host is one of many

_EXTRAS = {"http": "http", "https": "http", "s3": "s3", "gs": "gcs", "gcs": "gcs"}
_EXTRAS |= dict.fromkeys(("az", "abfs", "abfss"), "azure")
_WEB = ("http", "https")
_FINAL_NAMES = ("ParamValidationError",)  # botocore's error for an invalid bucket name
PARQUET_BUFFER_BYTES = 1 << 20  # without a buffer size, Arrow holds whole columns of a row group


T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileInfo:
    """A file as its store lists it."""

    uri: str
    num_bytes: int  # -1: the store does not report it
    is_regular: bool = True  # False for a pipe, a socket or a device, which may never end


def open_store(uri: str) -> tuple[Any, str]:
    """Return the file system of `uri` and its path there; a local path becomes absolute. Raise StoreError."""
    if uri.startswith("pipe:") and not os.path.lexists(uri):
        raise StoreError("commands (pipe:) are not run; give the URL that the command reads, such as s3://bucket/a.tar")
    if "://" not in uri:
        return _get_local(), LocalFileSystem._strip_protocol(uri)
    protocol = uri.split("://", 1)[0]
    if protocol in ("file", "local"):
        return _get_local(), _decode_local(uri)
    if protocol not in _WEB and _leaves_store_root(uri):
        raise StoreError(f"{redact(uri)} leads above its bucket; give a path inside the bucket")
    try:
        # Not fsspec's url_to_fs: it parses `::` in a name as a chain of file systems.
        kind = _load_file_system(protocol)
        return kind(**kind._get_kwargs_from_urls(uri)), kind._strip_protocol(uri)
    except ImportError as error:
        install = f"; pip install 'ovis2-ray[{_EXTRAS[protocol]}]'" if protocol in _EXTRAS else ""
        raise StoreError(f"{redact(uri)}: {error}{install}") from error
    except ValueError as error:
        raise StoreError(f"{redact(uri)}: {error}") from error


def _decode_local(uri: str) -> str:
    """Return the path of a file:// URI; a file whose name really contains the escapes is preferred."""
    path = uri.partition("://")[2]
    if path.startswith("localhost/"):
        path = path.removeprefix("localhost")
    if "%" in path and not os.path.lexists(path):
        path = unquote(path, errors="surrogateescape")
    return LocalFileSystem._strip_protocol(path)  # type: ignore[no-any-return]


def _leaves_store_root(uri: str) -> bool:
    """Return whether `..` leads above the bucket, where a proxy could take it for a path in another bucket."""
    return "/.." in uri and resolve_dots(uri) is None


def resolve_dots(uri: str) -> str | None:
    """Resolve `.` and `..` in the path of a store's URI, as a file system does; None if they lead above the bucket.

    A local path or URL is unchanged: the system or the client resolves it.
    """
    if "://" not in uri or "/." not in uri or uri.startswith(("file:", "local:", "http:", "https:")):
        return uri
    root, path = get_store_root(uri), list[str]()
    for part in uri[len(root) + 1 :].split("/"):
        if part == ".." and not path:
            return None
        if part == "..":
            path.pop()
        elif part != ".":
            path.append(part)
    return "/".join([root, *path])


@cache
def _get_local() -> LocalFileSystem:
    return LocalFileSystem()


def _load_file_system(protocol: str) -> Any:
    if protocol not in _WEB:
        return fsspec.get_filesystem_class(protocol)
    # Not fsspec's own http(s) file system: it follows redirects to any host and reads without a limit.
    from pipelines.storage.http import WebFileSystem

    return WebFileSystem


def allow_private_addresses(allowed: bool) -> None:
    """Set whether http(s) URLs may reach hosts inside this process's network; untrusted INPUT must not."""
    fsspec.config.conf.setdefault("http", {})["allow_private"] = allowed


def redact(uri: str) -> str:
    """Return a URI or an id for display: without credentials, and without a URL's query, which may be a signature."""
    plain = re.sub(r"(?<=://)[^/?#]*@", "", uri)
    return re.sub(r"\?[^#]*", "", plain) if uri.partition("://")[0] in _WEB else plain


def strip_query(uri: str) -> str:
    """Return the URI up to the file's suffix: a URL without its query and fragment, other URIs unchanged."""
    return re.split("[?#]", uri, maxsplit=1)[0] if uri.partition("://")[0] in _WEB else uri


@contextmanager
def _translate_faults(fs: Any) -> Iterator[None]:
    """Translate the exceptions of each store's client to OSError."""
    try:
        yield
    except Exception as error:
        if _has_credentials(fs) and (refusal := explain_refusal(error, fs.protocol)):
            raise refusal from error
        if isinstance(error, OSError | StoreError):
            raise
        name = type(error).__name__
        is_final = isinstance(error, ValueError | TypeError | NotImplementedError) or name in _FINAL_NAMES
        raise (FinalFault if is_final else OSError)(f"{name}: {error}") from error


def _has_credentials(fs: Any) -> bool:
    """Return whether settings give access to the store; on the web, each host is one of many."""
    return not isinstance(fs, LocalFileSystem) and "http" not in fs.protocol


def get_settings() -> dict[str, Any]:
    """Return this process's settings for stores, serializable as JSON, for `use_settings` in another process."""
    return dict(fsspec.config.conf)


def use_settings(given: dict[str, Any]) -> None:
    """Apply another process's settings for stores."""
    fsspec.config.conf.update(given)


def make_absolute(uri: str) -> str:
    """Return a local path as an absolute path, any other URI unchanged, so that any process can open it."""
    fs, path = open_store(uri)
    return path if isinstance(fs, LocalFileSystem) else uri


def find_local_path(uri: str) -> str | None:
    """Return the path of a local file, None for one in a store."""
    fs, path = open_store(uri)
    return path if isinstance(fs, LocalFileSystem) else None


def normalize(uri: str) -> str:
    """Return a URI as listings spell it: a local path absolute, any other with its store's own prefix."""
    fs, path = open_store(uri)
    return path if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(path))


def resolve_links(uri: str) -> str:
    """Return a local path with its links followed, any other URI normalized."""
    fs, path = open_store(uri)
    return os.path.realpath(path) if isinstance(fs, LocalFileSystem) else normalize(uri)


def get_store_root(uri: str) -> str:
    """Return the protocol and the bucket or host of `uri`, such as `s3://bucket`; "" for local files."""
    return "/".join(uri.split("/")[:3]) if "://" in uri else ""


def join(uri: str, *names: str) -> str:
    """Append path components to a URI."""
    return "/".join([uri.rstrip("/"), *names])


def list_files(uri: str) -> list[FileInfo]:
    """Return all files below a directory, sorted by name, links followed; none if it does not exist. Raise OSError."""
    fs, path = open_store(uri)
    if isinstance(fs, LocalFileSystem):
        return sorted(_walk(path), key=lambda info: info.uri)
    found: dict[str, dict[str, Any]] = _retry(fs, lambda: fs.find(path, detail=True))
    return _describe_files(fs, found)


def glob_files(uri: str) -> list[FileInfo]:
    """Return the files that match a pattern, without directories, sorted by name. Raise OSError."""
    fs, path = open_store(uri)
    if isinstance(fs, LocalFileSystem):
        return _glob_local(path)
    found: dict[str, dict[str, Any]] = _retry(fs, lambda: fs.glob(path, detail=True))
    return _describe_files(fs, {name: info for name, info in found.items() if info["type"] != "directory"})


def _glob_local(pattern: str) -> list[FileInfo]:
    """Return the local files that match; links to directories are followed, as in `list_files`."""
    parts = pattern.split("/")
    first = next(i for i, part in enumerate(parts) if set("*?[") & set(part))
    max_depth = None if "**" in pattern else len(parts) - first
    matches = re.compile(glob_translate(pattern)).match
    infos = _walk("/".join(parts[:first]) or "/", max_depth)
    return sorted((info for info in infos if matches(info.uri)), key=lambda info: info.uri)


def _describe_files(fs: Any, found: dict[str, dict[str, Any]]) -> list[FileInfo]:
    """Describe the objects of a store, sorted by name, without the empty ones that stand for directories."""
    names = sorted(found)
    return [
        _describe(fs, name, found[name])
        for name in names
        if found[name].get("size") or not _is_placeholder(name, names)
    ]


def _is_placeholder(name: str, names: list[str]) -> bool:
    """Return whether an empty object stands for a directory, as consoles and Hadoop make them."""
    following = bisect.bisect_left(names, f"{name}/")
    is_prefix = following < len(names) and names[following].startswith(f"{name}/")
    return is_prefix or name.endswith(("/", "_$folder$"))


def find_file(uri: str) -> FileInfo | None:
    """Return the file at `uri`; None if it does not exist or is a directory. Raise OSError."""
    fs, path = open_store(uri)
    if isinstance(fs, LocalFileSystem):
        return _describe_local(path) if fs.exists(path) and not fs.isdir(path) else None
    try:
        info = _retry(fs, lambda: fs.info(path))
    except FileNotFoundError:
        return None
    return _describe(fs, path, info) if info["type"] != "directory" else None


def is_directory(uri: str) -> bool:
    """Return whether `uri` is a directory. Raise OSError."""
    fs, path = open_store(uri)
    return bool(_retry(fs, lambda: fs.isdir(path)))


def read_bytes(uri: str, start: int | None = None, stop: int | None = None) -> bytes:
    """Return the whole file or its bytes [start, stop), fewer if the file is shorter. Raise OSError."""
    fs, path = open_store(uri)
    read = _read_local if isinstance(fs, LocalFileSystem) else fs.cat_file
    data: bytes = _retry(fs, lambda: read(path, start=start, end=stop))
    return data


def _read_local(path: str, start: int | None, end: int | None) -> bytes:
    place = Path(path)
    if not stat.S_ISREG(place.stat().st_mode):
        raise FinalFault(f"{path} is not a regular file")  # a pipe may never end
    with place.open("rb") as file:
        file.seek(start or 0)
        return file.read(-1 if end is None else end - file.tell())


def probe_byte(uri: str, offset: int) -> bool:
    """Return whether the byte at `offset` can be read now, in one attempt."""
    fs, path = open_store(uri)
    try:
        with _translate_faults(fs):
            return len(fs.cat_file(path, start=offset, end=offset + 1)) == 1
    except OSError:
        return False


def _retry(fs: Any, action: Callable[[], T]) -> T:
    """Return the result of `action`, retrying transient faults.

    A fault that persists is a StoreFault; on the web, where each host is one of many, it is an OSError.
    """

    def try_once() -> T:
        with _translate_faults(fs):
            return action()

    if "http" in fs.protocol:
        return WEB_RETRIES.run(try_once)
    try:
        return RETRIES.run(try_once)
    except OSError as error:
        if is_final(error):
            raise
        raise StoreFault(f"the store still fails after all retries: {error}") from error


def open_file(uri: str, block_bytes: int | None = None) -> Any:
    """Open a binary file for random access; an object store is read in blocks of `block_bytes`.

    Both this function and the file's `read` raise OSError.
    """
    fs, path = open_store(uri)
    options = {"block_size": block_bytes} if block_bytes else {}
    file = _retry(fs, lambda: fs.open(path, "rb", **options))
    return file if isinstance(fs, LocalFileSystem) else _PatientFile(fs, file)


def read_parquet(uri: str, columns: list[str] | None = None) -> pa.Table:
    """Read a whole Parquet file. Raise OSError.

    Only this thread reads (`use_threads`, `pre_buffer`), as everywhere in the driver: a thread of Arrow that releases
    a Python file while the interpreter ends aborts the process.
    """
    with open_file(uri) as file:
        return pq.read_table(file, columns=columns, use_threads=False, pre_buffer=False)


class _PatientFile:
    """A file of a store that retries failed reads."""

    def __init__(self, fs: Any, file: Any) -> None:
        self._fs, self._file = fs, file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _PatientFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def read(self, size: int = -1) -> bytes:
        at = self._file.tell()

        def read() -> bytes:
            self._file.seek(at)
            data: bytes = self._file.read(size)
            return data

        return _retry(self._fs, read)


def write_bytes(uri: str, data: bytes) -> None:
    """Write `data` atomically: by renaming a local file, by a single put to a store. Raise OSError."""
    fs, path = open_store(uri)
    if not isinstance(fs, LocalFileSystem):
        _retry(fs, lambda: fs.pipe_file(path, data))
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


def move(source: str, target: str) -> None:
    """Move a file within a store: rename it locally, copy and remove it elsewhere. Raise OSError.

    If the process dies, the target is complete or absent.
    """
    fs, path = open_store(source)
    if isinstance(fs, LocalFileSystem):
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(path).replace(target)
        return
    target_path = open_store(target)[1]
    _retry(fs, lambda: fs.cp_file(path, target_path))
    remove(source)


def remove(uri: str) -> None:
    """Remove a file if it exists. Raise OSError."""
    fs, path = open_store(uri)
    with suppress(FileNotFoundError):
        _retry(fs, lambda: fs.rm_file(path))


def remove_all(uri: str) -> None:
    """Remove all files below a directory, and the directory itself. Raise OSError."""
    for info in list_files(uri):
        remove(info.uri)
    fs, path = open_store(uri)
    if isinstance(fs, LocalFileSystem):
        shutil.rmtree(path, ignore_errors=True)


def create_directory(uri: str) -> list[str]:
    """Create a local directory; return it and the parents that did not exist, innermost first. Raise OSError.

    A store has no directories: return an empty list.
    """
    fs, path = open_store(uri)
    if not isinstance(fs, LocalFileSystem):
        return []
    created = [str(directory) for directory in (Path(path), *Path(path).parents) if not directory.exists()]
    Path(path).mkdir(parents=True, exist_ok=True)
    return created


def remove_if_empty(uri: str) -> None:
    """Remove a local directory if it is empty."""
    fs, path = open_store(uri)
    if isinstance(fs, LocalFileSystem):
        with suppress(OSError):
            Path(path).rmdir()


def _describe(fs: Any, name: str, info: dict[str, Any]) -> FileInfo:
    if isinstance(fs, LocalFileSystem):
        return _describe_local(name)
    size = info.get("size")
    return FileInfo(fs.unstrip_protocol(name), -1 if size is None else int(size))


def _walk(directory: str, max_depth: int | None = None) -> Iterator[FileInfo]:
    """Yield all files below a directory, at most `max_depth` levels down; log the directories that are met again.

    fsspec's own walk does not follow links to directories, and silently skips directories without permission.
    """
    seen, again = {os.path.realpath(directory)}, list[str]()
    for parent, directories, names in os.walk(directory, followlinks=True, onerror=_raise_unless_missing):
        place = parent.rstrip("/")
        yield from (_describe_local(f"{place}/{name}") for name in names)
        if max_depth is not None and place.count("/") - directory.rstrip("/").count("/") + 1 >= max_depth:
            directories.clear()
        # Directories before links to them, and by name, so that each listing finds a directory at the same place.
        directories.sort(key=lambda name: (Path(place, name).is_symlink(), name))
        is_new = {name: _is_new(f"{place}/{name}", seen) for name in directories}
        again += [f"{place}/{name}" for name in directories if not is_new[name]]
        directories[:] = [name for name in directories if is_new[name]]
    if again:
        logger.warning(
            "%s: skipped %s to directories listed already, such as %s",
            *(directory, count_nouns(len(again), "link"), again[0]),
        )


def _is_new(directory: str, seen: set[str]) -> bool:
    """Return whether a directory has not been walked yet; a link to a parent would loop forever."""
    real = os.path.realpath(directory)
    is_new = real not in seen
    seen.add(real)
    return is_new


def _describe_local(path: str) -> FileInfo:
    """Describe a file or a link's target. A dangling link gets size 0; reading it reports that it is missing."""
    try:
        status = Path(path).stat()
    except OSError:
        return FileInfo(path, 0)
    return FileInfo(path, status.st_size, stat.S_ISREG(status.st_mode))


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
