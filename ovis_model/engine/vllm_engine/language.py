"""The language model of an Ovis2 checkpoint as a model of vLLM: its files as they are, other names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vllm import ModelRegistry
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

from ovis_model.config import OvisConfig

_ARCHITECTURE = "Ovis2LanguageModel"
_RENAMED = re.compile(r"^(?:llm\.(?=model\.|lm_head\.)|(?P<native>model\.)language_model\.|(?=lm_head\.))")


class Ovis2LanguageModel(Qwen2ForCausalLM):  # type: ignore[misc]  # vLLM has no type information for us
    """Qwen2 as vLLM has it, which takes the tensors of the language model out of an Ovis2 checkpoint."""

    def load_weights(self, weights: Iterable[tuple[str, Any]]) -> set[str]:
        """Load the tensors of either layout; return the names of the parameters that were loaded."""
        tied = self.config.tie_word_embeddings
        own = ((name, tensor) for full, tensor in weights if (name := to_vllm_name(full)))
        loaded: set[str] = super().load_weights(
            (name, tensor) for name, tensor in own if not (tied and name == "lm_head.weight")
        )
        return loaded


def to_vllm_name(name: str) -> str:
    """Return vLLM's name of a tensor of the language model; "" for one of the visual part."""
    match = _RENAMED.match(name)
    return f"{match['native'] or ''}{name[match.end() :]}" if match else ""


def register() -> None:
    """Make the architecture known to vLLM; its worker processes call this through the package's entry point."""
    if _ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(_ARCHITECTURE, f"{__name__}:{_ARCHITECTURE}")


def write_model_directory(target: Path, checkpoint: Path, config: OvisConfig) -> None:
    """Write what vLLM reads into the empty directory `target`: a config.json, and links to the weights."""
    language = config.language
    fields = {
        "architectures": [_ARCHITECTURE],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": language.hidden_size,
        "intermediate_size": language.intermediate_size,
        "num_hidden_layers": language.num_hidden_layers,
        "num_attention_heads": language.num_attention_heads,
        "num_key_value_heads": language.num_key_value_heads,
        "vocab_size": language.vocab_size,
        "tie_word_embeddings": language.tie_word_embeddings,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": language.rms_norm_eps,
        "rope_theta": language.rope_theta,
        "torch_dtype": config.dtype,
    }
    (target / "config.json").write_text(json.dumps(fields), "utf-8")
    for path in (*checkpoint.glob("*.safetensors"), *checkpoint.glob("*.safetensors.index.json")):
        (target / path.name).symlink_to(path.resolve())
