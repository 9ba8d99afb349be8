"""The driver finds unusable weights by listing and headers, on a disk and in a store, before anything loads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from safetensors.torch import load_file, save_file

from ovis_model.checkpoint import WEIGHT_INDEX, CheckpointError
from ovis_model.weight_files import check_weight_files
from pipelines.checks import check_model
from tests.support.golden_data import CHECKPOINTS, checkpoint_dir
from tests.support.rows import make_config

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2334012345\n"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Write a checkpoint whose weights are in two files with an index."""
    directory = tmp_path / "model"
    shutil.copytree(checkpoint_dir("tiny56-tied"), directory)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    index = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in set(index.values()):
        save_file({name: tensors[name] for name in tensors if index[name] == shard}, directory / shard)
    (directory / WEIGHT_INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": index}))
    return directory


def truncate(file: Path, num_bytes: int) -> None:
    file.write_bytes(file.read_bytes()[:num_bytes])


def edit_index(directory: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((directory / WEIGHT_INDEX).read_text())
    edit(index["weight_map"])
    (directory / WEIGHT_INDEX).write_text(json.dumps(index))


SECOND = "model-00002-of-00002.safetensors"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a git-lfs pointer": (lambda d: (d / SECOND).write_text(LFS_POINTER), f"{SECOND}.*git-lfs pointer.*git lfs pull"),
    "a missing shard": (lambda d: (d / SECOND).unlink(), f"lacks 1 of 2 files.*{SECOND}"),
    "a file cut in its tensors": (lambda d: truncate(d / SECOND, 20_000), f"{SECOND} has 20,000 bytes instead of"),
    "a file cut in its header": (lambda d: truncate(d / SECOND, 100), rf"{SECOND} \(100 bytes\) is not a safetensors"),
    "an empty file": (lambda d: truncate(d / SECOND, 0), rf"{SECOND} \(0 bytes\) is not a safetensors"),
    "bytes after the last tensor": (lambda d: (d / SECOND).open("ab").write(b"xy"), f"{SECOND} has .* instead of"),
    "a page of HTML": (lambda d: (d / SECOND).write_text("<html>" * 99), f"{SECOND} .* is not a safetensors file"),
    "a tensor that is in no file": (
        lambda d: edit_index(d, lambda index: index.update({"llm.extra": SECOND})),
        f"{SECOND} lacks 1 tensor that.*llm.extra",
    ),
    "an index that leaves the directory": (
        lambda d: edit_index(d, lambda index: index.update({"llm.extra": "../" + SECOND})),
        "outside its directory",
    ),
    "an index of another form": (lambda d: (d / WEIGHT_INDEX).write_text("[]"), "not an index"),
}


@pytest.mark.parametrize("store", ["disk", "memory"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_refused_by_name(
    sharded: Path, damage: str, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    do_damage, message = DAMAGES[damage]
    do_damage(sharded)
    with pytest.raises(CheckpointError, match=message):
        check_weight_files(place(sharded, store, tmp_path, monkeypatch))


@pytest.mark.parametrize("store", ["disk", "memory"])
def test_whole_weights_pass(sharded: Path, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_weight_files(place(sharded, store, tmp_path, monkeypatch))


def place(directory: Path, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return where the checkpoint is: the directory itself, or a copy in an object store."""
    if store == "disk":
        return str(directory)
    monkeypatch.setenv("OVIS2_CACHE", str(tmp_path / "cache"))
    for file in directory.iterdir():
        fsspec.filesystem("memory").pipe_file(f"/weights/{tmp_path.name}/{file.name}", file.read_bytes())
    return f"memory://weights/{tmp_path.name}"


def test_every_checkpoint_here_passes() -> None:
    check_weight_files("demo")
    for checkpoint in CHECKPOINTS:
        for layout in ("aidc", "native"):
            check_weight_files(str(checkpoint_dir(checkpoint, layout)))


def test_no_weights_names_the_formats_that_are_refused(sharded: Path) -> None:
    for file in [*sharded.glob("*.safetensors"), sharded / WEIGHT_INDEX]:
        file.unlink()
    with pytest.raises(CheckpointError, match=r"no \.safetensors file; download"):
        check_weight_files(str(sharded))
    (sharded / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*can hold code"):
        check_weight_files(str(sharded))


def test_a_run_checks_weights_first(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    with pytest.raises(CheckpointError, match=SECOND):
        check_model(make_config("in", model=str(sharded)))
