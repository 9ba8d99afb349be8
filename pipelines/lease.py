"""OUTPUT/driver.json: one driver writes to an OUTPUT at a time."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any

from pipelines import store

RENEW_S, STALE_S = 10.0, 60.0


class LeaseError(ValueError):
    """Another driver writes to OUTPUT."""


class LeaseLost(RuntimeError):  # noqa: N818
    """Another driver has taken over."""


class Lease:
    """Held while its file says so. The file is renewed as a sign of life; one that is stale may be taken over.

    Object stores have no exclusive create, so two drivers that start within the same moment both think that they have
    it, until the first `check`: the one that wrote last keeps it, the other stops before it writes a row.
    """

    def __init__(self, output: str) -> None:
        self._uri = store.join(output, "driver.json")
        self._me = {"token": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid(), "boot": _boot_id()}
        self._renewed_s = 0.0

    def take(self) -> None:
        """Raises LeaseError saying who has it."""
        holder = self._read()
        if holder and not self._is_dead(holder):
            raise LeaseError(
                f"another run writes here: process {holder['pid']} on {holder['host']}, last sign of life "
                f"{time.time() - holder['at_s']:.0f} s ago. Stop it, or wait {STALE_S:.0f} s if it is gone"
            )
        self._write()

    def check(self) -> None:
        """Before anything is written to OUTPUT. Raises LeaseLost."""
        holder = self._read()
        if holder is None or holder["token"] != self._me["token"]:
            raise LeaseLost("another run has taken over this OUTPUT; this one stops")

    def renew(self) -> None:
        """A sign of life, when the last one is old enough."""
        if time.monotonic() - self._renewed_s > RENEW_S:
            self.check()
            self._write()

    def release(self) -> None:
        holder = self._read()
        if holder and holder["token"] == self._me["token"]:
            store.remove(self._uri)

    def _is_dead(self, holder: dict[str, Any]) -> bool:
        if time.time() - holder["at_s"] > STALE_S:
            return True
        is_here = (holder["host"], holder["boot"]) == (self._me["host"], self._me["boot"])
        return is_here and not Path(f"/proc/{holder['pid']}").exists() and Path("/proc").exists()

    def _read(self) -> dict[str, Any] | None:
        if store.find_file(self._uri) is None:
            return None
        holder: dict[str, Any] = json.loads(store.read_bytes(self._uri))
        return holder

    def _write(self) -> None:
        store.write_bytes(self._uri, json.dumps({**self._me, "at_s": time.time()}).encode())
        self._renewed_s = time.monotonic()


def _boot_id() -> str:
    """Of this boot of this kernel, so that a process id of another one is not taken for ours."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""
