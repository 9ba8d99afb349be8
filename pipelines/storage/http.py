"""A file system for http(s) URLs of strangers: bounded in time, bytes and redirects, and to public addresses.

Options of the class go into fsspec's configuration, such as FSSPEC_HTTP='{"total_timeout_s": 300}'.
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

from pipelines.errors import BusyFault, FinalFault

MAX_REDIRECTS = 5
_CHUNK_BYTES = 64 << 10
_REDIRECTS = (301, 302, 303, 307, 308)
_NOT_FOUND, _FORBIDDEN, _BUSY = (404, 410), (401, 403, 407, 451), (408, 425, 429)
_AS_GIVEN = re.compile(r"[!-~]+")  # printable ASCII is sent as it is: a signature may cover its spelling
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_AZURE_METADATA = ipaddress.ip_address("168.63.129.16")  # public by its number only


class AddressRefused(FinalFault):
    """A host inside the network that the run is in."""


class WebFileSystem(AsyncFileSystem):  # type: ignore[misc]
    """A read-only file system. Its OSErrors do not name the URL, which may hold credentials; one request per attempt.

    At most `max_file_bytes` are read of a file that is read whole.
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
        """Ask for one byte, as not every server answers HEAD. `size` is None if the server does not report it."""
        async with self._request(path, first=0, last=0) as response:
            return {"name": path, "type": "file", "size": _read_size(response)}

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        """Return a file from its start, at most `end` bytes, or else the range."""
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
                    "the server does not serve ranges of files, which shards need; copy the shard elsewhere"
                )
            return await _read_body(response, end - start)

    cat_range = sync_wrapper(_cat_range)

    async def _glob(self, path: str, **_: Any) -> dict[str, Any]:
        return {}

    async def _pipe_file(self, path: str, value: bytes, **_: Any) -> None:
        raise FinalFault("nothing can be written by http; choose another OUTPUT")

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> WebFile:
        size: int | None = self.info(path)["size"]
        if size is None:
            raise FinalFault(
                "the server does not tell the size of the file, which shards need; copy the shard elsewhere"
            )
        return WebFile(self, path, mode, block_size or "default", size=size)

    @asynccontextmanager
    async def _request(
        self, url: str, first: int | None = None, last: int | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Yield the server's response after redirects, status and headers checked."""
        headers = {} if first is None else {"Range": f"bytes={first}-{last}"}
        try:
            async with asyncio.timeout(self._timeout.total), self._follow(_parse(url), headers) as response:
                _check(response)
                yield response
        except TimeoutError as error:
            raise BusyFault("timeout: the server was too slow") from error  # fsspec takes the text off a TimeoutError
        except aiohttp.ClientError as error:
            raise _convert_to_os_error(error) from error
        except ValueError as error:  # of a header or a name that cannot be sent
            raise FinalFault(f"the URL cannot be asked for: {type(error).__name__}") from error

    @asynccontextmanager
    async def _follow(self, url: URL, headers: dict[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        for _ in range(MAX_REDIRECTS + 1):
            async with self._get_session().get(url, headers=headers, allow_redirects=False) as response:
                if response.status not in _REDIRECTS:
                    yield response
                    return
                url = url.join(_parse(response.headers.get("Location", "")))
                if url.scheme not in self.protocol:
                    raise FinalFault(f"a redirect to {url.scheme or 'nowhere'}")
        raise FinalFault(f"more than {MAX_REDIRECTS} redirects")

    def _get_session(self) -> aiohttp.ClientSession:
        """Return the session, on fsspec's event loop, of one thread."""
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
        """Check the address connected to, whatever name or redirect led to it, and however often it was resolved."""
        family, kind, protocol, _, where = address
        if not (self._allow_private or _is_public(where[0])):
            raise AddressRefused(f"{where[0]} is not a public address; --allow-private-addresses permits it")
        return socket.socket(family, kind, protocol)


class WebFile(AbstractBufferedFile):  # type: ignore[misc]
    """A file that is read in blocks."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        end = min(end, self.size)
        data: bytes = self.fs.cat_range(self.path, start, end)
        if len(data) != end - start:
            raise OSError(f"{len(data):,} bytes came instead of {end - start:,}: truncated, or changed meanwhile")
        return data


def _close(loop: asyncio.AbstractEventLoop, session: aiohttp.ClientSession) -> None:
    """Close the session, or aiohttp complains when the process ends."""
    with suppress(Exception):
        sync(loop, session.close, timeout=1)


def _parse(url: str) -> URL:
    return URL(url, encoded=_AS_GIVEN.fullmatch(url) is not None)


def _check(response: aiohttp.ClientResponse) -> None:
    """Raise OSError unless there is a body as it was asked for, or the range lies behind the end."""
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
        raise FinalFault(f"the server packs its answer ({encoding}) although it was asked not to")


async def _read_body(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """Return the first `max_bytes` at most, counted as they come, whatever the headers say."""
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
    """Parse seconds or a date; return 0 if there is none."""
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


def _convert_to_os_error(error: aiohttp.ClientError) -> OSError:
    """Convert the error, without the URL that aiohttp puts into most of its messages."""
    cause = getattr(error, "os_error", None)
    if isinstance(cause, OSError):
        return cause if isinstance(cause, AddressRefused) else OSError(f"no connection: {cause.strerror or cause}")
    if isinstance(error, aiohttp.ClientPayloadError):
        return OSError("the answer ended too early: truncated")
    if isinstance(error, aiohttp.InvalidURL):
        return FinalFault("not a URL that can be asked for")
    return OSError(f"the server's answer cannot be read ({type(error).__name__})")


def _is_public(address: str) -> bool:
    """Return whether the address is public, also the one that an IPv6 address leads to by translation."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        ip = inner or ip
    return ip.is_global and not ip.is_multicast and ip != _AZURE_METADATA
