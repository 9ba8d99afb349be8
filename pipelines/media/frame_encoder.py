"""Encode frames and questions as vectors that frames are chosen by, in actors of their own."""

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
from pipelines.config import PIXELS, ImageOptions

logger = logging.getLogger(__name__)

GPUS_PER_ENCODER_GPU = 9  # an encoder of 0.9 billion parameters keeps up with some replicas
CPUS_PER_ENCODER = 8
_MAX_THREADS = 4


@dataclass(frozen=True)
class EncoderPool:
    """Actors and what each reserves; `gpus` and `cpus` in all are what the captioner has to do without."""

    device: Literal["cpu", "cuda"]
    num_encoders: int
    cpus_each: int
    gpus_each: int
    num_threads: int

    @property
    def cpus(self) -> int:
        return self.num_encoders * self.cpus_each

    @property
    def gpus(self) -> int:
        return self.num_encoders * self.gpus_each

    def __str__(self) -> str:
        """Behind the plan of the captioner."""
        where = f"with {self.num_threads} threads on CPUs" if self.device == "cpu" else "on a GPU each"
        return f"; {self.num_encoders} to compare frames, {where}" if self.num_encoders else ""


NO_ENCODERS = EncoderPool("cpu", 0, 0, 0, 0)


def plan_encoders(config: ImageOptions, *, cpus: float, gpus: float, device: str) -> EncoderPool:
    """Plan GPUs of their own if there are several, so that no captioner shares its memory; else CPUs."""
    if not config.needs_encoder:
        return NO_ENCODERS
    if device != "cpu" and gpus >= 2:
        return EncoderPool("cuda", max(1, int(gpus) // GPUS_PER_ENCODER_GPU), 0, 1, 1)
    if device != "cpu" and gpus >= 1:
        logger.warning(
            "the only GPU is the captioner's, so frames are encoded on CPUs: a small --frame-encoder such as "
            "google/siglip-base-patch16-224 is far faster there, and %s needs no model",
            PIXELS,
        )
    threads = min(_MAX_THREADS, max(1, int(cpus) // CPUS_PER_ENCODER))
    return EncoderPool("cpu", max(1, int(cpus) // CPUS_PER_ENCODER), 1 if cpus >= 4 else 0, 0, threads)


def describe_encoder(config: ImageOptions) -> dict[str, str | None]:
    """Return what identifies the encoder of a run, nothing if it has none. Raises ValueError if it cannot be used."""
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
        raise CheckpointError(f"--frame-encoder {config.frame_encoder} is {kind}, not a SigLIP")
    described = describe_checkpoint(config.frame_encoder)
    return {f"frame encoder {name}": described[name] for name in ("revision", "weights")}


class EncodeFrames:
    """One encoder in an actor."""

    def __init__(self, name: str, revision: str | None, device: Literal["cpu", "cuda"], num_threads: int) -> None:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        import torch

        from ovis_model.network.siglip import SiglipEncoder

        torch.set_num_threads(num_threads)
        self._encoder = SiglipEncoder.from_pretrained(name, revision, device)

    def get_size(self) -> tuple[int, int]:
        return self._encoder.size

    def encode_frames(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._encoder.encode_frames(pictures)

    def encode_text(self, text: str) -> NDArray[np.float32]:
        return self._encoder.encode_text(text)


class RemoteEncoder:
    """Some `EncodeFrames` actors, seen from another process."""

    def __init__(self, actors: Sequence[Any], size: tuple[int, int]) -> None:
        self._actors, self.size = actors, size

    def encode_frames(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._ask("encode_frames", pictures)

    def encode_text(self, text: str) -> NDArray[np.float32]:
        return self._ask("encode_text", text)

    def _ask(self, method: str, argument: Any) -> NDArray[np.float32]:
        import ray

        vectors: NDArray[np.float32] = ray.get(getattr(random.choice(self._actors), method).remote(argument))
        return vectors


@contextmanager
def run_encoders(name: str, revision: str | None, pool: EncoderPool) -> Iterator[RemoteEncoder | None]:
    """Start the actors of the pool, loaded, and end them with the context. None if the pool is empty."""
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
