"""The AIMv2 tower (arXiv:2411.14402) and visual head: tiles -> probabilities over the visual vocabulary.

Attribute names are those of AIDC-AI's checkpoints.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ovis_model.config import VisionConfig
from ovis_model.network.attention import choose_kernels
from ovis_model.network.layers import LayerNorm, Linear, PatchNorm, apply_gate

HEAD_CHUNK_TOKENS = 1024
"""Visual tokens that the head processes at once. Their probabilities of 65,536 words are 0.13 GB in bfloat16, and two
or three such tensors are alive; for the tiles of a whole pass each would be 0.5 GB."""


class VisualTokenizer(nn.Module):
    """Vision tower and head, which turn a tile into `tokens_per_tile` visual tokens (Ovis, arXiv:2405.20797).

    A visual token is a probability vector over the visual words.
    """

    def __init__(self, config: VisionConfig, *, post_trunk_norm: bool = False) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config, post_trunk_norm=post_trunk_norm)
        self.head = nn.Sequential(
            Linear(config.hidden_size * config.hidden_stride**2, config.num_visual_words, bias=False),
            LayerNorm(config.num_visual_words, eps=1e-5),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute visual tokens: normalized [N, 3, S, S] -> [N, tokens_per_tile, num_visual_words]."""
        return self.compute_probabilities(self.compute_features(pixels))

    def compute_features(self, pixels: Tensor) -> Tensor:
        """Compute merged features: normalized [N, 3, S, S] -> [N, tokens_per_tile, hidden_stride^2 * hidden_size]."""
        return merge_patches(self.backbone(pixels), self.config.hidden_stride)

    def compute_probabilities(self, features: Tensor) -> Tensor:
        """Apply the head: [..., hidden_stride^2 * hidden_size] -> [..., num_visual_words].

        The softmax is computed in the dtype of `features`.
        """
        words: Tensor = self.head(features)
        return words.softmax(-1)


def merge_patches(features: Tensor, stride: int) -> Tensor:
    """Merge stride x stride neighbours into one token: [N, P*P, H] -> [N, (P/stride)^2, stride*stride*H].

    An odd side P is padded with zeros at the right and bottom, as in the original.
    """
    n, patches, hidden = features.shape
    side = round(patches**0.5)
    pad = -side % stride
    grid = F.pad(features.view(n, side, side, hidden), (0, 0, 0, pad, 0, pad))
    merged = (side + pad) // stride
    grid = grid.reshape(n, merged, stride, merged, stride, hidden).permute(0, 1, 3, 2, 4, 5)
    return grid.reshape(n, merged * merged, stride * stride * hidden)


class Backbone(nn.Module):
    """The vision tower: patch embeddings and transformer blocks."""

    def __init__(self, config: VisionConfig, *, post_trunk_norm: bool) -> None:
        super().__init__()
        self.preprocessor = Preprocessor(config)
        self.trunk = Trunk(config, post_trunk_norm=post_trunk_norm)

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute features: [N, 3, S, S] -> [N, num_patches, hidden_size]."""
        features: Tensor = self.trunk(self.preprocessor(pixels))
        return features


class Preprocessor(nn.Module):
    """Patch embeddings with learned positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patchifier = Patchifier(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_patches, config.hidden_size))

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed patches: [N, 3, S, S] -> [N, num_patches, hidden_size]."""
        patches: Tensor = self.patchifier(pixels)
        return patches + self.pos_embed


class Patchifier(nn.Module):
    """The projection of 14 x 14 px patches to features, with a norm."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.norm = PatchNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """Project patches: [N, 3, S, S] -> [N, num_patches, hidden_size]."""
        # Contiguous: products of a transposed tensor are batched, which takes up to a quarter longer on a CPU.
        weight, bias = (parameter.to(pixels.dtype) for parameter in self.proj.parameters())
        embedded = F.conv2d(pixels, weight, bias, self.proj.stride)
        patches: Tensor = self.norm(embedded.flatten(2).transpose(1, 2).contiguous())
        return patches


class Trunk(nn.Module):
    """The tower's blocks. Every checkpoint has `post_trunk_norm`; transformers applies it, the original does not."""

    def __init__(self, config: VisionConfig, *, post_trunk_norm: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.post_trunk_norm = PatchNorm(config.hidden_size, config.rms_norm_eps)
        self.applies_post_trunk_norm = post_trunk_norm

    def forward(self, hidden: Tensor) -> Tensor:
        """Run the blocks: [N, num_patches, hidden_size] -> the same shape."""
        for block in self.blocks:
            hidden = block(hidden)
        return self.post_trunk_norm(hidden) if self.applies_post_trunk_norm else hidden


class Block(nn.Module):
    """A transformer block with norms before attention and MLP."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm_1 = PatchNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config)
        self.norm_2 = PatchNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, hidden: Tensor) -> Tensor:
        """Run the block: [N, num_patches, hidden_size] -> the same shape."""
        hidden = self.attn(self.norm_1(hidden)).add_(hidden)
        out: Tensor = self.mlp(self.norm_2(hidden)).add_(hidden)
        return out


class Attention(nn.Module):
    """Full attention among the patches of one tile."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.proj = Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Attend within each tile: [N, num_patches, hidden_size] -> the same shape."""
        n, patches, size = hidden.shape
        qkv = self.qkv(hidden).view(n, patches, 3, self.num_heads, size // self.num_heads)
        out: Tensor = self.proj(choose_kernels(hidden).attend_all(*qkv.unbind(2)).reshape(n, patches, size))
        return out


class SwiGLU(nn.Module):
    """The gated MLP of a block (arXiv:2002.05202)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.fc3 = Linear(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply the MLP: [N, num_patches, hidden_size] -> the same shape."""
        out: Tensor = self.fc2(apply_gate(self.fc1(hidden), self.fc3(hidden)))
        return out
