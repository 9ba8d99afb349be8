"""Replace files of OUTPUT/data by others atomically: all or none, even if the process dies.

The new files are written to OUTPUT/exchange; a note there commits the exchange. Whoever opens the output next, this
process or a later one, moves the new files to OUTPUT/data and removes the old ones.
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
    """Return whether a run may have written a file of this name; no other file is ever removed."""
    return _OURS.fullmatch(_get_name(uri)) is not None


def exchange_files(output: str, new: Iterable[tuple[str, bytes]], old: Iterable[str], lease: Lease) -> None:
    """Write the `new` files (name, content) to OUTPUT/data and remove the `old` names. Raise OSError or LeaseLost."""
    names = [_write(store.join(output, PLACE), name, data) for name, data in new]
    lease.check()  # a driver that took over has removed uncommitted files
    if lost := set(names) - _list_exchange(output).keys():
        raise OSError(f"{len(lost)} new files were removed from {store.join(output, PLACE)}; OUTPUT/data is unchanged")
    note = {"new": names, "old": sorted(set(old) - set(names))}
    store.write_bytes(store.join(output, PLACE, _NOTE), json.dumps(note).encode())
    finish_exchange(output)


def _write(place: str, name: str, data: bytes) -> str:
    uri = store.join(place, name)
    store.write_bytes(uri, data)
    if store.read_bytes(uri) != data:  # before the files that it replaces are removed
        raise OSError(f"{uri} differs from what was written to it; nothing was removed, check the store")
    return name


def finish_exchange(output: str) -> None:
    """Finish a committed exchange, or undo one that was not committed. Needs the lease. Raise OSError."""
    left = _list_exchange(output)
    if _NOTE in left:
        note: dict[str, Any] = json.loads(store.read_bytes(left[_NOTE]))
        for name in note["new"]:
            if name in left:
                store.move(left[name], store.join(output, "data", name))
        present = {_get_name(info.uri) for info in store.list_files(store.join(output, "data"))}
        if lost := set(note["new"]) - present:
            raise OSError(f"{len(lost)} files named in {left[_NOTE]} are neither next to it nor in data: {min(lost)}")
        for name in filter(re.compile(_DATA_FILE).fullmatch, note["old"]):
            store.remove(store.join(output, "data", name))
    forget_exchange(output)


def forget_exchange(output: str) -> None:
    """Undo an exchange that was begun, also for an output that is overwritten."""
    # The note first: without it, the other files have no meaning.
    for name, uri in sorted(_list_exchange(output).items(), key=lambda file: file[0] != _NOTE):
        if is_ours(name):
            store.remove(uri)


def _list_exchange(output: str) -> dict[str, str]:
    """Return {name: URI} of the files in OUTPUT/exchange."""
    return {_get_name(info.uri): info.uri for info in store.list_files(store.join(output, PLACE))}


def _get_name(uri: str) -> str:
    return uri.rsplit("/", 1)[-1]
