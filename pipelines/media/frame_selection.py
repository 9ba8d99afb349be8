"""Choose the frames of a video for the model: evenly spread, or by comparing vectors of candidates."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ovis_model.inputs.keyframes import Rules, select_frames
from ovis_model.inputs.tiling import TILE_SIZE_PX
from pipelines.config import ImageOptions
from pipelines.media.reference import VideoLocation, Window
from pipelines.media.subtitles import Cue
from pipelines.media.video.frames import Frame, TiledFrame, TiledVideo, Tiling
from pipelines.media.video.process import VideoDecoder
from pipelines.media.video.sampling import Sampling

_THUMBNAIL_PX, _POOL = 32, 4
_SEGMENT_SIZE = Rules().segment_size
_BLANK_DEVIATION = 3.0  # of 255: compression changes a frame of one colour by less

T = TypeVar("T")


class Encoder(Protocol):
    """A model that compares frames, and frames with text."""

    size: tuple[int, int]
    """(width_px, height_px) of the images that it takes."""

    def encode_frames(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encode uint8[N, H, W, 3] as unit vectors, float32[N, d]."""
        ...

    def encode_text(self, text: str) -> NDArray[np.float32] | None:
        """Encode `text` as a unit vector, float32[d]; return None if the encoder does not read text."""
        ...


class PixelEncoder:
    """An encoder by thumbnails of 8 x 8 colours: they distinguish shots, but do not compare with text."""

    size = (_THUMBNAIL_PX, _THUMBNAIL_PX)

    def encode_frames(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encode frames as flattened 8 x 8 colour thumbnails of unit length."""
        cells = _THUMBNAIL_PX // _POOL
        pooled = images.reshape(len(images), cells, _POOL, cells, _POOL, 3).mean(axis=(2, 4), dtype=np.float32)
        flat = (pooled / 255 - 0.5).reshape(len(images), -1)
        vectors: NDArray[np.float32] = flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)
        return vectors

    def encode_text(self, text: str) -> None:
        """Return None: thumbnails do not compare with text."""
        return


class FrameSelector:
    """Chooses frames, for use by one thread; rows about the same video share its frames and vectors."""

    def __init__(
        self,
        config: ImageOptions,
        encoder: Encoder | None = None,
        *,
        tile_size: int = TILE_SIZE_PX,
        with_jpeg: bool = False,
        max_recent_bytes: int = 256 << 20,
    ) -> None:
        """Configure the choice; `encoder` is unused if frames are spread evenly, and by default compares thumbnails.

        Frames become tiles of `tile_size` px, and JPEG files `with_jpeg`. Up to `max_recent_bytes` of them and of
        vectors are kept for further questions about the same videos.
        """
        self._config, self._encoder = config, encoder or PixelEncoder()
        self._decoder = VideoDecoder()
        self._tiling = Tiling(config.max_tiles_per_frame, tile_size, with_jpeg)
        self._recent = _RecentValues(max_recent_bytes)

    def select(self, video: VideoLocation, window: Window, question: str) -> TiledVideo:
        """Return at most `num_frames` frames in the order of time, and facts about the video.

        Raise MediaError if they cannot be decoded, OSError if the video cannot be read.
        """
        key = (*video[:3], hashlib.blake2b(video.data).digest() if video.data else b"", window)
        if self._config.frame_selection == "uniform":
            sampling = self._make_sampling(self._config.num_frames, as_card=self._config.frames_as_card)
            return self._recent.get(
                (key, "uniform"), lambda: self._decoder.tile_frames(video, sampling, self._tiling, window)
            )
        candidate_times_s, vectors = self._recent.get(
            (key, "candidates"), lambda: self._encode_candidates(video, window)
        )
        times_s = [candidate_times_s[i] for i in self._choose(vectors, question).tolist()]
        return self._recent.get((key, *times_s), lambda: self._decoder.tile_frames(video, times_s, self._tiling))

    def read_subtitles(self, video: VideoLocation, window: Window) -> list[Cue]:
        """Return the cues of the video's text track in the window. Raise as `select` does."""
        return self._decoder.read_subtitles(video, window)

    def _encode_candidates(self, video: VideoLocation, window: Window) -> tuple[list[float], NDArray[np.float32]]:
        sampling = self._make_sampling(self._config.num_candidates)
        frames = self._decoder.sample_frames(video, sampling, window, self._encoder.size)
        frames = _drop_blank(frames)
        images = np.stack([frame.pixels for frame in frames])
        return [frame.timestamp_s for frame in frames], self._encoder.encode_frames(images)

    def _make_sampling(self, num_frames: int, *, as_card: bool = False) -> Sampling:
        return Sampling(num_frames, self._config.fps, as_card, self._config.on_truncated == "take")

    def _choose(self, vectors: NDArray[np.float32], question: str) -> NDArray[np.int64]:
        text = question if self._config.frame_query is None else self._config.frame_query
        query = self._recent.get(("text", text), lambda: self._encoder.encode_text(text)) if text else None
        num_frames, method = self._config.num_frames, self._config.frame_selection
        return select_frames(vectors, query, num_frames, method=method)


def _drop_blank(frames: list[Frame]) -> list[Frame]:
    """Leave out frames of one colour, such as black ones, where their segment of the video has others."""
    kept: list[Frame] = []
    for start in range(0, len(frames), _SEGMENT_SIZE):
        segment = frames[start : start + _SEGMENT_SIZE]
        kept += [frame for frame in segment if frame.pixels.std(axis=(0, 1)).max() > _BLANK_DEVIATION] or segment
    return kept


class _RecentValues:
    """A cache of the most recently used values, up to a number of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._num_bytes = max_bytes, 0
        self._values: OrderedDict[Any, Any] = OrderedDict()

    def get(self, key: Any, make: Callable[[], T]) -> T:
        """Return the value of `key`; make and keep it if it is missing."""
        if key in self._values:
            self._values.move_to_end(key)
            found: T = self._values[key]
            return found
        value = self._values[key] = make()
        self._num_bytes += _count_bytes(value)
        while self._num_bytes > self._max_bytes and len(self._values) > 1:
            self._num_bytes -= _count_bytes(self._values.popitem(last=False)[1])
        return value


def _count_bytes(value: Any) -> int:
    if isinstance(value, TiledFrame):
        return value.tiles.nbytes + len(value.jpeg)
    if isinstance(value, np.ndarray):
        return value.nbytes
    return sum(map(_count_bytes, value)) if isinstance(value, list | tuple) else 64
