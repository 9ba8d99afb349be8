"""Count what the network allocates on the meta device."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ovis_model.config import OvisConfig

META = torch.device("meta")


class Allocations(TorchDispatchMode):
    """Counter of the bytes alive, and their peak, in storages that are created inside this mode."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in _list_tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in _list_tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in given | self._known:
                self._enter(storage)
        return out

    def _enter(self, storage: torch.UntypedStorage) -> None:
        self._known.add(storage._cdata)
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._leave, storage._cdata, storage.nbytes())

    def _leave(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.alive -= nbytes


def _list_tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def make_shallow(config: OvisConfig) -> OvisConfig:
    """Reduce the model to two layers of each kind; the memory alive at once does not depend on their number."""
    vision, language = (replace(part, num_hidden_layers=2) for part in (config.vision, config.language))
    return replace(config, vision=vision, language=language)
