"""Replace files of OUTPUT by others atomically: all or none, even if the process dies.

The new files are written to OUTPUT/exchange; a note there commits the exchange. Whoever opens the output next, this
process or a later one, moves the new files to their places and removes the old ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from ovis_model.wording import count_nouns
from pipelines.errors import LeaseLost, StoreFault
from pipelines.output.lease import Lease
from pipelines.storage import store

PLACE = "exchange"
RECORD = "run.json"
_NOTE = "exchange.json"
_ROWS = r"rows-\d{12}[^/]*\.parquet"
_ROWS_PATH = re.compile(rf"(data|manifest)/{_ROWS}")
_OURS = re.compile(
    rf".*/((data|manifest)/\.?{_ROWS}|{PLACE}/\.?({_ROWS}|{re.escape(_NOTE)}|{re.escape(RECORD)}))(\.\w+\.tmp)?"
)


def is_ours(uri: str) -> bool:
    """Return whether a run may have written a file at this place; no other file is ever removed."""
    return _OURS.fullmatch(uri) is not None


def commit_exchange(output: str, new: Iterable[tuple[str, bytes]], old: Iterable[str], lease: Lease) -> None:
    """Write the `new` files (path in OUTPUT, content), and a note that they replace these and the `old` paths.

    Call `finish_exchange` next. An exception leaves OUTPUT as it was. Raise OSError or LeaseLost.
    """
    try:
        paths = [_stage(output, path, data) for path, data in new]
        lease.check()  # a driver that took over has removed uncommitted files
        if lost := set(map(_get_name, paths)) - _list_exchange(output).keys():
            removed = count_nouns(len(lost), "new file was", "new files were")
            raise OSError(f"{removed} removed from {store.join(output, PLACE)}; OUTPUT is unchanged")
        note = {"new": paths, "old": sorted(set(old) - set(paths))}
        store.write_bytes(store.join(output, PLACE, _NOTE), json.dumps(note).encode())
    except BaseException:
        with suppress(OSError, StoreFault, LeaseLost):
            lease.check()  # else the files may belong to the driver that took over
            forget_exchange(output)
        raise


def _stage(output: str, path: str, data: bytes) -> str:
    uri = store.join(output, PLACE, _get_name(path))
    store.write_bytes(uri, data)
    if store.read_bytes(uri) != data:  # before the files that it replaces are removed
        raise OSError(f"{uri} differs from what was written to it; nothing was removed, check the store")
    return path


def finish_exchange(output: str) -> None:
    """Finish a committed exchange, or undo one that was not committed. Needs the lease. Raise OSError."""
    staged = _list_exchange(output)
    if _NOTE in staged:
        note: dict[str, Any] = json.loads(store.read_bytes(staged[_NOTE]))
        new, old = _read_paths(note["new"]), _read_paths(note["old"])
        moved = [path for path in new if _get_name(path) not in staged]  # by an earlier process
        if lost := [path for path in moved if store.find_file(store.join(output, path)) is None]:
            missing = count_nouns(len(lost), "file is", "files are")
            raise OSError(f"{missing} named in {staged[_NOTE]}, but neither next to it nor in place: {lost[0]}")
        for path in new:
            if path not in moved:
                store.move(staged[_get_name(path)], store.join(output, path))
        for path in set(old) - {RECORD}:
            store.remove(store.join(output, path))
    forget_exchange(output)


def _read_paths(names: list[str]) -> list[str]:
    """Return those paths of a note that a run may replace. Version 0.1 names files of OUTPUT/data without `data/`."""
    paths = [name if "/" in name or name == RECORD else f"data/{name}" for name in names]
    return [path for path in paths if path == RECORD or _ROWS_PATH.fullmatch(path)]


def forget_exchange(output: str) -> None:
    """Remove the files of an exchange that is finished or was not committed."""
    # The note first: without it, the other files have no meaning.
    for _, uri in sorted(_list_exchange(output).items(), key=lambda file: file[0] != _NOTE):
        if is_ours(uri):
            store.remove(uri)
    store.remove_if_empty(store.join(output, PLACE))


def locate_record(output: str) -> str:
    """Return the URI of run.json: in OUTPUT/exchange if it is part of a committed exchange that is not finished."""
    staged = _list_exchange(output)
    return staged[RECORD] if _NOTE in staged and RECORD in staged else store.join(output, RECORD)


def _list_exchange(output: str) -> dict[str, str]:
    """Return {name: URI} of the files in OUTPUT/exchange."""
    return {_get_name(info.uri): info.uri for info in store.list_files(store.join(output, PLACE))}


def _get_name(uri: str) -> str:
    return uri.rsplit("/", 1)[-1]
