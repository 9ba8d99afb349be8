"""List INPUT once into a temporary file of manifest rows; memory holds only hashes of their ids."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol, Self

import pyarrow as pa

from ovis_model.wording import count_nouns
from pipelines import schema
from pipelines.config import SourceOptions
from pipelines.errors import SourceError
from pipelines.media.reference import TarRef
from pipelines.sources.ids import Changes, IdIndex, KnownRows, OnDuplicate
from pipelines.sources.kept_columns import convert_column, find_stored_type
from pipelines.sources.kinds import IMAGE_SUFFIXES
from pipelines.sources.prompts import PromptBuilder
from pipelines.sources.rows import Chunk
from pipelines.sources.shards import list_chunks
from pipelines.sources.videos import parse_windows
from pipelines.storage import store
from pipelines.tasks.questionnaire import Questionnaire

logger = logging.getLogger(__name__)


def list_rows(
    options: SourceOptions, questionnaire: Questionnaire, known: KnownRows | None = None, *, output: str | None = None
) -> Listing:
    """List the rows of all inputs except those that are `known`; the caller closes the listing.

    Files of `output`, the OUTPUT of this run, are not listed.

    Raise SourceError if the inputs have no rows, if a column does not exist, or if two rows share an id and
    --on-duplicate-id is "error".
    """
    store.allow_private_addresses(options.allow_private_addresses)
    with ExitStack() as unless_listed:
        listing = unless_listed.enter_context(Listing(options.keep_columns))
        try:
            _list_into(listing, options, questionnaire, output)
            listing.resolve_duplicates(options.on_duplicate_id, known or KnownRows())
        except OSError as error:
            raise SourceError(f"cannot list {_name_inputs(options)}: {error}{_advise(error, options)}") from error
        unless_listed.pop_all()
    return listing


def _name_inputs(options: SourceOptions) -> str:
    return ", ".join(map(store.redact, options.input))


def _advise(error: OSError, options: SourceOptions) -> str:
    """Return the remedy for a web server that refuses access; messages of other stores include theirs."""
    is_refused = isinstance(error, PermissionError) and any(uri.startswith("http") for uri in options.input)
    return "; give the URL with its signature or with user:password@ before the host" if is_refused else ""


def _list_into(listing: Listing, options: SourceOptions, questionnaire: Questionnaire, output: str | None) -> None:
    prompts = PromptBuilder(options, questionnaire)
    groups = listing.groups
    rows = parse_windows(list_chunks(options, prompts.columns, output))
    num_unreadable, error = 0, ""
    for chunk in _limit_rows(rows, options.limit):
        listing.add(prompts.to_table(chunk), chunk.kept)
        if chunk.unreadable:
            num_unreadable, error = num_unreadable + len(chunk), error or chunk.rows[0].error
        groups.count(chunk)
    if not listing.num_rows:
        raise SourceError(
            f"no rows in {_name_inputs(options)}: looked for {' '.join(sorted(IMAGE_SUFFIXES))}; "
            "for shards (.tar .parquet .jsonl) in a directory use a glob such as DIRECTORY/*.tar"
        )
    _check_readable(listing.num_rows, num_unreadable, error)
    prompts.finish()
    groups.log()
    listing.check_kept()


def _check_readable(num_rows: int, num_unreadable: int, error: str) -> None:
    """Log how many shards cannot be read. Raise SourceError, with the first `error`, if no other row was listed."""
    if num_unreadable == num_rows:
        raise SourceError(error if num_rows == 1 else f"none of the {num_rows} shards can be read. The first: {error}")
    if num_unreadable:
        unreadable = count_nouns(num_unreadable, "unreadable shard is an error row", "unreadable shards are error rows")
        logger.warning("%s. The first: %s", unreadable, error)


def _limit_rows(chunks: Iterable[Chunk], limit: int | None) -> Iterator[Chunk]:
    left = limit
    for chunk in chunks:
        yield chunk if left is None else chunk.take(left)
        if left is not None:
            left -= len(chunk)
            if left <= 0:
                return


@dataclass
class KeyGroups:
    """Counts the keys in tars with several images: views of one sample, or names that merely contain dots."""

    num_keys: int = 0
    num_images: int = 0

    def count(self, chunk: Chunk) -> None:
        """Add the rows of a chunk."""
        for row in chunk.rows:
            if len(row.images) > 1 and isinstance(row.images[0], TarRef):
                self.num_keys += 1
                self.num_images += len(row.images)

    def log(self) -> None:
        """Log the counts, with the option for names that contain dots."""
        if self.num_keys:
            logger.warning(
                "%s in tars with several images each, %d in total: a key ends at the first dot of the name. "
                "For one row per image use --group-by file",
                count_nouns(self.num_keys, "key"),
                self.num_images,
            )


class RowListing(Protocol):
    """What a run needs of its rows: a context manager with tables of schema `schema.build_manifest_schema(kept)`."""

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        ...

    @property
    def num_skipped(self) -> int:
        """The number of rows that were left out, because their id occurs before or is known."""
        ...

    @property
    def kept(self) -> pa.Schema:
        """The names and types of the kept columns."""
        ...

    @property
    def groups(self) -> KeyGroups:
        """The keys in tars with several images."""
        ...

    def read_tables(self) -> Iterator[pa.Table]:
        """Yield the rows without their numbers."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


class Listing:
    """All rows, in order, as a context manager. `kept` has the type of each kept column over the whole input."""

    def __init__(self, keep: Sequence[str]) -> None:
        self.num_rows = 0
        self.groups = KeyGroups()
        self.kept = pa.schema([pa.field(name, pa.null()) for name in keep])
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the listing)
        self._lengths: list[int] = []
        self._ids = IdIndex()
        self._changes = Changes()

    @property
    def num_skipped(self) -> int:
        """The number of rows that were left out, because their id occurs before or is known."""
        return len(self._changes.skipped)

    def __enter__(self) -> Listing:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def add(self, table: pa.Table, kept: pa.Table | None) -> None:
        """Append rows of schema MANIFEST without `row`, with their kept columns."""
        if kept is not None:
            table = self._append_kept(table, kept)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        self._lengths.append(self._file.write(sink.getvalue()))
        self._ids.add(table)
        self.num_rows += len(table)

    def _append_kept(self, table: pa.Table, kept: pa.Table) -> pa.Table:
        types = pa.schema([pa.field(field.name, field.type) for field in kept.schema])
        try:
            self.kept = pa.unify_schemas([self.kept, types], promote_options="permissive")
        except pa.ArrowException as error:
            id_ = store.redact(table.column("id")[0].as_py())
            raise SourceError(
                f"a kept column changes its type at {id_} ({error}); convert it to one type or remove it from "
                "--keep-columns"
            ) from error
        return pa.table([*table.columns, *kept.columns], [*table.column_names, *(f"kept {n}" for n in types.names)])

    def read_tables(self) -> Iterator[pa.Table]:
        """Yield tables of schema `schema.build_manifest_schema(kept)` without `row`."""
        full_schema = schema.build_manifest_schema(self.kept).remove(0)
        for table in self._changes.apply(self._read_stored()):
            columns = [table.column(name) for name in schema.MANIFEST.names[1:]]
            if len(self.kept):
                columns.append(self._build_kept(table))
            yield pa.table(columns, schema=full_schema)

    def check_kept(self) -> None:
        """Choose the types to store. Raise SourceError if values of a kept column do not fit its type."""
        self.kept = pa.schema([(field.name, find_stored_type(field.type)) for field in self.kept])
        if len(self.kept):
            for table in self._read_stored():
                self._build_kept(table)

    def resolve_duplicates(self, on_duplicate: OnDuplicate, known: KnownRows) -> None:
        """Make every id unique and skip known rows. Raise SourceError if ids repeat and `on_duplicate` is "error"."""
        self._changes = self._ids.resolve_duplicates(self._read_stored, on_duplicate, known)
        self.num_rows -= len(self._changes.skipped)

    def _build_kept(self, table: pa.Table) -> pa.Array:
        try:
            columns = [convert_column(f.name, table.column(f"kept {f.name}"), f.type) for f in self.kept]
            return schema.pack_struct(columns, self.kept)
        except pa.ArrowException as error:
            raise SourceError(
                f"a kept column does not fit one type over the whole input ({error}); its columns: "
                f"{', '.join(map(str, self.kept))}. Convert it to one type or remove it from --keep-columns"
            ) from error

    def _read_stored(self) -> Iterator[pa.Table]:
        self._file.seek(0)
        for length in self._lengths:
            yield pa.ipc.open_stream(self._file.read(length)).read_all()
