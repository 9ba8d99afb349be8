"""Check RAY_ADDRESS before Ray connects: Ray itself would retry for minutes, or end the process."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from pipelines.errors import ResourceError

_CONNECT_S = 4
_PROBE_S = 8  # with _CONNECT_S, a job ends within 15 s
_REMEDY = (
    "give HOST:PORT of the cluster's head (port 6379 unless changed; neither the dashboard's port nor Ray Client's), "
    'or "auto" inside a `ray job submit`; unset it to run on this machine'
)
# One call in HTTP/2 by hand: importing Ray or gRPC in a child process would cost each job 2 s. Ray's client in this
# process cannot be interrupted, and it ends the process if nothing responds.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS = 0, 1, 4
_END_STREAM, _END_HEADERS = 1, 4
_CALL = {
    ":method": "POST",
    ":scheme": "http",
    ":path": "/ray.rpc.NodeInfoGcsService/GetClusterId",
    ":authority": "head",
    "content-type": "application/grpc",
    "te": "trailers",
}
_UNIMPLEMENTED, _UNAUTHENTICATED = b"12", b"16"
# It honours Ray's settings for TLS and tokens.
_RAY_PROBE = """
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
        connection = socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S)
    except (OSError, OverflowError) as error:
        raise ResourceError(
            f"RAY_ADDRESS={address} does not respond ({error}); start that cluster, {_REMEDY}"
        ) from error
    with connection:
        uses_tls = os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")
        status = None if uses_tls else _call_head(connection, address)
    if status in (None, _UNAUTHENTICATED):
        _probe_with_ray(address)
    elif status == _UNIMPLEMENTED:
        raise ResourceError(f"RAY_ADDRESS={address} responds, but not as a Ray head; {_REMEDY}")


def _call_head(connection: socket.socket, address: str) -> bytes:
    """Ask for the id of the cluster -> the status of the call, "" if it is not understood. Raise ResourceError."""
    token = _find_token(os.environ)
    fields = {**_CALL, **({"authorization": f"Bearer {token}"} if token else {})}
    headers = b"".join(map(_encode_field, fields.items()))
    call = _pack_frame(_HEADERS, _END_HEADERS, headers) + _pack_frame(_DATA, _END_STREAM, bytes(5))
    data, ends_s = b"", time.monotonic() + _PROBE_S
    with suppress(TimeoutError, ConnectionError):
        connection.sendall(_PREFACE + _pack_frame(_SETTINGS, 0, b"", stream=0) + call)
        while not _read_status(data) and (left_s := ends_s - time.monotonic()) > 0:
            connection.settimeout(left_s)
            if not (received := connection.recv(1 << 16)):
                break
            data += received
            if data[3:4] != bytes([_SETTINGS]):
                break
    if not data:
        raise ResourceError(f"RAY_ADDRESS={address} connects, but no Ray head responds; {_REMEDY}")
    if data[3:4] != bytes([_SETTINGS]):
        raise ResourceError(f"RAY_ADDRESS={address} responds, but not as a Ray head; {_REMEDY}")
    return _read_status(data)


def _pack_frame(kind: int, flags: int, payload: bytes, *, stream: int = 1) -> bytes:
    return struct.pack("!I", len(payload))[1:] + struct.pack("!BBI", kind, flags, stream) + payload


def _encode_field(field: tuple[str, str]) -> bytes:
    """Encode a header field in HPACK as it is, without tables and Huffman codes; up to 126 bytes each."""
    name, value = (part.encode() for part in field)
    return b"\x10" + bytes([len(name)]) + name + bytes([len(value)]) + value


def _read_status(data: bytes) -> bytes:
    """Return the digits after `grpc-status`, which gRPC writes as they are; "" if there are none."""
    _, _, rest = data.partition(b"grpc-status")
    return rest[1 : 1 + rest[0]] if rest and len(rest) > rest[0] else b""


def _find_token(environment: Mapping[str, str]) -> str:
    """Return the token that Ray would send: of the environment or of the home directory; "" for none."""
    if token := environment.get("RAY_AUTH_TOKEN", ""):
        return token
    with suppress(OSError, RuntimeError, ValueError):
        path = environment.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
        token = Path(path).read_text().strip()
    return token if len(token) < 120 else ""


def _probe_with_ray(address: str) -> None:
    """Raise ResourceError unless Ray's client reads the id of the cluster there, within 8 s."""
    command = [sys.executable, "-c", _RAY_PROBE, address]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROBE_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise ResourceError(f"RAY_ADDRESS={address} connects, but no Ray head responds; {_REMEDY}") from error
    if done.returncode:
        raise ResourceError(f"RAY_ADDRESS={address} responds, but not as a Ray head; {_REMEDY}")
