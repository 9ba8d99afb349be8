"""Check a checkpoint's weight files by their listing and headers, before a replica starts to load them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from ovis_model.checkpoint import (
    WEIGHT_INDEX,
    CheckpointError,
    fetch_checkpoint,
    is_hub_id,
    open_file_system,
    read_weight_index,
)
from ovis_model.wording import count_nouns

_SUFFIX = ".safetensors"
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".msgpack", ".h5")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_FIRST_READ_BYTES = 1 << 16  # holds the header of most files, so that a store is asked once per file


def check_weight_files(path_or_id: str, revision: str | None = None) -> None:
    """Raise CheckpointError unless every weight file exists and has the length that its header implies.

    Reads the listing, the index and the header of each file; downloads nothing else from a hub or a store.
    """
    directory = fetch_checkpoint(path_or_id, revision, weights=False)
    files = _open_weight_files(path_or_id, directory)
    index = read_weight_index(directory)
    names = set(index.values()) or files.names
    if not names:
        raise CheckpointError(
            f"{path_or_id} has no {_SUFFIX} file{files.describe_others()}; download the checkpoint again, with weights"
        )
    if missing := sorted(names - files.names):
        raise CheckpointError(
            f"{path_or_id} lacks {len(missing)} of {count_nouns(len(names), 'file')} that {WEIGHT_INDEX} names, such "
            f"as {missing[0]}; download the checkpoint again"
        )
    stored = {name: files.read_tensor_names(name) for name in sorted(names)}
    if lost := [tensor for tensor, name in index.items() if tensor not in stored[name]]:
        raise CheckpointError(
            f"{path_or_id}/{index[lost[0]]} lacks {count_nouns(len(lost), 'tensor')} that {WEIGHT_INDEX} expects "
            f"in it, such as {lost[0]}; download the checkpoint again"
        )


def _open_weight_files(path_or_id: str, directory: Path) -> _WeightFiles:
    if "://" in path_or_id:
        return _WeightFiles(path_or_id, *open_file_system(path_or_id))
    if is_hub_id(path_or_id) and not any(directory.glob(f"*{_SUFFIX}")):  # not downloaded yet
        return _WeightFiles(path_or_id, *open_file_system(f"hf://{path_or_id}@{directory.name}"))
    return _WeightFiles(path_or_id, *open_file_system(str(directory.absolute())))


@dataclass(frozen=True)
class _WeightFiles:
    """The files directly below `root` of a file system; messages name the `checkpoint`."""

    checkpoint: str
    fs: Any
    root: str

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The size of every file: {name: bytes}."""
        infos = [info for info in self._ask("ls", self.root, detail=True) if info["type"] != "directory"]
        return {PurePosixPath(info["name"]).name: int(info["size"]) for info in infos}

    @property
    def names(self) -> set[str]:
        """The names of the safetensors files."""
        return {name for name in self.sizes if name.endswith(_SUFFIX)}

    def describe_others(self) -> str:
        """Return a note about weights in refused formats, for a message; "" if there are none."""
        others = sorted(name for name in self.sizes if name.endswith(_OTHER_FORMATS))
        return f" ({', '.join(others[:3])} is not read: such formats can hold code)" if others else ""

    def read_tensor_names(self, name: str) -> set[str]:
        """Return the names of a file's tensors. Raise CheckpointError if its length contradicts its header."""
        start = self._read(name, 0, _FIRST_READ_BYTES)
        if start.startswith(_LFS_POINTER):
            raise CheckpointError(
                f"{self.checkpoint}/{name} is a git-lfs pointer instead of weights; run `git lfs pull` there, or "
                "download the checkpoint again"
            )
        num_header_bytes = int.from_bytes(start[:8], "little")
        if len(start) < 8 or num_header_bytes > _MAX_HEADER_BYTES:
            raise self._not_safetensors(name)
        header = start[8:] if 8 + num_header_bytes <= len(start) else self._read(name, 8, 8 + num_header_bytes)
        try:
            tensors = json.loads(header[:num_header_bytes])
            tensors.pop("__metadata__", None)
            expected = 8 + num_header_bytes + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise self._not_safetensors(name) from error
        if self.sizes[name] != expected:
            size = count_nouns(self.sizes[name], "byte")
            raise CheckpointError(
                f"{self.checkpoint}/{name} has {size} instead of {expected:,}: the copy is incomplete; download it "
                "again"
            )
        return set(tensors)

    def _read(self, name: str, start: int, stop: int) -> bytes:
        data: bytes = self._ask("cat_file", f"{self.root}/{name}", start=start, end=min(stop, self.sizes[name]))
        return data

    def _ask(self, method: str, path: str, **options: Any) -> Any:
        try:
            return getattr(self.fs, method)(path, **options)
        except Exception as error:  # the clients of hubs and stores have no common base
            reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            raise CheckpointError(f"cannot read {path} of model {self.checkpoint!r}: {reason}") from error

    def _not_safetensors(self, name: str) -> CheckpointError:
        size = count_nouns(self.sizes[name], "byte")
        return CheckpointError(f"{self.checkpoint}/{name} ({size}) is not a safetensors file; download it again")
