"""Load safetensors files of either layout into a model, one tensor at a time.

A missing, unknown or misshapen tensor is an error that names the tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ovis_model.checkpoint import CheckpointError, read_weight_index
from ovis_model.config import Layout, OvisConfig, Quantization
from ovis_model.network.kernels import FP8, TORCH, choose_layer_kernels
from ovis_model.network.ovis import Ovis
from ovis_model.network.quantization import get_scales
from ovis_model.network.tensor_parallel import ALONE, WHOLE, Part, Shard, ShardedEmbedding, ShardedLinear


class WeightsError(ValueError):
    """The checkpoint's tensors do not match its configuration."""


def load_model(
    directory: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    post_trunk_norm: bool = False,
    shard: Shard = ALONE,
    quantization: Quantization = "none",
) -> Ovis:
    """Load the checkpoint in `directory`, or a rank's part of it, in eval mode. Raise ConfigError or WeightsError.

    The model is first allocated on `device`. Then each tensor is read from its mapped file, cast and copied into place,
    so at most one tensor is in memory twice.
    """
    config = OvisConfig.from_directory(directory)
    model = allocate_model(
        config, device=device, dtype=dtype, post_trunk_norm=post_trunk_norm, shard=shard, quantization=quantization
    )
    load_weights(model, directory, config.layout)
    return model


def load_embedder(
    directory: Path, *, device: torch.device, dtype: torch.dtype, quantization: Quantization = "none"
) -> Ovis:
    """Load what turns ids and tiles into embeddings: tower, head and both tables, without a layer of the decoder."""
    config = OvisConfig.from_directory(directory)
    language = replace(config.language, num_hidden_layers=0, tie_word_embeddings=True)
    model = allocate_model(replace(config, language=language), device=device, dtype=dtype, quantization=quantization)
    decoder = re.compile(r"(llm\.)?(model\.)?(language_model\.)?(layers\.|lm_head\.)")
    load_weights(model, directory, config.layout, ignores=decoder.match)
    model.config = config
    return model


def allocate_model(
    config: OvisConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    post_trunk_norm: bool = False,
    shard: Shard = ALONE,
    quantization: Quantization = "none",
) -> Ovis:
    """Allocate an Ovis in eval mode on `device`, without initializing its parameters."""
    with torch.device("meta"), _Uninitialized():
        model = Ovis(config, post_trunk_norm=post_trunk_norm, shard=shard).to(dtype)
        if quantization == "fp8":
            model.quantize_shapes()
    # As `to_empty` does, which imports torch's symbolic shapes for tensors of the meta device.
    model._apply(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device))  # type: ignore[no-untyped-call]
    model = model.eval().requires_grad_(False)
    model.prepare(choose_layer_kernels(dtype, device))
    return model


class _Uninitialized(TorchFunctionMode):
    """A context in which modules leave their parameters as they are.

    On the meta device, `normal_` would import torch's compiler, which takes a second.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return the tensor of a function of `torch.nn.init` unchanged; call other functions."""
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Target:
    """The parameter, or some of its rows, that `part` of a stored tensor fills; `scales` if it is quantized."""

    tensor: Tensor
    part: Part = WHOLE
    scales: Tensor | None = None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the whole stored tensor."""
        return self.part.to_whole_shape(self.tensor.shape)

    def fill(self, stored: Any) -> None:
        """Copy or quantize the part from `stored`, a safetensors slice; nothing else is read from the file."""
        part = stored[self.part.to_slices(self.tensor.shape)]
        if self.scales is not None:
            part, scales = TORCH.quantize_rows(part.to(self.tensor.device))
            self.scales.copy_(scales)
        self.tensor.copy_(part)


def load_weights(
    model: Ovis, directory: Path, layout: Layout, ignores: Callable[[str], object] = lambda _: False
) -> None:
    """Fill every parameter of `model` from the stored tensors that `ignores` does not accept the names of.

    Raise WeightsError that names each missing, unknown or misshapen tensor.
    """
    pending = find_targets(model, layout)
    faults: dict[str, list[str]] = {"missing": [], "unexpected": [], "misshapen": []}
    ignored = {_LM_HEAD[layout]} if model.config.language.tie_word_embeddings else set()
    for name, stored in _read_tensors(directory):
        if name in ignored or ignores(name):
            continue
        target = pending.pop(name, None)
        if target is None:
            faults["unexpected"].append(name)
        elif not _is_float(stored) or tuple(stored.get_shape()) != target.stored_shape:
            faults["misshapen"].append(f"{name} is {_describe(stored)} instead of a float {target.stored_shape}")
        else:
            target.fill(stored)
    faults["missing"].extend(pending)
    _raise_if_any(faults, directory)


def find_targets(model: Ovis, layout: Layout) -> dict[str, Target]:
    """Return {name in the layout: target} for each stored tensor."""
    targets: dict[str, Target] = {}
    for prefix, module in model.named_modules():
        part = module.part if isinstance(module, ShardedLinear | ShardedEmbedding) else WHOLE
        for name, parameter in module.named_parameters(prefix, recurse=False):
            names = [name] if layout == "aidc" else _to_native_names(name)
            data = parameter.data[0] if name == _POS_EMBED and layout == "native" else parameter.data
            tensors = data.chunk(len(names))
            scales = _chunk_scales(module, parameter, len(names))
            targets.update((n, Target(t, part, scale)) for n, t, scale in zip(names, tensors, scales, strict=True))
    return targets


def _chunk_scales(module: nn.Module, parameter: Tensor, count: int) -> Sequence[Tensor | None]:
    """Return the scales of each of `count` equal groups of rows of a parameter, or None for each."""
    scales = get_scales(module)
    return scales.chunk(count) if scales is not None and parameter.dtype == FP8 else [None] * count


_POS_EMBED = "visual_tokenizer.backbone.preprocessor.pos_embed"
_LM_HEAD: dict[Layout, str] = {"aidc": "llm.lm_head.weight", "native": "lm_head.weight"}

_TOWER = "model.vision_tower.transformer"
_TO_NATIVE = [
    (r"visual_tokenizer\.backbone\.", f"{_TOWER}."),
    (r"\.preprocessor\.patchifier\.proj\.", ".embeddings.patch_embedding."),
    (r"\.preprocessor\.patchifier\.norm\.", ".embeddings.rms_norm."),
    (r"\.preprocessor\.pos_embed", ".embeddings.position_embedding.weight"),
    (r"\.trunk\.post_trunk_norm\.", ".rms_norm."),
    (r"\.trunk\.blocks\.", ".encoder.layers."),
    (r"\.norm_([12])\.", r".rms_norm\1."),
    (r"\.attn\.proj\.", ".attention.out_proj."),
    (r"\.attn\.qkv\.", ".attention.qkv."),
    (r"\.mlp\.fc1\.", ".ffn.gate_proj."),
    (r"\.mlp\.fc2\.", ".ffn.down_proj."),
    (r"\.mlp\.fc3\.", ".ffn.up_proj."),
    (r"visual_tokenizer\.head\.0\.", "model.vision_tower.head_linear."),
    (r"visual_tokenizer\.head\.1\.", "model.vision_tower.head_norm."),
    (r"^vte\.", "model.visual_embeddings_table."),
    (r"^llm\.model\.", "model.language_model."),
    (r"^llm\.lm_head\.", "lm_head."),
]


def _to_native_names(name: str) -> list[str]:
    """Return transformers' name, or its three names in row order where it splits the query-key-value matrix."""
    for pattern, replacement in _TO_NATIVE:
        name = re.sub(pattern, replacement, name)
    if ".attention.qkv." not in name:
        return [name]
    return [name.replace(".qkv.", f".{part}_proj.") for part in "qkv"]


def _raise_if_any(faults: dict[str, list[str]], directory: Path) -> None:
    found = [f"{kind}: {_enumerate(names)}" for kind, names in faults.items() if names]
    if found:
        raise WeightsError(f"the weights in {directory} do not fit its config.json; " + "; ".join(found))


def _enumerate(names: list[str], limit: int = 10) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _is_float(stored: Any) -> bool:
    return str(stored.get_dtype()).startswith(("F", "BF"))


def _describe(stored: Any) -> str:
    return f"{stored.get_dtype()} {tuple(stored.get_shape())}"


def _read_tensors(directory: Path) -> Iterator[tuple[str, Any]]:
    """Yield names and safetensors slices; only the part cut out of a slice is read from its file."""
    for path in _list_shards(directory):
        try:
            with safe_open(path, framework="pt", device="cpu") as shard:
                for name in shard.keys():  # noqa: SIM118  (not a dict)
                    yield name, shard.get_slice(name)
        except OSError as error:
            raise WeightsError(f"cannot read {path}: {error}") from error
        except Exception as error:
            # safetensors does not export its error type under a stable name.
            if type(error).__name__ != "SafetensorError":
                raise
            raise WeightsError(f"{path} is not a safetensors file: {error}") from error


def _list_shards(directory: Path) -> list[Path]:
    try:
        names = set(read_weight_index(directory).values())
    except CheckpointError as error:
        raise WeightsError(str(error)) from error
    shards = sorted(directory / name for name in names) or sorted(directory.glob("*.safetensors"))
    if not shards:
        raise WeightsError(
            f"{directory} has no .safetensors file; convert the weights, since other formats can contain code"
        )
    return shards
