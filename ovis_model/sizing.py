"""Estimate from a configuration how much device memory a model needs, and how many ranks can share it.

Knows sizes, not tensors.
"""

from __future__ import annotations

from ovis_model.config import LanguageConfig, OvisConfig, Quantization, VisionConfig

# A device should hold this many sequences at once, of 3 x 3 tiles each; with fewer, decoding is bound by its bandwidth.
_SEQUENCES, _TOKENS_PER_SEQUENCE = 16, 2600
_ACTIVATION_BYTES = 4 << 30  # 16 tiles in the visual head, the logits of 128 sequences, what the libraries keep
_USABLE = 0.9  # share of a device's memory


def count_vision_parameters(config: OvisConfig) -> int:
    """Count the parameters of tower, head and visual embedding table, which every rank holds."""
    return (
        count_tower_parameters(config.vision)
        + count_head_parameters(config.vision)
        + config.vision.vocab_size * config.language.hidden_size
    )


def count_language_parameters(config: LanguageConfig) -> int:
    """Count the parameters of the decoder, its embedding table and, unless it is tied, its output matrix."""
    hidden, kv_size = config.hidden_size, config.num_key_value_heads * config.head_dim
    vectors = config.num_hidden_layers * (3 * hidden + 2 * kv_size) + hidden  # biases and norms
    tables = (1 if config.tie_word_embeddings else 2) * config.vocab_size * hidden
    return _count_layer_matrices(config) + vectors + tables


def _count_layer_matrices(config: LanguageConfig) -> int:
    """Count the weights of the matrices in the decoder's layers, which FP8 quantizes."""
    hidden, kv_size = config.hidden_size, config.num_key_value_heads * config.head_dim
    layer = 2 * hidden * hidden + 2 * hidden * kv_size + 3 * hidden * config.intermediate_size
    return config.num_hidden_layers * layer


def estimate_device_bytes(
    config: OvisConfig, ranks: int, bytes_per_value: int, quantization: Quantization = "none"
) -> int:
    """Estimate the bytes per device for the model to run well on `ranks` devices.

    These are weights, keys and values, and activations. `bytes_per_value` is the size of what is not quantized.
    """
    language = config.language
    kv_heads = max(language.num_key_value_heads / ranks, 1)
    kv_values = 2 * language.num_hidden_layers * kv_heads * language.head_dim * _SEQUENCES * _TOKENS_PER_SEQUENCE
    weight_bytes = estimate_weight_bytes(config, ranks, bytes_per_value, quantization)
    return int(weight_bytes + kv_values * bytes_per_value + _ACTIVATION_BYTES)


def estimate_weight_bytes(
    config: OvisConfig, ranks: int, bytes_per_value: int, quantization: Quantization = "none"
) -> int:
    """Estimate the bytes of the weights on each of `ranks` devices."""
    values = count_vision_parameters(config) + count_language_parameters(config.language) / ranks
    saved = 0.0
    if quantization == "fp8":
        quantized = _count_block_matrices(config.vision) + _count_layer_matrices(config.language) / ranks
        saved = quantized * (bytes_per_value - 1)  # scales are less than 0.5 % of it
    return int(values * bytes_per_value - saved)


def find_min_ranks(
    config: OvisConfig, memory_bytes: int, bytes_per_value: int, quantization: Quantization = "none"
) -> int:
    """Return the minimum number of devices of `memory_bytes` for a replica. Raise ValueError if none is enough."""
    needed = {
        ranks: estimate_device_bytes(config, ranks, bytes_per_value, quantization)
        for ranks in list_rank_counts(config.language)
    }
    for ranks, device_bytes in needed.items():
        if device_bytes <= _USABLE * memory_bytes:
            return ranks
    ranks, least_bytes = list(needed.items())[-1]
    raise ValueError(
        f"GPUs of {memory_bytes / 1e9:.0f} GB are too small for this model, which needs "
        f"{least_bytes / _USABLE / 1e9:.0f} GB on each of {ranks} GPUs; use larger GPUs or a smaller model, or try "
        "anyway with --tensor-parallel"
    )


MIN_FP8_CAPABILITY = (8, 9)
"""Compute capability of the first GPUs that multiply float8 numbers."""


def describe_missing_fp8(name: str, capability: tuple[int, int]) -> str:
    """Return why the GPU `name` cannot run FP8, and what to do."""
    found, needed = (".".join(map(str, version)) for version in (capability, MIN_FP8_CAPABILITY))
    return (
        f"quantization fp8 needs GPUs of compute capability {needed} or newer, such as L4, L40S and H100, but "
        f"{name} has {found}; use --quantization none"
    )


def list_rank_counts(config: LanguageConfig) -> list[int]:
    """Return the numbers of ranks that can share this decoder, in ascending order from 1."""
    return [n for n in range(1, config.num_attention_heads + 1) if _can_divide(n, config)]


def check_tensor_parallel(config: LanguageConfig, tensor_parallel: int) -> None:
    """Raise ValueError with the possible values if this decoder cannot be divided among so many ranks."""
    if not _can_divide(tensor_parallel, config):
        *others, last = map(str, list_rank_counts(config))
        raise ValueError(
            f"tensor_parallel={tensor_parallel} does not divide the model's {config.num_attention_heads} heads, "
            f"{config.num_key_value_heads} key-value heads, {config.intermediate_size} channels and "
            f"{config.vocab_size} tokens; use {' or '.join(filter(None, [', '.join(others), last]))}"
        )


def _can_divide(n: int, config: LanguageConfig) -> bool:
    kv_heads = config.num_key_value_heads
    sizes = (config.num_attention_heads, config.intermediate_size, config.vocab_size)
    return n >= 1 and all(size % n == 0 for size in sizes) and (kv_heads % n == 0 or n % kv_heads == 0)


def count_tower_parameters(config: VisionConfig) -> int:
    """Count the parameters of the vision tower."""
    hidden = config.hidden_size
    patchifier = hidden * 3 * config.patch_size**2 + hidden + hidden + config.num_patches * hidden
    norms = config.num_hidden_layers * 2 * hidden + hidden
    return patchifier + _count_block_matrices(config) + norms


def _count_block_matrices(config: VisionConfig) -> int:
    """Count the weights of the matrices in the tower's blocks, which FP8 quantizes."""
    hidden = config.hidden_size
    return config.num_hidden_layers * (4 * hidden * hidden + 3 * hidden * config.intermediate_size)


def count_head_parameters(config: VisionConfig) -> int:
    """Count the parameters of the visual head: a matrix and the norm of its outputs."""
    merged = config.hidden_size * config.hidden_stride**2
    return merged * config.num_visual_words + 2 * config.num_visual_words
