"""The parts of a run that several drivers write: each has its own OUTPUT below one directory, read together.

OUTPUT/list/             the rows, listed once: list.json and manifest/
OUTPUT/parts.json        the number of parts
OUTPUT/part-00002-of-00004/   the OUTPUT of a driver, with rows num_rows * 1 // 4 to num_rows * 2 // 4
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ovis_model.wording import count_nouns
from pipelines import schema
from pipelines.config import RunConfig
from pipelines.errors import LeaseError, LeaseLost, RunError
from pipelines.output.lease import Lease
from pipelines.output.ledger import RowRange
from pipelines.output.manifest import KeptColumns, encode_manifest, read_range
from pipelines.output.run_record import acquire_lease, read_record
from pipelines.sources import Listing, list_rows
from pipelines.sources.listing import KeyGroups
from pipelines.storage import store

Json = dict[str, Any]

_LIST, _LIST_RECORD, _PARTS = "list", "list/list.json", "parts.json"
_LOOK_S = 2.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OutputPart:
    """The OUTPUT of one driver; its row 0 is row `first_row` of the whole list."""

    output: str
    first_row: int = 0


@dataclass(frozen=True)
class RowList:
    """A list of rows in `place`, made once for all parts; `record` is list.json."""

    place: str
    record: Json

    @property
    def num_rows(self) -> int:
        """The number of rows of all parts."""
        return int(self.record["num_rows"])


@dataclass(frozen=True)
class ListedRange:
    """The rows `rows` of a list, as the listing of a run."""

    source: RowList
    rows: RowRange

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return self.rows.stop - self.rows.start

    @property
    def kept(self) -> pa.Schema:
        """The kept columns."""
        return KeptColumns(self.source.place).schema

    @property
    def groups(self) -> KeyGroups:
        """The key groups of the whole list."""
        return KeyGroups(num_keys=self.source.record["num_keys_with_several_images"])

    def read_tables(self) -> Iterator[pa.Table]:
        """Yield the rows as `Listing.read_tables` does, one table per file of the list."""
        columns = [*schema.MANIFEST.names[1:], *([schema.KEPT] if len(self.kept) else [])]
        yield from read_range(self.source.place, self.rows, columns)

    def __enter__(self) -> ListedRange:
        return self

    def __exit__(self, *exception: object) -> None:
        """Do nothing: the list stays."""


def open_part(config: RunConfig, list_them: Callable[..., Listing] = list_rows) -> tuple[OutputPart, ListedRange]:
    """Return the part of --shard and its rows; list all rows first unless another driver has done so.

    Raise RunError if OUTPUT has another list or another number of parts, or if the part would be empty.
    """
    output = store.make_absolute(config.output)
    index, count = config.shard_numbers
    listed = prepare_list(config, list_them, count=count)
    if count > listed.num_rows:
        rows = count_nouns(listed.num_rows, "row")
        raise RunError(f"--shard {config.shard} of {rows} would be empty; use at most {listed.num_rows} parts")
    place = _cut_rows(listed.num_rows, index, count)
    return OutputPart(_locate_part(output, index, count), place.start), ListedRange(listed, place)


def prepare_list(
    config: RunConfig, list_them: Callable[..., Listing] = list_rows, *, count: int | None = None
) -> RowList:
    """Return the list of OUTPUT; make it under OUTPUT's lease if there is none, or wait for the driver that does.

    `count` is the number of parts, which the first driver decides. Raise RunError if OUTPUT has another list or run.
    """
    output = store.make_absolute(config.output)
    while (found := _find_list(config, output, count)) is None:
        try:
            with acquire_lease(output) as lease:
                if _find_list(config, output, count) is None:
                    _write_list(config, output, list_them, lease, count)
        except (LeaseError, LeaseLost) as error:  # lost to a driver that started at the same moment
            if error.__cause__ is not None:  # OUTPUT cannot be used
                raise
            logger.warning("another driver lists the rows (%s); waiting for it", error)
            time.sleep(_LOOK_S)
    return found


def list_output_parts(output: str) -> list[OutputPart]:
    """Return the parts of OUTPUT that have begun, in the order of their rows; OUTPUT itself if it has none."""
    parts = _read_json(store.join(output, _PARTS))
    if parts is None:
        return [OutputPart(output)]
    listed, count = _read_json(store.join(output, _LIST_RECORD)) or {}, parts["count"]
    found = [
        OutputPart(_locate_part(output, index, count), _cut_rows(listed["num_rows"], index, count).start)
        for index in range(1, count + 1)
    ]
    return [part for part in found if store.find_file(store.join(part.output, "run.json"))]


def locate_manifest(output: str) -> str:
    """Return the directory whose manifest has all rows of OUTPUT."""
    is_divided = store.find_file(store.join(output, _PARTS)) is not None
    return store.join(output, _LIST) if is_divided else output


def read_whole_record(output: str) -> Json | None:
    """Return the run record of OUTPUT; of parts, that of the first one with the rows and sessions of all."""
    parts = list_output_parts(output)
    records = [record for part in parts if (record := read_record(part.output)) is not None]
    if not records or parts == [OutputPart(output)]:
        return records[0] if records else None
    listed = _read_json(store.join(output, _LIST_RECORD)) or {}
    is_finished = len(records) == count_parts(output) and all(r.get("status") == "finished" for r in records)
    return {
        **records[0],
        "num_rows": listed["num_rows"],
        "status": "finished" if is_finished else "running",
        "started_at": min(record["started_at"] for record in records),
        "updated_at": max(str(record.get("updated_at") or record["started_at"]) for record in records),
        "sessions": [session for record in records for session in record.get("sessions", [])],
    }


def count_parts(output: str) -> int:
    """Return the number of parts of OUTPUT, 1 if it is not divided."""
    return int((_read_json(store.join(output, _PARTS)) or {"count": 1})["count"])


def check_undivided(output: str) -> None:
    """Raise RunError if OUTPUT is divided into parts, which only drivers with --shard may write."""
    if store.find_file(store.join(output, _LIST_RECORD)) is not None:
        raise RunError(f"{output} is divided among several drivers; give --shard I/N, or use another OUTPUT")


def _find_list(config: RunConfig, output: str, count: int | None) -> RowList | None:
    """Return the list of OUTPUT if it is complete and, if `count` is given, divided. Raise RunError if it differs."""
    record = _read_json(store.join(output, _LIST_RECORD))
    if record is None:
        if store.find_file(store.join(output, "run.json")) is not None:
            raise RunError(f"{output} holds a run of one driver; use another OUTPUT for --shard")
        return None
    wanted = _identify_list(config)
    if differences := [name for name in wanted if record["config"].get(name) != wanted[name]]:
        raise RunError(
            f"{store.join(output, _LIST)} was listed with another {', '.join(sorted(differences))}; use the same "
            "options for all parts, or another OUTPUT"
        )
    parts = _read_json(store.join(output, _PARTS))
    if count is not None and parts is not None and parts["count"] != count:
        raise RunError(f"{output} is divided into {parts['count']} parts, not {count}; give --shard I/{parts['count']}")
    return RowList(store.join(output, _LIST), record) if count is None or parts is not None else None


def _write_list(
    config: RunConfig, output: str, list_them: Callable[..., Listing], lease: Lease, count: int | None
) -> None:
    """Write what OUTPUT lacks of the list and the number of parts; list.json comes after the rows."""
    if _read_json(store.join(output, _LIST_RECORD)) is None:
        place = store.join(output, _LIST)
        with list_them(config, config.questionnaire, output=output) as listing:
            for path, data in encode_manifest(place, listing.read_tables()):
                lease.check()
                store.write_bytes(store.join(place, path), data)
            record = {
                "config": _identify_list(config),
                "num_rows": listing.num_rows,
                "num_keys_with_several_images": listing.groups.num_keys,
            }
        store.write_bytes(store.join(output, _LIST_RECORD), json.dumps(record, indent=2).encode())
    if count is not None:
        lease.check()
        store.write_bytes(store.join(output, _PARTS), json.dumps({"count": count}).encode())


def _identify_list(config: RunConfig) -> Json:
    """Return the options that must be the same for all parts: those that decide rows."""
    fields = {**config.fingerprint_fields(), "input": [store.make_absolute(uri) for uri in config.input]}
    fields.pop("shard", None)
    return json.loads(json.dumps(fields))  # type: ignore[no-any-return]


def _cut_rows(num_rows: int, index: int, count: int) -> RowRange:
    return RowRange(num_rows * (index - 1) // count, num_rows * index // count)


def _locate_part(output: str, index: int, count: int) -> str:
    return store.join(output, f"part-{index:05}-of-{count:05}")


def _read_json(uri: str) -> Any:
    return None if store.find_file(uri) is None else json.loads(store.read_bytes(uri))
