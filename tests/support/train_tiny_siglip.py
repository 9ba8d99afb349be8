"""Train the SigLIP of 110 thousand parameters in tests/tiny_siglip on drawn objects; about two minutes on one core.

    python -m tests.support.train_tiny_siglip [DIRECTORY]

Runs on the same machine write the same bytes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch.nn.functional import logsigmoid, normalize
from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipModel

from tests.support.objects import COLOURS, OBJECTS, SHAPES, draw_object
from tests.support.roots import TINY_SIGLIP

STEPS, LEARNING_RATE, SIDE_PX, NUM_POSITIONS = 3000, 2e-3, 32, 16
UNKNOWN, END = "<unk>", "</s>"
OTHERS = ("a", "an", "the", "is", "where", "what", "of", "show", "picture", "frame", "video", "in", "there", "with")
WORDS = (UNKNOWN, END, *COLOURS, *SHAPES, *OTHERS)


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    tokenizer, model = make_tokenizer(), SiglipModel(make_config())
    texts = tokenizer([thing.text for thing in OBJECTS], add_special_tokens=False)["input_ids"]
    padded = torch.tensor([[*ids, *[1] * (NUM_POSITIONS - len(ids))] for ids in texts])
    model.logit_scale.data.fill_(np.log(10))
    model.logit_bias.data.fill_(-10)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS)
    random = np.random.default_rng(0)
    for step in range(STEPS):
        loss = compute_loss(model, draw_batch(random), padded)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(step, f"{loss.item():.3f}", flush=True)
    save(directory, model, tokenizer)


def make_config() -> SiglipConfig:
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**shape, "vocab_size": len(WORDS), "max_position_embeddings": NUM_POSITIONS, "pad_token_id": 1}
    return SiglipConfig(
        text_config={**text, "bos_token_id": 1, "eos_token_id": 1, "projection_size": 48},
        vision_config={**shape, "image_size": SIDE_PX, "patch_size": 4},
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=UNKNOWN))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token=UNKNOWN, eos_token=END, pad_token=END)


def draw_batch(random: np.random.Generator) -> torch.Tensor:
    """Draw one picture per object: float32[objects, 3, side, side]."""
    drawn = np.stack([np.asarray(draw_object(thing, random).resize((SIDE_PX, SIDE_PX))) for thing in OBJECTS])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1


def compute_loss(model: SiglipModel, pixels: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    images = normalize(model.get_image_features(pixels).pooler_output, dim=-1)
    queries = normalize(model.get_text_features(texts).pooler_output, dim=-1)
    logits = images @ queries.T * model.logit_scale.exp() + model.logit_bias
    signs = 2 * torch.eye(len(texts)) - 1
    return -logsigmoid(signs * logits).sum() / len(texts)


def save(directory: Path, model: SiglipModel, tokenizer: PreTrainedTokenizerFast) -> None:
    directory.mkdir(exist_ok=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": SIDE_PX, "width": SIDE_PX}}
    (directory / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else TINY_SIGLIP)
