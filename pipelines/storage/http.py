"""A file system for untrusted http(s) URLs: limited in time, bytes and redirects, and to public addresses.

Set the class's options in fsspec's configuration, such as FSSPEC_HTTP='{"total_timeout_s": 300}'.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import time
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp
from fsspec.asyn import AsyncFileSystem, sync, sync_wrapper
from fsspec.spec import AbstractBufferedFile
from yarl import URL

from ovis_model.wording import count_nouns
from pipelines.errors import BusyFault, FinalFault

MAX_REDIRECTS = 5
_CHUNK_BYTES = 64 << 10
_REDIRECTS = (301, 302, 303, 307, 308)
_NOT_FOUND, _FORBIDDEN, _BUSY = (404, 410), (401, 403, 407, 451), (408, 425, 429)
_AS_GIVEN = re.compile(r"[!-~]+")  # printable ASCII is sent unchanged: a signature may cover the exact spelling
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_AZURE_METADATA = ipaddress.ip_address("168.63.129.16")  # in a public range, yet private to Azure's hosts


class AddressRefused(FinalFault):
    """The host is inside the run's own network."""


class WebFileSystem(AsyncFileSystem):  # type: ignore[misc]
    """A read-only file system. Each call makes one attempt; retrying is up to the caller.

    Its OSErrors do not name the URL, which may contain credentials. `max_file_bytes` limits a file that is read whole.
    """

    protocol = ("http", "https")

    def __init__(
        self,
        allow_private: bool = False,
        connect_timeout_s: float = 10,
        read_timeout_s: float = 20,
        total_timeout_s: float = 60,
        max_file_bytes: int = 256 << 20,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._allow_private, self._max_file_bytes = allow_private, max_file_bytes
        self._timeout = aiohttp.ClientTimeout(total_timeout_s, sock_connect=connect_timeout_s, sock_read=read_timeout_s)
        self._session: aiohttp.ClientSession | None = None

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path

    async def _info(self, path: str, **_: Any) -> dict[str, Any]:
        """Request one byte, since not every server supports HEAD. `size` is None if the server does not report it."""
        async with self._request(path, first=0, last=0) as response:
            return {"name": path, "type": "file", "size": _read_size(response)}

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        """Return the file, its first `end` bytes, or the range from `start` to `end`."""
        if start:
            assert end is not None, "a range has an end"
            return await self._cat_range(path, start, end)
        async with self._request(path) as response:
            if (response.content_length or 0) > self._max_file_bytes:
                raise FinalFault(
                    f"the file has {response.content_length:,} bytes, over the limit of {self._max_file_bytes:,}"
                )
            data = await _read_body(response, self._max_file_bytes + 1 if end is None else end)
        if end is None and len(data) > self._max_file_bytes:
            raise FinalFault(f"the file has more than the limit of {self._max_file_bytes:,} bytes")
        return data

    async def _cat_range(self, path: str, start: int, end: int) -> bytes:
        async with self._request(path, first=start, last=end - 1) as response:
            if response.status == 416:
                return b""
            if response.status != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                raise FinalFault(
                    "the server does not support range requests, which shards need; copy the shard elsewhere"
                )
            return await _read_body(response, end - start)

    cat_range = sync_wrapper(_cat_range)

    async def _glob(self, path: str, **_: Any) -> dict[str, Any]:
        return {}

    async def _pipe_file(self, path: str, value: bytes, **_: Any) -> None:
        raise FinalFault("http(s) URLs are read-only; choose another OUTPUT")

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> WebFile:
        size: int | None = self.info(path)["size"]
        if size is None:
            raise FinalFault(
                "the server does not report the size of the file, which shards need; copy the shard elsewhere"
            )
        return WebFile(self, path, mode, block_size or "default", size=size)

    @asynccontextmanager
    async def _request(
        self, url: str, first: int | None = None, last: int | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Yield the server's response after following redirects and checking status and headers."""
        headers = {} if first is None else {"Range": f"bytes={first}-{last}"}
        try:
            async with asyncio.timeout(self._timeout.total), self._follow(_parse(url), headers) as response:
                _check(response)
                yield response
        except TimeoutError as error:
            raise BusyFault("timeout: the server was too slow") from error  # fsspec drops a TimeoutError's text
        except aiohttp.ClientError as error:
            raise _convert_to_os_error(error) from error
        except ValueError as error:  # a header or a host name that cannot be sent
            raise FinalFault(f"the URL cannot be requested: {type(error).__name__}") from error

    @asynccontextmanager
    async def _follow(self, url: URL, headers: dict[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        for _ in range(MAX_REDIRECTS + 1):
            async with self._get_session().get(url, headers=headers, allow_redirects=False) as response:
                if response.status not in _REDIRECTS:
                    yield response
                    return
                url = url.join(_parse(response.headers.get("Location", "")))
                if url.scheme not in self.protocol:
                    raise FinalFault(f"redirected to {url.scheme or 'nowhere'}; only http and https are followed")
        raise FinalFault(f"more than {MAX_REDIRECTS} redirects")

    def _get_session(self) -> aiohttp.ClientSession:
        """Return the session, created at first use. Runs only on fsspec's event loop, so in one thread."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(socket_factory=self._create_socket, limit_per_host=32),
                timeout=self._timeout,
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"Accept-Encoding": "identity", "User-Agent": "ovis2-ray"},
                auto_decompress=False,
            )
            weakref.finalize(self, _close, self.loop, self._session)
        return self._session

    def _create_socket(self, address: Any) -> socket.socket:
        """Create the socket after checking the resolved address, so that neither a redirect nor DNS can bypass it."""
        family, kind, protocol, _, host_and_port = address
        if not (self._allow_private or _is_public(host_and_port[0])):
            raise AddressRefused(f"{host_and_port[0]} is not a public address; --allow-private-addresses permits it")
        return socket.socket(family, kind, protocol)


class WebFile(AbstractBufferedFile):  # type: ignore[misc]
    """A remote file that is read in blocks."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        end = min(end, self.size)
        data: bytes = self.fs.cat_range(self.path, start, end)
        if len(data) != end - start:
            received = count_nouns(len(data), "byte")
            raise OSError(f"received {received} instead of {end - start:,}: truncated, or changed meanwhile")
        return data


def _close(loop: asyncio.AbstractEventLoop, session: aiohttp.ClientSession) -> None:
    """Close the session; else aiohttp logs an error when the process ends."""
    with suppress(Exception):
        sync(loop, session.close, timeout=1)


def _parse(url: str) -> URL:
    return URL(url, encoded=_AS_GIVEN.fullmatch(url) is not None)


def _check(response: aiohttp.ClientResponse) -> None:
    """Raise OSError unless the response has the requested body, or the range starts after the end of the file."""
    status, reason = response.status, f"HTTP {response.status} {response.reason or ''}".rstrip()
    if status in _NOT_FOUND:
        raise FileNotFoundError(reason)
    if status in _FORBIDDEN:
        raise PermissionError(reason)
    if status in _BUSY or status >= 500:
        raise BusyFault(reason, _parse_retry_after_s(response.headers.get("Retry-After", "")))
    if status not in (200, 206, 416):
        raise FinalFault(reason)
    encoding = response.headers.get("Content-Encoding", "identity").lower()
    if encoding != "identity":
        raise FinalFault(f"the server compresses its response ({encoding}) although the request forbids it")


async def _read_body(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """Return at most the first `max_bytes`, counted as they are received, whatever the headers say."""
    data = bytearray()
    async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
        data += chunk
        if len(data) >= max_bytes:
            break
    del data[max_bytes:]
    return bytes(data)


def _read_size(response: aiohttp.ClientResponse) -> int | None:
    total = response.headers.get("Content-Range", "").rpartition("/")[2]
    if response.status in (206, 416):
        return int(total) if total.isdecimal() else None
    return response.content_length


def _parse_retry_after_s(value: str) -> float:
    """Parse a number of seconds or a date; return 0 if the value is neither."""
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


def _convert_to_os_error(error: aiohttp.ClientError) -> OSError:
    """Convert the error to an OSError without the URL, which most of aiohttp's messages contain."""
    cause = getattr(error, "os_error", None)
    if isinstance(cause, OSError):
        return cause if isinstance(cause, AddressRefused) else OSError(f"no connection: {cause.strerror or cause}")
    if isinstance(error, aiohttp.ClientPayloadError):
        return OSError("the response is truncated")
    if isinstance(error, aiohttp.InvalidURL):
        return FinalFault("the URL is invalid")
    return OSError(f"the server's response cannot be read ({type(error).__name__})")


def _is_public(address: str) -> bool:
    """Return whether the address is public; for an IPv6 address that embeds an IPv4 one, whether that is."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        ip = inner or ip
    return ip.is_global and not ip.is_multicast and ip != _AZURE_METADATA
