"""http(s) URLs yield bytes or one clear fault in bounded time, whatever the server does; private hosts are refused."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest

from pipelines.errors import BusyFault, FinalFault, SourceError
from pipelines.media.fetch import Fetcher
from pipelines.media.reference import parse_reference
from pipelines.storage import http, store
from pipelines.storage.http import WebFileSystem
from tests.support.fetched import fetch_images, is_refused
from tests.support.jsonl_files import write_lines
from tests.support.parquet_files import HF, write
from tests.support.pictures import encode_picture
from tests.support.rows import list_input
from tests.support.tars import write_tar
from tests.support.web_server import WebServer


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    options = {"allow_private": True, "connect_timeout_s": 0.5, "read_timeout_s": 0.5, "total_timeout_s": 1}
    monkeypatch.setitem(fsspec.config.conf, "http", options)
    monkeypatch.setattr(store, "WEB_RETRIES", replace(store.WEB_RETRIES, first_pause_s=0.01, patience_s=1.5))
    WebFileSystem.clear_instance_cache()
    with WebServer().run() as server:
        server.files["/a.png"] = encode_picture(1)
        yield server


def read(url: str) -> bytes:
    return store.read_bytes(url, 0, 1000)


def list_web_input(*inputs: object, **options: object) -> list[dict[str, Any]]:
    return list_input(*inputs, allow_private_addresses=True, **options)


@pytest.mark.parametrize(
    ("path", "error", "message", "requests"),
    [
        ("/missing", FileNotFoundError, "^HTTP 404 Not Found$", 1),
        ("/private", PermissionError, "HTTP 403", 1),
        ("/teapot", FinalFault, "HTTP 418", 1),
        ("/loop", FinalFault, "more than 5 redirects", 6),
        ("/file", FinalFault, "redirected to file", 1),
        ("/packed", FinalFault, "compresses its response", 1),
        ("/huge", FinalFault, "99,999,999,999 bytes, over the limit", 1),
        ("/broken", BusyFault, "HTTP 500", 5),
        ("/truncated", OSError, "is truncated", 5),
        ("/junk", OSError, "cannot be read", 5),
        ("/endless-header", OSError, "cannot be read", 5),
        ("/silent", BusyFault, "timeout", 3),
        ("/drip", BusyFault, "timeout", 2),
        ("/drip-body", BusyFault, "timeout", 2),
    ],
)
def test_faults_are_named_and_retried_if_they_may_pass(
    web: WebServer, path: str, error: type[OSError], message: str, requests: int
) -> None:
    started_s = time.monotonic()
    with pytest.raises(error, match=message) as raised:
        read(f"{web.url}{path}?secret=1")
    assert isinstance(raised.value, OSError) and "secret" not in repr(raised.value)
    assert time.monotonic() - started_s < 60  # PATIENCE_S and the last attempt, on a loaded machine
    min_requests = (
        1 if message == "timeout" else requests
    )  # how many timeouts fit into PATIENCE_S depends on the machine
    assert min_requests <= web.requests[path] <= requests + 1


def test_temporary_faults_are_waited_out(web: WebServer) -> None:
    started_s = time.monotonic()
    assert read(f"{web.url}/busy").startswith(b"after 429")
    assert time.monotonic() - started_s >= 1, "retried before the time that the server asked for"
    assert read(f"{web.url}/unwell").startswith(b"after 503")
    assert read(f"{web.url}/away") == encode_picture(1)[:1000]


def test_the_size_limit_applies_to_received_bytes(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(f"{web.url}/endless") == b"x" * 1000
    monkeypatch.setitem(fsspec.config.conf["http"], "max_file_bytes", 1 << 20)
    with pytest.raises(FinalFault, match="more than the limit"):
        store.read_bytes(f"{web.url}/endless")


INSIDE = ["127.0.0.1", "10.0.0.1", "169.254.169.254", "0.0.0.0", "100.100.100.200", "168.63.129.16", "224.0.0.1"]
INSIDE_V6 = ["::1", "::ffff:127.0.0.1", "fe80::1", "fd00:ec2::254", "64:ff9b::a9fe:a9fe", "2002:7f00:1::"]


@pytest.mark.parametrize("address", [*INSIDE, *INSIDE_V6])
def test_private_addresses_are_recognised(address: str) -> None:
    assert not http._is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "64:ff9b::808:808"])
def test_public_addresses_are_recognised(address: str) -> None:
    assert http._is_public(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]", "127.1"])
def test_private_addresses_are_refused_in_every_spelling(web: WebServer, host: str) -> None:
    store.allow_private_addresses(False)
    with pytest.raises(
        OSError, match=r"not a public address; --allow-private|no connection|cannot be requested|URL is invalid"
    ):
        read(f"http://{host}:{web.port}/a.png")
    assert not web.requests


def test_the_address_that_is_connected_to_is_checked(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name may resolve to a public address when checked and to a private one when used (DNS rebinding)."""
    store.allow_private_addresses(False)
    answers = iter([[("93.184.215.14", 80)], [("127.0.0.1", web.port)]])

    def resolve(*_: object, **__: object) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in next(answers)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    socket.getaddrinfo("rebinding.example", web.port)
    with pytest.raises(http.AddressRefused, match=r"127\.0\.0\.1 is not a public address"):
        read(f"http://rebinding.example:{web.port}/a.png")
    assert not web.requests


def test_redirects_to_private_addresses_are_refused(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server itself counts as public here, so only the redirect is checked."""
    store.allow_private_addresses(False)
    is_public = http._is_public
    monkeypatch.setattr(http, "_is_public", lambda address: address == "127.0.0.1" or is_public(address))
    with pytest.raises(http.AddressRefused, match=r"169\.254\.169\.254 is not a public address"):
        read(f"{web.url}/metadata")
    assert web.requests["/metadata"] == 1


def test_credentials_are_sent_to_their_host_only(web: WebServer) -> None:
    read(f"http://user:password@localhost:{web.port}/a.png")
    [headers] = web.headers
    assert headers["Host"] == f"localhost:{web.port}" and headers["Authorization"].startswith("Basic ")
    web.faults["/elsewhere"] = lambda handler: handler.answer(302, Location=f"{web.url}/a.png")
    read(f"http://user:password@localhost:{web.port}/elsewhere")
    assert "Authorization" in web.headers[-2] and "Authorization" not in web.headers[-1]


def test_credentials_are_neither_reported_nor_logged(
    web: WebServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = f"http://user:password@127.0.0.1:{web.port}"
    web.files["/bad.parquet"] = b"PAR1 not really"
    for url in (
        f"{secret}/missing?signature=abc",
        f"{secret}/bad.parquet?signature=abc",
        f"{secret}/a.zip?signature=a",
    ):
        with pytest.raises(SourceError) as error:
            list_web_input(url)
        assert "password" not in str(error.value) and "signature" not in str(error.value)
    web.files["/a.tar"] = write_tar(tmp_path / "a.tar", [("1.jpg", b"x"), ("1.cls", b"3")]).read_bytes()
    list_web_input(f"{secret}/a.tar?signature=abc")
    with pytest.raises(SourceError) as error:
        list_web_input(*[f"{secret}/a.png?signature=abc"] * 2)
    assert "repeats an id" in str(error.value) and "password" not in str(error.value) + caplog.text
    assert "signature" not in str(error.value) + caplog.text


def test_urls_may_be_files_shards_and_values_of_columns(web: WebServer, tmp_path: Path) -> None:
    for i in range(3):
        web.files[f"/{i}.png"] = encode_picture(i)
    members = [(f"{i}.png", encode_picture(i)) for i in range(3)]
    table = {"image": pa.array([{"bytes": encode_picture(i), "path": None} for i in range(3)], HF), "n": range(3)}
    for path in (
        write_tar(tmp_path / "a.tar", members),
        write_tar(tmp_path / "b.tgz", members, "w:gz"),
        write(tmp_path / "c.parquet", table),
        write(tmp_path / "d.parquet", {"url": [f"{web.url}/{i}.png" for i in range(3)]}),
        write_lines(tmp_path / "e.jsonl", *({"image": f"{i}.png"} for i in range(3))),
    ):
        web.files[f"/{path.name}"] = path.read_bytes()
    rows = list_web_input(
        f"{web.url}/0.png?size=large", *(f"{web.url}/{n}" for n in ("a.tar", "b.tgz", "c.parquet", "d.parquet"))
    )
    assert fetch_images(rows) == [[encode_picture(i)] for i in (0, *(0, 1, 2) * 4)]
    assert rows[0]["images"][0]["num_bytes"] == len(encode_picture(0))
    assert fetch_images(list_web_input(f"{web.url}/e.jsonl?signature=x")) == [[encode_picture(i)] for i in range(3)]


def test_a_shard_on_a_server_without_ranges_is_refused(web: WebServer) -> None:
    with pytest.raises(SourceError, match="does not support range requests"):
        list_web_input(f"{web.url}/no-ranges.tar")


def test_writing_over_http_is_refused(web: WebServer) -> None:
    with pytest.raises(OSError, match="choose another OUTPUT"):
        store.write_bytes(f"{web.url}/out", b"x")


def test_each_bad_url_is_one_error_row(web: WebServer, tmp_path: Path) -> None:
    urls = [
        "http://",
        "http://[",
        "http://a b",
        "http:///x",
        "http://\r\nHost: x/",
        "http://exa mple/\0",
        "http://a:99999",
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"image": url}) for url in [*urls, f"{web.url}/a.png"]))
    fetcher = Fetcher()
    futures = [fetcher.submit([parse_reference(image) for image in row["images"]]) for row in list_web_input(path)]
    assert [is_refused(future) for future in futures] == [True] * len(urls) + [False]
