"""Name the stages of training and the parts that each of them trains. Knows no tensors."""

from __future__ import annotations

from typing import Literal

Stage = Literal["1", "2", "3", "4", "dpo"]
STAGES: dict[Stage, str] = {
    "1": "visual_tokenizer.backbone.layer.-1|visual_tokenizer.head|vte",
    "2": "visual_tokenizer|vte",
    "3": "visual_tokenizer|vte",
    "4": "all",
    "dpo": "all",
}
"""What each stage trains: the last block with head and table, then the whole visual part, then everything."""
LAYER_PART = "visual_tokenizer.backbone.layer."
"""The part that is one block of the vision tower, before its number; negative numbers count from the end."""
