"""The Ovis2 network: visual and text embeddings in one sequence (Ovis, arXiv:2405.20797)."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ovis_model.config import OvisConfig
from ovis_model.network.attention import NoContext
from ovis_model.network.kernels import LayerKernels
from ovis_model.network.language import Qwen2ForCausalLM
from ovis_model.network.layers import apply_linear, choose_pass_dtype, use_kernels
from ovis_model.network.quantization import quantize_shapes
from ovis_model.network.tensor_parallel import ALONE, Shard
from ovis_model.network.vision import HEAD_CHUNK_TOKENS, VisualTokenizer
from ovis_model.types import IMAGE_ATOM_ID, IMAGE_START_ID

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of red, green and blue in [0, 1]: the `image_mean` of every published checkpoint."""
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Ovis(nn.Module):
    """The Ovis2 network; attribute names are those of AIDC-AI's checkpoints.

    `post_trunk_norm` applies the tower's last norm. transformers applies it, the original does not.
    """

    def __init__(self, config: OvisConfig, *, post_trunk_norm: bool = False, shard: Shard = ALONE) -> None:
        super().__init__()
        self.config, self.shard = config, shard
        self.visual_tokenizer = VisualTokenizer(config.vision, post_trunk_norm=post_trunk_norm)
        self.vte = nn.Embedding(config.vision.vocab_size, config.language.hidden_size)
        self.llm = Qwen2ForCausalLM(config.language, shard)

    def quantize_shapes(self) -> None:
        """Give the unloaded linear layers of tower and decoder FP8 weights. Raise ValueError if a width forbids it.

        Head, tables and the output matrix keep their dtype.
        """
        for part in (self.visual_tokenizer.backbone.trunk, self.llm.model.layers):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    quantize_shapes(module)

    def prepare(self, kernels: LayerKernels) -> None:
        """Compute with `kernels`, and lay out the weights for inference in their present device and dtype."""
        use_kernels(self, kernels)
        if kernels.pads_columns:
            self.visual_tokenizer.pad_head()
        self.llm.fuse()

    @property
    def device(self) -> torch.device:
        """The device of all parameters."""
        return self.vte.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all parameters."""
        return self.vte.weight.dtype

    @property
    def pass_dtype(self) -> torch.dtype:
        """The dtype of activations in vision and prefill; see `layers.choose_pass_dtype`."""
        return choose_pass_dtype(self.dtype, self.device)

    def normalize(self, tiles: Tensor, tile_sizes: Tensor) -> Tensor:
        """Normalize tiles: uint8[N, 3, S, S], int[N, 2] (height_px, width_px) -> pixels [N, 3, S, S] in `pass_dtype`.

        A table applies CLIP's mean and standard deviation, bitwise as the original does. The border around a crop
        becomes 0, the mean colour, because the original pads after normalization.
        """
        table = _load_normalization_table(self.device, self.pass_dtype)
        pixels = torch.empty(tiles.shape, dtype=table.dtype, device=table.device)
        for channel in range(3):
            bytes_ = tiles[:, channel]
            pixels[:, channel] = table[channel].index_select(0, bytes_.int().flatten()).view(bytes_.shape)
        # A product: filling by a mask takes six times as long on a CPU.
        return pixels.mul_(_mask_borders(tile_sizes, tiles.shape[-1], table.dtype)[:, None])

    def encode_tiles(self, pixels: Tensor) -> Tensor:
        """Encode pixels [N, 3, S, S] as visual embeddings [N, tokens_per_tile, hidden_size] in the model's dtype.

        The computation runs in the dtype of the pixels. It skips the indicators' entries of the table, whose
        probability is 0 in the original.
        """
        return self.shard.distribute(pixels, self._encode_tiles)

    def _encode_tiles(self, pixels: Tensor) -> Tensor:
        features = self.visual_tokenizer.compute_features(pixels)
        chunks = torch.split(features.flatten(0, 1), HEAD_CHUNK_TOKENS)
        embeds = torch.cat([self.embed_features(chunk) for chunk in chunks])
        return embeds.view(*features.shape[:2], embeds.shape[1])

    def embed_features(self, features: Tensor) -> Tensor:
        """Embed merged features by head and table: [n, hidden_stride^2 * width] -> [n, hidden_size]."""
        probabilities, table = self.visual_tokenizer.compute_probabilities(features), self.vte.weight
        # The words come first in the table; without padding of the head, only they have a probability.
        return apply_linear(probabilities, table[: probabilities.shape[1]].t()).to(table.dtype)

    def embed(self, input_ids: Tensor, visual: Tensor) -> Tensor:
        """Embed ids with placeholders: int64[T], visual embeddings [n, hidden_size] -> [T, hidden_size].

        The n atoms of `input_ids` take the n embeddings of `visual` in order. Raise IndexError on a CPU if there are
        fewer embeddings.
        """
        # All lookups are for all tokens: to pick some by a mask, the host would wait until the device has counted them.
        embeds: Tensor = self.llm.model.embed_tokens(input_ids.clamp(min=0))
        words = self.config.vision.num_visual_words
        indicators = self.vte((words + IMAGE_START_ID - input_ids).clamp(min=words))
        embeds = torch.where((input_ids <= IMAGE_START_ID)[:, None], indicators.to(embeds.dtype), embeds)
        if not len(visual):
            return embeds
        atoms = input_ids == IMAGE_ATOM_ID
        order = (atoms.cumsum(0) - 1).clamp(min=0)
        return torch.where(atoms[:, None], visual.to(embeds.dtype).index_select(0, order), embeds)

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor) -> Tensor:
        """Compute logits: [B, T, hidden_size], int64[B, T] -> [B, T, vocab_size], in training and to score texts."""
        return self.llm.compute_logits(self.llm.model(inputs_embeds, position_ids, NoContext()))


def _mask_borders(tile_sizes: Tensor, side: int, dtype: torch.dtype) -> Tensor:
    """Return [N, S, S]: 1 inside the centred crop of (height_px, width_px) of each tile, 0 in the border around it."""
    at = torch.arange(side, device=tile_sizes.device)
    start = (side - tile_sizes) // 2  # [N, 2]
    within = (at >= start[..., None]) & (at < (start + tile_sizes)[..., None])  # [N, 2, S]
    rows, columns = within.to(dtype).unbind(1)
    return rows[:, :, None] * columns[:, None, :]


@cache
def _load_normalization_table(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(build_normalization_table()).to(device, dtype)


def build_normalization_table() -> NDArray[np.float32]:
    """Return float32[3, 256], which maps a byte of each channel to its normalized value.

    The values are bitwise those of the original's `CLIPImageProcessor`. The border of a tile, which is 0 after
    normalization, cannot come from the table, because no byte maps to 0.
    """
    # Order and dtypes decide the last bit: a float64 product rounded once, then float32 throughout.
    unit = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    mean, std = np.array(CLIP_MEAN, np.float32)[:, None], np.array(CLIP_STD, np.float32)[:, None]
    table: NDArray[np.float32] = (unit - mean) / std
    return table
