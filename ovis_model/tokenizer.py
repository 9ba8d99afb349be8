"""Load the tokenizer, detokenize ids, and cut a text at a stop string."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer


def load_tokenizer(directory: Path) -> Tokenizer:
    """Load the checkpoint's `tokenizer.json`, which both layouts have. Raise ValueError if it is missing or broken."""
    path = directory / "tokenizer.json"
    if not path.exists():
        raise ValueError(f"{path} is missing; save the tokenizer there in its fast format (tokenizer.json)")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no error type of its own
        raise ValueError(f"{path} is not a tokenizer: {error}") from error


def detokenize(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """Convert `ids` to text without special tokens; bytes that are not UTF-8 become U+FFFD, as in the original."""
    text: str = tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)
    return text


def cut_at_stop(text: str, stop: Iterable[str]) -> str:
    """Return `text` before its first stop string, or all of it if it has none."""
    return text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]
