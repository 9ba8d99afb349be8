"""Count where the host would wait for a GPU, and what it copies to it, for work on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_COUNTING = ("nonzero", "masked_select", "is_nonzero", "equal", "unique2", "_unique2", "unique_consecutive")
_READING = ("item", "_local_scalar_dense")


class HostTraffic(TorchDispatchMode):
    """Lists the operations after which a host waits for the device, and counts copies to the device.

    What is read from the device is zero, so the whole engine runs. Tensors that the mode has not seen are taken as made
    from values of the host, e.g. by `torch.tensor`, until `reset` is called: then they count as a copy that waits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.uploads = 0
        self._known: dict[int, torch.UntypedStorage] = {}
        self._is_learning = True

    def reset(self) -> None:
        """Count from here on."""
        self.waits, self.uploads, self._is_learning = [], 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device, on_host = ([x for x in tensors if x.is_meta == wanted] for wanted in (True, False))
        self._find_made_from_values(on_device)
        if on_device and name in _READING:
            self.waits.append(name)
            return 0
        if on_device and kwargs.get("device") == torch.device("cpu"):
            self.waits.append("copy to the host")
            return torch.zeros(args[0].shape, dtype=args[0].dtype)
        if not on_device and on_host and kwargs.get("device") == torch.device("meta"):
            self._count_upload(kwargs.get("non_blocking", False))
        elif on_device and any(x.dim() for x in on_host):
            self.waits.append(f"{name} with a tensor of the host")
        if on_device and (name in _COUNTING or _has_mask_as_index(name, args)):
            self.waits.append(name)
        out = func(*args, **kwargs)
        self._learn(x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor))
        return out

    def _count_upload(self, non_blocking: bool) -> None:
        self.uploads += 1
        if not non_blocking:
            self.waits.append("copy that blocks")

    def _find_made_from_values(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            if tensor.untyped_storage()._cdata not in self._known and not self._is_learning:
                self.waits.append("tensor made from values of the host")
        self._learn(tensors)

    def _learn(self, tensors: Any) -> None:
        """Remember storages, which keeps their addresses from being used again."""
        for tensor in tensors:
            self._known[tensor.untyped_storage()._cdata] = tensor.untyped_storage()


def _has_mask_as_index(name: str, args: Any) -> bool:
    if name.rstrip("_") not in ("index", "index_put", "_index_put_impl"):
        return False
    return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
