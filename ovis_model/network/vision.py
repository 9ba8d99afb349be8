"""The AIMv2 tower (arXiv:2411.14402) and visual head: tiles -> probabilities over the visual vocabulary.

Attribute names are those of AIDC-AI's checkpoints.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ovis_model.config import VisionConfig
from ovis_model.network.attention import choose_kernels
from ovis_model.network.kernels import add_residual
from ovis_model.network.layers import KernelModule, Linear, PatchNorm, apply_linear

HEAD_CHUNK_TOKENS = 1024
"""Visual tokens that the head processes at once. Their probabilities of 65,536 words are 0.13 GB in bfloat16, and two
or three such tensors are alive; for the tiles of a whole pass each would be 0.5 GB."""


class VisualTokenizer(KernelModule):
    """Vision tower and head, which turn a tile into `tokens_per_tile` visual tokens (Ovis, arXiv:2405.20797).

    A visual token is a probability vector over the visual words.
    """

    def __init__(self, config: VisionConfig, *, post_trunk_norm: bool = False) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config, post_trunk_norm=post_trunk_norm)
        linear = Linear(config.hidden_size * config.hidden_stride**2, config.num_visual_words, bias=False)
        norm = nn.LayerNorm(config.num_visual_words, eps=1e-5)
        self.head = nn.Sequential(linear, norm)
        self._head_parts = linear, norm
        self._padded_head: Tensor | None = None

    def pad_head(self) -> None:
        """Store the head's matrix with zero rows up to `vocab_size`; its parameter keeps its shape.

        A row of words and of probabilities then is a multiple of 16 bytes, so its products use aligned kernels.
        """
        linear, _ = self._head_parts
        self._padded_head = F.pad(linear.weight.data, (0, 0, 0, self.config.vocab_size - linear.out_features))
        linear.weight.data = self._padded_head[: linear.out_features]

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute visual tokens: normalized [N, 3, S, S] -> [N, tokens_per_tile, num_visual_words]."""
        return self.compute_probabilities(self.compute_features(pixels))

    def compute_features(self, pixels: Tensor) -> Tensor:
        """Compute merged features: normalized [N, 3, S, S] -> [N, tokens_per_tile, hidden_stride^2 * hidden_size]."""
        return merge_patches(self.backbone(pixels), self.config.hidden_stride)

    def compute_probabilities(self, features: Tensor) -> Tensor:
        """Apply the head: [..., hidden_stride^2 * hidden_size] -> [..., num_visual_words or, if padded, vocab_size].

        The softmax is computed in the dtype of `features`. Padding has the probability 0.
        """
        linear, norm = self._head_parts
        weight = linear.weight if self._padded_head is None else self._padded_head
        return self.kernels.compute_word_probabilities(apply_linear(features, weight), norm)


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
        update: Tensor | None = None
        for block in self.blocks:
            hidden, update = block(hidden, update)
        if self.applies_post_trunk_norm:
            return self.post_trunk_norm.add(update, hidden)[1]
        return hidden if update is None else add_residual(update, hidden)


class Block(nn.Module):
    """A transformer block with norms before attention and MLP."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm_1 = PatchNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config)
        self.norm_2 = PatchNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, hidden: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor]:
        """Add the update of the block before, and return the sum with the update of the MLP, which is not yet added.

        All are [N, num_patches, hidden_size]. So each addition is one operation with the norm after it.
        """
        hidden, normalized = self.norm_1.add(update, hidden)
        hidden, normalized = self.norm_2.add(self.attn(normalized), hidden)
        return hidden, self.mlp(normalized)


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


class SwiGLU(KernelModule):
    """The gated MLP of a block (arXiv:2002.05202)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.fc3 = Linear(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply the MLP: [N, num_patches, hidden_size] -> the same shape."""
        out: Tensor = self.fc2(self.kernels.apply_gate(self.fc1(hidden), self.fc3(hidden)))
        return out
