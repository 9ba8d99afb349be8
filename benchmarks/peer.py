"""Transformers' Ovis2 on the weights of a model of this project, as the other side of benchmarks."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.workload import Workload
from ovis_model.config import NUM_INDICATORS
from ovis_model.network.ovis import Ovis
from ovis_model.network.weights import find_targets
from ovis_model.types import IMAGE_ATOM_ID, IMAGE_START_ID, Request


def build_peer(model: Ovis) -> Any:
    """Build transformers' Ovis2 on the same weight tensors."""
    import transformers

    config, vision, language = model.config, asdict(model.config.vision), asdict(model.config.language)
    tied, first = language.pop("tie_word_embeddings"), language["vocab_size"] - 6
    peer_config = transformers.Ovis2Config(
        text_config={**language, "model_type": "qwen2", "rope_theta": config.language.rope_theta},
        vision_config=vision,
        hidden_size=config.language.hidden_size,
        vocab_size=config.language.vocab_size,
        image_token_id=first,
        visual_indicator_token_ids=list(range(first + 1, first + 1 + NUM_INDICATORS)),
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        peer: Any = transformers.Ovis2ForConditionalGeneration(peer_config)
    peer.to_empty(device=model.device)
    weights = {name: target.tensor for name, target in find_targets(model, "native").items()}
    peer.load_state_dict(weights, strict=False, assign=True)
    peer.tie_weights()
    head_dim, theta = config.language.head_dim, config.language.rope_theta
    exponents = torch.arange(0, head_dim, 2, device=model.device).float() / head_dim
    rotary = peer.model.language_model.rotary_emb
    rotary.inv_freq = rotary.original_inv_freq = 1.0 / theta**exponents
    patches = torch.arange(config.vision.num_patches, device=model.device)
    peer.model.vision_tower.transformer.embeddings.position_ids = patches[None]
    return peer.eval()


def run_transformers(peer: Any, model: Ovis, workload: Workload, batch_size: int) -> list[list[int]]:
    """Generate in padded batches; return the output ids of each request."""
    outputs: list[list[int]] = []
    for start in range(0, len(workload.requests), batch_size):
        part = slice(start, start + batch_size)
        requests, output_lengths = workload.requests[part], workload.output_lengths[part]
        ids = torch.stack([translate_ids(request, peer.config) for request in requests]).to(
            model.device
        )  # of one length
        pixels = torch.cat([normalize_tiles(model, request) for request in requests])
        with torch.inference_mode():
            out = peer.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=pixels,
                do_sample=False,
                max_new_tokens=max(output_lengths),
                eos_token_id=None,
                pad_token_id=0,
            )
        new = out[:, ids.shape[1] :].tolist()
        outputs += [row[:length] for row, length in zip(new, output_lengths, strict=True)]
    return outputs


def translate_ids(request: Request, config: Any) -> Tensor:
    """Return the input ids of `request` with transformers' ids for the placeholders."""
    ids = request.input_ids.astype(np.int64)
    at = request.input_ids <= IMAGE_START_ID
    ids[at] = np.array(config.visual_indicator_token_ids)[IMAGE_START_ID - request.input_ids[at]]
    ids[request.input_ids == IMAGE_ATOM_ID] = config.image_token_id
    return torch.from_numpy(ids)


def normalize_tiles(model: Ovis, request: Request) -> Tensor:
    """Return the tiles of `request` as the model takes them, [tiles, 3, H, W]."""
    tiles, sizes = torch.from_numpy(request.tiles), torch.from_numpy(request.tile_sizes)
    return model.normalize(tiles.to(model.device), sizes.to(model.device)).to(model.dtype)
