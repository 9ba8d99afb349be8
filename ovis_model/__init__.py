"""Ovis2 in Python and PyTorch. Knows neither Ray nor Arrow.

    inputs     images and text -> model input         numpy, Pillow, tokenizers; never torch
    grammar    constraints on answers                 never torch
    network    the model in plain torch               never Pillow
    engine     batched generation with one replica    never Pillow
    training   losses and updates of the network      never Pillow

All five use `types`, `config`, `checkpoint`, `tokenizer`, `sizing` and `child_process`. `__all__` lists the Python API.
Each name is imported on first use, so preparing model input never loads torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ovis_model.engine.engine import OvisEngine
    from ovis_model.inputs.keyframes import select_frames
    from ovis_model.inputs.processor import Processor
    from ovis_model.inputs.tiling import choose_grid
    from ovis_model.types import Completion, Grid, Request, SamplingParams

_MODULES = {
    "OvisEngine": "ovis_model.engine.engine",
    "select_frames": "ovis_model.inputs.keyframes",
    "Processor": "ovis_model.inputs.processor",
    "choose_grid": "ovis_model.inputs.tiling",
    "Completion": "ovis_model.types",
    "Grid": "ovis_model.types",
    "Request": "ovis_model.types",
    "SamplingParams": "ovis_model.types",
}

__all__ = [
    "Completion",
    "Grid",
    "OvisEngine",
    "Processor",
    "Request",
    "SamplingParams",
    "choose_grid",
    "select_frames",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'ovis_model' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_MODULES[name]), name)
