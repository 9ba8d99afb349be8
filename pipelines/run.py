"""OUTPUT/run.json: what a run is, so that only the same run goes on in the same OUTPUT."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from pipelines import store
from pipelines.config import CaptionConfig
from pipelines.manifest import write_manifest
from pipelines.sources import list_rows

_VERSIONS_OF = ("ovis2-ray", "ray", "torch", "tokenizers", "pillow", "pyarrow", "numpy")

Json = dict[str, Any]


class RunError(ValueError):
    """OUTPUT cannot take this run, and what to do about it."""


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
        _write_record(self.output, {**self.record, **fields, "updated_at": _now()})


def open_run(config: CaptionConfig, model: Json) -> Run:
    """Go on with the run that OUTPUT holds, or list the input and start one.

    `model` says which model it is (id, revision, weights). Raises RunError if OUTPUT holds another run or something
    else, SourceError if the input cannot be listed.
    """
    output = store.absolute_uri(config.output)
    what = {**config.fingerprint_fields(), "input": [store.absolute_uri(uri) for uri in config.input]}
    if config.overwrite:
        _remove_run(output)
    record = _read_record(output)
    if record is None:
        record = _start(output, config, {"config": what, "model": model})
    _check_same(output, record, {"config": what, "model": model})
    return Run(output, record["num_rows"], record)


def _start(output: str, config: CaptionConfig, what: Json) -> Json:
    if next(store.list_files(store.join(output, "data")), None):
        raise RunError(f"{output}/data holds files but {output} has no run.json; use another OUTPUT or --overwrite")
    with list_rows(config) as listing:
        store.remove(store.join(output, "manifest"))  # of a start that was killed
        write_manifest(output, listing.tables())
    # Last: a run.json says that the manifest is whole.
    record = {
        **what,
        "fingerprint": hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16],
        "num_rows": listing.num_rows,
        "versions": {name: version(name) for name in _VERSIONS_OF},
        "status": "running",
        "started_at": _now(),
    }
    _write_record(output, record)
    return record


def _check_same(output: str, record: Json, what: Json) -> None:
    """Raises RunError with each difference between the run there and this one."""
    there, here = ({**r["config"], **{f"model {k}": v for k, v in r["model"].items()}} for r in (record, what))
    differences = [
        f"{name.replace('_', '-')} {there.get(name)!r} there, {here.get(name)!r} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    if differences:
        raise RunError(
            f"{output} holds a run with other options: {'; '.join(differences)}. "
            "Use another OUTPUT, the same options, or --overwrite"
        )


def _remove_run(output: str) -> None:
    for name in ("run.json", "data", "manifest"):
        store.remove(store.join(output, name))


def _read_record(output: str) -> Json | None:
    uri = store.join(output, "run.json")
    if store.find_file(uri) is None:
        return None
    try:
        record: Json = json.loads(store.read_bytes(uri))
    except json.JSONDecodeError as error:
        raise RunError(f"{uri} is not JSON ({error}); use another OUTPUT or --overwrite") from error
    return record


def _write_record(output: str, record: Json) -> None:
    store.write_bytes(store.join(output, "run.json"), json.dumps(record, indent=2, ensure_ascii=False).encode())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
