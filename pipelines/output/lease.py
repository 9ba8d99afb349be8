"""The lease in OUTPUT/driver.json, which lets one driver at a time write to an OUTPUT."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipelines.errors import LeaseError, LeaseLost, StoreFault
from pipelines.storage import store

RENEW_S, STALE_S = 10.0, 60.0
_LOOK_S = 2.0  # between two looks at the lease of another driver
_MAX_SKEW_S = 5.0  # clocks that are synchronized differ by less
_FIELDS = {"token", "host", "boot", "pid", "started", "at_s"}

Holder = dict[str, Any]
"""The content of a lease: _FIELDS."""

logger = logging.getLogger(__name__)


class Lease:
    """A context manager that holds the right to write to OUTPUT.

    The file names the holder. A thread renews it as a sign of life; another driver may take over a lease that it has
    watched without seeing a change.
    Object stores have no exclusive create, so two drivers that start at the same moment may both believe that they
    hold the lease, until the first `check`: the one that wrote last keeps it, the other stops before it writes a row.
    """

    def __init__(self, output: str) -> None:
        self._output, self._uri = output, store.join(output, "driver.json")
        self._created: list[str] = []  # directories that did not exist, innermost first
        boot = Path("/proc/sys/kernel/random/boot_id")  # process ids are comparable within one boot of a kernel
        self._me = {
            "token": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "boot": boot.read_text().strip() if boot.exists() else "",
            **_identify_process(os.getpid()),
        }
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        """Take the lease. Raise LeaseError if another driver holds it or OUTPUT cannot be written."""
        try:
            self._wait_for_holder()
            self._created = store.create_directory(self._output)
            self._write()
        except OSError as error:
            self._remove_created()
            raise LeaseError(f"cannot use {self._uri.rpartition('/')[0]} as OUTPUT: {error}") from error
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._released.set()
        self._thread.join()
        with suppress(OSError, StoreFault):
            if self._is_mine():
                store.remove(self._uri)
                self._remove_created()

    def _remove_created(self) -> None:
        """Remove the directories that this lease created, unless something was written to them."""
        for directory in self._created:
            store.remove_if_empty(directory)

    def check(self) -> None:
        """Raise LeaseLost if another driver has taken over. Call this before each write to OUTPUT."""
        if self._is_mine():
            return
        if self._read_holder():
            raise LeaseLost("another run has taken over this OUTPUT, so this run stops; let the other run finish")
        raise LeaseLost(f"{self._uri} was removed or damaged, so another run could write here too, and this run stops")

    def _wait_for_holder(self) -> None:
        """Return once no driver holds the lease. Raise LeaseError if one is alive.

        A driver of this machine is looked up. Any other one is watched: it renews its lease every RENEW_S. Its clock
        may differ from this machine's, so the time in the lease only decides how long to watch.
        """
        before = self._read()
        holder = _parse_holder(before)
        if before is None or (holder and self._is_here(holder) and not _is_alive(holder)):
            return
        if holder and self._is_here(holder):
            raise LeaseError(f"another run writes here: {_describe_holder(holder)}; stop it, or let it finish")
        if holder:
            logger.warning("%s may be writing here: %s", self._output, _describe_holder(holder))
        else:
            logger.warning("%s is empty or damaged: it names no driver", self._uri)
        is_recent = holder is not None and time.time() - holder["at_s"] < STALE_S
        self._watch(before, STALE_S if is_recent else 2.5 * RENEW_S)

    def _watch(self, before: bytes, watch_s: float) -> None:
        """Return when the lease is released or has not changed for `watch_s`. Raise LeaseError if it changes."""
        ends_s = time.monotonic() + watch_s
        next_line_s = time.monotonic()
        while (now_s := time.monotonic()) < ends_s:
            if now_s >= next_line_s:
                next_line_s = now_s + RENEW_S
                logger.warning("waiting for a sign of life of that driver, for %.0f more s", ends_s - now_s)
            time.sleep(min(_LOOK_S, max(0, ends_s - time.monotonic())))
            after = self._read()
            if after is None:
                return
            if after != before:
                holder = _parse_holder(after)
                who = _describe_holder(holder) if holder else "a driver"
                raise LeaseError(
                    f"another run writes here: {who}; it renewed its lease while this command watched. Stop it, or let "
                    "it finish"
                )
        logger.warning("there was none, so this run takes over; the other one would stop before it writes a row")

    def _renew(self) -> None:
        while not self._released.wait(RENEW_S):
            # A store that fails now may answer at the next attempt, well before the lease is stale.
            with suppress(OSError, StoreFault):
                if self._is_mine():
                    self._write()

    def _is_mine(self) -> bool:
        holder = self._read_holder()
        return holder is not None and holder["token"] == self._me["token"]

    def _is_here(self, holder: Holder) -> bool:
        return (holder["host"], holder["boot"]) == (self._me["host"], self._me["boot"])

    def _read_holder(self) -> Holder | None:
        return _parse_holder(self._read())

    def _read(self) -> bytes | None:
        with suppress(FileNotFoundError):  # released after it was found
            return None if store.find_file(self._uri) is None else store.read_bytes(self._uri)
        return None

    def _write(self) -> None:
        store.write_bytes(self._uri, json.dumps({**self._me, "at_s": time.time()}).encode())


def _parse_holder(data: bytes | None) -> Holder | None:
    """Return what a lease says; None if there is none, or only a part of one from a machine that failed."""
    try:
        holder = json.loads(data or b"")
    except ValueError:
        return None
    return holder if isinstance(holder, dict) and holder.keys() >= _FIELDS else None


def _describe_holder(holder: Holder) -> str:
    age_s = time.time() - holder["at_s"]
    if age_s < -_MAX_SKEW_S:
        sign = f"whose clock is {-age_s:.0f} s ahead of this machine's"
    else:
        sign = f"last sign of life {max(0, age_s):.0f} s ago"
    return f"process {holder['pid']} on {holder['host']}, {sign}"


def _is_alive(holder: Holder) -> bool:
    """Return whether a driver of this machine still runs."""
    return bool(holder["started"] == _identify_process(holder["pid"])["started"])


def _identify_process(pid: int) -> dict[str, int | str]:
    """Return the process id and the start time in ticks since boot, which tell a process from a later one of its id.

    The start time is "" if the process has ended, even as a zombie, and on systems without /proc.
    """
    try:
        # The name in brackets may hold any character. After it come the state and, 19 fields later, the start time.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return {"pid": pid, "started": ""}
    return {"pid": pid, "started": "" if fields[0] in "ZX" else fields[19]}
