"""A web server on loopback with one fault per path."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class WebServer:
    """A server that sends `files` by path, with ranges, calls `faults` by path, and counts `requests` by path."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, Callable[[Handler], None]] = dict(FAULTS)
        self.requests: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        self.closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"web": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.port = self._server.server_address[1]

    @contextmanager
    def run(self) -> Iterator[WebServer]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield self
        finally:
            self.closing.set()
            self._server.shutdown()
            self._server.server_close()
            thread.join()


class Handler(BaseHTTPRequestHandler):
    web: WebServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.web.requests[path] += 1
        self.web.headers.append(dict(self.headers))
        with suppress(ConnectionError):
            if path in self.web.faults:
                self.close_connection = True
                self.web.faults[path](self)
            elif path in self.web.files:
                self._serve(self.web.files[path])
            else:
                self.answer(404, b"nothing here")

    def _serve(self, data: bytes) -> None:
        given = self.headers.get("Range")
        if given is None:
            self.answer(200, data)
            return
        first, last = map(int, given.removeprefix("bytes=").split("-"))
        if first >= len(data):
            self.answer(416, b"", **{"Content-Range": f"bytes */{len(data)}"})
            return
        part = data[first : last + 1]
        self.answer(206, part, **{"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(data)}"})

    def answer(self, status: int, data: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def _redirect(to: str) -> Callable[[Handler], None]:
    return lambda handler: handler.answer(302, Location=to)


def _drip(handler: Handler) -> None:
    """Send a header byte every 0.1 s, forever."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Drip: ")
    while not handler.web.closing.wait(0.1):
        handler.wfile.write(b"x")


def _drip_body(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    while not handler.web.closing.wait(0.1):
        handler.wfile.write(b"x")


def _stay_silent(handler: Handler) -> None:
    handler.web.closing.wait()


def _send_endless_body(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while not handler.web.closing.is_set():
        handler.wfile.write(b"x" * 65536)


def _send_endless_header(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while not handler.web.closing.is_set():
        handler.wfile.write(b"X-More: " + b"x" * 1000 + b"\r\n")


def _send_part(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nonly this")


def _fail_once(status: int, **headers: str) -> Callable[[Handler], None]:
    def answer(handler: Handler) -> None:
        path = handler.path.partition("?")[0]
        if handler.web.requests[path] == 1:
            handler.answer(status, b"", **headers)
        else:
            handler.answer(200, f"after {status}, {time.monotonic()}".encode())

    return answer


def _send_gzip_bomb(handler: Handler) -> None:
    handler.answer(200, b"\x1f\x8b" + b"x" * 100, **{"Content-Encoding": "gzip"})


FAULTS: dict[str, Callable[[Handler], None]] = {
    "/loop": _redirect("/loop"),
    "/away": _redirect("/a.png"),
    "/metadata": _redirect("http://169.254.169.254/latest/meta-data/"),
    "/file": _redirect("file:///etc/passwd"),
    "/nowhere": _redirect(""),
    "/drip": _drip,
    "/drip-body": _drip_body,
    "/silent": _stay_silent,
    "/endless": _send_endless_body,
    "/endless-header": _send_endless_header,
    "/truncated": _send_part,
    "/busy": _fail_once(429, **{"Retry-After": "1"}),
    "/unwell": _fail_once(503),
    "/broken": lambda handler: handler.answer(500),
    "/private": lambda handler: handler.answer(403),
    "/teapot": lambda handler: handler.answer(418),
    "/packed": _send_gzip_bomb,
    "/huge": lambda handler: handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\nx"),
    "/no-ranges.tar": lambda handler: handler.answer(200, b"\0" * 5000),
    "/junk": lambda handler: handler.wfile.write(b"\0\1\2 not HTTP at all\r\n\r\n"),
}
