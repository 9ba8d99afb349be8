"""Checkpoints as directories in any store: tensors as safetensors, the rest as JSON, a marker written last.

A directory without its marker does not exist for a reader, so a process may be killed at any moment. Two are kept: if
the newest is damaged, the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from pipelines.errors import CheckpointDamaged
from pipelines.storage import store

Tensors = Iterable[tuple[str, NDArray[Any]]]

_MARKER, _STATE = "complete.json", "state.json"
_MAX_PART_BYTES = 1 << 30  # a put to a store holds a whole file in memory
_NUM_KEPT = 2

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run below `uri`, one directory for each step at which one was written."""

    uri: str

    def write(self, step: int, tensors: Tensors, state: Mapping[str, Any], *, max_part_bytes: int = 0) -> None:
        """Write the checkpoint of a step, then remove all but the newest two. Raise OSError or StoreFault."""
        self.remove_incomplete()
        directory = self._locate(step)
        files = {}
        for number, part in enumerate(_group(tensors, max_part_bytes or _MAX_PART_BYTES)):
            name = f"part-{number:05}.safetensors"
            files[name] = _write_file(store.join(directory, name), save(part))
        files[_STATE] = _write_file(store.join(directory, _STATE), json.dumps(state).encode())
        store.write_bytes(store.join(directory, _MARKER), json.dumps(files).encode())
        for old in self.list_steps()[:-_NUM_KEPT]:
            self._remove(old)

    def list_steps(self) -> list[int]:
        """Return the steps of complete checkpoints, oldest first."""
        return sorted(step for step, names in self._list_files().items() if _MARKER in names)

    def find_last(self) -> int | None:
        """Return the step of the newest checkpoint whose files are all there and undamaged; None if there is none."""
        for step in reversed(self.list_steps()):
            try:
                for _ in self._read_files(step):
                    pass
                return step
            except OSError as error:
                logger.warning("the checkpoint of step %d is damaged and not used: %s", step, error)
        return None

    def read_state(self, step: int) -> dict[str, Any]:
        """Return the JSON part of a checkpoint. Raise OSError."""
        state: dict[str, Any] = json.loads(store.read_bytes(store.join(self._locate(step), _STATE)))
        return state

    def read_tensors(self, step: int) -> Iterator[tuple[str, NDArray[Any]]]:
        """Yield the tensors of a checkpoint by name, one file in memory at a time. Raise OSError if it is damaged."""
        for name, data in self._read_files(step):
            if name != _STATE:
                yield from load(data).items()

    def remove_incomplete(self) -> None:
        """Remove what a killed process left of a checkpoint."""
        for step, names in self._list_files().items():
            if _MARKER not in names:
                self._remove(step)

    def remove_after(self, step: int) -> None:
        """Remove the checkpoints after `step`, such as one that is damaged: another one of their step may follow."""
        for later in self._list_files():
            if later > step:
                self._remove(later)

    def _read_files(self, step: int) -> Iterator[tuple[str, bytes]]:
        files = json.loads(store.read_bytes(store.join(self._locate(step), _MARKER)))
        for name, (num_bytes, digest) in files.items():
            data = store.read_bytes(store.join(self._locate(step), name))
            if (len(data), _hash(data)) != (num_bytes, digest):
                raise CheckpointDamaged(f"{name} of step {step} has {len(data):,} bytes that differ from those written")
            yield name, data

    def _remove(self, step: int) -> None:
        """Remove a checkpoint, first its marker, so that none is half removed."""
        directory, names = self._locate(step), self._list_files().get(step, set())
        for name in sorted(names, key=lambda name: name != _MARKER):
            store.remove(store.join(directory, name))
        store.remove_if_empty(directory)

    def _list_files(self) -> dict[int, set[str]]:
        found: dict[int, set[str]] = {}
        for info in store.list_files(self.uri):
            directory, name = info.uri.split("/")[-2:]
            if directory.startswith("step-") and directory[5:].isdigit():
                found.setdefault(int(directory[5:]), set()).add(name)
        return found

    def _locate(self, step: int) -> str:
        return store.join(self.uri, f"step-{step:08}")


def _group(tensors: Tensors, max_bytes: int) -> Iterator[dict[str, NDArray[Any]]]:
    part: dict[str, NDArray[Any]] = {}
    num_bytes = 0
    for name, tensor in tensors:
        if part and num_bytes + tensor.nbytes > max_bytes:
            yield part
            part, num_bytes = {}, 0
        part[name] = np.ascontiguousarray(tensor) if tensor.ndim else tensor
        num_bytes += tensor.nbytes
    if part:
        yield part


def _write_file(uri: str, data: bytes) -> tuple[int, str]:
    store.write_bytes(uri, data)
    return len(data), _hash(data)


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
