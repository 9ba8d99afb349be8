"""Encode frames and questions as vectors for choosing frames, in separate actors."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ovis_model.checkpoint import CheckpointError, describe_checkpoint, fetch_checkpoint
from ovis_model.wording import count_nouns
from pipelines.config import PIXELS, ImageOptions

logger = logging.getLogger(__name__)

GPUS_PER_ENCODER_GPU = 9  # an encoder of 0.9 billion parameters keeps up with several replicas
CPUS_PER_ENCODER = 8
_MAX_THREADS = 4


@dataclass(frozen=True)
class EncoderPool:
    """Encoder actors and what each reserves; the captioner has `gpus` and `cpus` fewer than the cluster."""

    device: Literal["cpu", "cuda"]
    num_encoders: int
    cpus_each: int
    gpus_each: int
    num_threads: int

    @property
    def cpus(self) -> int:
        """The CPUs that all encoders reserve."""
        return self.num_encoders * self.cpus_each

    @property
    def gpus(self) -> int:
        """The GPUs that all encoders reserve."""
        return self.num_encoders * self.gpus_each

    def __str__(self) -> str:
        """Return the text that follows the plan of the captioner in the log."""
        device = f"with {count_nouns(self.num_threads, 'thread')} on CPUs" if self.device == "cpu" else "on a GPU each"
        return f"; {self.num_encoders} to compare frames, {device}" if self.num_encoders else ""


NO_ENCODERS = EncoderPool("cpu", 0, 0, 0, 0)


def plan_encoders(config: ImageOptions, *, cpus: float, gpus: float, device: str) -> EncoderPool:
    """Plan encoders on separate GPUs if the cluster has several, so that no captioner shares one; else on CPUs."""
    if not config.needs_encoder:
        return NO_ENCODERS
    if device != "cpu" and gpus >= 2:
        return EncoderPool("cuda", max(1, int(gpus) // GPUS_PER_ENCODER_GPU), 0, 1, 1)
    if device != "cpu" and gpus >= 1:
        logger.warning(
            "the captioner uses the only GPU, so frames are encoded on CPUs: there a small --frame-encoder such as "
            "google/siglip-base-patch16-224 is far faster, and %s needs no model",
            PIXELS,
        )
    threads = min(_MAX_THREADS, max(1, int(cpus) // CPUS_PER_ENCODER))
    return EncoderPool("cpu", max(1, int(cpus) // CPUS_PER_ENCODER), 1 if cpus >= 4 else 0, 0, threads)


def describe_encoder(config: ImageOptions) -> dict[str, str | None]:
    """Return {setting: value} that identifies the encoder of a run, {} without one. Raise ValueError if unusable."""
    if not config.needs_encoder:
        return {}
    if missing := [name for name in ("transformers", "sentencepiece") if importlib.util.find_spec(name) is None]:
        raise CheckpointError(
            f"--frame-selection {config.frame_selection} needs {' and '.join(missing)}: pip install "
            f"'ovis2-ray[video]', or choose --frame-encoder {PIXELS}"
        )
    try:
        directory = fetch_checkpoint(config.frame_encoder, weights=False)
        kind = json.loads((directory / "config.json").read_text()).get("model_type")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"--frame-encoder {config.frame_encoder}: {error}") from error
    if kind != "siglip":
        raise CheckpointError(
            f"--frame-encoder {config.frame_encoder} has the model type {kind!r}; use a SigLIP or {PIXELS}"
        )
    described = describe_checkpoint(config.frame_encoder)
    return {f"frame encoder {name}": described[name] for name in ("revision", "weights")}


class EncodeFrames:
    """Actor that holds one SigLIP encoder."""

    def __init__(self, name: str, revision: str | None, device: Literal["cpu", "cuda"], num_threads: int) -> None:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        import torch

        from ovis_model.network.siglip import SiglipEncoder

        torch.set_num_threads(num_threads)
        self._encoder = SiglipEncoder.from_pretrained(name, revision, device)

    def get_size(self) -> tuple[int, int]:
        """Return (width_px, height_px) of the images that the encoder takes."""
        return self._encoder.size

    def encode_frames(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encode uint8[N, H, W, 3] as unit vectors, float32[N, d]."""
        return self._encoder.encode_frames(images)

    def encode_text(self, text: str) -> NDArray[np.float32]:
        """Encode `text` as a unit vector, float32[d]."""
        return self._encoder.encode_text(text)


class RemoteEncoder:
    """A handle for other processes to several `EncodeFrames` actors."""

    def __init__(self, actors: Sequence[Any], size: tuple[int, int]) -> None:
        self._actors, self.size = actors, size

    def encode_frames(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encode frames by one of the actors; see `EncodeFrames.encode_frames`."""
        return self._ask("encode_frames", images)

    def encode_text(self, text: str) -> NDArray[np.float32]:
        """Encode a text by one of the actors; see `EncodeFrames.encode_text`."""
        return self._ask("encode_text", text)

    def _ask(self, method: str, argument: Any) -> NDArray[np.float32]:
        import ray

        vectors: NDArray[np.float32] = ray.get(getattr(random.choice(self._actors), method).remote(argument))
        return vectors


@contextmanager
def run_encoders(name: str, revision: str | None, pool: EncoderPool) -> Iterator[RemoteEncoder | None]:
    """Start the actors of the pool and yield them once loaded, None if the pool is empty; kill them at the end."""
    if not pool.num_encoders:
        yield None
        return
    import ray

    options = {
        "num_cpus": pool.cpus_each,
        "num_gpus": pool.gpus_each,
        "max_restarts": -1,
        "max_task_retries": 2,
        "scheduling_strategy": "SPREAD",
    }
    make = ray.remote(EncodeFrames).options(**options)
    actors = [make.remote(name, revision, pool.device, pool.num_threads) for _ in range(pool.num_encoders)]
    try:
        yield RemoteEncoder(actors, ray.get([actor.get_size.remote() for actor in actors])[0])
    finally:
        for actor in actors:
            ray.kill(actor)
