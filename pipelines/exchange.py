"""Files of OUTPUT/data exchanged for others: all of them or none, whenever the process dies.

The new files are written to OUTPUT/exchange, then a note there commits: whoever opens the output next, this process or
a later one, moves them to OUTPUT/data and removes the old ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from pipelines import store

PLACE = "exchange"
_NOTE = "note.json"


def exchange_files(output: str, new: Iterable[tuple[str, bytes]], old: Iterable[str]) -> None:
    """Write `new` files (name, content) to OUTPUT/data and remove the `old` names. Needs the lease. Raises OSError."""
    names = [_write(store.join(output, PLACE), name, data) for name, data in new]
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
    left = {info.uri.rsplit("/", 1)[-1]: info.uri for info in store.list_files(store.join(output, PLACE))}
    if _NOTE in left:
        note: dict[str, Any] = json.loads(store.read_bytes(left[_NOTE]))
        for name in note["new"]:
            if name in left:
                store.move(left.pop(name), store.join(output, "data", name))
        for name in note["old"]:
            store.remove(store.join(output, "data", name))
        store.remove(left.pop(_NOTE))
    forget_exchange(output)


def forget_exchange(output: str) -> None:
    """Undo what was begun, for an output that is overwritten."""
    # The note first: without it, the others mean nothing.
    for info in sorted(store.list_files(store.join(output, PLACE)), key=lambda info: not info.uri.endswith(_NOTE)):
        store.remove(info.uri)
