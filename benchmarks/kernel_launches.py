"""Count the kernels that a tower block, a decoder layer in prefill and one in decoding launch on a GPU.

    python -m benchmarks.kernel_launches [--size 1B] [--list]

The model is on the meta device, so no GPU is needed: operations of torch are counted where they are dispatched, without
views and allocations, and Triton's kernels where they would be launched. Attention counts as the operations of
torch's FlashAttention, with keys and values in pages of a cache.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode

from ovis_model.config import SIZES, OvisConfig
from ovis_model.engine.kv_cache import PagedKVCache, Prefill
from ovis_model.network import attention
from ovis_model.network.attention import PAGE_TOKENS, PackedSequences, Varlen
from ovis_model.network.kernels import TORCH, LayerKernels
from ovis_model.network.ovis import Ovis
from ovis_model.network.weights import allocate_model

META = torch.device("meta")
ROWS, LENGTH = 4, 256
_ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counter of the operations that launch a kernel inside this mode, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in _ALLOCATIONS and (
            func._schema.is_mutable or not _find_storages(out) <= _find_storages((args, kwargs))
        ):
            self.names[func.overloadpacket.__name__] += 1
        return out


def _find_storages(tree: Any) -> set[int]:
    leaves = torch.utils._pytree.tree_leaves(tree)
    return {leaf.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, torch.Tensor)}


def make_recording_kernels(launches: Launches) -> LayerKernels:
    """Return Triton's kernels, which allocate their results and count instead of launching."""
    from ovis_model.network.kernels_triton import TritonKernels

    class Recording(TritonKernels):
        def launch(self, kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
            launches.names[kernel.fn.__name__.strip("_")] += 1

    return Recording()


def count_launches(config: OvisConfig, make_kernels: Callable[[Launches], LayerKernels]) -> dict[str, Counter[str]]:
    """Return the launches of one layer of each kind: those of a model of two layers, minus those of one."""
    one, two = (_count_all(_set_depth(config, depth), make_kernels) for depth in (1, 2))
    return {kind: two[kind] - one[kind] for kind in two}


def _set_depth(config: OvisConfig, depth: int) -> OvisConfig:
    vision = replace(config.vision, num_hidden_layers=depth)
    return replace(config, vision=vision, language=replace(config.language, num_hidden_layers=depth))


def _count_all(config: OvisConfig, make_kernels: Callable[[Launches], LayerKernels]) -> dict[str, Counter[str]]:
    model = allocate_model(config, device=META, dtype=torch.bfloat16)
    cache = PagedKVCache(
        config.language,
        ROWS,
        PAGE_TOKENS,
        slots=ROWS,
        capacity=LENGTH,
        device=META,
        dtype=torch.bfloat16,
    )
    vision, language = config.vision, config.language
    features = torch.empty(ROWS, vision.num_patches, vision.hidden_size, dtype=torch.bfloat16, device=META)
    rows = torch.arange(ROWS, device=META)
    tokens = torch.arange(ROWS * LENGTH, device=META)
    embeds = torch.empty(1, ROWS * LENGTH, language.hidden_size, dtype=torch.bfloat16, device=META)
    sequences = PackedSequences((LENGTH,) * ROWS, rows.int(), torch.arange(ROWS + 1, device=META).int())
    prefill = Prefill(cache, tokens, tokens, sequences)
    work: dict[str, Callable[[], object]] = {
        "tower block": lambda: model.visual_tokenizer.backbone.trunk(features),
        "prefill layer": lambda: model.llm.model(embeds, tokens[None], prefill),
        "decode layer": lambda: model.llm.model(
            embeds[0, :ROWS, None], rows[:, None], cache.begin_step(rows, LENGTH - 1)
        ),
    }
    return {kind: _count(model, make_kernels, run) for kind, run in work.items()}


def _count(model: Ovis, make_kernels: Callable[[Launches], LayerKernels], run: Callable[[], object]) -> Counter[str]:
    launches = Launches()
    model.prepare(make_kernels(launches))
    with torch.inference_mode(), mock.patch.object(attention, "_find_kernels", _find_varlen), launches:
        run()
    return launches.names


def _find_varlen(is_cuda: bool, is_half: bool) -> Varlen:
    return Varlen(partial(varlen_attn, enable_gqa=True), reads_pages=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="count the kernel launches of a layer of each kind")
    parser.add_argument("--size", choices=SIZES, default="1B")
    parser.add_argument("--list", action="store_true", help="also name the kernels")
    args = parser.parse_args()
    found = {
        name: count_launches(SIZES[args.size], make_kernels)
        for name, make_kernels in {"torch": lambda _: TORCH, "triton": make_recording_kernels}.items()
    }
    for name, kinds in found.items():
        for kind, launches in kinds.items():
            names = ", ".join(f"{count} {name}" for name, count in launches.items())
            print(f"{name:8} {kind:14} {launches.total():3}" + f"  {names}" * args.list)
    print(json.dumps({name: {kind: n.total() for kind, n in kinds.items()} for name, kinds in found.items()}))


if __name__ == "__main__":
    main()
