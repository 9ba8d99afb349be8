"""What to load, and on what. Knows no torch, so that the owner of rank processes need not load it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """`num_threads`: CPU threads of the whole replica; None for torch's own number."""

    directory: Path
    device: Device = "auto"
    dtype: Dtype = "auto"
    post_trunk_norm: bool = False
    num_threads: int | None = None
