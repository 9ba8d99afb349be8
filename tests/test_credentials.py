"""Missing and refused credentials end a job within seconds with exit code 2 and the settings to set."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from jobs import caption, compact, report
from pipelines.config import CaptionConfig
from pipelines.errors import CredentialsRefused, StoreFault
from pipelines.sources import list_rows
from pipelines.storage import preflight
from pipelines.storage.credentials import explain_refusal
from pipelines.storage.preflight import check_stores
from tests.support.golden_data import checkpoint_dir
from tests.support.guarded_store import REGION, GuardedStore
from tests.support.pictures import encode_picture
from tests.support.processes import run_caption
from tests.support.stages import make_stage, run_stage
from tests.support.web_server import WebServer

MODEL = str(checkpoint_dir("tiny56-tied"))
IN, OUT = "s3://guarded/in", "s3://guarded/out"
KEY_SETTINGS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "FSSPEC_S3_ANON")


@pytest.fixture(scope="module")
def guarded() -> Iterator[GuardedStore]:
    server = GuardedStore()
    for i in range(4):
        server.files.put_object(Bucket="guarded", Key=f"in/{i}.png", Body=encode_picture(i))
    yield server
    server.close()


@pytest.fixture
def environment(guarded: GuardedStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """Configure the store without credentials; a test adds some."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", guarded.endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    S3FileSystem.clear_instance_cache()  # fsspec caches file systems with the environment of their first use
    yield monkeypatch
    S3FileSystem.clear_instance_cache()


def use_key(environment: pytest.MonkeyPatch, key: tuple[str, str]) -> None:
    environment.setenv("AWS_ACCESS_KEY_ID", key[0])
    environment.setenv("AWS_SECRET_ACCESS_KEY", key[1])


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, "NoCredentialsError"),
        ({"AWS_ACCESS_KEY_ID": "AKIAABSENT"}, "PartialCredentialsError"),
        ({"AWS_PROFILE": "absent"}, "ProfileNotFound"),
        ({"AWS_ACCESS_KEY_ID": "AKIAABSENT", "AWS_SECRET_ACCESS_KEY": "x"}, "InvalidAccessKeyId"),
        ({"AWS_ACCESS_KEY_ID": "OWNER", "AWS_SECRET_ACCESS_KEY": "x"}, "SignatureDoesNotMatch"),
    ],
)
def test_credentials_that_the_store_does_not_accept_are_bad_usage(
    guarded: GuardedStore,
    environment: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    given: dict[str, str],
    reason: str,
) -> None:
    before = guarded.read_all()
    for name, value in given.items():
        environment.setenv(name, value.replace("OWNER", guarded.owner[0]))
    started_s = time.monotonic()
    with guarded.check_access():
        assert caption.main([IN, OUT, "--model", MODEL]) == 2
        assert report.main([OUT]) == 2
        assert compact.main([OUT]) == 2
    assert time.monotonic() - started_s < 10
    printed = capfd.readouterr().err.splitlines()
    assert len(printed) == 3, printed
    for line in printed:
        assert line.startswith(f"error: s3://guarded: no valid credentials ({reason}: ")
        assert all(name in line for name in KEY_SETTINGS) and "same command" not in line
    assert guarded.read_all() == before


def test_a_key_without_permission_is_bad_usage_and_says_so(
    guarded: GuardedStore, environment: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    use_key(environment, guarded.create_user("stranger", actions=[]))
    with guarded.check_access():
        assert caption.main([IN, str(tmp_path / "out"), "--model", MODEL]) == 2
        assert caption.main([str(tmp_path), OUT, "--model", MODEL]) == 2
    listing, lease = capfd.readouterr().err.splitlines()
    assert listing.startswith(f"error: cannot list {IN}: access is denied (") and "AWS_PROFILE" in listing
    assert lease.startswith(f"error: cannot use {OUT} as OUTPUT: access is denied (") and "AWS_PROFILE" in lease
    assert not (tmp_path / "out").exists()


def test_credentials_that_expire_during_a_run_stop_it_without_error_rows(
    guarded: GuardedStore, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_key(environment, guarded.owner)
    stage, units = make_stage(CaptionConfig(input=(IN,), output=str(tmp_path / "out"), model=MODEL))
    S3FileSystem.clear_instance_cache()
    use_key(environment, ("AKIAEXPIRED", "x"))
    with guarded.check_access(), pytest.raises(StoreFault, match=r"no valid credentials .*AWS_ACCESS_KEY_ID"):
        run_stage(stage, units)


def test_an_unreachable_store_is_named(environment: pytest.MonkeyPatch) -> None:
    use_key(environment, ("key", "secret"))
    environment.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    environment.setenv("AWS_MAX_ATTEMPTS", "1")
    environment.setattr(S3FileSystem, "retries", 1)
    environment.setattr(preflight, "_RETRIES", replace(preflight._RETRIES, first_pause_s=0.001))
    with pytest.raises(StoreFault, match=r"s3://guarded cannot be reached: AWS_ENDPOINT_URL=http://127.0.0.1:9 "):
        check_stores([OUT])


@pytest.mark.slow
@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://nowhere.invalid"])
def test_an_unreachable_store_stops_a_job_within_half_a_minute(
    environment: pytest.MonkeyPatch, endpoint: str, tmp_path: Path
) -> None:
    use_key(environment, ("key", "secret"))
    environment.setenv("AWS_ENDPOINT_URL", endpoint)
    started_s = time.monotonic()
    stopped = run_caption(IN, tmp_path / "out", "--model", MODEL)
    assert 8 < time.monotonic() - started_s < 45
    assert stopped.exit_code == 1 and endpoint in stopped.stderr
    assert "OUTPUT is unchanged" in stopped.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("status", [401, 403])
def test_a_url_that_needs_credentials_is_bad_usage(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, status: int
) -> None:
    web = WebServer()
    web.faults["/a.png"] = lambda handler: handler.answer(status, b"")
    with web.run():
        arguments = [f"{web.url}/a.png", str(tmp_path / "out"), "--model", MODEL, "--allow-private-addresses"]
        assert caption.main(arguments) == 2
    line = capfd.readouterr().err
    assert f"HTTP {status}" in line and "signature" in line and "user:password@" in line
    assert web.requests["/a.png"] == 1, "no retry can help"


class HttpError(Exception):  # as gcsfs names it, which need not be installed
    code = 401


class HttpResponseError(Exception):  # as azure-core names it
    status_code = 403


class ClientAuthenticationError(HttpResponseError):
    status_code = 401


@pytest.mark.parametrize(
    ("error", "protocol", "kind", "setting"),
    [
        (HttpError("Anonymous caller"), ("gs", "gcs"), CredentialsRefused, "GOOGLE_APPLICATION_CREDENTIALS"),
        (OSError("Forbidden: https://storage.googleapis.com/b\ndenied"), "gs", PermissionError, "GOOGLE_APPL"),
        (ClientAuthenticationError("no"), "az", CredentialsRefused, "AZURE_STORAGE_ACCOUNT_KEY"),
        (HttpResponseError("no"), "abfs", PermissionError, "AZURE_STORAGE_CONNECTION_STRING"),
    ],
)
def test_other_clients_errors_are_told_by_their_types_and_numbers(
    error: Exception, protocol: str, kind: type[OSError], setting: str
) -> None:
    found = explain_refusal(error, protocol)
    assert type(found) is kind and setting in str(found)


@pytest.mark.parametrize("error", [OSError("slow"), FileNotFoundError("a"), ValueError("b"), TimeoutError()])
def test_other_errors_are_left_alone(error: Exception) -> None:
    assert explain_refusal(error, "s3") is None


def test_a_store_without_settings_is_told_as_such() -> None:
    assert "the credentials of this store" in str(explain_refusal(PermissionError("no"), "sftp"))


def test_the_store_lists_again_with_valid_credentials(guarded: GuardedStore, environment: pytest.MonkeyPatch) -> None:
    use_key(environment, guarded.owner)
    with guarded.check_access():
        check_stores([IN, OUT])
        config = CaptionConfig(input=(IN,), output=OUT, model=MODEL)
        with list_rows(config, config.questionnaire) as listing:
            assert listing.num_rows == 4
