"""Make thumbnails of images and film strips of videos for the page."""

from __future__ import annotations

import base64
import io
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from ovis_model.inputs.keyframes import select_uniform
from pipelines.cluster.attempts import DIED
from pipelines.config import ImageOptions
from pipelines.errors import MediaError, StoreFault
from pipelines.media.fetch import Fetcher, PendingImages
from pipelines.media.images import read_image
from pipelines.media.reference import ImageRef, is_seekable_video, locate_video, parse_reference
from pipelines.media.similarity import hash_picture
from pipelines.media.video.container import has_video_signature
from pipelines.media.video.frames import Frame
from pipelines.media.video.process import VideoDecoder
from pipelines.media.video.sampling import Sampling
from pipelines.output.manifest import take_rows
from pipelines.report.sample import PickedRow
from pipelines.storage import store

Json = dict[str, Any]

MAX_IMAGES = 16  # per row; further images are only counted
_SINGLE_PX, _STRIP_PX = 320, 192  # the longer side of a thumbnail, and of one of several in a row
_QUALITY = 75  # of WebP
_MIN_PX = 24
_VIDEO_TIMEOUT_S = 60.0
_FRAMES_OF_A_FAILED_VIDEO = 4

RowMedia = tuple[PickedRow, Json]


def read_media(
    output: str,
    rows: Sequence[PickedRow],
    images: ImageOptions,
    *,
    max_bytes: int,
    limit_s: float,
    scale: float = 1.0,
) -> Iterator[RowMedia]:
    """Yield the rows, which are in order, with their media as the model saw them.

    output: where the manifest is. images: the run's options. scale: of the thumbnails; they are never larger than the
    image.

    Media are {"images": [...], "more": number of further images, "hash": of the image in the middle} or
    {"missing": reason}. An image is {"src": data URI, "width": px, "height": px}, for a video frame also "time_s". The
    images of a row take at most `max_bytes` as text.

    Raises nothing: media that cannot be read, or not within `limit_s` in total, are reported as missing.
    """
    if not rows:
        return
    try:
        found = take_rows(output, np.array([picked.row for picked in rows]), ["images"])
    except (OSError, StoreFault, pa.ArrowException, IndexError) as error:
        yield from ((picked, {"missing": f"the manifest cannot be read: {error}"}) for picked in rows)
        return
    references = (list(map(parse_reference, images)) for images in found.column("images").to_pylist())
    with closing(VideoDecoder(timeout_s=_VIDEO_TIMEOUT_S)) as decoder:
        yield from _Reader(decoder, images, max_bytes, limit_s, scale).read(zip(rows, references, strict=True))


class _Reader:
    def __init__(
        self, decoder: VideoDecoder, images: ImageOptions, max_bytes: int, limit_s: float, scale: float
    ) -> None:
        self._decoder, self._images, self._limit_s = decoder, images, limit_s
        self._max_bytes, self._scale = max_bytes, scale
        self._deadline_s = time.monotonic() + limit_s
        self._down: set[str] = set()  # stores that failed

    def read(self, rows: Iterable[tuple[PickedRow, list[ImageRef]]]) -> Iterator[RowMedia]:
        wanted = (((picked, images), self._select_images(picked, images)) for picked, images in rows)
        for (picked, images), pending in Fetcher().fetch_ahead(wanted):
            yield picked, self._read_media(picked, images, pending)

    def _select_images(self, picked: PickedRow, images: list[ImageRef]) -> list[ImageRef]:
        is_needed = not self._explain_missing(picked, images) and not is_seekable_video(images)
        return images[:MAX_IMAGES] if is_needed else []

    def _explain_missing(self, picked: PickedRow, images: list[ImageRef]) -> str:
        if not images:
            return "this row has no image"
        if picked.values["error"].startswith(DIED):
            return "not opened: reading it killed the process of the job"
        if time.monotonic() > self._deadline_s:
            return f"not read: reading the media took longer than {self._limit_s:g} s (--media-limit-s)"
        if {store.get_store_root(image.uri) for image in images} & self._down:
            return "not read: its store failed earlier"
        return ""

    def _read_media(self, picked: PickedRow, images: list[ImageRef], pending: PendingImages) -> Json:
        if reason := self._explain_missing(picked, images):
            return {"missing": reason}
        try:
            return self._make_strip(picked, images, pending)
        except StoreFault as fault:
            self._down.update(store.get_store_root(image.uri) for image in images)
            return {"missing": str(fault)}
        except (MediaError, OSError) as error:
            return {"missing": getattr(error, "strerror", None) or str(error)}

    def _make_strip(self, picked: PickedRow, images: list[ImageRef], pending: PendingImages) -> Json:
        encoded = pending.result()
        if is_seekable_video(images) or any(map(has_video_signature, encoded)):
            frames = self._read_frames(picked, images, encoded)
            pictures, times_s = [Image.fromarray(frame.pixels) for frame in frames], picked.values["frame_timestamps_s"]
            media = make_thumbnails(pictures, self._max_bytes, len(times_s), self._scale)
            for image, frame in zip(media["images"], frames, strict=False):
                image["time_s"] = round(frame.timestamp_s, 3)
            return media
        if not encoded:
            return {"missing": "this row has no image"}
        num_images = max(len(encoded), len(images))
        return make_thumbnails(list(map(self._decode, encoded[:MAX_IMAGES])), self._max_bytes, num_images, self._scale)

    def _decode(self, data: bytes) -> Image.Image:
        keep_partial = self._images.partial_images == "keep"
        return read_image(data, keep_partial=keep_partial, background=self._images.background_colour).pixels

    def _read_frames(self, picked: PickedRow, images: list[ImageRef], encoded: list[bytes]) -> list[Frame]:
        """Return the frames that the model saw, of many an even choice; of a row that failed, a few uniform ones."""
        video, window = locate_video(images, encoded)
        if times_s := picked.values["frame_timestamps_s"]:
            return self._decoder.decode_frames_at(video, [times_s[i] for i in select_uniform(len(times_s), MAX_IMAGES)])
        return self._decoder.sample_frames(video, Sampling(_FRAMES_OF_A_FAILED_VIDEO, take_truncated=True), window)


def make_thumbnails(pictures: Sequence[Image.Image], max_bytes: int, num_images: int = 0, scale: float = 1.0) -> Json:
    """Encode RGB images as data URIs of at most `max_bytes` characters in total; count those that do not fit.

    `hash` is that of the image in the middle, for `group_similar`.
    """
    side_px = round(scale * (_SINGLE_PX if len(pictures) == 1 else _STRIP_PX))
    shown = [_shrink(picture, side_px) for picture in pictures[:MAX_IMAGES]]
    sources = [source for picture in shown if (source := _make_thumbnail(picture, side_px, max_bytes // len(shown)))]
    more = max(num_images, len(pictures)) - len(sources)
    return {"images": sources, "more": more, "hash": hash_picture(shown[len(shown) // 2])}


def _make_thumbnail(picture: Image.Image, side_px: int, max_bytes: int) -> Json | None:
    """Return the largest thumbnail that fits; None if even the smallest does not."""
    small = picture
    while side_px >= _MIN_PX:
        small = _shrink(small, side_px)
        source = _encode_data_uri(small)
        if len(source) <= max_bytes:
            return {"src": source, "width": small.width, "height": small.height}
        side_px = math.floor(max(small.size) * min(0.8, math.sqrt(max_bytes / len(source))))
    return None


def _shrink(picture: Image.Image, side_px: int) -> Image.Image:
    scale = min(1.0, side_px / max(picture.size))
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)


def _encode_data_uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=_QUALITY, method=2)  # half the time of the default method, a tenth larger
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
