"""The lease in OUTPUT/driver.json, which lets one driver at a time write to an OUTPUT."""

from __future__ import annotations

import json
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


class Lease:
    """A context manager that holds the right to write to OUTPUT.

    The file names the holder. A thread renews it as a sign of life; another driver may take over a stale lease.
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
            holder = self._read()
            if holder and not self._is_dead(holder):
                raise LeaseError(
                    f"another run writes here: process {holder['pid']} on {holder['host']}, last sign of life "
                    f"{time.time() - holder['at_s']:.0f} s ago; stop it, or wait {STALE_S:.0f} s if it has ended"
                )
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
        if not self._is_mine():
            raise LeaseLost("another run has taken over this OUTPUT, so this run stops; let the other run finish")

    def _renew(self) -> None:
        while not self._released.wait(RENEW_S):
            # A store that fails now may answer at the next attempt, well before the lease is stale.
            with suppress(OSError, StoreFault):
                if self._is_mine():
                    self._write()

    def _is_mine(self) -> bool:
        holder = self._read()
        return holder is not None and holder["token"] == self._me["token"]

    def _is_dead(self, holder: dict[str, Any]) -> bool:
        if time.time() - holder["at_s"] > STALE_S:
            return True
        is_here = (holder["host"], holder["boot"]) == (self._me["host"], self._me["boot"])
        return is_here and holder["started"] != _identify_process(holder["pid"])["started"]

    def _read(self) -> dict[str, Any] | None:
        if store.find_file(self._uri) is None:
            return None
        with suppress(json.JSONDecodeError):  # half a file of a driver whose machine failed names nobody
            holder: dict[str, Any] = json.loads(store.read_bytes(self._uri))
            return holder
        return None

    def _write(self) -> None:
        store.write_bytes(self._uri, json.dumps({**self._me, "at_s": time.time()}).encode())


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
