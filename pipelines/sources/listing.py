"""INPUT -> the rows of the manifest, listed once into a temporary file: the driver's memory holds hashes only."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby, islice

import numpy as np
import pyarrow as pa

from pipelines import schema, store
from pipelines.config import CaptionConfig
from pipelines.sources.files import IMAGE_SUFFIXES, images_below, list_files
from pipelines.sources.jsonl import list_jsonl
from pipelines.sources.parquet import list_parquet
from pipelines.sources.prompts import NoValue, Template
from pipelines.sources.rows import Chunk, Columns, Row, SourceError
from pipelines.sources.tar import list_tar
from pipelines.store import FileInfo

_KINDS = {
    ".tar": "tar",
    ".tar.gz": "tgz",
    ".tgz": "tgz",
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
}
_MANY_ROWS = (".zip", ".7z", ".bz2", ".xz", ".zst", ".csv", ".tsv", ".json", ".ndjson", ".arrow", ".feather", ".lance")
_GLOB_CHARACTERS = frozenset("*?[")
_SHARDS_AT_ONCE, _CHUNKS_AHEAD = 16, 2

Begun = tuple[list[Chunk], Iterator[Chunk]]
"""The first chunks of a shard, and the others."""

logger = logging.getLogger(__name__)


class Listing:
    """All rows, in order. `kept` has the type of each kept column over the whole input. To be closed."""

    def __init__(self, keep: Sequence[str]) -> None:
        self.num_rows = 0
        self.kept = pa.schema([pa.field(name, pa.null()) for name in keep])
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the listing)
        self._lengths: list[int] = []
        self._hashes = array("Q")

    def __enter__(self) -> Listing:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def add(self, table: pa.Table, kept: pa.Table | None) -> None:
        """Rows of schema MANIFEST without `row`, and their kept columns."""
        if kept is not None:
            table = self._with_kept(table, kept)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        self._lengths.append(self._file.write(sink.getvalue()))
        self._hashes.extend(map(_hash, table.column("id").to_pylist()))
        self.num_rows += len(table)

    def _with_kept(self, table: pa.Table, kept: pa.Table) -> pa.Table:
        types = pa.schema([pa.field(field.name, field.type) for field in kept.schema])
        try:
            self.kept = pa.unify_schemas([self.kept, types], promote_options="permissive")
        except pa.ArrowException as error:
            id_ = table.column("id")[0]
            raise SourceError(
                f"a kept column has another type from {id_} on than before ({error}); make it one type or leave it "
                "out of --keep-columns"
            ) from error
        return pa.table([*table.columns, *kept.columns], [*table.column_names, *(f"kept {n}" for n in types.names)])

    def tables(self) -> Iterator[pa.Table]:
        """Schema `schema.manifest(kept)` without `row`."""
        whole = schema.manifest(self.kept).remove(0)
        for table in self._stored():
            columns = [table.column(name) for name in schema.MANIFEST.names[1:]]
            if len(self.kept):
                columns.append(schema.struct_of([table.column(f"kept {f.name}") for f in self.kept], self.kept))
            yield pa.table(columns, schema=whole)

    def _stored(self) -> Iterator[pa.Table]:
        self._file.seek(0)
        for length in self._lengths:
            yield pa.ipc.open_stream(self._file.read(length)).read_all()

    def check_unique(self) -> None:
        """Raises SourceError naming ids that several rows share."""
        hashes = np.sort(np.frombuffer(self._hashes, np.uint64))
        repeated = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
        if not repeated:
            return
        ids = (id_ for table in self._stored() for id_ in table.column("id").to_pylist())
        counts = Counter(id_ for id_ in ids if _hash(id_) in repeated)
        if num_extra := counts.total() - len(counts):
            shown = ", ".join(f"{id_} ({n} times)" for id_, n in counts.most_common(10) if n > 1)
            raise SourceError(
                f"{num_extra} rows repeat an id; list each file once, or choose an --id-column whose values are "
                f"unique. The most frequent: {shown}"
            )


def list_rows(config: CaptionConfig) -> Listing:
    """The rows of all inputs. Raises SourceError if there are none, if two share an id or if a column is unknown."""
    listing = Listing(config.keep_columns)
    try:
        _list_into(listing, config)
    except OSError as error:
        listing.__exit__()
        raise SourceError(f"cannot list {', '.join(config.input)}: {error}") from error
    except BaseException:
        listing.__exit__()
        raise
    return listing


def _list_into(listing: Listing, config: CaptionConfig) -> None:
    asker = _Asker(config)
    for chunk in _limited(_chunks(config.input, asker.columns), config.limit):
        listing.add(asker.table(chunk), chunk.kept)
    if not listing.num_rows:
        raise SourceError(
            f"no images in {', '.join(config.input)}: looked for {' '.join(sorted(IMAGE_SUFFIXES))}; "
            "shards (.tar .parquet .jsonl) in a directory are given as a glob such as DIRECTORY/*.tar"
        )
    asker.finish()
    listing.check_unique()


class _Asker:
    """Gives each row its question, and notes what the columns turn out to be."""

    def __init__(self, config: CaptionConfig) -> None:
        self._config, self._template = config, Template(config.prompt)
        self.columns = Columns(
            id=config.id_column,
            image=config.image_column,
            prompt=config.prompt_column,
            keep=config.keep_columns,
            in_prompt=self._template.names,
        )
        self._names: set[str] = set()
        self._num_without_columns = self._num_text_only = 0

    def table(self, chunk: Chunk) -> pa.Table:
        """Schema MANIFEST without `row`."""
        if chunk.names:
            self._template.check()
            self._names |= chunk.names
        else:
            self._num_without_columns += len(chunk.rows)
        self._num_text_only += sum(not row.images and not row.error for row in chunk.rows)
        asked = [self._ask(row, has_columns=bool(chunk.names)) for row in chunk.rows]
        columns = {
            "id": [row.id for row in chunk.rows],
            "uri": [row.uri for row in chunk.rows],
            "images": [[image._asdict() for image in row.images] for row in chunk.rows],
            "prompt": [prompt for prompt, _ in asked],
            "has_own_prompt": [row.prompt is not None for row in chunk.rows],
            "error": [error for _, error in asked],
        }
        return pa.table(columns, schema=schema.MANIFEST.remove(0))

    def _ask(self, row: Row, *, has_columns: bool) -> tuple[str, str]:
        """The question and why it cannot be asked, if so."""
        error, text = row.error, row.prompt or self._config.prompt
        if row.prompt is None and has_columns and not error:
            try:
                text = self._template.fill(row.values)
            except NoValue as name:
                error = f"--prompt names the column {name.args[0]!r}, which is empty in this row"
        return self._config.question(text), error

    def finish(self) -> None:
        """Raises SourceError for columns that no row has."""
        if self._num_text_only:
            logger.warning("%d rows have no image and are asked as text", self._num_text_only)
        named = self.columns.wanted.union(filter(None, [self.columns.image]))
        wanted = named if self._names else named - self.columns.in_prompt
        if unknown := sorted(wanted - self._names):
            known = ", ".join(sorted(self._names)) or "none: files and tars without .json or .txt have no columns"
            raise SourceError(
                f"the input has no column {', '.join(unknown)}; its columns: {known} "
                "(in --prompt, {{ and }} stand for braces)"
            )
        if self._names and self._num_without_columns and self.columns.in_prompt:
            raise SourceError(
                f"--prompt names columns, and {self._num_without_columns} rows come from inputs that have none; "
                "caption those in a run of their own"
            )


def _limited(chunks: Iterable[Chunk], limit: int | None) -> Iterator[Chunk]:
    left = limit
    for chunk in chunks:
        yield chunk if left is None else chunk.first(left)
        if left is not None:
            left -= len(chunk.rows)
            if left <= 0:
                return


def _chunks(inputs: Iterable[str], columns: Columns) -> Iterator[Chunk]:
    infos = (info for uri in inputs for info in _expand(uri))
    for are_files, group in groupby(infos, key=lambda info: _kind(info) == "file"):
        list_group = list_files if are_files else _in_parallel
        yield from list_group(group, columns)


def _in_parallel(shards: Iterable[FileInfo], columns: Columns) -> Iterator[Chunk]:
    """Chunks in the order of the shards. The next shards are begun meanwhile: listing is waiting for their headers."""
    ahead: deque[Future[Begun]] = deque()
    pool = ThreadPoolExecutor(_SHARDS_AT_ONCE, thread_name_prefix="list")
    try:
        for shard in shards:
            ahead.append(pool.submit(_begin, _list_shard(shard, columns)))
            if len(ahead) > _SHARDS_AT_ONCE:
                yield from _all_of(ahead.popleft().result())
        while ahead:
            yield from _all_of(ahead.popleft().result())
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(shard: Iterator[Chunk]) -> Begun:
    return list(islice(shard, _CHUNKS_AHEAD)), shard


def _all_of(begun: Begun) -> Iterator[Chunk]:
    first, others = begun
    yield from first
    yield from others


def _list_shard(shard: FileInfo, columns: Columns) -> Iterator[Chunk]:
    match _kind(shard):
        case "parquet":
            return list_parquet(shard, columns)
        case "jsonl":
            return list_jsonl(shard, columns)
        case kind:
            return list_tar(shard, "tar" if kind == "tar" else "tgz", columns)


def _expand(uri: str) -> Iterable[FileInfo]:
    if info := store.find_file(uri):
        return [info]
    if store.is_directory(uri):
        return images_below(uri)
    if _GLOB_CHARACTERS & set(uri):
        return store.glob_files(uri)
    raise SourceError(f"input {uri!r} does not exist")


def _kind(info: FileInfo) -> str:
    """A file that is named is taken as an image whatever it is called, unless it holds many rows."""
    name = info.uri.lower()
    kind = next((kind for suffix, kind in _KINDS.items() if name.endswith(suffix)), "file")
    if kind != "file" and (not info.is_regular or not _is_unicode(info.uri)):
        raise SourceError(f"{info.uri!r} is not a regular file with a name in UTF-8; rename or replace it")
    if name.endswith(_MANY_ROWS):
        raise SourceError(f"{info.uri}: shards of this kind are not read; make them {' '.join(_KINDS)}")
    return kind


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _hash(id_: str) -> int:
    return int.from_bytes(hashlib.blake2b(id_.encode(), digest_size=8).digest())
