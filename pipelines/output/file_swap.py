"""Exchange files of OUTPUT/data for others, all or none, whenever the process dies.

The new files are written to OUTPUT/exchange, then a note there commits: whoever opens the output next, this process or
a later one, moves them to OUTPUT/data and removes the old ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from pipelines.output.lease import Lease
from pipelines.storage import store

PLACE = "exchange"
_NOTE = "exchange.json"
_DATA_FILE = r"rows-\d{12}[^/]*\.parquet"
_OURS = re.compile(rf"\.?({_DATA_FILE}|{re.escape(_NOTE)})(\.\w+\.tmp)?")


def is_ours(uri: str) -> bool:
    """Whether a file of this name may be one of an output's own: nothing else is ever removed."""
    return _OURS.fullmatch(_name(uri)) is not None


def exchange_files(output: str, new: Iterable[tuple[str, bytes]], old: Iterable[str], lease: Lease) -> None:
    """Write `new` files (name, content) to OUTPUT/data and remove the `old` names. Raises OSError and LeaseLost."""
    names = [_write(store.join(output, PLACE), name, data) for name, data in new]
    lease.check()  # another driver that took over has removed what was not committed
    if lost := set(names) - _files(output).keys():
        raise OSError(f"{len(lost)} new files are gone from {store.join(output, PLACE)}; nothing was exchanged")
    note = {"new": names, "old": sorted(set(old) - set(names))}
    store.write_bytes(store.join(output, PLACE, _NOTE), json.dumps(note).encode())
    finish_exchange(output)


def _write(place: str, name: str, data: bytes) -> str:
    uri = store.join(place, name)
    store.write_bytes(uri, data)
    if store.read_bytes(uri) != data:  # what it replaces is about to go
        raise OSError(f"{uri} does not hold what was written to it")
    return name


def finish_exchange(output: str) -> None:
    """Finish one that was committed, undo one that was not. Needs the lease. Raises OSError."""
    left = _files(output)
    if _NOTE in left:
        note: dict[str, Any] = json.loads(store.read_bytes(left[_NOTE]))
        for name in note["new"]:
            if name in left:
                store.move(left[name], store.join(output, "data", name))
        there = {_name(info.uri) for info in store.list_files(store.join(output, "data"))}
        if lost := set(note["new"]) - there:
            raise OSError(f"{len(lost)} files that {left[_NOTE]} names are neither beside it nor in data: {min(lost)}")
        for name in filter(re.compile(_DATA_FILE).fullmatch, note["old"]):
            store.remove(store.join(output, "data", name))
    forget_exchange(output)


def forget_exchange(output: str) -> None:
    """Undo what was begun, for an output that is overwritten."""
    # The note first: without it, the others mean nothing.
    for name, uri in sorted(_files(output).items(), key=lambda file: file[0] != _NOTE):
        if is_ours(name):
            store.remove(uri)


def _files(output: str) -> dict[str, str]:
    """URIs by name."""
    return {_name(info.uri): info.uri for info in store.list_files(store.join(output, PLACE))}


def _name(uri: str) -> str:
    return uri.rsplit("/", 1)[-1]
