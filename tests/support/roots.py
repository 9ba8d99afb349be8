"""Paths of this repository and of its test data."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
TINY_SIGLIP = ROOT / "tests" / "tiny_siglip"
