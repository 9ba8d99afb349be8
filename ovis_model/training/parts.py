"""Choose what is trained, by the names of the original's `--train_modules`, and draw the parts that begin anew."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ovis_model.network.ovis import Ovis
from ovis_model.training.stages import LAYER_PART
from ovis_model.training.stages import STAGES as STAGES
from ovis_model.training.stages import Stage as Stage

_NEVER_TRAINED = "visual_tokenizer.backbone.trunk.post_trunk_norm."  # the network never uses it: it has no gradient
_PATTERNS = {
    "all": r"",
    "llm": r"llm\.(?!.*\.adapter\.)",
    "lora": r"llm\..*\.adapter\.",
    "visual_tokenizer": r"visual_tokenizer\.",
    "visual_tokenizer.backbone": r"visual_tokenizer\.backbone\.",
    "visual_tokenizer.head": r"visual_tokenizer\.head\.",
    "vte": r"vte\.",
}


class PartError(ValueError):
    """A part is unknown, or has nothing to train."""


def choose_trainable(network: Ovis, parts: str) -> None:
    """Let gradients reach the parts in `parts`, joined by "|", and nothing else. Raise PartError.

    `post_trunk_norm` stays frozen, and a tied output matrix moves with the llm's embedding table. The part "lora" are
    the adapters that `lora.add_adapters` adds.
    """
    patterns = [_resolve_part(part.strip(), network) for part in parts.split("|")]
    for name, parameter in network.named_parameters():
        is_chosen = any(pattern.match(name) for pattern in patterns)
        parameter.requires_grad_(is_chosen and not name.startswith(_NEVER_TRAINED))
    if not list_trainable(network):
        raise PartError(f"the parts {parts!r} have nothing to train; add adapters before training 'lora'")


def list_trainable(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters by their names."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with one learning rate, by name; `part` is what their rate was given for."""

    part: str
    learning_rate: float
    weight_decay: float
    parameters: Mapping[str, nn.Parameter]


def group_parameters(
    network: Ovis, learning_rate: float, rates: Mapping[str, float] | None = None, weight_decay: float = 0.0
) -> list[ParameterGroup]:
    """Group what is trained by learning rate; `rates` are those of parts, and the most specific part counts.

    Biases and norms are never decayed. Raise PartError for an unknown part, or one of which nothing is trained.
    """
    by_part = {"all": learning_rate, **(rates or {})}
    patterns = {part: _resolve_part(part, network) for part in by_part}
    found: dict[tuple[str, bool], dict[str, nn.Parameter]] = {}
    for name, parameter in list_trainable(network).items():
        part = max((part for part, pattern in patterns.items() if pattern.match(name)), key=_measure_specificity)
        found.setdefault((part, parameter.dim() >= 2), {})[name] = parameter
    if unused := sorted(set(rates or {}) - {part for part, _ in found}):
        raise PartError(f"{unused[0]!r} has a learning rate, but nothing of it is trained; remove the rate")
    return [
        ParameterGroup(part, by_part[part], weight_decay if is_decayed else 0.0, parameters)
        for (part, is_decayed), parameters in found.items()
    ]


def _measure_specificity(part: str) -> int:
    return 0 if part == "all" else 1 + part.count(".")


def _resolve_part(part: str, network: Ovis) -> re.Pattern[str]:
    """Return the pattern that the names of a part's parameters begin with. Raise PartError if it is unknown."""
    num_blocks, number = network.config.vision.num_hidden_layers, part.removeprefix(LAYER_PART)
    if part in _PATTERNS:
        return re.compile(_PATTERNS[part])
    if number != part and re.fullmatch(r"-?\d+", number) and -num_blocks <= int(number) < num_blocks:
        return re.compile(rf"visual_tokenizer\.backbone\.trunk\.blocks\.{int(number) % num_blocks}\.")
    raise PartError(
        f"unknown part {part!r}; use {', '.join(_PATTERNS)} or {LAYER_PART}N with N from {-num_blocks} to "
        f"{num_blocks - 1}, joined by |"
    )


@torch.no_grad()
def draw_visual_table(network: Ovis, generator: torch.Generator) -> None:
    """Draw the visual embedding table from the mean and standard deviation of all the llm's input embeddings.

    Unless told otherwise, the original draws it from N(0, 1), which is many times as wide as the embeddings of a
    language model. The generator is the CPU's, so that every device gets the same table.
    """
    mean, std = measure_embeddings(network.llm.model.embed_tokens.weight)
    table = network.vte.weight
    table.copy_(torch.randn(table.shape, generator=generator) * std + mean)


def measure_embeddings(table: Tensor) -> tuple[float, float]:
    """Return the mean and the standard deviation of all entries of a table."""
    values = table.detach().float()
    return float(values.mean()), float(values.std())
