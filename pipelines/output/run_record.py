"""OUTPUT/run.json: the identity of a run, so that only the same run is resumed in the same OUTPUT."""

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
_LISTED = frozenset({"input", "limit"})  # what an extension may change

Json = dict[str, Any]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A run whose manifest is frozen. `output` is absolute; `num_rows` is that of the manifest."""

    output: str
    num_rows: int
    record: Json

    @property
    def data_uri(self) -> str:
        return store.join(self.output, "data")

    def update(self, **fields: Any) -> None:
        self.record.update(fields, updated_at=_now())
        _write_record(self.output, self.record)

    def record_dtype(self, dtype: str) -> None:
        """Record what `auto` resolved to. Raises RunError if the rows that are done were generated in another type."""
        settled = self.record.setdefault("settled_dtype", dtype)
        if settled != dtype:
            raise RunError(
                f"{self.output} holds rows generated in {settled}, this machine would go on in {dtype}; "
                f"give --dtype {settled} in a new OUTPUT, or go on where there is a device as before"
            )
        self.update()


def acquire_lease(output: str) -> Lease:
    """Return the lease to enter before anything in OUTPUT is looked at or changed. Raises RunError."""
    uri = store.make_absolute(output)
    if not uri.strip("/") or uri.rstrip("/").endswith(":"):
        raise RunError(f"{output!r} names no place for an OUTPUT; give a directory or a URI with a path")
    return Lease(uri)


def open_run(config: RunConfig, models: Json) -> Run:
    """Resume the run that OUTPUT holds, with more rows if it is to be extended, or list the input and start one.

    `models` identifies the model (id, revision, weights). Raises RunError if OUTPUT holds another run or something
    else or cannot be written, SourceError if the input cannot be listed; nothing has changed then.
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
            _check_same(output, record, identity, defaults, except_for=_LISTED)
            _extend(output, config, identity, record)
        _check_same(output, record, identity, defaults)
        finish_exchange(output)
    except OSError as error:
        raise RunError(f"cannot use {output} as OUTPUT: {error}") from error
    return Run(output, record["num_rows"], record)


def _start(output: str, config: RunConfig, identity: Json, *, replaces: Json | None) -> Json:
    _check_foreign(output, identity["config"]["input"], replaces)
    with list_rows(config, config.questionnaire) as listing:
        if replaces is not None:
            _write_record(output, {"status": _REPLACED})
        _remove_ours(output)
        write_manifest(output, listing.read_tables())
    # Last: a run.json says that the manifest is whole.
    record = {
        **identity,
        "fingerprint": _fingerprint(identity),
        "options": config.model_dump(mode="json"),
        **config.questionnaire.describe(),
        "num_rows": listing.num_rows,
        "versions": {"ovis2-ray": __version__, **{name: _version(name) for name in _VERSIONS_OF}},
        "status": "running",
        "started_at": _now(),
    }
    _write_record(output, record)
    return record


def _extend(output: str, config: RunConfig, identity: Json, record: Json) -> None:
    """Append the rows that the run does not have yet; a run.json that counts them comes last."""
    num_rows: int = record["num_rows"]
    known = KnownRows(lambda: read_columns(output, num_rows, ["id", "uri", "images"]))
    with list_rows(config, config.questionnaire, known) as listing:
        if listing.num_rows:
            listing.kept = _same_kept(KeptColumns(output).schema, listing.kept)
            write_manifest(output, listing.read_tables(), num_rows)
    logger.warning("%d rows of the input are new, %d rows were there", listing.num_rows, num_rows)
    listed = {"at": _now(), "first_row": num_rows, "input": record["config"]["input"]}
    record.update({**identity, "fingerprint": _fingerprint(identity)})
    record.update(
        status="running",
        counts=None,
        num_rows=num_rows + listing.num_rows,
        extended=[*record.get("extended", []), listed],
    )
    _write_record(output, record)


def _same_kept(there: pa.Schema, here: pa.Schema) -> pa.Schema:
    """All files of an output have one schema. Raises RunError."""
    for old, new in zip(there, here, strict=True):
        if new.type != old.type and not pa.types.is_null(new.type):
            raise RunError(
                f"the kept column {old.name} is {old.type} in the run and would be {new.type} in what is added; make "
                "it the same in the input, or use another OUTPUT"
            )
    return there


def _check_foreign(output: str, inputs: list[str], replaces: Json | None) -> None:
    """Only what a run.json vouches for is ever removed, and never the input."""
    for name in ("data", "manifest", PLACE):
        place = store.join(output, name)
        if any(f"{uri}/".startswith(f"{place}/") for uri in inputs):
            raise RunError(f"the input is in {place}, where the results go; use another OUTPUT")
        foreign = [info.uri for info in store.list_files(place) if replaces is None or not is_ours(info.uri)]
        if foreign and not (name == "manifest" and all(map(is_ours, foreign))):
            raise RunError(f"{place} holds files of something else, such as {foreign[0]}; use another OUTPUT")


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

    An option that the record lacks is one that the version that wrote it did not have: it counts as its default.
    """
    if record.get("status") == _REPLACED:
        raise RunError(f"an --overwrite of {output} was interrupted; give --overwrite again")
    there, here = _flatten(record, defaults), _flatten(identity, defaults)
    differences = [
        f"{name.replace('_', '-')} {there.get(name)!r} there, {here.get(name)!r} here"
        for name in sorted((there.keys() | here.keys()) - except_for)
        if there.get(name) != here.get(name)
    ]
    if differences:
        raise RunError(
            f"{output} holds a run with other options: {'; '.join(differences)}. "
            "Use another OUTPUT, the same options, or --overwrite"
            + (", or --extend to add rows" if {d.split()[0] for d in differences} <= _LISTED else "")
        )


def _flatten(record: Json, defaults: Json) -> Json:
    """Flatten a run record to {setting: value} for comparison; of a task without what it leaves open."""
    models = {f"model {name}": value for name, value in record["model"].items()}
    settings = {**defaults, **record["config"], **models}
    if tasks := settings.get("tasks"):
        settings["tasks"] = [task["name"] for task in tasks]
        settings |= {f"task {t['name']}": {k: v for k, v in t.items() if v is not None and k != "name"} for t in tasks}
    return settings


def read_record(output: str) -> Json | None:
    """What OUTPUT/run.json says, None if there is none. Raises RunError and OSError."""
    uri = store.join(output, "run.json")
    if store.find_file(uri) is None:
        return None
    try:
        record: Json = json.loads(store.read_bytes(uri))
    except json.JSONDecodeError as error:
        raise RunError(f"{uri} is not JSON ({error}); use another OUTPUT") from error
    return record


def _write_record(output: str, record: Json) -> None:
    # ASCII: a path whose bytes are no UTF-8 survives the way there and back.
    store.write_bytes(store.join(output, "run.json"), json.dumps(record, indent=2).encode())


def _fingerprint(identity: Json) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None  # a head node needs no torch


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
