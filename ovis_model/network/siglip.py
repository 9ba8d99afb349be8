"""Encode frames and text as comparable vectors, with SigLIP (arXiv:2303.15343) from transformers.

The weights are read from safetensors, and no remote code runs. Frames must have the size of the checkpoint, `size`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ovis_model.checkpoint import CheckpointError, fetch_checkpoint

IMAGES_PER_BATCH = 32


class SiglipEncoder:
    """One checkpoint on one device: float32 on a CPU, bfloat16 on CUDA.

    `size` is the (width_px, height_px) of frames. Vectors are scaled to unit length in float32.
    """

    def __init__(self, model: Any, tokenizer: Any, mean: Sequence[float], std: Sequence[float]) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._mean, self._std = (torch.tensor(v, device=model.device).view(3, 1, 1) * 255 for v in (mean, std))
        side = model.config.vision_config.image_size
        self.size: tuple[int, int] = (side, side)
        self._num_positions: int = model.config.text_config.max_position_embeddings

    @classmethod
    def from_pretrained(
        cls, path_or_id: str, revision: str | None = None, device: Literal["cpu", "cuda"] = "cpu"
    ) -> SiglipEncoder:
        """Load from a directory, hub id or URI. Raise ValueError if the checkpoint is not a SigLIP."""
        from transformers import AutoTokenizer, SiglipModel

        directory = fetch_checkpoint(path_or_id, revision)
        check_siglip(directory)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model: Any = SiglipModel.from_pretrained(directory, use_safetensors=True, dtype=dtype, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        settings = json.loads((directory / "preprocessor_config.json").read_text())
        mean, std = (settings.get(name, [0.5] * 3) for name in ("image_mean", "image_std"))
        return cls(model.to(device).eval(), tokenizer, mean, std)

    @torch.inference_mode()
    def encode_frames(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encode frames uint8[N, H, W, 3] of `size` as float32[N, d] of unit length."""
        parts = [frames[i : i + IMAGES_PER_BATCH] for i in range(0, len(frames), IMAGES_PER_BATCH)]
        return np.concatenate([_normalize_vectors(self._encode_batch(part)) for part in parts])

    @torch.inference_mode()
    def encode_text(self, text: str) -> NDArray[np.float32]:
        """Encode a text as float32[d] of unit length; a text too long for the encoder is the mean of its parts.

        The encoder reads its result at the last position, and was trained on texts padded to the full length. So each
        part ends with the end mark and is padded.
        """
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        room = self._num_positions - 1
        parts = [ids[i : i + room] for i in range(0, len(ids), room)] or [[]]
        padded = [[*part, self._tokenizer.eos_token_id] for part in parts]
        padded = [part + [self._tokenizer.pad_token_id] * (self._num_positions - len(part)) for part in padded]
        vectors = _normalize_vectors(
            self._model.get_text_features(torch.tensor(padded, device=self._model.device)).pooler_output
        )
        mean: NDArray[np.float32] = _normalize_vectors(torch.from_numpy(vectors.mean(axis=0, keepdims=True)))[0]
        return mean

    def _encode_batch(self, frames: NDArray[np.uint8]) -> torch.Tensor:
        pixels = torch.from_numpy(frames).to(self._model.device).permute(0, 3, 1, 2).float()  # [N, 3, H, W]
        normalised = ((pixels - self._mean) / self._std).to(self._model.dtype)
        features: torch.Tensor = self._model.get_image_features(normalised).pooler_output
        return features


def check_siglip(directory: Path) -> None:
    """Raise CheckpointError unless `directory` holds a SigLIP; only its configuration is read."""
    config = directory / "config.json"
    kind = json.loads(config.read_text()).get("model_type") if config.exists() else None
    if kind != "siglip":
        raise CheckpointError(f"{directory} holds {kind or 'no model'}; give a SigLIP that takes images of one size")


def _normalize_vectors(vectors: torch.Tensor) -> NDArray[np.float32]:
    lengths = torch.nn.functional.normalize(vectors.float(), dim=-1)
    array: NDArray[np.float32] = lengths.cpu().numpy()
    return array
