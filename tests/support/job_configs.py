"""Make job configurations that use a golden checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipelines.config import AnnotateConfig, CaptionConfig
from tests.support.golden_data import checkpoint_dir

MODEL = str(checkpoint_dir("tiny56-tied"))


def make_job_config(inputs: Sequence[object], output: Path | str, **options: object) -> CaptionConfig:
    values = {"model": MODEL, "max_new_tokens": 4, **options}
    return CaptionConfig(input=tuple(map(str, inputs)), output=str(output), **values)  # type: ignore[arg-type]


def make_annotate_config(inputs: Path | str, output: Path, **options: object) -> AnnotateConfig:
    """Make an annotation with the caption's question and a yes/no question."""
    tasks = [
        {"name": "caption", "prompt": "Describe the image."},
        {"name": "round", "prompt": "Is it?", "answer": "bool"},
    ]
    values = {"model": MODEL, "max_new_tokens": 8, "tasks": tasks, **options}
    return AnnotateConfig(input=(str(inputs),), output=str(output), **values)  # type: ignore[arg-type]
