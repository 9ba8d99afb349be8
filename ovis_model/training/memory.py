"""Estimate from a configuration how much device memory training needs. Knows sizes, not tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ovis_model.config import LanguageConfig, OvisConfig, VisionConfig
from ovis_model.sizing import count_head_parameters, count_language_parameters, count_tower_parameters
from ovis_model.training.stages import LAYER_PART

TRAINED_BYTES = 16
"""Bytes per trained parameter: weight, gradient and the two moments of Adam, in float32."""
_HEAD_CHUNK_TOKENS, _LOGIT_CHUNK_TOKENS = 1024, 512  # as `network.vision` and `training.model` cut them
_USABLE = 0.92  # share of a device's memory; the rest is CUDA's context and fragments


class TrainingMemoryError(ValueError):
    """The device is too small for this training."""


@dataclass(frozen=True)
class TrainingMemory:
    """The parameters of a run, and bytes on each device.

    states: weights, gradients and moments. checkpoints: what is stored for the backward pass, one tensor per layer and
    block. working: what exists at one time while a layer, the visual head or the logits are computed again.
    """

    num_trained: int
    num_frozen: int
    states: int
    checkpoints: int
    working: int

    @property
    def total(self) -> int:
        """All bytes on a device."""
        return self.states + self.checkpoints + self.working

    def check_fits(self, device_bytes: int) -> None:
        """Raise TrainingMemoryError with the shortfall if a device of this size is too small."""
        usable = int(_USABLE * device_bytes)
        if self.total > usable:
            raise TrainingMemoryError(
                f"training {self.num_trained / 1e6:,.0f} M of {(self.num_trained + self.num_frozen) / 1e6:,.0f} M "
                f"parameters needs {self.total / 1e9:.1f} GB per device ({self.states / 1e9:.1f} for weights and "
                f"optimizer, {(self.checkpoints + self.working) / 1e9:.1f} for activations), but {usable / 1e9:.1f} of "
                f"{device_bytes / 1e9:.1f} GB are usable: {(self.total - usable) / 1e9:.1f} GB too few; train fewer "
                "parts, use LoRA, shorter batches, a smaller model, or shard over more devices"
            )


def estimate_training_memory(
    config: OvisConfig,
    parts: str,
    *,
    num_tokens: int,
    num_tiles: int,
    lora_rank: int = 0,
    precision: Literal["float32", "bfloat16"] = "bfloat16",
    num_shards: int = 1,
) -> TrainingMemory:
    """Estimate the memory of training `parts` with checkpointed layers.

    `num_tokens` and `num_tiles` are those of the largest batch on one device. `lora_rank` counts adapters of all
    projections, which the part "lora" trains. `num_shards` devices share weights, gradients and moments.
    """
    width = 2 if precision == "bfloat16" else 4
    units, adapters = _count_units(config), count_adapter_parameters(config.language, lora_rank)
    chosen = _choose_units(units, parts)
    num_trained = sum(units[name] for name in chosen) + (adapters if _trains_adapters(parts) else 0)
    num_frozen = sum(units.values()) + adapters - num_trained
    return TrainingMemory(
        num_trained,
        num_frozen,
        states=(TRAINED_BYTES * num_trained + width * num_frozen) // num_shards,
        checkpoints=_count_checkpoint_bytes(config, chosen, num_tokens, num_tiles, width),
        working=max(
            _count_layer_bytes(config.language, num_tokens, width)
            + _count_stacked_bytes(config.language, width, is_trained="llm" in chosen),
            _count_block_bytes(config.vision, num_tiles, width) if any(map(_is_visual, chosen)) else 0,
            _count_head_bytes(config, num_tiles) if any(map(_is_visual, chosen)) else 0,
            _count_logit_bytes(config.language, num_tokens),
        ),
    )


def count_adapter_parameters(config: LanguageConfig, rank: int) -> int:
    """Count the parameters of LoRA of this rank on all seven projections of every layer."""
    hidden, kv_size, mlp = config.hidden_size, config.num_key_value_heads * config.head_dim, config.intermediate_size
    ends = [(hidden, hidden), (hidden, kv_size), (hidden, kv_size), (hidden, hidden), *[(hidden, mlp)] * 3]
    return config.num_hidden_layers * rank * sum(map(sum, ends))


def count_decoder_checkpoint_bytes(config: LanguageConfig, num_tokens: int, width: int) -> int:
    """Count the bytes of the tensors [num_tokens, hidden_size] stored before each decoder layer."""
    return config.num_hidden_layers * config.hidden_size * num_tokens * width


def _count_units(config: OvisConfig) -> dict[str, int]:
    """Count the parameters of the smallest parts that can be named."""
    vision, language = config.vision, config.language
    hidden = vision.hidden_size
    block = 4 * hidden * hidden + 3 * hidden * vision.intermediate_size + 2 * hidden
    blocks = {f"{LAYER_PART}{i}": block for i in range(vision.num_hidden_layers)}
    return {
        "visual_tokenizer.backbone.preprocessor": count_tower_parameters(vision) - sum(blocks.values()) - hidden,
        **blocks,
        "visual_tokenizer.head": count_head_parameters(vision),
        "vte": vision.vocab_size * language.hidden_size,
        "llm": count_language_parameters(language),
        _UNUSED: hidden,
    }


_UNUSED = "post_trunk_norm"  # never trained


def _choose_units(units: dict[str, int], parts: str) -> list[str]:
    """Return the units in `parts`, which `parts.choose_trainable` explains."""
    num_blocks, names = sum(name.startswith(LAYER_PART) for name in units), []
    for part in parts.split("|"):
        number = part.removeprefix(LAYER_PART)
        names.append(part if number == part else f"{LAYER_PART}{int(number) % num_blocks}")
    return [unit for unit in units if unit != _UNUSED and any(_is_within(unit, name) for name in names)]


def _is_within(unit: str, part: str) -> bool:
    return part in ("all", unit) or unit.startswith(f"{part}.")


def _trains_adapters(parts: str) -> bool:
    return bool({"all", "lora"} & set(parts.split("|")))


def _is_visual(unit: str) -> bool:
    return unit != "llm"


def _count_checkpoint_bytes(config: OvisConfig, chosen: list[str], num_tokens: int, num_tiles: int, width: int) -> int:
    """Count the tensors before each layer, and before each block from the first that is trained."""
    vision = config.vision
    trained = [name for name in chosen if name.startswith("visual_tokenizer.backbone.")]
    numbers = [int(name.removeprefix(LAYER_PART)) if name.startswith(LAYER_PART) else 0 for name in trained]
    num_blocks = vision.num_hidden_layers - min(numbers, default=vision.num_hidden_layers)
    tower = num_blocks * num_tiles * vision.num_patches * vision.hidden_size * width
    return tower + count_decoder_checkpoint_bytes(config.language, num_tokens, width)


def _count_layer_bytes(config: LanguageConfig, num_tokens: int, width: int) -> int:
    """Count what a decoder layer stores while it is computed again, and the gradients on the way back.

    Measured with hooks on saved tensors: 9 hidden, 3 key-value and 4 MLP sizes per token, in float32.
    """
    kv_size = config.num_key_value_heads * config.head_dim
    return num_tokens * width * (16 * config.hidden_size + 4 * kv_size + 6 * config.intermediate_size)


def _count_stacked_bytes(config: LanguageConfig, width: int, *, is_trained: bool) -> int:
    """Count the copies of a layer's weights that share an input: stacked, cast, and the gradients of both."""
    kv_size = config.num_key_value_heads * config.head_dim
    weights = config.hidden_size * (config.hidden_size + 2 * kv_size + 2 * config.intermediate_size)
    return weights * (2 * (4 + width) if is_trained else width)


def _count_block_bytes(config: VisionConfig, num_tiles: int, width: int) -> int:
    """Count the same for a block of the tower, measured as 12 hidden and 4 MLP sizes per patch in float32."""
    return num_tiles * config.num_patches * width * (18 * config.hidden_size + 6 * config.intermediate_size)


def _count_head_bytes(config: OvisConfig, num_tiles: int) -> int:
    """Count the words, probabilities and their gradients of the tokens that the visual head processes at once."""
    tokens = min(_HEAD_CHUNK_TOKENS, num_tiles * config.vision.tokens_per_tile)
    return tokens * config.vision.num_visual_words * 16


def _count_logit_bytes(config: LanguageConfig, num_tokens: int) -> int:
    """Count the logits of the ids that are scored at once: in the network's dtype and in float32, with gradients."""
    return min(_LOGIT_CHUNK_TOKENS, num_tokens) * config.vocab_size * 12
