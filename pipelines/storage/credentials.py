"""Recognize that a store refuses the credentials or gets none, and name the settings that give them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipelines.errors import CredentialsRefused

_S3 = (
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN if they are temporary) or AWS_PROFILE, "
    "or FSSPEC_S3_ANON=true for a public bucket"
)
_GS = "GOOGLE_APPLICATION_CREDENTIALS to the file of a key, or run gcloud auth application-default login"
_AZURE = (
    "AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, "
    "or AZURE_STORAGE_CONNECTION_STRING"
)
_SETTINGS = {"s3": _S3, "s3a": _S3, "gs": _GS, "gcs": _GS, "az": _AZURE, "abfs": _AZURE, "abfss": _AZURE}
_SETTINGS |= {"hf": "HF_TOKEN"}

# Of the stores' clients, which need not be installed: therefore names. First botocore's, then Google's and Azure's.
_ERROR_NAMES = frozenset(
    (
        *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"),
        *("TokenRetrievalError", "SSOError", "SSOTokenLoadError", "UnauthorizedSSOTokenError"),
        *("DefaultCredentialsError", "RefreshError", "ClientAuthenticationError", "CredentialUnavailableError"),
    )
)
_S3_CODES = frozenset(
    (
        *("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "ExpiredTokenException", "InvalidToken"),
        *("TokenRefreshRequired", "InvalidClientTokenId", "UnrecognizedClientException", "AuthFailure"),
        *("CredentialsNotSupported", "InvalidSecurity", "MissingSecurityHeader", "NotSignedUp", "AccountProblem"),
        *("Unauthorized", "401"),
    )
)


def explain_refusal(error: Exception, protocols: str | tuple[str, ...]) -> OSError | None:
    """Return what to raise instead of a client's exception about access, with the remedy; None for any other one.

    CredentialsRefused: there are no credentials, or the store knows or accepts none of them: no file can be read.
    PermissionError: the credentials are valid, but not for this file.
    """
    settings = name_settings(protocols)
    for cause in _list_causes(error):
        code, reason = _read_code(cause), _describe(cause)
        if type(cause).__name__ in _ERROR_NAMES or code in _S3_CODES:
            return CredentialsRefused(f"no valid credentials ({reason}); on every node, set {settings}")
        if code == "403" or isinstance(cause, PermissionError) or _is_forbidden_by_gcs(cause):
            return PermissionError(f"access is denied ({_describe(error)}); permit it, or set {settings}")
    return None


def name_settings(protocols: str | tuple[str, ...]) -> str:
    """Return the settings that give credentials to stores of these protocols, as the object of "set"."""
    names = (protocols,) if isinstance(protocols, str) else protocols
    return next((_SETTINGS[name] for name in names if name in _SETTINGS), "the credentials of this store")


def _list_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the exceptions from the first cause to `error`: the first knows most."""
    if error is not None:
        yield from _list_causes(error.__cause__)
        yield error


def _read_code(error: Any) -> str:
    """Return the code that a store answered: one of S3's names, or an HTTP status; "" if it did not answer."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # of botocore
        return str(response.get("Error", {}).get("Code", ""))
    for holder, name in ((error, "status_code"), (response, "status_code"), (error, "code"), (error, "status")):
        if isinstance(status := getattr(holder, name, None), int):
            return str(status)
    return ""


def _describe(error: Any) -> str:
    """Return the code or type of an exception and the first line of its message."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        answer = response.get("Error", {})
        return f"{answer.get('Code', 'unknown')}: {answer.get('Message', 'no reason given')}"
    first_line = next(iter(str(error).strip().splitlines()), "")
    return first_line if isinstance(error, OSError) and first_line else f"{type(error).__name__}: {first_line}"


def _is_forbidden_by_gcs(error: BaseException) -> bool:
    """Return whether this is gcsfs's error for HTTP 403, which has neither a type nor a number."""
    return type(error) is OSError and str(error).startswith("Forbidden: ")
