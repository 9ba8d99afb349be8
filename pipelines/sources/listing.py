"""List INPUT once into a temporary file: the rows of the manifest, while memory holds hashes only."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack

import pyarrow as pa

from pipelines import schema
from pipelines.config import SourceOptions
from pipelines.errors import SourceError
from pipelines.sources.directories import IMAGE_SUFFIXES
from pipelines.sources.ids import Changes, IdIndex, KnownRows, OnDuplicate
from pipelines.sources.prompts import PromptBuilder
from pipelines.sources.rows import Chunk
from pipelines.sources.shards import list_chunks
from pipelines.sources.videos import apply_windows
from pipelines.storage import store
from pipelines.tasks.questionnaire import Questionnaire


def list_rows(options: SourceOptions, questionnaire: Questionnaire, known: KnownRows | None = None) -> Listing:
    """List the rows of all inputs, without those that are `known`; the caller closes the listing.

    Raises SourceError if there are none at all, if a column is unknown or, unless --on-duplicate-id says otherwise, if
    two share an id.
    """
    store.allow_private_addresses(options.allow_private_addresses)
    with ExitStack() as unless_listed:
        listing = unless_listed.enter_context(Listing(options.keep_columns))
        try:
            _list_into(listing, options, questionnaire)
            listing.resolve_duplicates(options.on_duplicate_id, known or KnownRows())
        except OSError as error:
            raise SourceError(f"cannot list {_shown(options)}: {error}") from error
        unless_listed.pop_all()
    return listing


def _shown(options: SourceOptions) -> str:
    return ", ".join(map(store.redact, options.input))


def _list_into(listing: Listing, options: SourceOptions, questionnaire: Questionnaire) -> None:
    prompts = PromptBuilder(options, questionnaire)
    rows = _limited(list_chunks(options.input, prompts.columns), options.limit)  # each is one window or more
    for chunk in _limited(apply_windows(rows, options.window_s), options.limit):
        listing.add(prompts.to_table(chunk), chunk.kept)
    if not listing.num_rows:
        raise SourceError(
            f"no rows in {_shown(options)}: looked for {' '.join(sorted(IMAGE_SUFFIXES))}; "
            "shards (.tar .parquet .jsonl) in a directory are given as a glob such as DIRECTORY/*.tar"
        )
    prompts.finish()
    listing.check_kept()


def _limited(chunks: Iterable[Chunk], limit: int | None) -> Iterator[Chunk]:
    left = limit
    for chunk in chunks:
        yield chunk if left is None else chunk.take(left)
        if left is not None:
            left -= len(chunk.rows)
            if left <= 0:
                return


class Listing:
    """All rows, in order. `kept` has the type of each kept column over the whole input. To be closed."""

    def __init__(self, keep: Sequence[str]) -> None:
        self.num_rows = 0
        self.kept = pa.schema([pa.field(name, pa.null()) for name in keep])
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the listing)
        self._lengths: list[int] = []
        self._ids = IdIndex()
        self._changes = Changes()

    def __enter__(self) -> Listing:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def add(self, table: pa.Table, kept: pa.Table | None) -> None:
        """Add rows of schema MANIFEST without `row`, and their kept columns."""
        if kept is not None:
            table = self._with_kept(table, kept)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        self._lengths.append(self._file.write(sink.getvalue()))
        self._ids.add(table)
        self.num_rows += len(table)

    def _with_kept(self, table: pa.Table, kept: pa.Table) -> pa.Table:
        types = pa.schema([pa.field(field.name, field.type) for field in kept.schema])
        try:
            self.kept = pa.unify_schemas([self.kept, types], promote_options="permissive")
        except pa.ArrowException as error:
            id_ = store.redact(table.column("id")[0].as_py())
            raise SourceError(
                f"a kept column has another type from {id_} on than before ({error}); make it one type or leave it "
                "out of --keep-columns"
            ) from error
        return pa.table([*table.columns, *kept.columns], [*table.column_names, *(f"kept {n}" for n in types.names)])

    def read_tables(self) -> Iterator[pa.Table]:
        """Yield tables of schema `schema.manifest(kept)` without `row`."""
        whole = schema.manifest(self.kept).remove(0)
        for table in self._changes.apply(self._stored()):
            columns = [table.column(name) for name in schema.MANIFEST.names[1:]]
            if len(self.kept):
                columns.append(self._kept_of(table))
            yield pa.table(columns, schema=whole)

    def check_kept(self) -> None:
        """Raise SourceError if a kept column does not fit the type that it has over the whole input."""
        if len(self.kept):
            for table in self._stored():
                self._kept_of(table)

    def resolve_duplicates(self, on_duplicate: OnDuplicate, known: KnownRows) -> None:
        """Make every id unique and leave out the rows that are known. Raises SourceError."""
        self._changes = self._ids.resolve_duplicates(self._stored, on_duplicate, known)
        self.num_rows -= len(self._changes.left_out)

    def _kept_of(self, table: pa.Table) -> pa.Array:
        try:
            return schema.pack_struct([table.column(f"kept {f.name}") for f in self.kept], self.kept)
        except pa.ArrowException as error:
            raise SourceError(
                f"a kept column does not fit one type over the whole input ({error}); its columns: "
                f"{', '.join(map(str, self.kept))}. Leave it out of --keep-columns or make it one type"
            ) from error

    def _stored(self) -> Iterator[pa.Table]:
        self._file.seek(0)
        for length in self._lengths:
            yield pa.ipc.open_stream(self._file.read(length)).read_all()
