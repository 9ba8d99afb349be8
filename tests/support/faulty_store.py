"""A real S3 server with a proxy in front of it that fails as stores do and counts the reads."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

from moto.server import ThreadedMotoServer

Fault = Literal["error", "cut", "stall"]


@dataclass
class Faults:
    """Faults to inject: a `share` of requests fails with one of `kinds`; paths containing one of `broken` all do."""

    share: float = 0.0
    kinds: tuple[Fault, ...] = ("error",)
    broken: tuple[str, ...] = ()
    stall_s: float = 10.0
    seed: int = 0
    reads: Counter[str] = field(default_factory=Counter)  # complete bodies sent, by path
    num_faults: int = 0

    def __post_init__(self) -> None:
        self._rng, self._lock = random.Random(self.seed), threading.Lock()

    def draw(self, path: str) -> Fault | None:
        with self._lock:
            if any(part in path for part in self.broken):
                return "error"
            if self._rng.random() >= self.share:
                return None
            self.num_faults += 1
            return self._rng.choice(self.kinds)


class FaultyStore:
    """A store at `endpoint` (for AWS_ENDPOINT_URL); `faults` may be replaced while it runs."""

    def __init__(self) -> None:
        self.faults = Faults()
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it logs every request
        self._moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._moto.start()
        upstream = self._moto.get_host_and_port()
        store = self

        class Handler(_Proxy):
            def handle_any(self) -> None:
                self.forward(upstream, store.faults)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._moto.stop()

    def to_environment(self) -> dict[str, str]:
        """Return the environment variables with which a user would configure the store."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    @contextmanager
    def inject(self, faults: Faults) -> Iterator[Faults]:
        self.faults = faults
        try:
            yield faults
        finally:
            self.faults = Faults()


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def forward(self, upstream: tuple[str, int], faults: Faults) -> None:
        body = self._read_body()
        fault = faults.draw(self.path)
        if fault == "stall":
            time.sleep(faults.stall_s)
        if fault == "error":
            self._answer(503, {"Content-Type": "application/xml"}, _SLOW_DOWN)
            return
        connection = HTTPConnection(*upstream)
        connection.request(self.command, self.path, body, dict(self.headers))
        response = connection.getresponse()
        data = response.read()
        headers = {name: value for name, value in response.getheaders() if name.lower() not in _HOP_BY_HOP}
        length = response.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        if fault == "cut" and len(data) > 1:
            data = data[: len(data) // 2]
            self.close_connection = True
        elif self.command == "GET":
            faults.reads[self.path.partition("?")[0]] += 1
        self._answer(response.status, {**headers, "Content-Length": length or "0"}, data)
        connection.close()

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def handle_any(self) -> None:
        raise NotImplementedError

    def do_GET(self) -> None:
        self.handle_any()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

    def log_message(self, *arguments: object) -> None:
        pass


_HOP_BY_HOP = {"content-length", "transfer-encoding", "connection", "keep-alive", "date", "server"}
_SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
