"""Choose the frames of a video that the model is shown: evenly spread, or by vectors of candidates."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ovis_model.inputs.keyframes import select_frames
from pipelines.config import ImageOptions
from pipelines.media.reference import VideoLocation, Window
from pipelines.media.video import Frame, Sampling
from pipelines.media.video_process import VideoDecoder

_THUMBNAIL_PX, _POOL = 32, 4

T = TypeVar("T")


class Encoder(Protocol):
    """A model that compares frames, and frames with text."""

    size: tuple[int, int]
    """(width_px, height_px) of the pictures that it takes."""

    def encode_frames(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8[N, H, W, 3] -> float32[N, d], of unit length."""
        ...

    def encode_text(self, text: str) -> NDArray[np.float32] | None:
        """float32[d], of unit length; None if it does not read."""
        ...


class PixelEncoder:
    """Thumbnails of 8 x 8 colours: enough to tell shots apart, nothing to compare with a text."""

    size = (_THUMBNAIL_PX, _THUMBNAIL_PX)

    def encode_frames(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        cells = _THUMBNAIL_PX // _POOL
        pooled = pictures.reshape(len(pictures), cells, _POOL, cells, _POOL, 3).mean(axis=(2, 4), dtype=np.float32)
        flat = (pooled / 255 - 0.5).reshape(len(pictures), -1)
        vectors: NDArray[np.float32] = flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)
        return vectors

    def encode_text(self, text: str) -> None:
        return None


class FrameSelector:
    """For one thread. Rows that ask about the same video share what was decoded and embedded for it."""

    def __init__(
        self, config: ImageOptions, encoder: Encoder | None = None, *, max_recent_bytes: int = 256 << 20
    ) -> None:
        """`encoder` is needed unless frames are spread evenly.

        `max_recent_bytes` of frames and embeddings are kept for further questions about the same videos.
        """
        self._config, self._encoder = config, encoder or PixelEncoder()
        self._decoder = VideoDecoder()
        self._recent = _Recent(max_recent_bytes)

    def select(self, video: VideoLocation, window: Window, question: str) -> list[Frame]:
        """Return at most `num_frames`, in the order of time. Raises MediaError, OSError."""
        place = (*video[:3], hashlib.blake2b(video.data).digest() if video.data else b"", window)
        if self._config.frame_selection == "uniform":
            sampling = Sampling(self._config.num_frames, self._config.fps)
            return self._recent.get((place, "uniform"), lambda: self._decoder.sample_frames(video, sampling, window))
        candidate_times_s, vectors = self._recent.get((place, "candidates"), lambda: self._candidates(video, window))
        times_s = [candidate_times_s[i] for i in self._choose(vectors, question).tolist()]
        return self._recent.get((place, *times_s), lambda: self._decoder.decode_frames_at(video, times_s))

    def _candidates(self, video: VideoLocation, window: Window) -> tuple[list[float], NDArray[np.float32]]:
        sampling = Sampling(self._config.num_candidates, self._config.fps)
        frames = self._decoder.sample_frames(video, sampling, window, self._encoder.size)
        pictures = np.stack([frame.pixels for frame in frames])
        return [frame.timestamp_s for frame in frames], self._encoder.encode_frames(pictures)

    def _choose(self, vectors: NDArray[np.float32], question: str) -> NDArray[np.int64]:
        text = question if self._config.frame_query is None else self._config.frame_query
        query = self._recent.get(("text", text), lambda: self._encoder.encode_text(text)) if text else None
        num_frames, method = self._config.num_frames, self._config.frame_selection
        return select_frames(vectors, query, num_frames, method=method)


class _Recent:
    """What was made for the last keys, up to a number of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._num_bytes = max_bytes, 0
        self._values: OrderedDict[Any, Any] = OrderedDict()

    def get(self, key: Any, make: Callable[[], T]) -> T:
        if key in self._values:
            self._values.move_to_end(key)
            found: T = self._values[key]
            return found
        value = self._values[key] = make()
        self._num_bytes += _num_bytes(value)
        while self._num_bytes > self._max_bytes and len(self._values) > 1:
            self._num_bytes -= _num_bytes(self._values.popitem(last=False)[1])
        return value


def _num_bytes(value: Any) -> int:
    if isinstance(value, np.ndarray):
        return value.nbytes
    return sum(map(_num_bytes, value)) if isinstance(value, list | tuple) else 64
