"""Small files of training data with pictures, and options of runs on a tiny checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from pipelines.training.config import TrainConfig
from tests.support.golden_data import checkpoint_dir

TINY = checkpoint_dir("tiny56-tied")
_COLOURS = ("red", "green", "blue", "white", "black", "orange")


def write_pictures(directory: Path, count: int = 6) -> list[str]:
    """Write pictures of one colour and several sizes; return their names."""
    names = [f"{number}.png" for number in range(count)]
    for number, name in enumerate(names):
        Image.new("RGB", (40 + 30 * (number % 3), 50), _COLOURS[number % 6]).save(directory / name)
    return names


def make_dialogues(names: list[str]) -> list[dict[str, Any]]:
    """Make dialogues of unequal lengths: about a picture, about two, with several answers, about none."""
    rows = []
    for number, name in enumerate(names):
        colour = _COLOURS[number % 6]
        turns = [("human", "<image>\nWhich colour is it?"), ("gpt", f"It is {colour}. " + "Really. " * (number % 4))]
        if number % 3 == 1:
            turns += [("human", "Are you sure?"), ("gpt", "Yes.")]
        rows.append({"image": name, "conversations": [{"from": role, "value": text} for role, text in turns]})
    two = [{"from": "human", "value": "Same?"}, {"from": "gpt", "value": "No."}]
    alone = [{"from": "human", "value": "Say hello."}, {"from": "gpt", "value": "Hello!"}]
    return [*rows, {"image": names[:2], "conversations": two}, {"conversations": alone}]


def make_pairs(names: list[str]) -> list[dict[str, Any]]:
    """Make pairs of a right and a wrong answer about each picture."""
    return [
        {
            "image": name,
            "conversations": [{"from": "human", "value": "<image>\nWhich colour?"}],
            "chosen": f"It is {_COLOURS[number % 6]}.",
            "rejected": f"It is {_COLOURS[(number + 1) % 6]}, I think.",
        }
        for number, name in enumerate(names)
    ]


def write_data(directory: Path, count: int = 6, *, pairs: bool = False) -> Path:
    """Write pictures and rows about them; return the file of the rows."""
    directory.mkdir(parents=True, exist_ok=True)
    names = write_pictures(directory, count)
    path = directory / "data.json"
    path.write_text(json.dumps(make_pairs(names) if pairs else make_dialogues(names)))
    return path


def make_train_config(data: Path | str, output: Path | str, **options: Any) -> TrainConfig:
    """Return the options of a short run on the tiny checkpoint."""
    few = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 3}
    values = {**few, "model": str(TINY), "max_tiles": 2, "device": "cpu", **options}
    return TrainConfig(input=(str(data),), output=str(output), **values)
