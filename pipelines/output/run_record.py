"""OUTPUT/run.json: the identity of a run, so that an OUTPUT resumes only the run that it holds."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import pyarrow as pa

from ovis_model.wording import count_nouns
from pipelines import __version__
from pipelines.config import RunConfig
from pipelines.errors import RunError
from pipelines.output.differences import Json, list_differences, list_type_differences
from pipelines.output.file_swap import PLACE, RECORD, commit_exchange, finish_exchange, is_ours, locate_record
from pipelines.output.lease import Lease
from pipelines.output.ledger import Ledger, Ranges, read_data_schema
from pipelines.output.manifest import KeptColumns, encode_manifest, read_columns
from pipelines.sources import KnownRows, Listing, RowListing, list_rows
from pipelines.storage import store

_VERSIONS_OF = ("ray", "torch", "tokenizers", "pillow", "pyarrow", "numpy")
_REPLACED = "replaced"
_MAX_SESSIONS = 20  # kept in run.json
EXTENDABLE = frozenset({"input", "limit"})  # the options that --extend may change

Lister = Callable[..., RowListing]
"""Lists the rows of a run, called as `list_rows`."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A run with a frozen manifest of `num_rows` rows; `output` is an absolute path or URI."""

    output: str
    num_rows: int
    record: Json

    @property
    def data_uri(self) -> str:
        """The directory of the output files."""
        return store.join(self.output, "data")

    def note_session(self, figures: Json) -> None:
        """Add the figures of a session that did rows to the record, which the next `update` writes."""
        self.record["sessions"] = [*self.record.get("sessions", []), {"ended_at": _format_now(), **figures}][
            -_MAX_SESSIONS:
        ]

    def update(self, **fields: Any) -> None:
        """Set fields of the record and write it."""
        self.record.update(fields, updated_at=_format_now())
        store.write_bytes(store.join(self.output, RECORD), _encode_record(self.record))


@dataclass(frozen=True)
class PreparedRun:
    """A run that is checked and listed, as a context manager; OUTPUT is unchanged until `start`.

    ledger: the rows that OUTPUT holds and the run keeps.
    listing: the rows to add to the manifest, from row number `first_row`; None to resume.
    replaced: paths in OUTPUT of the files that the run removes.
    """

    output: str
    record: Json
    ledger: Ledger
    listing: RowListing | None = None
    first_row: int = 0
    replaced: tuple[str, ...] = ()

    def __enter__(self) -> PreparedRun:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.listing is not None:
            self.listing.__exit__()

    @property
    def missing(self) -> Ranges:
        """The rows that OUTPUT does not hold."""
        return self.ledger.find_missing(self.record["num_rows"])

    def start(self, lease: Lease, **fields: Any) -> Run:
        """Write the record with these `fields`, and the manifest if it has new rows. Raise OSError or LeaseLost.

        The new files replace those of an earlier run together. An exception before that leaves OUTPUT as it was.
        """
        run = Run(self.output, self.record["num_rows"], {**self.record, **fields})
        if self.listing is None:
            if fields:
                run.update()
            return run
        with note_unchanged(), _refuse_unusable(self.output):
            commit_exchange(self.output, self._encode_files(self.listing, run.record), self.replaced, lease)
        finish_exchange(self.output)
        return run

    def _encode_files(self, listing: RowListing, record: Json) -> Iterator[tuple[str, bytes]]:
        if listing.num_rows:
            yield from encode_manifest(self.output, listing.read_tables(), self.first_row)
        yield RECORD, _encode_record(record)  # last: run.json means that the manifest is complete


def acquire_lease(output: str) -> Lease:
    """Return the lease to enter before reading or changing OUTPUT. Raise RunError if OUTPUT names no directory."""
    uri = store.make_absolute(output)
    if not uri.strip("/") or uri.rstrip("/").endswith(":"):
        raise RunError(f"{output!r} cannot be an OUTPUT; give a directory or a URI with a path")
    return Lease(uri)


def open_run(config: RunConfig, models: Json) -> Run:
    """Prepare and start a run in one step, without plans for its rows."""
    with acquire_lease(config.output) as lease, prepare_run(config, models) as prepared:
        return prepared.start(lease)


def prepare_run(config: RunConfig, models: Json, lister: Lister | None = None) -> PreparedRun:
    """Check that OUTPUT accepts this run, and list the input unless the run is resumed. Needs the lease.

    `models` identifies the model (id, revision, weights); `lister` is `list_rows` by default. Raise RunError if OUTPUT
    holds another run or foreign files or cannot be read, SourceError if the input cannot be listed.
    """
    output, lister = store.make_absolute(config.output), lister or list_rows
    identity = _identify_run(config, models)
    with _refuse_unusable(output):
        record = read_record(output)
        if config.overwrite or record is None:
            return _prepare_new(output, config, identity, lister, replaces=record)
        _check_same(output, record, identity, config, except_for=EXTENDABLE if config.extend else frozenset())
        finish_exchange(output)  # this run accepts the exchange that an earlier process committed
        ledger = _read_ledger(output, record, config)
        if config.extend:
            return _prepare_extension(output, config, identity, record, ledger, lister)
        return PreparedRun(output, record, ledger)


def check_output(config: RunConfig, models: Json) -> Ledger:
    """Return the rows that OUTPUT has and a run would keep. Change nothing. Raise RunError as `prepare_run` does."""
    output, identity = store.make_absolute(config.output), _identify_run(config, models)
    with _refuse_unusable(output):
        record = read_record(output)
        if config.overwrite or record is None:
            _check_foreign(output, identity["config"]["input"], record)
            return Ledger()
        _check_same(output, record, identity, config, except_for=EXTENDABLE if config.extend else frozenset())
        return _read_ledger(output, record, config)


def check_resumable(config: RunConfig, models: Json) -> None:
    """Raise RunError if OUTPUT holds a run that this one cannot resume, before anything of it starts."""
    output = store.make_absolute(config.output)
    with _refuse_unusable(output):
        record = read_record(output)
        if record is not None and not config.overwrite:
            except_for = EXTENDABLE if config.extend else frozenset[str]()
            _check_same(output, record, _identify_run(config, models), config, except_for)


def check_replaceable(output: str) -> None:
    """Raise RunError unless a run with --overwrite may write to OUTPUT: it is writable and holds no foreign files."""
    with acquire_lease(output), _refuse_unusable(output):
        _check_foreign(store.make_absolute(output), [], read_record(output))


@contextmanager
def note_unchanged() -> Iterator[None]:
    """Add to any exception the note that OUTPUT is unchanged, which replaces the advice to resume."""
    try:
        yield
    except BaseException as error:
        error.add_note("OUTPUT is unchanged; run the same command again")
        raise


def _identify_run(config: RunConfig, models: Json) -> Json:
    """Return what decides the rows of a run."""
    inputs = [store.make_absolute(uri) for uri in config.input]
    return {"config": {**config.fingerprint_fields(), "input": inputs}, "model": models}


@contextmanager
def _refuse_unusable(output: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot use {output} as OUTPUT: {error}") from error


def _prepare_new(
    output: str, config: RunConfig, identity: Json, lister: Lister, *, replaces: Json | None
) -> PreparedRun:
    _check_foreign(output, identity["config"]["input"], replaces)
    listing = lister(config, config.questionnaire, output=output)
    finish_exchange(output)
    record = {
        **identity,
        "fingerprint": _hash_identity(identity),
        "options": config.model_dump(mode="json"),
        **config.questionnaire.describe(),
        "num_rows": listing.num_rows,
        "num_keys_with_several_images": listing.groups.num_keys,
        "versions": {"ovis2-ray": __version__, **{name: _find_version(name) for name in _VERSIONS_OF}},
        "status": "running",
        "started_at": _format_now(),
    }
    return PreparedRun(output, record, Ledger(), listing, replaced=tuple(_list_ours(output)))


def _prepare_extension(
    output: str, config: RunConfig, identity: Json, record: Json, ledger: Ledger, lister: Lister
) -> PreparedRun:
    """List the rows that the run does not have yet, for a run.json that counts them."""
    num_rows: int = record["num_rows"]
    known = KnownRows(lambda: read_columns(output, num_rows, ["id", "uri", "images"]))
    with ExitStack() as unless_accepted:
        listing = unless_accepted.enter_context(lister(config, config.questionnaire, known, output=output))
        if isinstance(listing, Listing) and listing.num_rows:  # the rows of a list have its types
            listing.kept = check_kept_types(KeptColumns(output).schema, listing.kept)
        unless_accepted.pop_all()
    new, earlier = count_nouns(listing.num_rows, "new row"), count_nouns(num_rows, "row was", "rows were")
    logger.warning("%s in the input; %s listed before", new, earlier)
    listed = {"at": _format_now(), "first_row": num_rows, "input": record["config"]["input"]}
    extended = {
        **record,
        **identity,
        "fingerprint": _hash_identity(identity),
        "status": "running",
        "counts": None,
        "num_rows": num_rows + listing.num_rows,
        "num_keys_with_several_images": listing.groups.num_keys,
        "extended": [*record.get("extended", []), listed],
    }
    return PreparedRun(output, extended, ledger, listing, num_rows)


def check_dtype(output: str, record: Json, dtype: str) -> None:
    """Raise RunError if the finished rows were generated in another type than `dtype`."""
    if (recorded := record.get("settled_dtype", dtype)) != dtype:
        raise RunError(
            f"{output} holds rows generated in {recorded}, but this machine would use {dtype}; "
            f"resume on a machine with the same kind of device, or use a new OUTPUT with --dtype {recorded}"
        )


def check_kept_types(existing: pa.Schema, added: pa.Schema) -> pa.Schema:
    """Return the schema of the existing rows. Raise RunError if it differs from that of the new rows."""
    for old, new in zip(existing, added, strict=True):
        if new.type != old.type and not pa.types.is_null(new.type):
            raise RunError(
                f"the kept column {old.name} is {old.type} in the run, but {new.type} in the new rows; convert it to "
                f"{old.type} in the input, or use another OUTPUT"
            )
    return existing


def _read_ledger(output: str, record: Json, config: RunConfig) -> Ledger:
    """Return the rows in OUTPUT. Raise RunError if new ones would get columns of other types, as in another version."""
    data = store.join(output, "data")
    ledger = Ledger.read(data)
    is_complete = not config.extend and not ledger.find_missing(record["num_rows"])
    existing = pa.schema([]) if is_complete else read_data_schema(data)
    if differences := list_type_differences(existing, config.questionnaire.schema):
        raise RunError(
            f"{output} was begun by a version that writes other types: {'; '.join(differences)}. "
            "Resume it with that version, or use another OUTPUT"
        )
    return ledger


def _check_foreign(output: str, inputs: list[str], replaces: Json | None) -> None:
    """Raise RunError if OUTPUT holds the input or files that no run.json accounts for: they are never removed."""
    for name in ("data", "manifest", PLACE):
        place = store.join(output, name)
        if any(f"{uri}/".startswith(f"{place}/") for uri in inputs):
            raise RunError(f"the input is in {place}, which the run overwrites; use another OUTPUT")
        foreign = [info.uri for info in store.list_files(place) if replaces is None or not is_ours(info.uri)]
        if foreign and (name == "data" or not all(map(is_ours, foreign))):  # the others are left by a killed start
            raise RunError(f"{place} holds files that are not from a run, such as {foreign[0]}; use another OUTPUT")


def _list_ours(output: str) -> Iterator[str]:
    """Yield the paths in OUTPUT of the manifest and the data of an earlier run."""
    for name in ("data", "manifest"):
        for info in store.list_files(store.join(output, name)):
            if is_ours(info.uri):
                yield f"{name}/{info.uri.rsplit('/', 1)[-1]}"


def _check_same(
    output: str, record: Json, identity: Json, config: RunConfig, except_for: frozenset[str] = frozenset()
) -> None:
    """Raise RunError with each difference between the run in OUTPUT and this one."""
    if record.get("status") == _REPLACED:
        raise RunError(f"an --overwrite of {output} was interrupted; run it again with --overwrite")
    if lacking := {"config", "model", "num_rows"} - record.keys():
        raise RunError(f"run.json in {output} lacks {', '.join(sorted(lacking))}; use another OUTPUT, or --overwrite")
    differences = list_differences(record, identity, config.fingerprint_defaults())
    if differences.keys() - except_for:
        shown = (f"{name.replace('_', '-')} {values}" for name, values in differences.items() if name not in except_for)
        raise RunError(
            f"{output} holds a run with other options: {'; '.join(shown)}. "
            "Use another OUTPUT, the same options, or --overwrite"
            + (", or --extend to add rows" if differences.keys() <= EXTENDABLE else "")
        )


def read_record(output: str) -> Json | None:
    """Return the content of run.json, None if the file does not exist. Raise RunError if it is not a run record."""
    uri = locate_record(output)
    if store.find_file(uri) is None:
        return None
    try:
        record: Json = json.loads(store.read_bytes(uri))
    except json.JSONDecodeError as error:
        raise RunError(f"{uri} is not JSON ({error}); use another OUTPUT") from error
    if not isinstance(record, dict):
        raise RunError(f"{uri} is not the record of a run; use another OUTPUT")
    return record


def _encode_record(record: Json) -> bytes:
    # ASCII, so that a path that is not UTF-8 survives writing and reading.
    return json.dumps(record, indent=2).encode()


def _hash_identity(identity: Json) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _find_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None  # e.g. torch on a head node


def _format_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
