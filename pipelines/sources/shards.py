"""Expand INPUT to files and list their rows in order, several shards at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, groupby, islice

from ovis_model.wording import count_nouns
from pipelines.config import GroupBy, SourceOptions
from pipelines.errors import SourceError
from pipelines.media.reference import FileRef
from pipelines.sources.braces import expand_names
from pipelines.sources.directories import list_directory
from pipelines.sources.jsonl import list_jsonl
from pipelines.sources.kinds import KINDS, detect_kind
from pipelines.sources.rows import Chunk, ColumnRoles, SourceRow, escape_name, group_into_chunks
from pipelines.sources.selection import GLOB_CHARACTERS, select_files
from pipelines.sources.tables import list_arrow, list_parquet
from pipelines.sources.tar import list_tar
from pipelines.sources.videos import strip_window
from pipelines.storage import store
from pipelines.storage.store import FileInfo

_MANY_ROWS = (".zip", ".7z", ".bz2", ".xz", ".zst", ".csv", ".tsv", ".feather", ".lance")
_SHARDS_AT_ONCE, _CHUNKS_AHEAD = 16, 2


def list_chunks(options: SourceOptions, columns: ColumnRoles, output: str | None = None) -> Iterator[Chunk]:
    """Yield the rows of all inputs, in order, without the files of `output`, which is the OUTPUT of this run.

    Raise SourceError or OSError if an input cannot be listed.
    """
    infos = (info for uri in options.input for info in _expand(store.resolve_dots(uri) or uri, output))
    for is_file, group in groupby(infos, key=lambda info: _check_kind(info) == "file"):
        if is_file:
            yield from _list_files(group, columns)
        else:
            yield from _list_shards(group, columns, options.group_by)


def _list_files(infos: Iterable[FileInfo], columns: ColumnRoles) -> Iterator[Chunk]:
    """List one row per file; files have no columns, so kept columns are null."""
    return group_into_chunks(map(_make_row, infos), columns.keep)


def _make_row(info: FileInfo) -> SourceRow:
    if (uri := escape_name(info.uri)) != info.uri:  # the escaped name would not open the file
        return SourceRow(uri, uri, error="the file name is not UTF-8; rename the file")
    error = "" if info.is_regular else "not a regular file"
    return SourceRow(info.uri, info.uri, (FileRef(info.uri, info.num_bytes),), error=error)


def _list_shards(shards: Iterable[FileInfo], columns: ColumnRoles, group_by: GroupBy) -> Iterator[Chunk]:
    """Yield chunks in the order of the shards; start the next shards early, as listing mostly waits for headers."""
    ahead: deque[Future[Iterator[Chunk]]] = deque()
    pool = ThreadPoolExecutor(_SHARDS_AT_ONCE, thread_name_prefix="list")
    try:
        for shard in shards:
            ahead.append(pool.submit(_start_listing, _list_shard(shard, columns, group_by)))
            if len(ahead) > _SHARDS_AT_ONCE:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start_listing(shard: Iterator[Chunk]) -> Iterator[Chunk]:
    return chain(list(islice(shard, _CHUNKS_AHEAD)), shard)


def _list_shard(shard: FileInfo, columns: ColumnRoles, group_by: GroupBy) -> Iterator[Chunk]:
    match _check_kind(shard):
        case "parquet":
            return list_parquet(shard, columns)
        case "arrow":
            return list_arrow(shard, columns)
        case "jsonl" | "json":
            return list_jsonl(shard, columns)
        case kind:
            return list_tar(shard, columns, is_gzip=kind == "tgz", group_by=group_by)


def _expand(uri: str, output: str | None) -> Iterable[FileInfo]:
    """Return the files of one INPUT. A name that exists is taken as it is, whatever characters it has."""
    if "{" not in store.get_store_root(uri) and (infos := _find_literally(uri, output)) is not None:
        return infos
    if (names := expand_names(uri)) != [uri]:
        return _expand_all(uri, names, output)
    if GLOB_CHARACTERS & set(uri):
        raise SourceError(f"no files match {store.redact(uri)!r}")
    raise SourceError(f"input {store.redact(uri)!r} does not exist")


def _find_literally(uri: str, output: str | None) -> Iterable[FileInfo] | None:
    """Return the files of a file, a window of a video, a directory or a glob; None if there are none."""
    if info := store.find_file(uri):
        return [info]
    if (video := strip_window(uri)) != uri and (info := store.find_file(video)):
        return [replace(info, uri=f"{info.uri}{uri[len(video) :]}")]
    if store.is_directory(uri):
        return list_directory(uri, output)
    if not GLOB_CHARACTERS & set(uri) or not (infos := store.glob_files(uri)):
        return None
    if not (selected := select_files(uri, infos, output, is_glob=True)):
        raise SourceError(
            f"{count_nouns(len(infos), 'file matches', 'files match')} {store.redact(uri)!r}, but each is hidden or "
            "belongs to a run; name it exactly"
        )
    return selected


def _expand_all(uri: str, names: list[str], output: str | None) -> list[FileInfo]:
    """Return the files of all names. Raise SourceError if some do not exist."""
    with ThreadPoolExecutor(_SHARDS_AT_ONCE) as pool:
        found = list(pool.map(lambda name: _find_literally(store.resolve_dots(name) or name, output), names))
    if missing := [name for name, infos in zip(names, found, strict=True) if infos is None]:
        raise SourceError(
            f"{len(missing)} of {count_nouns(len(names), 'name')} in {store.redact(uri)!r} cannot be found, the first "
            f"is {store.redact(missing[0])}; correct the range, or use a glob such as DIRECTORY/*.tar for those that "
            "exist"
        )
    return [info for infos in found for info in infos or ()]


def _check_kind(info: FileInfo) -> str:
    """Return the kind of a file; "file" means one image or video. Raise SourceError if the kind is not supported."""
    name = store.strip_query(info.uri).lower()
    kind = detect_kind(info.uri)
    if kind != "file" and (not info.is_regular or escape_name(info.uri) != info.uri):
        raise SourceError(f"{store.redact(info.uri)!r} is not a regular file with a UTF-8 name; rename or replace it")
    if name.endswith(_MANY_ROWS):
        raise SourceError(
            f"{store.redact(info.uri)}: shards of this kind are not supported; convert them to {' '.join(KINDS)}"
        )
    return kind
