"""Stores by URI: the sources of their settings, and which errors are retried."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from s3fs import S3FileSystem

from pipelines.errors import BusyFault, StoreError
from pipelines.storage import store


@pytest.mark.parametrize("source", ["profile", "fsspec"])
def test_settings_come_from_a_profile_or_from_fsspec(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    if source == "profile":
        keys = "aws_access_key_id = key\naws_secret_access_key = secret\nregion = us-east-1\n"
        (tmp_path / "config").write_text(f"[profile mine]\n{keys}endpoint_url = {endpoint}\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        monkeypatch.setenv("AWS_PROFILE", "mine")
    else:
        monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": endpoint, "key": "key", "secret": "secret"})
    S3FileSystem.clear_instance_cache()
    try:
        store.open_store(f"s3://{source}")[0].mkdir(source)
        store.write_bytes(f"s3://{source}/a", b"from here")
        assert store.read_bytes(f"s3://{source}/a") == b"from here"
        assert [info.uri for info in store.list_files(f"s3://{source}")] == [f"s3://{source}/a"]
        store.remove(f"s3://{source}/a")
    finally:
        S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(("uri", "extra"), [("gs://b/x", "gcs"), ("az://c/x", "azure"), ("abfs://c/x", "azure")])
def test_a_store_that_is_not_installed_names_the_install_command(
    uri: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, {"gcs": "gcsfs", "azure": "adlfs"}[extra], None)
    with pytest.raises(StoreError, match=rf"pip install 'ovis2-ray\[{extra}\]'"):
        store.open_store(uri)


def inject_faults(monkeypatch: pytest.MonkeyPatch, method: str, faults: list[Exception]) -> list[int]:
    """Let `method` of the memory store raise each of `faults` once; return a list that grows with its calls."""
    original: Callable[..., object] = getattr(MemoryFileSystem, method)
    calls: list[int] = []

    def call_or_fail(*arguments: object, **options: object) -> object:
        calls.append(1)
        if faults:
            raise faults.pop(0)
        return original(*arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, method, call_or_fail)
    monkeypatch.setattr(store, "RETRIES", replace(store.RETRIES, first_pause_s=0.001))
    return calls


REQUESTS: dict[str, Callable[[], object]] = {
    "pipe_file": lambda: store.write_bytes("memory://retried/a", b"x"),
    "cat_file": lambda: store.read_bytes("memory://retried/a"),
    "find": lambda: store.list_files("memory://retried"),
    "info": lambda: store.find_file("memory://retried/a"),
    "rm_file": lambda: store.remove("memory://retried/a"),
}


@pytest.mark.parametrize("method", REQUESTS)
def test_every_request_is_retried(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    store.write_bytes("memory://retried/a", b"x")
    inject_faults(monkeypatch, method, [ConnectionResetError("reset"), RuntimeError("a client's own")])
    REQUESTS[method]()


def test_retries_are_bounded_and_permanent_faults_are_not_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = inject_faults(monkeypatch, "cat_file", [ConnectionResetError(str(i)) for i in range(20)])
    with pytest.raises((OSError, RuntimeError), match=r"\d$"):
        store.read_bytes("memory://retried/a")
    assert store.RETRIES.max_attempts <= len(calls) <= 10
    for fault in (FileNotFoundError("gone"), PermissionError("no"), ValueError("a bad name")):
        monkeypatch.undo()
        calls = inject_faults(monkeypatch, "cat_file", [fault])
        with pytest.raises(OSError, match=str(fault)):
            store.read_bytes("memory://retried/a")
        assert len(calls) == 1


def test_pauses_double_with_jitter_and_follow_the_stores_request() -> None:
    random.seed(0)
    pauses = [[store.RETRIES.compute_pause_s(attempt) for _ in range(100)] for attempt in (1, 2, 3)]
    for attempt, some in enumerate(pauses):
        assert 0.125 * 2**attempt <= min(some) < max(some) <= 0.25 * 2**attempt and len(set(some)) > 90
    assert 7 < store.RETRIES.compute_pause_s(1, BusyFault("busy", 7)) < 8
    assert store.RETRIES.compute_pause_s(1, BusyFault("busy", 1e9)) < 61
