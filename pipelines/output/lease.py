"""OUTPUT/driver.json: allows one driver at a time to write to an OUTPUT."""

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
    """Held while its file says so, as a context. A thread renews the file as a sign of life; one that is stale may be
    taken over.

    Object stores have no exclusive create, so two drivers that start within the same moment both think that they have
    it, until the first `check`: the one that wrote last keeps it, the other stops before it writes a row.
    """

    def __init__(self, output: str) -> None:
        self._uri = store.join(output, "driver.json")
        boot = Path("/proc/sys/kernel/random/boot_id")  # process ids are comparable within one boot of a kernel
        self._me = {
            "token": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "boot": boot.read_text().strip() if boot.exists() else "",
            **_process(os.getpid()),
        }
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        """Raises LeaseError saying who has it, or that OUTPUT cannot be written."""
        try:
            holder = self._read()
            if holder and not self._is_dead(holder):
                raise LeaseError(
                    f"another run writes here: process {holder['pid']} on {holder['host']}, last sign of life "
                    f"{time.time() - holder['at_s']:.0f} s ago. Stop it, or wait {STALE_S:.0f} s if it is gone"
                )
            self._write()
        except OSError as error:
            raise LeaseError(f"cannot use {self._uri.rpartition('/')[0]} as OUTPUT: {error}") from error
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._released.set()
        self._thread.join()
        with suppress(OSError, StoreFault):
            if self._is_mine():
                store.remove(self._uri)

    def check(self) -> None:
        """Before anything is written to OUTPUT. Raises LeaseLost."""
        if not self._is_mine():
            raise LeaseLost("another run has taken over this OUTPUT; this one stops")

    def _renew(self) -> None:
        while not self._released.wait(RENEW_S):
            # A store that does not answer now may answer next time, well before the lease is stale.
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
        return is_here and holder["started"] != _process(holder["pid"])["started"]

    def _read(self) -> dict[str, Any] | None:
        if store.find_file(self._uri) is None:
            return None
        holder: dict[str, Any] = json.loads(store.read_bytes(self._uri))
        return holder

    def _write(self) -> None:
        store.write_bytes(self._uri, json.dumps({**self._me, "at_s": time.time()}).encode())


def _process(pid: int) -> dict[str, int | str]:
    """The process and when it started, in ticks since boot, so that a later one of the same id is not taken for it.

    "" if it has ended, waited for or not, and where there is no /proc.
    """
    try:
        # After the name in brackets, which may hold anything: the state, and 19 fields on the start.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return {"pid": pid, "started": ""}
    return {"pid": pid, "started": "" if fields[0] in "ZX" else fields[19]}
