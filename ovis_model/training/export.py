"""Load a network for training, and write it as a checkpoint in AIDC-AI's layout that the engine loads at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ovis_model.checkpoint import WEIGHT_INDEX
from ovis_model.config import LanguageConfig, OvisConfig, VisionConfig
from ovis_model.network.ovis import Ovis
from ovis_model.network.weights import WeightsError, load_weights
from ovis_model.training.lora import list_merged

_MAX_SHARD_BYTES = 5 << 30
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "merges.txt", "vocab.txt", "vocab.json")
_COPIED_FILES = (*_TOKENIZER_FILES, "generation_config.json", "preprocessor_config.json")


def load_network(directory: Path, device: torch.device | None = None) -> Ovis:
    """Load a checkpoint of either layout in float32 for training. Raise ConfigError or WeightsError.

    Unlike `weights.load_model`, it leaves the weights as separate tensors, and refuses those that are not finite.
    """
    config = OvisConfig.from_directory(directory)
    with torch.device("meta"):
        network = Ovis(config)
    network.to_empty(device=device or torch.device("cpu"))
    load_weights(network, directory, config.layout)
    for name, parameter in network.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise WeightsError(f"{directory} has NaN or infinite values in {name}; use a sound checkpoint")
    return network.train()


def make_network(config: OvisConfig, seed: int) -> Ovis:
    """Make a network with random weights on the CPU; the same for the same seed.

    Matrices are as torch draws them. The words of both tables have length 1, so that a new network gives all words
    about the same probability. Positions and visual words differ enough to be told apart in bfloat16.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Ovis(config)
        for table in (network.vte, network.llm.model.embed_tokens):
            nn.init.normal_(table.weight, std=config.language.hidden_size**-0.5)
        nn.init.normal_(network.visual_tokenizer.backbone.preprocessor.pos_embed, std=0.2)
        head_norm = network.visual_tokenizer.head[1]
        assert isinstance(head_norm, nn.LayerNorm)
        nn.init.constant_(head_norm.weight, 2.0)
        return network.train()


def export_network(network: Ovis, source: Path, target: Path, facts: Mapping[str, Any]) -> None:
    """Write weights in bfloat16, configuration, tokenizer and a model card with `facts` to the directory `target`.

    The tokenizer comes from the checkpoint `source`, which the network was made from. Adapters are merged.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in _COPIED_FILES:
        if (source / name).exists() and source != target:
            shutil.copy(source / name, target / name)
    _write_json(target / "config.json", _make_config(network.config, source))
    _write_weights(network, target)
    (target / "README.md").write_text(render_model_card(facts), encoding="utf-8")


def render_model_card(facts: Mapping[str, Any]) -> str:
    """Return the model card, in Markdown: a table of facts such as the stage, the data and the losses."""
    rows = "\n".join(f"| {name} | {str(value).replace('|', '/')} |" for name, value in facts.items())
    return f"{_CARD}\n| | |\n|---|---|\n{rows}\n"


_CARD = """---
library_name: ovis2-ray
pipeline_tag: image-text-to-text
---

# A model in the layout of Ovis2

`ovis2 caption INPUT OUTPUT --model DIRECTORY` uses it. How it was made:
"""


def _write_weights(network: Ovis, target: Path) -> None:
    """Write `model.safetensors`, or shards of at most 5 GB with their index."""
    shards = [*_split_shards((name, tensor.to("cpu", torch.bfloat16)) for name, tensor in list_merged(network))]
    for old in (*target.glob("model*.safetensors"), target / WEIGHT_INDEX):
        old.unlink(missing_ok=True)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        save_file({key: x.contiguous() for key, x in shard.items()}, target / name, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        _write_json(target / WEIGHT_INDEX, {"metadata": {}, "weight_map": weight_map})


def _split_shards(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    num_bytes = 0
    for name, tensor in tensors:
        if shard and num_bytes + tensor.nbytes > _MAX_SHARD_BYTES:
            yield shard
            shard, num_bytes = {}, 0
        shard[name] = tensor
        num_bytes += tensor.nbytes
    yield shard


def _make_config(config: OvisConfig, source: Path) -> dict[str, Any]:
    """Return the content of `config.json`: that of the source, or one in AIDC-AI's layout if it has the other."""
    found = json.loads((source / "config.json").read_text("utf-8"))
    made = found if config.layout == "aidc" else _describe_network(config)
    return {**made, "torch_dtype": "bfloat16", "use_cache": True}


def _describe_network(config: OvisConfig) -> dict[str, Any]:
    return {
        "architectures": ["Ovis"],
        "model_type": "ovis",
        "conversation_formatter_class": "QwenConversationFormatter",
        "hidden_size": config.language.hidden_size,
        "multimodal_max_length": config.max_length,
        "llm_config": _describe_language(config.language, config.eos_token_ids),
        "visual_tokenizer_config": _describe_vision(config.vision),
    }


def _describe_language(config: LanguageConfig, eos_token_ids: tuple[int, ...]) -> dict[str, Any]:
    fixed = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu"}
    return {**fixed, "use_sliding_window": False, "eos_token_id": list(eos_token_ids), **vars(config)}


def _describe_vision(config: VisionConfig) -> dict[str, Any]:
    sizes = dict(vars(config))
    outer = {name: sizes.pop(name) for name in ("hidden_stride", "vocab_size")}
    return {
        "model_type": "aimv2_visual_tokenizer",
        "tokenize_function": "softmax",
        "tau": 1.0,
        **outer,
        "backbone_config": {"model_type": "aimv2", "num_channels": 3, "qkv_bias": False, "use_bias": False, **sizes},
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
