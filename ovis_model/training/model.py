"""Compute losses with the network of inference: a forward pass without a cache, under gradients.

What is large is recomputed in the backward pass instead of stored: the visual head's probabilities over 65,531 words,
and the logits, which are computed only where an id is learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ovis_model.network.language import compute_rotary
from ovis_model.network.ovis import Ovis
from ovis_model.network.vision import HEAD_CHUNK_TOKENS, merge_patches
from ovis_model.training.attention import PackedContext
from ovis_model.training.batch import Batch

Precision = Literal["float32", "bfloat16"]
LOGIT_CHUNK_TOKENS = 512
"""Learnt ids whose logits exist at the same time: 0.3 GB for 152,064 words in float32."""


class TrainingModel(nn.Module):
    """The network under training. Choose what is trained before (`parts.choose_trainable`, `lora.add_adapters`).

    precision: in both, trained parameters are float32. "bfloat16" computes under autocast, and stores frozen parameters
        in bfloat16.
    checkpoint_layers: recompute each layer and block in the backward pass. Training then takes a third more time and
        stores one tensor per layer.
    recompute_head: do so for the visual head and the logits.
    """

    def __init__(
        self,
        network: Ovis,
        *,
        precision: Precision = "float32",
        checkpoint_layers: bool = False,
        recompute_head: bool = True,
    ) -> None:
        super().__init__()
        self.network = network
        self._dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self._checkpoint_layers, self._recompute_head = checkpoint_layers, recompute_head
        for parameter in network.parameters():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else self._dtype)

    def forward(self, batch: Batch) -> Tensor:
        """Return the summed loss of all learnt ids, float32[]."""
        return self.loss_sum(batch)[0]

    def loss_sum(self, batch: Batch) -> tuple[Tensor, int]:
        """Return the summed loss, float32[] in nats, and the number of learnt ids.

        The mean over several batches, on any number of workers, is the sum of their sums divided by the sum of their
        numbers. A batch that teaches nothing has the loss 0 and gradients of 0.
        """
        return self.compute_losses(batch).sum(), batch.num_targets

    def compute_logprobs(self, batch: Batch) -> Tensor:
        """Return the log-probability of each example's learnt ids, float32[B]: a sum over ids, in nats."""
        losses = self.compute_losses(batch)
        return losses.new_zeros(len(batch.lengths)).index_add(0, batch.owners, -losses)

    def compute_losses(self, batch: Batch) -> Tensor:
        """Return the negative log-probability of each learnt id, float32[K], in nats."""
        device = self.network.device
        # Without layers in memory, a cache of all weights in bfloat16 would be the largest thing of a forward pass.
        is_half, caches = self._dtype == torch.bfloat16, not self._checkpoint_layers
        with torch.autocast(device.type, torch.bfloat16, enabled=is_half, cache_enabled=caches):
            batch = batch.to(device)
            hidden = self._run_decoder(self._embed(batch), batch)
            losses = [hidden[:0, 0].float()]  # keeps the gradients of a batch that teaches nothing
            chunks = (torch.split(x, LOGIT_CHUNK_TOKENS) for x in (batch.sources, batch.targets))
            for sources, targets in zip(*chunks, strict=True):
                losses.append(_run(self._compute_chunk, self._recompute_head, hidden[sources], targets))
        return torch.cat(losses)

    def _compute_chunk(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.network.llm.compute_logits(hidden)
        return F.cross_entropy(logits.float(), targets, reduction="none")

    def _embed(self, batch: Batch) -> Tensor:
        """Return the embeddings of the row, [T, hidden_size]."""
        network = self.network
        visual = self._encode_tiles(batch.tiles, batch.tile_sizes)
        embeds = network.embed(batch.input_ids, visual[batch.visual])
        # A batch without images gives the visual parts gradients of 0, so that all workers have the same gradients.
        return embeds if len(batch.visual) else embeds + 0 * visual.sum()

    def _encode_tiles(self, tiles: Tensor, tile_sizes: Tensor) -> Tensor:
        """Return visual embeddings, [N * tokens_per_tile, hidden_size]."""
        visual, pixels = self.network.visual_tokenizer, self.network.normalize(tiles, tile_sizes)
        features = self._run_layers(visual.backbone.trunk.blocks, visual.backbone.preprocessor(pixels))
        merged = merge_patches(features, visual.config.hidden_stride).flatten(0, 1)
        embed = self.network.embed_features
        chunks = torch.split(merged, HEAD_CHUNK_TOKENS)
        return torch.cat([_run(embed, self._recompute_head, chunk) for chunk in chunks])

    def _run_decoder(self, embeds: Tensor, batch: Batch) -> Tensor:
        """Run the decoder over the row: [T, hidden_size] -> [T, hidden_size]."""
        model = self.network.llm.model
        config, positions = model.config, batch.position_ids[None]
        rotary = compute_rotary(positions, config.head_dim, config.rope_theta, self._dtype)
        context = PackedContext(batch.order, batch.lengths, len(batch.input_ids))
        out: Tensor = model.norm(self._run_layers(model.layers, embeds, rotary, context))
        return out

    def _run_layers(self, layers: Iterable[nn.Module], hidden: Tensor, *arguments: Any) -> Tensor:
        """Run the decoder's layers or the tower's blocks. Checkpoints are taken where one tensor leads on."""
        hidden = hidden.to(self._dtype)
        for layer in layers:
            hidden, update = _run(layer, self._checkpoint_layers, hidden, None, *arguments)
            hidden = hidden + update
        return hidden


def _run(function: Callable[..., Any], recompute: bool, *arguments: Any) -> Any:
    """Call `function`; if `recompute`, its results inside are computed again in the backward pass instead of stored."""
    return checkpoint(function, *arguments, use_reentrant=False) if recompute else function(*arguments)
