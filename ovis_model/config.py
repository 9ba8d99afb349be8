"""Parse a checkpoint's `config.json` in either layout, and list the six published sizes.

The file is parsed as JSON, without AutoConfig and remote code. A value that this implementation does not support is an
error, never ignored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

NUM_INDICATORS = 5  # image start, overview end, column, row, image end: the last entries of the vte

Layout = Literal["aidc", "native"]
Quantization = Literal["none", "fp8"]
EngineName = Literal["ovis", "vllm"]
Json = dict[str, Any]


class ConfigError(ValueError):
    """The checkpoint is not an Ovis2 that this implementation supports."""


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The AIMv2 tower and the visual head; sizes in px. `vocab_size` counts visual words and the five indicators."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int = 448
    patch_size: int = 14
    hidden_stride: int = 2
    vocab_size: int = 65536
    rms_norm_eps: float = 1e-5

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of one tile."""
        return self.patches_per_side**2

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of one tile: each merges `hidden_stride` x `hidden_stride` patches, rounded up."""
        return (-(-self.patches_per_side // self.hidden_stride)) ** 2

    @property
    def num_visual_words(self) -> int:
        """Outputs of the visual head: the visual vocabulary without the indicators."""
        return self.vocab_size - NUM_INDICATORS


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """The Qwen2.5 decoder."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True, kw_only=True)
class OvisConfig:
    """An Ovis2 checkpoint. `max_length` limits prompt + output, in tokens; `dtype` is the stored one."""

    vision: VisionConfig
    language: LanguageConfig
    max_length: int = 32768
    eos_token_ids: tuple[int, ...] = (151645, 151643)
    dtype: str = "bfloat16"
    layout: Layout = "aidc"

    @classmethod
    def from_directory(cls, directory: Path) -> OvisConfig:
        """Read `config.json` and, for the end-of-text ids, `generation_config.json`. Raise ConfigError if invalid."""
        config = _read_json(directory / "config.json")
        generation = directory / "generation_config.json"
        return parse_config(config, _read_json(generation) if generation.exists() else {})


def parse_config(config: Json, generation: Json) -> OvisConfig:
    """Parse `config.json` and `generation_config.json`.

    Raise ConfigError that names the field, its value and the supported value.
    """
    if "quantization_config" in config:
        raise ConfigError("quantized checkpoints (quantization_config) are not supported; use the bfloat16 one")
    layout = _detect_layout(config)
    vision, language = (_parse_aidc if layout == "aidc" else _parse_native)(config)
    eos_ids = _find_eos_token_ids(generation, config["llm_config" if layout == "aidc" else "text_config"])
    return OvisConfig(
        vision=vision,
        language=language,
        max_length=min(config.get("multimodal_max_length", 32768), language.max_position_embeddings),
        eos_token_ids=eos_ids,
        dtype=config.get("dtype") or config.get("torch_dtype") or "bfloat16",
        layout=layout,
    )


def _detect_layout(config: Json) -> Layout:
    model_type = config.get("model_type")
    if model_type == "ovis" and "llm_config" in config and "visual_tokenizer_config" in config:
        return "aidc"
    if model_type == "ovis2" and "text_config" in config and "vision_config" in config:
        return "native"
    raise ConfigError(
        f"config.json has model_type={model_type!r}; supported are Ovis2's 'ovis' (AIDC-AI) and 'ovis2' (transformers)"
    )


def _find_eos_token_ids(generation: Json, text: Json) -> tuple[int, ...]:
    """Take the ids from generation_config.json, else from the decoder's section, else Qwen2.5-Instruct's two."""
    for source in (generation, text):
        if (eos := source.get("eos_token_id")) is not None:
            return (eos,) if isinstance(eos, int) else tuple(eos)
    return OvisConfig.eos_token_ids


def _parse_aidc(config: Json) -> tuple[VisionConfig, LanguageConfig]:
    tokenizer, llm = config["visual_tokenizer_config"], config["llm_config"]
    if "backbone_config" not in tokenizer:
        raise ConfigError("config.json lacks backbone_config in its visual_tokenizer_config")
    backbone = tokenizer["backbone_config"]
    _expect(backbone, model_type="aimv2", use_bias=False)
    return _parse_vision(backbone, tokenizer), _parse_language(llm, bool(llm.get("tie_word_embeddings", False)))


def _parse_native(config: Json) -> tuple[VisionConfig, LanguageConfig]:
    vision, text = config["vision_config"], config["text_config"]
    _expect(vision, model_type="ovis2_vision", hidden_act="silu", mlp_bias=False)
    # As transformers' Ovis2Config, which reads only the top level and defaults to tied.
    return _parse_vision(vision, vision), _parse_language(text, bool(config.get("tie_word_embeddings", True)))


def _parse_vision(backbone: Json, tokenizer: Json) -> VisionConfig:
    _expect(tokenizer, tokenize_function="softmax")
    _expect(backbone, qkv_bias=False, num_channels=3)
    vision = VisionConfig(
        **_pick_fields(backbone, "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        **_pick_fields(backbone, "image_size", "patch_size", "rms_norm_eps"),
        **_pick_fields(tokenizer, "hidden_stride", "vocab_size"),
    )
    _check_divides(vision, "patch_size", "image_size")
    _check_divides(vision, "num_attention_heads", "hidden_size")
    return vision


def _parse_language(text: Json, tied: bool) -> LanguageConfig:
    _expect(text, model_type="qwen2", hidden_act="silu", use_sliding_window=False)
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    _expect(rope, **{"type" if "type" in rope else "rope_type": "default"})
    theta = rope.get("rope_theta") or text.get("rope_theta") or LanguageConfig.rope_theta
    language = LanguageConfig(
        **_pick_fields(text, "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"),
        **_pick_fields(text, "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
        tie_word_embeddings=tied,
        rope_theta=float(theta),
    )
    _check_divides(language, "num_attention_heads", "hidden_size")
    _check_divides(language, "num_key_value_heads", "num_attention_heads")
    return language


def _pick_fields(source: Json, *names: str) -> Json:
    missing = [name for name in names if source.get(name) is None]
    if missing:
        raise ConfigError(f"config.json lacks {', '.join(missing)} in its {source.get('model_type')!r} part")
    return {name: source[name] for name in names}


def _expect(source: Json, **supported: object) -> None:
    for name, value in supported.items():
        if source.get(name, value) != value:
            raise ConfigError(f"config.json has {name}={source[name]!r}; only {value!r} is supported")


def _check_divides(config: VisionConfig | LanguageConfig, part: str, whole: str) -> None:
    value, multiple = getattr(config, part), getattr(config, whole)
    if value < 1 or multiple % value:
        raise ConfigError(f"config.json has {part}={value}, which does not divide {whole}={multiple}")


def _read_json(path: Path) -> Json:
    try:
        data: Json = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: {path.parent} is not a model checkpoint") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    return data


def _make_config(
    vision: tuple[int, int, int], language: tuple[int, int, int, int, int, int], *, tied: bool
) -> OvisConfig:
    width, heads, mlp = vision
    layers, hidden, q_heads, kv_heads, intermediate, vocab = language
    return OvisConfig(
        vision=VisionConfig(hidden_size=width, intermediate_size=mlp, num_hidden_layers=24, num_attention_heads=heads),
        language=LanguageConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=q_heads,
            num_key_value_heads=kv_heads,
            vocab_size=vocab,
            tie_word_embeddings=tied,
        ),
    )


_LARGE, _HUGE, _ONE_B = (1024, 8, 2816), (1536, 12, 4096), (2048, 16, 5632)

SIZES: dict[str, OvisConfig] = {
    "1B": _make_config(_LARGE, (24, 896, 14, 2, 4864, 151936), tied=True),
    "2B": _make_config(_LARGE, (28, 1536, 12, 2, 8960, 151936), tied=True),
    "4B": _make_config(_HUGE, (36, 2048, 16, 2, 11008, 151936), tied=True),
    "8B": _make_config(_HUGE, (28, 3584, 28, 4, 18944, 152064), tied=False),
    "16B": _make_config(_HUGE, (48, 5120, 40, 8, 13824, 152064), tied=False),
    "34B": _make_config(_ONE_B, (64, 5120, 40, 8, 27648, 152064), tied=False),
}
"""Shapes of the published AIDC-AI/Ovis2-* checkpoints, for planning and for runs with random weights."""
