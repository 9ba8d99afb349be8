"""Make directories with odd names, and say which of their files are rows; the same seed gives the same directory."""

from __future__ import annotations

import os
import random
from pathlib import Path

_FOLDERS = ["a", "b c", "ü", "x%20y", "#1", "{1..2}", "[x]", "*?", "new\nline", "_private", "_c=1", "shards.tar"]
_HIDDEN = [".hidden", "__MACOSX", "@eaDir", ".ipynb_checkpoints"]
_STEMS = [
    "1",
    "ä b",
    "%41",
    "a#t=1,2",
    "q?x=1",
    "::",
    "{0..9}",
    "_1",
    "data:,",
    "\\",
    "'",
    "s3:",
    b"\xff".decode(errors="surrogateescape"),
]
_SUFFIXES = [".jpg", ".PNG", ".webp", ".mp4"]
_OTHERS = [".txt", ".JSON5", "", ".jpg.tmp", ".py"]


def make_tree(root: Path, seed: int) -> list[str]:
    """Write up to 40 files below `root`; return the paths of those that are rows, sorted."""
    rng, rows = random.Random(seed), set[str]()
    for _ in range(rng.randrange(1, 40)):
        is_hidden = rng.random() < 0.1
        parts = rng.choices(_FOLDERS, k=rng.randrange(3)) + ([rng.choice(_HIDDEN)] if is_hidden else [])
        is_image = rng.random() < 0.8
        name = rng.choice(_STEMS) + rng.choice(_SUFFIXES if is_image else _OTHERS)
        path = root.joinpath(*parts, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * rng.randrange(3))
        if is_image and not is_hidden:
            rows.add(os.fspath(path))
    if rng.random() < 0.3:
        (root / "loop").symlink_to(root)
    return sorted(rows)
