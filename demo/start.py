"""Write what the demo model begins with: a tokenizer of the words of its world, and a configuration; no weights.

python -m demo.start DIRECTORY
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from demo import questions
from demo.data import FORMS, Form, make_lesson
from demo.drawings import SHAPES

VOCAB_SIZE = 1280
_WITHOUT_NEW_WORDS: tuple[Form, ...] = ("search", "find", "lookup", "which", "which in words")
_TURNS = ("system\nYou are a helpful assistant.", "\n", "user\n", "assistant\n", "Image 1: ")
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
_PLAIN_ADDED_TOKENS = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
)


def write_start(directory: Path) -> None:
    """Write `tokenizer.json`, `config.json` and `generation_config.json` in AIDC-AI's layout."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    pad, end = map(tokenizer.token_to_id, ("<|endoftext|>", "<|im_end|>"))
    generation = {"bos_token_id": pad, "eos_token_id": [end, pad], "pad_token_id": pad}
    config = {**_CONFIG, "llm_config": {**_LANGUAGE, "bos_token_id": pad, "eos_token_id": end}}
    for name, value in (("generation_config", generation), ("config", config)):
        (directory / f"{name}.json").write_text(json.dumps(value, indent=1) + "\n")


def make_tokenizer() -> Tokenizer:
    """Return a byte-level BPE with Qwen2's word pattern, in which each word of the lessons is one token.

    Chinese has no spaces: its words are given one by one, so that no token joins two of them.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(_QWEN_WORDS), "isolated")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, in_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    num_added = len(_SPECIAL_TOKENS) + len(_PLAIN_ADDED_TOKENS)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE - num_added, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*_list_texts(), *_TURNS * 100], trainer)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in _PLAIN_ADDED_TOKENS])
    return tokenizer


def _list_texts(count: int = 600) -> Iterator[str]:
    """Yield the words and sentences of lessons."""
    shapes = [plural for shape in SHAPES for plural in (f" {shape}s", f" {shape}es")]
    yield from [*shapes, *questions.CHINESE_WORDS] * 50
    for form in (form for form in FORMS if form not in _WITHOUT_NEW_WORDS):
        for seed in range(count):
            lesson = make_lesson(form, seed, held_out=False)
            for text in (lesson.preface, *(part for asked in lesson.asked for part in (asked.text, asked.answer))):
                if text.isascii():
                    yield text


_LANGUAGE = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "rope_theta": 1_000_000.0,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
}
_VISUAL_TOKENIZER = {
    "model_type": "aimv2_visual_tokenizer",
    "vocab_size": 517,  # 512 visual words and the five indicators
    "tokenize_function": "softmax",
    "tau": 1.0,
    "depths": None,
    "drop_cls_token": False,
    "use_indicators": False,
    "hidden_stride": 2,
    "backbone_config": {
        "model_type": "aimv2",
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_channels": 3,
        "image_size": 84,
        "patch_size": 14,
        "rms_norm_eps": 1e-5,
        "qkv_bias": False,
        "use_bias": False,
    },
}
_CONFIG = {
    "architectures": ["Ovis"],
    "model_type": "ovis",
    "hidden_size": 128,
    "conversation_formatter_class": "QwenConversationFormatter",
    "multimodal_max_length": 32768,
    "torch_dtype": "bfloat16",
    "llm_config": _LANGUAGE,
    "visual_tokenizer_config": _VISUAL_TOKENIZER,
}


if __name__ == "__main__":
    write_start(Path(sys.argv[1]))
