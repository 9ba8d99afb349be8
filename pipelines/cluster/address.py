"""Check RAY_ADDRESS before Ray connects: Ray itself would retry for minutes, or end the process."""

from __future__ import annotations

import socket
import subprocess
import sys

from pipelines.errors import ResourceError

_CONNECT_S = 4
_PROBE_S = 8  # the start of Python and Ray takes 2 s of it; with _CONNECT_S, a job ends within 15 s
_REMEDY = (
    "give HOST:PORT of the cluster's head (port 6379 unless changed; neither the dashboard's port nor Ray Client's), "
    'or "auto" inside a `ray job submit`; unset it to run on this machine'
)
# In a process of its own, since Ray's client cannot be interrupted. It honours Ray's settings for TLS and tokens.
_PROBE = """
import sys
from ray._private.services import canonicalize_bootstrap_address
from ray._raylet import GcsClient
GcsClient(address=canonicalize_bootstrap_address(sys.argv[1]))
"""


def check_address(address: str) -> None:
    """Raise ResourceError unless a Ray head answers at HOST:PORT within 15 s; leave "auto" and the like to Ray."""
    if "://" in address:
        raise ResourceError(f"RAY_ADDRESS={address} is a URL, which jobs cannot join; {_REMEDY}")
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise ResourceError(
            f"RAY_ADDRESS={address} does not respond ({error}); start that cluster, {_REMEDY}"
        ) from error
    _probe_head(address)


def _probe_head(address: str) -> None:
    """Raise ResourceError unless Ray's client reads the id of the cluster there, within 8 s."""
    command = [sys.executable, "-c", _PROBE, address]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROBE_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise ResourceError(f"RAY_ADDRESS={address} connects, but no Ray head responds; {_REMEDY}") from error
    if done.returncode:
        raise ResourceError(f"RAY_ADDRESS={address} responds, but not as a Ray head; {_REMEDY}")
