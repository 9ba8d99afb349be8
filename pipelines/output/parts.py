"""The parts of a run that several drivers write: each has its own OUTPUT below one directory, read together.

OUTPUT/list/             the rows, listed once: list.json and manifest/; `ovis2 list --extend` appends to them
OUTPUT/parts.json        the number of parts, and how many rows there were when they were cut
OUTPUT/part-00002-of-00004/   the OUTPUT of a driver, with rows num_rows * 1 // 4 to num_rows * 2 // 4, followed by the
                         same share of the rows that each extension appended
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pyarrow as pa

from ovis_model.wording import count_nouns
from pipelines import schema
from pipelines.config import RunConfig
from pipelines.errors import LeaseError, LeaseLost, RunError
from pipelines.output.lease import Lease
from pipelines.output.ledger import Ranges, RowRange, count_rows, drop_rows, merge_ranges
from pipelines.output.manifest import KeptColumns, encode_manifest, read_columns, read_range
from pipelines.output.run_record import EXTENDABLE, Lister, acquire_lease, check_kept_types, read_record
from pipelines.sources import KnownRows, Listing, list_rows
from pipelines.sources.listing import KeyGroups
from pipelines.storage import store

Json = dict[str, Any]

_LIST, _LIST_RECORD, _PARTS = "list", "list/list.json", "parts.json"
_LOOK_S = 2.0

logger = logging.getLogger(__name__)


MakeLister = Callable[[Lease], Lister]
"""Returns what lists INPUT, given the lease of the OUTPUT that holds the list."""


@dataclass(frozen=True)
class OutputPart:
    """The OUTPUT of one driver; its rows are rows `pieces` of the whole list, in order. Without a list () is all."""

    output: str
    pieces: Ranges = ()


@dataclass(frozen=True)
class RowList:
    """A list of rows in `place`, made once for all parts; `record` is list.json."""

    place: str
    record: Json

    @property
    def num_rows(self) -> int:
        """The number of rows of all parts."""
        return int(self.record["ends"][-1])


@dataclass(frozen=True)
class ListedRows:
    """The rows `ranges` of a list, as the listing of a run."""

    source: RowList
    ranges: Ranges

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return count_rows(self.ranges)

    @property
    def num_skipped(self) -> int:
        """Return 0: ids were made unique when the list was made."""
        return 0

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
        for rows in self.ranges:
            yield from read_range(self.source.place, rows, columns)

    def skip(self, count: int) -> ListedRows:
        """Return the rows after the first `count`."""
        return replace(self, ranges=drop_rows(self.ranges, count))

    def __enter__(self) -> ListedRows:
        return self

    def __exit__(self, *exception: object) -> None:
        """Do nothing: the list stays."""


def open_part(config: RunConfig, make_lister: MakeLister = lambda _: list_rows) -> tuple[OutputPart, ListedRows]:
    """Return the part of --shard and its rows; list all rows first unless another driver has done so.

    Raise RunError if OUTPUT has another list or another number of parts, or if the part would be empty.
    """
    output = store.make_absolute(config.output)
    index, count = config.shard_numbers
    listed = prepare_list(config, make_lister, count=count)
    part = _locate_part(output, listed.record, _read_json(store.join(output, _PARTS)), index)
    return part, ListedRows(listed, part.pieces)


def find_part(config: RunConfig) -> tuple[OutputPart, ListedRows] | None:
    """Return the part of --shard and its rows if OUTPUT has a list. Change nothing. Raise RunError if it differs."""
    output = store.make_absolute(config.output)
    index, count = config.shard_numbers
    if (listed := _find_list(config, output)) is None:
        return None
    part = _locate_part(output, listed.record, _read_parts(output, count) or _divide(listed.num_rows, count), index)
    return part, ListedRows(listed, part.pieces)


def cut_part(config: RunConfig, num_rows: int) -> OutputPart:
    """Return the part of --shard if OUTPUT has no list and INPUT has `num_rows` rows. Raise RunError."""
    index, count = config.shard_numbers
    return _locate_part(store.make_absolute(config.output), {"ends": [num_rows]}, _divide(num_rows, count), index)


def prepare_list(
    config: RunConfig, make_lister: MakeLister = lambda _: list_rows, *, count: int | None = None
) -> RowList:
    """Return the list of OUTPUT; make it under OUTPUT's lease if there is none, or wait for the driver that does.

    `count` is the number of parts, which the first driver decides. Raise RunError if OUTPUT has another list or run.
    """
    output = store.make_absolute(config.output)
    while (found := _find_divided_list(config, output, count)) is None:
        try:
            with acquire_lease(output) as lease:
                if _find_divided_list(config, output, count) is None:
                    listed = _find_list(config, output) or _write_list(config, output, make_lister(lease), lease)
                    _write_parts(output, listed.num_rows, count, lease)
        except (LeaseError, LeaseLost) as error:  # lost to a driver that started at the same moment
            if error.__cause__ is not None:  # OUTPUT cannot be used
                raise
            logger.warning("another driver lists the rows (%s); waiting for it", error)
            time.sleep(_LOOK_S)
    return found


def extend_list(config: RunConfig, make_lister: MakeLister = lambda _: list_rows) -> RowList:
    """Append the rows of INPUT that the list of OUTPUT lacks, or make the list. Raise RunError or LeaseError."""
    output = store.make_absolute(config.output)
    with acquire_lease(output) as lease:
        earlier = _find_list(config, output, except_for=EXTENDABLE)
        return _write_list(config, output, make_lister(lease), lease, earlier)


def list_output_parts(output: str) -> list[OutputPart]:
    """Return the parts of OUTPUT that have begun, in the order of their rows; OUTPUT itself if it has none."""
    parts = _read_json(store.join(output, _PARTS))
    if parts is None:
        return [OutputPart(output)]
    listed = _read_json(store.join(output, _LIST_RECORD))
    found = [_locate_part(output, listed, parts, index) for index in range(1, parts["count"] + 1)]
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
    num_rows = _read_json(store.join(output, _LIST_RECORD))["ends"][-1]
    has_all = sum(record["num_rows"] for record in records) == num_rows
    is_finished = has_all and all(record.get("status") == "finished" for record in records)
    return {
        **records[0],
        "num_rows": num_rows,
        "status": "finished" if is_finished else "running",
        "started_at": min(record["started_at"] for record in records),
        "updated_at": max(str(record.get("updated_at") or record["started_at"]) for record in records),
        "sessions": [session for record in records for session in record.get("sessions", [])],
    }


def check_undivided(output: str) -> None:
    """Raise RunError if OUTPUT is divided into parts, which only drivers with --shard may write."""
    if store.find_file(store.join(output, _LIST_RECORD)) is not None:
        raise RunError(f"{output} is divided among several drivers; give --shard I/N, or use another OUTPUT")


def _find_divided_list(config: RunConfig, output: str, count: int | None) -> RowList | None:
    """Return the list of OUTPUT if it is complete and, if `count` is given, divided."""
    listed = _find_list(config, output)
    return listed if count is None or _read_parts(output, count) is not None else None


def _find_list(config: RunConfig, output: str, except_for: frozenset[str] = frozenset()) -> RowList | None:
    """Return the list of OUTPUT if it is complete. Raise RunError if it differs by other options than `except_for`."""
    record = _read_json(store.join(output, _LIST_RECORD))
    if record is None:
        if store.find_file(store.join(output, "run.json")) is not None:
            raise RunError(f"{output} holds a run of one driver; use another OUTPUT for --shard")
        return None
    wanted = _identify_list(config)
    differences = {name for name in wanted if record["config"].get(name) != wanted[name]} - except_for
    if differences:
        remedy = ", or add rows with `ovis2 list INPUT OUTPUT ... --extend`" if differences <= EXTENDABLE else ""
        raise RunError(
            f"{store.join(output, _LIST)} was listed with another {', '.join(sorted(differences))}; use the same "
            f"options for all parts, or another OUTPUT{remedy}"
        )
    return RowList(store.join(output, _LIST), record)


def _write_list(
    config: RunConfig, output: str, list_them: Lister, lease: Lease, earlier: RowList | None = None
) -> RowList:
    """Write the rows of INPUT that are not in the `earlier` list after those that are. list.json comes last.

    A reader of the earlier list finds its rows at any moment: files are replaced by longer ones.
    """
    place, num_rows, known = store.join(output, _LIST), 0, KnownRows()
    if earlier is not None:
        num_rows = earlier.num_rows
        known = KnownRows(lambda: read_columns(place, num_rows, ["id", "uri", "images"]))
    with list_them(config, config.questionnaire, known, output=output) as listing:
        if earlier is not None and isinstance(listing, Listing) and listing.num_rows:
            listing.kept = check_kept_types(KeptColumns(place).schema, listing.kept)
        for path, data in encode_manifest(place, listing.read_tables(), num_rows):
            lease.check()
            store.write_bytes(store.join(place, path), data)
        record = {
            "config": _identify_list(config),
            "ends": [*(earlier.record["ends"] if earlier else ()), num_rows + listing.num_rows],
            "num_keys_with_several_images": listing.groups.num_keys,
        }
    lease.check()
    store.write_bytes(store.join(output, _LIST_RECORD), json.dumps(record, indent=2).encode())
    return RowList(place, record)


def _write_parts(output: str, num_rows: int, count: int | None, lease: Lease) -> None:
    if count is not None:
        lease.check()
        store.write_bytes(store.join(output, _PARTS), json.dumps(_divide(num_rows, count)).encode())


def _divide(num_rows: int, count: int) -> Json:
    """Return the content of parts.json. Raise RunError if a part would be empty."""
    if count > num_rows:
        rows = count_nouns(num_rows, "row")
        raise RunError(f"{rows} cannot be divided into {count} parts; use at most {num_rows} parts")
    return {"count": count, "num_rows": num_rows}


def _read_parts(output: str, count: int) -> Json | None:
    """Return the content of parts.json. Raise RunError if OUTPUT has another number of parts."""
    parts: Json | None = _read_json(store.join(output, _PARTS))
    if parts is not None and parts["count"] != count:
        raise RunError(f"{output} is divided into {parts['count']} parts, not {count}; give --shard I/{parts['count']}")
    return parts


def _identify_list(config: RunConfig) -> Json:
    """Return the options that must be the same for all parts: those that decide rows."""
    fields = {**config.fingerprint_fields(), "input": [store.make_absolute(uri) for uri in config.input]}
    fields.pop("shard", None)
    return json.loads(json.dumps(fields))  # type: ignore[no-any-return]


def _locate_part(output: str, listed: Json, parts: Json, index: int) -> OutputPart:
    """Return part `index`: its share of the rows that were there when the list was divided, and of each extension."""
    count, first = parts["count"], parts["num_rows"]
    ends = [0, first, *(end for end in listed["ends"] if end > first)]
    pieces = (RowRange(a + (b - a) * (index - 1) // count, a + (b - a) * index // count) for a, b in pairwise(ends))
    place = store.join(output, f"part-{index:05}-of-{count:05}")
    return OutputPart(place, merge_ranges(pieces))


def _read_json(uri: str) -> Any:
    return None if store.find_file(uri) is None else json.loads(store.read_bytes(uri))
