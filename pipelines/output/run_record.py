"""OUTPUT/run.json: the identity of a run, so that an OUTPUT resumes only the run that it holds."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import pyarrow as pa

from pipelines import __version__
from pipelines.config import RunConfig
from pipelines.errors import RunError
from pipelines.output.file_swap import PLACE, finish_exchange, forget_exchange, is_ours
from pipelines.output.lease import Lease
from pipelines.output.manifest import KeptColumns, read_columns, write_manifest
from pipelines.sources import KnownRows, list_rows
from pipelines.storage import store

_VERSIONS_OF = ("ray", "torch", "tokenizers", "pillow", "pyarrow", "numpy")
_REPLACED = "replaced"
_EXTENDABLE = frozenset({"input", "limit"})  # the options that --extend may change

Json = dict[str, Any]

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

    def update(self, **fields: Any) -> None:
        """Set fields of the record and write it."""
        self.record.update(fields, updated_at=_format_now())
        _write_record(self.output, self.record)

    def record_dtype(self, dtype: str) -> None:
        """Record what `auto` resolved to. Raise RunError if the finished rows were generated in another type."""
        recorded = self.record.setdefault("settled_dtype", dtype)
        if recorded != dtype:
            raise RunError(
                f"{self.output} holds rows generated in {recorded}, but this machine would use {dtype}; "
                f"resume on a machine with the same kind of device, or use a new OUTPUT with --dtype {recorded}"
            )
        self.update()


def acquire_lease(output: str) -> Lease:
    """Return the lease to enter before reading or changing OUTPUT. Raise RunError if OUTPUT names no directory."""
    uri = store.make_absolute(output)
    if not uri.strip("/") or uri.rstrip("/").endswith(":"):
        raise RunError(f"{output!r} cannot be an OUTPUT; give a directory or a URI with a path")
    return Lease(uri)


def open_run(config: RunConfig, models: Json) -> Run:
    """Resume the run in OUTPUT, adding rows with --extend, or list the input and start a new run.

    `models` identifies the model (id, revision, weights). Raise RunError if OUTPUT holds another run or foreign files
    or cannot be written, SourceError if the input cannot be listed; OUTPUT is unchanged then.
    """
    output = store.make_absolute(config.output)
    identity = {
        "config": {**config.fingerprint_fields(), "input": [store.make_absolute(uri) for uri in config.input]},
        "model": models,
    }
    defaults = config.fingerprint_defaults()
    try:
        record = read_record(output)
        if config.overwrite or record is None:
            record = _start(output, config, identity, replaces=record)
        elif config.extend:
            _check_same(output, record, identity, defaults, except_for=_EXTENDABLE)
            _extend(output, config, identity, record)
        _check_same(output, record, identity, defaults)
        finish_exchange(output)
    except OSError as error:
        raise RunError(f"cannot use {output} as OUTPUT: {error}") from error
    return Run(output, record["num_rows"], record)


def _start(output: str, config: RunConfig, identity: Json, *, replaces: Json | None) -> Json:
    _check_foreign(output, identity["config"]["input"], replaces)
    with list_rows(config, config.questionnaire, output=output) as listing:
        if replaces is not None:
            _write_record(output, {"status": _REPLACED})
        _remove_ours(output)
        write_manifest(output, listing.read_tables())
    # Last: run.json means that the manifest is complete.
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
    _write_record(output, record)
    return record


def _extend(output: str, config: RunConfig, identity: Json, record: Json) -> None:
    """Append the rows that the run does not have yet, then write a run.json that counts them."""
    num_rows: int = record["num_rows"]
    known = KnownRows(lambda: read_columns(output, num_rows, ["id", "uri", "images"]))
    with list_rows(config, config.questionnaire, known, output=output) as listing:
        if listing.num_rows:
            listing.kept = _check_kept_types(KeptColumns(output).schema, listing.kept)
            write_manifest(output, listing.read_tables(), num_rows)
    logger.warning("%d rows of the input are new, %d rows were listed before", listing.num_rows, num_rows)
    listed = {"at": _format_now(), "first_row": num_rows, "input": record["config"]["input"]}
    record.update({**identity, "fingerprint": _hash_identity(identity)})
    record.update(
        status="running",
        counts=None,
        num_rows=num_rows + listing.num_rows,
        num_keys_with_several_images=listing.groups.num_keys,
        extended=[*record.get("extended", []), listed],
    )
    _write_record(output, record)


def _check_kept_types(existing: pa.Schema, added: pa.Schema) -> pa.Schema:
    """Return the schema of the existing rows. Raise RunError if it differs from that of the new rows."""
    for old, new in zip(existing, added, strict=True):
        if new.type != old.type and not pa.types.is_null(new.type):
            raise RunError(
                f"the kept column {old.name} is {old.type} in the run, but {new.type} in the new rows; convert it to "
                f"{old.type} in the input, or use another OUTPUT"
            )
    return existing


def _check_foreign(output: str, inputs: list[str], replaces: Json | None) -> None:
    """Raise RunError if OUTPUT holds the input or files that no run.json accounts for: they are never removed."""
    for name in ("data", "manifest", PLACE):
        place = store.join(output, name)
        if any(f"{uri}/".startswith(f"{place}/") for uri in inputs):
            raise RunError(f"the input is in {place}, which the run overwrites; use another OUTPUT")
        foreign = [info.uri for info in store.list_files(place) if replaces is None or not is_ours(info.uri)]
        if foreign and not (name == "manifest" and all(map(is_ours, foreign))):
            raise RunError(f"{place} holds files that are not from a run, such as {foreign[0]}; use another OUTPUT")


def _remove_ours(output: str) -> None:
    forget_exchange(output)
    for name in ("data", "manifest"):
        for info in store.list_files(store.join(output, name)):
            if is_ours(info.uri):
                store.remove(info.uri)


def _check_same(
    output: str, record: Json, identity: Json, defaults: Json, except_for: frozenset[str] = frozenset()
) -> None:
    """Raise RunError with each difference between the run in OUTPUT and this one.

    An option that the record lacks was unknown to the version that wrote it: it counts as its default.
    """
    if record.get("status") == _REPLACED:
        raise RunError(f"an --overwrite of {output} was interrupted; run it again with --overwrite")
    recorded, current = _flatten(record, defaults), _flatten(identity, defaults)
    differences = [
        f"{name.replace('_', '-')} {recorded.get(name)!r} there, {current.get(name)!r} here"
        for name in sorted((recorded.keys() | current.keys()) - except_for)
        if recorded.get(name) != current.get(name)
    ]
    if differences:
        raise RunError(
            f"{output} holds a run with other options: {'; '.join(differences)}. "
            "Use another OUTPUT, the same options, or --overwrite"
            + (", or --extend to add rows" if {d.split()[0] for d in differences} <= _EXTENDABLE else "")
        )


def _flatten(record: Json, defaults: Json) -> Json:
    """Flatten a run record to {setting: value} for comparison, without the settings that a task leaves open."""
    models = {f"model {name}": value for name, value in record["model"].items()}
    settings = {**defaults, **record["config"], **models}
    if tasks := settings.get("tasks"):
        settings["tasks"] = [task["name"] for task in tasks]
        settings |= {f"task {t['name']}": {k: v for k, v in t.items() if v is not None and k != "name"} for t in tasks}
    return settings


def read_record(output: str) -> Json | None:
    """Return the content of OUTPUT/run.json, None if the file does not exist. Raise RunError if it is not JSON."""
    uri = store.join(output, "run.json")
    if store.find_file(uri) is None:
        return None
    try:
        record: Json = json.loads(store.read_bytes(uri))
    except json.JSONDecodeError as error:
        raise RunError(f"{uri} is not JSON ({error}); use another OUTPUT") from error
    return record


def _write_record(output: str, record: Json) -> None:
    # ASCII, so that a path that is not UTF-8 survives writing and reading.
    store.write_bytes(store.join(output, "run.json"), json.dumps(record, indent=2).encode())


def _hash_identity(identity: Json) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _find_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None  # e.g. torch on a head node


def _format_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
