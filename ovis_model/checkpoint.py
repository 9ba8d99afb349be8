"""Find a checkpoint by "demo", directory, hub id or URI, and make it available as a local directory.

Each node fetches a checkpoint once: its processes share one copy under a file lock. Only JSON, tokenizer and
safetensors files are read, never code and never pickles.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock

DEMO_DIRECTORY = Path(__file__).parent / "demo"

WEIGHT_INDEX = "model.safetensors.index.json"
_TEXT_FILES = ("*.json", "merges.txt", "vocab.txt", "spiece.model")
_WEIGHT_FILES = ("*.safetensors",)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SAMPLE_BYTES, _NUM_SAMPLES = 1 << 16, 16


class CheckpointError(ValueError):
    """The checkpoint cannot be found or fetched."""


def fetch_checkpoint(path_or_id: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """Return a local directory that holds the checkpoint's files, without the weights if `weights` is False.

    Raise CheckpointError with the reason if there is none.
    """
    if path_or_id == "demo":
        return DEMO_DIRECTORY
    local = Path(path_or_id).expanduser()
    if local.is_dir():
        return local
    if "://" in path_or_id:
        return _fetch_uri(path_or_id, weights=weights)
    if _HUB_ID.fullmatch(path_or_id):
        return _fetch_hub(path_or_id, revision, weights=weights)
    raise CheckpointError(
        f"cannot find model {path_or_id!r}: give a directory, a hub id such as AIDC-AI/Ovis2-1B, a URI or 'demo'"
    )


def is_hub_id(path_or_id: str) -> bool:
    """Return whether `path_or_id` names a repository of the Hugging Face hub."""
    return not Path(path_or_id).expanduser().is_dir() and _HUB_ID.fullmatch(path_or_id) is not None


def resolve_local_path(path_or_id: str) -> str:
    """Make the path of a local directory absolute; return anything else unchanged.

    A process in another working directory would take the relative path for a hub id.
    """
    local = Path(path_or_id).expanduser()
    return str(local.absolute()) if path_or_id != "demo" and local.is_dir() else path_or_id


def describe_checkpoint(path_or_id: str, revision: str | None = None) -> dict[str, str | None]:
    """Return what identifies the model: its `id`, the `revision` of a hub id, and `weights`, a hash.

    The weights are not downloaded. For a hub id the hash covers the commit, for a URI the store's file versions. For a
    local directory it covers, per file, the size, the header (names, shapes, types) and 16 evenly spaced samples of
    64 KiB. The JSON files always count. Raise CheckpointError if the checkpoint cannot be fetched.
    """
    directory = fetch_checkpoint(path_or_id, revision, weights=False)
    is_hub_snapshot = directory.parent.name == "snapshots" and _HUB_ID.fullmatch(path_or_id)
    commit = directory.name if is_hub_snapshot else None
    digest = hashlib.sha256(commit.encode() if commit else b"")
    for path in sorted(directory.glob("*.json")):
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    if "://" in path_or_id:
        digest.update(json.dumps(_list_weight_versions(path_or_id)).encode())
    elif not commit:
        for path in sorted(directory.glob("*.safetensors")):
            _hash_samples(path, digest)
    return {"id": path_or_id, "revision": commit or revision, "weights": digest.hexdigest()[:16]}


def _list_weight_versions(uri: str) -> list[tuple[str, str]]:
    fs, root = open_file_system(uri)
    files = [info for info in fs.ls(root, detail=True) if info["name"].endswith(".safetensors")]
    return sorted((PurePosixPath(info["name"]).name, _get_version(info)) for info in files)


def _hash_samples(path: Path, digest: Any) -> None:
    size = path.stat().st_size
    digest.update(f"{path.name}\0{size}\0".encode())
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        digest.update(file.read(min(header_bytes, size)))
        for i in range(_NUM_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * i // (_NUM_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))


def _fetch_hub(repo_id: str, revision: str | None, *, weights: bool) -> Path:
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    with _lock_cache(cache, f"ovis2-{repo_id.replace('/', '--')}.lock", "HF_HOME"):
        try:
            directory = _download(repo_id, revision, weights=weights)
        except Exception as error:  # the hub client has no common base: network, HTTP, cache and repository errors
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(
                f"cannot fetch {repo_id!r} (revision {revision or 'main'}) from the Hugging Face hub: {reason}"
            ) from error
    if weights and not _has_weights(directory):
        raise CheckpointError(
            f"{directory} lacks some weights of {repo_id!r}, and the hub is not reachable; retry with a connection"
        )
    return directory


def _download(repo_id: str, revision: str | None, *, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if revision and _COMMIT.fullmatch(revision):
        # A commit never changes: a complete local copy saves a request to the hub by each actor of a node.
        with suppress(LocalEntryNotFoundError):
            directory = Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
            if (directory / "config.json").exists() and (_has_weights(directory) or not weights):
                return directory
    return Path(snapshot_download(repo_id, revision=revision, allow_patterns=_list_patterns(weights)))


def _has_weights(directory: Path) -> bool:
    names = set(read_weight_index(directory).values())
    return all((directory / name).exists() for name in names) if names else any(directory.glob("*.safetensors"))


def read_weight_index(directory: Path) -> dict[str, str]:
    """Return {tensor: file} of the checkpoint's index, empty if there is none.

    Raise CheckpointError if it is not an index, or names a file outside `directory`.
    """
    path = directory / WEIGHT_INDEX
    if not path.exists():
        return {}
    try:
        index: dict[str, str] = dict(json.loads(path.read_text("utf-8"))["weight_map"])
        outside = [name for name in index.values() if PurePosixPath(name).name != name]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not an index of weight files ({error}); download it again") from error
    if outside:
        raise CheckpointError(f"{path} names a file outside its directory: {outside[0]}")
    return index


def _fetch_uri(uri: str, *, weights: bool) -> Path:
    fs, root = open_file_system(uri)
    cache = Path(os.environ.get("OVIS2_CACHE", "~/.cache/ovis2")).expanduser()
    target = cache / hashlib.sha256(uri.rstrip("/").encode()).hexdigest()[:24]
    with _lock_cache(target, ".lock", "OVIS2_CACHE"):
        try:
            listing = [info for info in fs.ls(root, detail=True) if info["type"] == "file"]
        except FileNotFoundError:
            raise CheckpointError(f"model {uri!r} does not exist") from None
        except PermissionError as error:
            raise CheckpointError(f"model {uri!r} cannot be listed ({error}); check the credentials") from error
        names = {PurePosixPath(info["name"]).name for info in listing}
        for path in target.iterdir():  # a shard deleted from the store must not be loaded from the cache
            if not path.name.startswith(".") and path.name not in names:
                path.unlink()
        for info in listing:
            if any(map(PurePosixPath(info["name"]).match, _list_patterns(weights))):
                _fetch_file(fs, info, target / PurePosixPath(info["name"]).name)
    if not (target / "config.json").exists():
        raise CheckpointError(f"model {uri!r} has no config.json: it is not a checkpoint")
    return target


@contextmanager
def _lock_cache(directory: Path, name: str, setting: str) -> Iterator[None]:
    """Create a cache directory and hold its lock; a read-only one needs no lock, since no process changes it.

    Raise CheckpointError that names the environment variable `setting` if the directory cannot be created.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"the cache of models {directory} cannot be created ({error.strerror}); set {setting} to a writable "
            "directory"
        ) from error
    lock = FileLock(directory / name)
    with suppress(OSError):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _list_patterns(weights: bool) -> list[str]:
    return [*_TEXT_FILES, *(_WEIGHT_FILES if weights else ())]


def _fetch_file(fs: Any, info: dict[str, Any], target: Path) -> None:
    """Copy one file unless its version is cached; the store's version mark is saved next to the file."""
    mark = _get_version(info)
    mark_file = target.with_name(f".{target.name}.version")
    if target.exists() and mark_file.exists() and mark_file.read_text() == mark:
        return
    partial = target.with_name(f".{target.name}.partial")
    with fs.open(info["name"], "rb") as source, partial.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 24)
    partial.replace(target)
    mark_file.write_text(mark)


def _get_version(info: dict[str, Any]) -> str:
    return json.dumps([info.get("ETag") or info.get("mtime") or info.get("LastModified"), info["size"]], default=str)


def open_file_system(uri: str) -> tuple[Any, str]:
    """Return the file system of a checkpoint's URI and its path there. Raise CheckpointError."""
    import fsspec

    try:
        fs, root = fsspec.core.url_to_fs(uri)
    except (ImportError, ValueError) as error:
        raise CheckpointError(f"model {uri!r}: {error}") from error
    return fs, root
