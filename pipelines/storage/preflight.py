"""Check before a job begins that its stores respond and accept the credentials."""

from __future__ import annotations

from collections.abc import Iterable

from fsspec.asyn import AsyncFileSystem

from pipelines.errors import CredentialsRefused, StoreError, StoreFault
from pipelines.storage import store
from pipelines.storage.credentials import explain_refusal
from pipelines.storage.retries import Retries

_RETRIES = Retries(max_attempts=3, patience_s=15.0)
_ATTEMPT_S = 12.0  # in which the clients themselves retry several times
# Of the stores' clients, which need not be installed: therefore names.
_NO_CONNECTION = frozenset(
    (
        *(
            "EndpointConnectionError",
            "ConnectTimeoutError",
            "ConnectionClosedError",
            "ProxyConnectionError",
            "SSLError",
        ),
        *("ClientConnectorError", "ClientConnectorDNSError", "ServiceRequestError", "ServiceRequestTimeoutError"),
        "FSTimeoutError",
    )
)


class _NoConnection(OSError):  # noqa: N818  (the name says what happened)
    """The store does not respond; the argument is the client's exception."""


def check_stores(uris: Iterable[str]) -> None:
    """Check the store of each URI. Local files and the web pass, and so do faults that are not about access.

    Raise StoreError if there are no valid credentials, StoreFault if a store has not responded for 15 to 30 s.
    """
    by_root = {store.get_store_root(uri): uri for uri in uris}
    for root, uri in by_root.items():
        fs, path = store.open_store(uri if root else "")
        if isinstance(fs, AsyncFileSystem) and "http" not in fs.protocol:
            _check(fs, path, uri)


def _check(fs: AsyncFileSystem, path: str, uri: str) -> None:
    root = store.redact(store.get_store_root(uri))
    try:
        _RETRIES.run(lambda: _request(fs, f"{path.rstrip('/')}/run.json"))
    except CredentialsRefused as error:
        raise StoreError(f"{root}: {error}") from error
    except _NoConnection as error:
        raise StoreFault(
            f"{root} cannot be reached: {_name_endpoint(fs)} does not respond ({error}); check its address "
            "and the network"
        ) from error


def _request(fs: AsyncFileSystem, path: str) -> None:
    """Read a byte of a file, which need not exist: unlike HEAD, the response to GET says why access is refused."""
    try:
        fs.cat_file(path, start=0, end=1, timeout=_ATTEMPT_S)
    except Exception as error:  # each client has exceptions of its own; the job itself meets all others again
        refusal = explain_refusal(error, fs.protocol)
        if isinstance(refusal, CredentialsRefused):
            raise refusal from error
        if type(error).__name__ in _NO_CONNECTION:
            raise _NoConnection(type(error).__name__) from error


def _name_endpoint(fs: AsyncFileSystem) -> str:
    """Return the address of an S3 store, which AWS_ENDPOINT_URL may set; for other stores their protocol."""
    client = getattr(fs, "_s3", None)
    return f"AWS_ENDPOINT_URL={client.meta.endpoint_url}" if client else f"the store of {fs.unstrip_protocol('')}"
