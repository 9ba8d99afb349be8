"""Checkpoints from directories, the hub's cache and URIs are fetched once, and described without loading weights."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import fsspec
import pytest

from ovis_model.checkpoint import CheckpointError, describe_checkpoint, fetch_checkpoint
from ovis_model.engine.engine import OvisEngine
from ovis_model.inputs.processor import Processor
from tests.support.golden_data import checkpoint_dir
from tests.support.roots import ROOT

SOURCE = checkpoint_dir("tiny56-tied")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def memory_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Put a checkpoint into an object store, with an empty cache on this node, and return its URI."""
    monkeypatch.setenv("OVIS2_CACHE", str(tmp_path / "cache"))
    fs = fsspec.filesystem("memory")
    uri = f"memory://models/{tmp_path.name}"
    for file in SOURCE.iterdir():
        fs.pipe_file(f"/models/{tmp_path.name}/{file.name}", file.read_bytes())
    fs.pipe_file(f"/models/{tmp_path.name}/modeling_ovis.py", b"raise SystemExit('remote code ran')")
    fs.pipe_file(f"/models/{tmp_path.name}/pytorch_model.bin", b"pickle")
    return uri


def test_a_uri_is_copied_once_without_code_and_pickles(memory_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = fetch_checkpoint(memory_uri, weights=False)
    assert not list(directory.glob("*.safetensors"))
    directory = fetch_checkpoint(memory_uri)
    visible = {file.name for file in directory.iterdir() if not file.name.startswith(".")}
    assert visible == {file.name for file in SOURCE.iterdir() if file.suffix in (".json", ".safetensors", ".txt")}
    copied = []
    monkeypatch.setattr(shutil, "copyfileobj", lambda *args: copied.append(args))
    fetch_checkpoint(memory_uri)
    assert copied == []


def test_processes_of_a_node_share_one_copy(memory_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[object] = []
    copy = shutil.copyfileobj

    def count_copies(source: object, sink: object, *args: object) -> None:
        copies.append(sink)
        copy(source, sink, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(shutil, "copyfileobj", count_copies)
    threads = [threading.Thread(target=fetch_checkpoint, args=(memory_uri,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(copies) == len([f for f in SOURCE.iterdir() if f.suffix in (".json", ".safetensors", ".txt")])


def test_a_changed_file_is_fetched_again_and_changes_the_description(memory_uri: str) -> None:
    before = describe_checkpoint(memory_uri)
    assert before == describe_checkpoint(memory_uri)
    path = memory_uri.removeprefix("memory://")
    fsspec.filesystem("memory").pipe_file(f"/{path}/config.json", (SOURCE / "config.json").read_bytes() + b"\n")
    assert describe_checkpoint(memory_uri)["weights"] != before["weights"]


def test_a_hub_id_is_loaded_from_the_cache_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is laid out as the hub's client does it; nothing is read from the network."""
    repository = tmp_path / "hub" / "models--AIDC-AI--Ovis2-tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(SOURCE, repository / "snapshots" / COMMIT)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    description = describe_checkpoint("AIDC-AI/Ovis2-tiny")
    assert (description["id"], description["revision"]) == ("AIDC-AI/Ovis2-tiny", COMMIT)
    assert Processor.from_pretrained("AIDC-AI/Ovis2-tiny", revision=COMMIT).config.vision.image_size == 56
    assert OvisEngine.from_pretrained("AIDC-AI/Ovis2-tiny", device="cpu", revision=COMMIT).model
    with pytest.raises(CheckpointError, match="cannot fetch 'AIDC-AI/Ovis2-none'"):
        fetch_checkpoint("AIDC-AI/Ovis2-none")


READ_ONLY = ("unshare", "-m", "sh", "-c", 'mount --bind -o ro "$0" "$0" && exec "$@"')


def test_a_cache_on_a_read_only_disk_is_used(tmp_path: Path) -> None:
    if subprocess.run((*READ_ONLY, tmp_path, "true"), capture_output=True, check=False).returncode:
        pytest.skip("this machine does not permit mounts")
    repository = tmp_path / "hub" / "models--AIDC-AI--Ovis2-tiny"
    shutil.copytree(SOURCE, repository / "snapshots" / COMMIT)
    fetch = f"from ovis_model.checkpoint import *; print(fetch_checkpoint('AIDC-AI/Ovis2-tiny', '{COMMIT}'))"
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = (*READ_ONLY, tmp_path, sys.executable, "-c", fetch)
    found = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(repository / "snapshots" / COMMIT)
    assert not list(tmp_path.glob("*.lock"))


@pytest.mark.parametrize(
    ("setting", "model"), [("HF_HOME", "AIDC-AI/Ovis2-tiny"), ("OVIS2_CACHE", "memory://models/x")]
)
def test_a_cache_that_cannot_be_created_is_refused(setting: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(setting, "/proc/nothing/cache")
    with pytest.raises(CheckpointError, match=f"cannot be created .*; set {setting} to a writable directory"):
        fetch_checkpoint(model)


def test_other_weights_change_the_description(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(SOURCE, copy)
    assert describe_checkpoint(str(copy))["weights"] == describe_checkpoint(str(SOURCE))["weights"]
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert describe_checkpoint(str(copy))["weights"] != describe_checkpoint(str(SOURCE))["weights"]


@pytest.mark.parametrize("model", ["nowhere", "/no/such/directory", "memory://models/nothing"])
def test_a_model_that_does_not_exist_is_refused(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVIS2_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="model"):
        fetch_checkpoint(model)
