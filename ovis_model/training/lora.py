"""Train a decoder by low-rank additions to its projections (LoRA, arXiv:2106.09685), stored with PEFT's names."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ovis_model.network.language import DecoderLayer, LayerWeights
from ovis_model.network.layers import project
from ovis_model.network.ovis import Ovis
from ovis_model.network.quantization import Matrix

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_ATTENTION_TARGETS = TARGETS[:4]


@dataclass(frozen=True)
class LoraConfig:
    """Rank, scale (alpha / rank) and the projections of every layer that get an addition."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.targets or set(self.targets) - set(TARGETS):
            raise ValueError(
                f"LoRA needs a rank of at least 1 and targets among {', '.join(TARGETS)}; got rank={self.rank} and "
                f"targets={','.join(self.targets) or 'none'}"
            )


class AdapterError(ValueError):
    """Stored adapters do not fit the model."""


class Adapter(nn.Module):
    """The addition to one projection: x A^T B^T alpha / rank, with B = 0 at first."""

    def __init__(self, linear: nn.Linear, config: LoraConfig, generator: torch.Generator | None) -> None:
        super().__init__()
        device = linear.weight.device
        bound = 1 / math.sqrt(linear.in_features)  # as PEFT: Kaiming's uniform initialization with a = sqrt(5)
        down = torch.empty(config.rank, linear.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(down.to(device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, config.rank, device=device))
        self.scale = config.alpha / config.rank

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute the addition: [N, in] -> [N, out]."""
        return F.linear(F.linear(tokens, self.lora_A), self.lora_B) * self.scale

    def compute_delta(self) -> Tensor:
        """Return what merging adds to the weight, float32[out, in]."""
        return self.lora_B.detach().float() @ self.lora_A.detach().float() * self.scale


class AdaptedMatrix(NamedTuple):
    """A matrix over the outputs of several projections, each with its number of outputs and its adapter or None."""

    base: Matrix
    parts: Sequence[tuple[int, Adapter | None]]

    def multiply(self, tokens: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply tokens [N, in] -> [N, out]."""
        added = [tokens.new_zeros(len(tokens), size) if x is None else x(tokens) for size, x in self.parts]
        return project(tokens, self.base, bias) + (torch.cat(added, -1) if len(added) > 1 else added[0])


class LayerAdapter(nn.Module):
    """The adapters of one decoder layer, by the names of their projections."""

    def __init__(self, layer: DecoderLayer, config: LoraConfig, generator: torch.Generator | None) -> None:
        super().__init__()
        self._sizes = {name: linear.out_features for name, linear in _list_projections(layer)}
        for name, linear in _list_projections(layer):
            if name in config.targets:
                self.add_module(name, Adapter(linear, config, generator))

    def forward(self, weights: LayerWeights) -> LayerWeights:
        """Return the weights with the additions."""
        return weights._replace(
            qkv=self._adapt(weights.qkv, "q_proj", "k_proj", "v_proj"),
            o=self._adapt(weights.o, "o_proj"),
            gate_up=self._adapt(weights.gate_up, "gate_proj", "up_proj"),
            down=self._adapt(weights.down, "down_proj"),
        )

    def _adapt(self, matrix: Matrix, *names: str) -> Matrix:
        adapters = dict(self.named_children())
        if not adapters.keys() & set(names):
            return matrix
        return AdaptedMatrix(matrix, [(self._sizes[name], adapters.get(name)) for name in names])  # type: ignore[misc]


def add_adapters(network: Ovis, config: LoraConfig, generator: torch.Generator | None = None) -> None:
    """Add adapters to every decoder layer; then `parts.choose_trainable(network, "lora")` trains them.

    Without training, the network computes what it computed before. The generator is the CPU's.
    """
    for layer in _list_layers(network):
        layer.adapter = LayerAdapter(layer, config, generator)


def remove_adapters(network: Ovis) -> None:
    """Remove the adapters, so that the network computes what its base computes."""
    for layer in _list_layers(network):
        layer.adapter = None


def list_merged(network: Ovis) -> Iterator[tuple[str, Tensor]]:
    """Yield the checkpoint's names and tensors; adapters are added to their weights in float32."""
    deltas = {f"{name}.weight": adapter.compute_delta() for name, adapter in _list_adapters(network)}
    for name, parameter in network.named_parameters():
        if ".adapter." not in name:
            yield name, parameter.detach().float() + deltas[name] if name in deltas else parameter.detach()


def save_adapters(network: Ovis, config: LoraConfig, directory: Path, base: str) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` as PEFT does; `base` says what they were added to."""
    tensors = {f"{_PEFT}{name}.{side}.weight": x.contiguous() for name, side, x in _list_sides(network)}
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": rf"llm\..*\.({'|'.join(config.targets)})",
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings, indent=1) + "\n")


@torch.no_grad()
def load_adapters(network: Ovis, directory: Path) -> None:
    """Fill the adapters of `network` from a directory. Raise AdapterError if tensors are missing or do not fit."""
    stored = load_file(directory / "adapter_model.safetensors")
    targets = {f"{_PEFT}{name}.{side}.weight": x for name, side, x in _list_sides(network)}
    for name in sorted(stored.keys() | targets.keys()):
        shapes = [tuple(tensors[name].shape) if name in tensors else None for tensors in (stored, targets)]
        if shapes[0] != shapes[1]:
            raise AdapterError(
                f"{directory} has {name} of the shape {shapes[0]}, but the model expects {shapes[1]}; use the rank and "
                "the targets that the adapters were trained with"
            )
        targets[name].copy_(stored[name])


_PEFT = "base_model.model."


def _list_sides(network: Ovis) -> Iterator[tuple[str, str, Tensor]]:
    for name, adapter in _list_adapters(network):
        yield name, "lora_A", adapter.lora_A.data
        yield name, "lora_B", adapter.lora_B.data


def _list_adapters(network: Ovis) -> Iterator[tuple[str, Adapter]]:
    """Yield the adapters with the names of their projections in the checkpoint."""
    for name, module in network.named_modules():
        if isinstance(module, Adapter):
            layer, projection = name.split(".adapter.")
            yield f"{layer}.{'self_attn' if projection in _ATTENTION_TARGETS else 'mlp'}.{projection}", module


def _list_layers(network: Ovis) -> list[DecoderLayer]:
    return [layer for layer in network.llm.model.layers if isinstance(layer, DecoderLayer)]


def _list_projections(layer: DecoderLayer) -> Iterator[tuple[str, nn.Linear]]:
    for name in TARGETS:
        yield name, getattr(layer.self_attn if name in _ATTENTION_TARGETS else layer.mlp, name)
