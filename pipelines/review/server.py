"""Serve the page of a review on this machine only, and keep the decisions.

The address holds a random word, so that other users and web pages cannot reach the answers. Media are read when they
are shown.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any

from pipelines.output.decisions import Decision, make_time_us, read_decisions, write_decision
from pipelines.report.opened import OpenedRun
from pipelines.report.page import encode_for_html
from pipelines.report.sample import make_picked
from pipelines.report.thumbnails import read_media
from pipelines.review.picks import PickedAnswer
from pipelines.storage import store
from pipelines.tasks.answer_types import parse_answer

Json = dict[str, Any]

_MAX_BODY_BYTES = 1 << 20
_MAX_PICTURE_BYTES = 4_000_000
_SCALE = 4.0  # of the pictures, against those of a report: 1,280 px, to judge fine print


class Review:
    """The answers to review and the decisions so far. Thread-safe."""

    def __init__(self, run: OpenedRun, answers: Sequence[PickedAnswer]) -> None:
        self._run, self._answers = run, answers
        self._lock = threading.Lock()
        self._done = {(d.row, d.task): d.text for d in read_decisions(run.output).values()}

    def describe(self) -> list[Json]:
        """Return the answers in their order, with the decisions that exist."""
        return [self._describe(place, answer) for place, answer in enumerate(self._answers)]

    def _describe(self, place: int, answer: PickedAnswer) -> Json:
        about = answer.task.about
        choices = answer.task.choices or (["Yes", "No"] if answer.task.kind == "bool" else [])
        return {
            "place": place,
            "id": store.redact(answer.id),
            "task": answer.task.name,
            "question": answer.question or about.get("prompt") or "",
            "text": answer.text,
            "choices": list(choices),
            "confidence": answer.confidence if answer.confidence == answer.confidence else None,
            "decided": self._done.get((answer.row, answer.task.name)),
        }

    def decide(self, place: int, text: str) -> None:
        """Record that `text` is the right answer. Raise ValueError if the task does not allow it."""
        answer = self._answers[place]
        parse = parse_answer(answer.task.about.get("answer", "text")).parse
        parse(text)
        decision = Decision(
            row=answer.row,
            id=answer.id,
            task=answer.task.name,
            answer=answer.text,
            text=text,
            is_right=_is_same(parse, text, answer.text),
            confidence=answer.confidence,
            at_us=make_time_us(),
        )
        with self._lock:
            write_decision(self._run.output, decision)
            self._done[answer.row, answer.task.name] = text

    def read_pictures(self, place: int) -> Json:
        """Return the thumbnails of a row, or why there are none."""
        answer = self._answers[place]
        rows, run = [make_picked(answer.id, answer.row, answer.times_s)], self._run
        pictures = read_media(run.manifest, rows, run.images, max_bytes=_MAX_PICTURE_BYTES, limit_s=60.0, scale=_SCALE)
        [(_, media)] = pictures
        return media

    @property
    def num_decided(self) -> int:
        """How many of the answers have a decision."""
        return sum((answer.row, answer.task.name) in self._done for answer in self._answers)


def _is_same(parse: Callable[[str], Any], text: str, answer: str) -> bool:
    """Return whether the model's answer has the value of the right text; an invalid answer only if it is that text."""
    with suppress(ValueError):
        return bool(parse(answer) == parse(text))
    return text == answer


class ReviewServer(ThreadingHTTPServer):
    """A server of one review on a port of the loopback interface; `url` is the address of its page."""

    daemon_threads = True

    def __init__(self, review: Review, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.review, self.word = review, secrets.token_urlsafe(16)
        self.url = f"http://127.0.0.1:{self.server_port}/{self.word}/"


class _Handler(BaseHTTPRequestHandler):
    server: ReviewServer

    def do_GET(self) -> None:
        """Answer with the page, or with the pictures of a row."""
        path = self._read_path()
        if path == "":
            nonce = secrets.token_urlsafe(16)
            self._send(200, "text/html; charset=utf-8", _render(self.server.review, nonce), nonce)
        elif path is not None and path.removeprefix("media/").isdecimal():
            self._send_json(200, self.server.review.read_pictures(int(path.removeprefix("media/"))))
        else:
            self._send_json(404, {"error": "there is no such page"})

    def do_POST(self) -> None:
        """Record a decision."""
        length = int(self.headers.get("Content-Length", 0))
        if self._read_path() != "decide" or not 0 < length <= _MAX_BODY_BYTES:
            self._send_json(404, {"error": "there is no such page"})
            return
        try:
            given = json.loads(self.rfile.read(length))
            self.server.review.decide(int(given["place"]), str(given["text"]))
        except (ValueError, KeyError, IndexError) as error:
            self._send_json(400, {"error": str(error)})
        except OSError as error:
            self._send_json(500, {"error": str(error)})
        else:
            self._send_json(200, {"decided": self.server.review.num_decided})

    def _read_path(self) -> str | None:
        """Return the path after the secret word; None without it, or if another name leads to this server."""
        host, prefix = self.headers.get("Host", ""), f"/{self.server.word}/"
        is_ours = host == f"127.0.0.1:{self.server.server_port}" and self.path.startswith(prefix)
        return self.path.removeprefix(prefix) if is_ours else None

    def _send_json(self, status: int, value: Any) -> None:
        self._send(status, "application/json", json.dumps(value).encode())

    def _send(self, status: int, kind: str, body: bytes, nonce: str = "") -> None:
        """Send an answer; only a script and a style with this nonce may run."""
        self.send_response(status)
        own = f"script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; " if nonce else ""
        policy = f"default-src 'none'; {own}img-src data:"
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Content-Security-Policy": f"{policy}; connect-src 'self'; base-uri 'none'; form-action 'none'",
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        """Log nothing: the address holds the secret word."""


def _render(review: Review, nonce: str) -> bytes:
    page = resources.files("pipelines.review").joinpath("page.html").read_text("utf-8")
    page = page.replace("$nonce", nonce)
    return page.replace("$data", encode_for_html(review.describe())).encode("utf-8", "backslashreplace")
