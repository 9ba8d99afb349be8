"""Convert decoded frames to upright RGB pixels, thumbnails or tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from av.sidedata.sidedata import SideDataContainer
from av.video.frame import VideoFrame
from numpy.typing import NDArray
from PIL import Image

from ovis_model.inputs.tiling import tile_image
from pipelines.errors import MediaError
from pipelines.media.images import check_num_pixels
from pipelines.media.saving import encode_jpeg

Pixels = NDArray[np.uint8]

_MATRIX_BYTES = 36  # nine int32


class Frame(NamedTuple):
    """A frame: `pixels` uint8[H, W, 3], upright RGB, and `timestamp_s` from the start of the video."""

    pixels: Pixels
    timestamp_s: float


class Tiling(NamedTuple):
    """How frames are cut into tiles of `tile_size` px, see `tile_image`, and whether a JPEG of each is kept."""

    max_tiles: int
    tile_size: int
    with_jpeg: bool = False


@dataclass(frozen=True)
class TiledFrame:
    """A frame of `width` x `height` px as tiles uint8[N, 3, S, S] and their sizes int32[N, 2]; see `tile_image`.

    `jpeg` is the whole frame as a file, if asked for.
    """

    tiles: Pixels
    sizes: NDArray[np.int32]
    width: int
    height: int
    timestamp_s: float
    jpeg: bytes = b""


@dataclass(frozen=True)
class VideoInfo:
    """Facts about a video. `width` and `height` are those shown, in px; `format` is ffmpeg's first name of it.

    Shares are of the wanted frames: shown already for an earlier time, or corrupt and replaced or left out.
    """

    width: int
    height: int
    format: str
    num_bytes: int
    duration_s: float
    fps: float
    codec: str
    repeated_share: float = 0.0
    corrupt_share: float = 0.0


class TiledVideo(NamedTuple):
    """The frames chosen from a video in the order of time, and facts about the video."""

    frames: list[TiledFrame]
    info: VideoInfo


def tile_frame(frame: Frame, tiling: Tiling) -> TiledFrame:
    """Cut a frame into its tiles, which need a hundredth of the memory of a large frame."""
    picture = Image.fromarray(frame.pixels)
    tiles, sizes = tile_image(picture, tiling.max_tiles, tiling.tile_size)
    jpeg = encode_jpeg(picture) if tiling.with_jpeg else b""
    return TiledFrame(tiles, sizes, picture.width, picture.height, frame.timestamp_s, jpeg)


def convert_to_pixels(frame: VideoFrame, size: tuple[int, int] | None) -> Pixels:
    """Convert a frame to upright uint8[H, W, 3] of `size` (width_px, height_px), by default its own.

    The colours equal those of ffmpeg's command line.
    """
    check_size(frame.width, frame.height)
    matrix = _read_display_matrix(frame)
    width, height = size if size is not None else (frame.width, frame.height)
    if size is not None and _is_on_its_side(matrix):
        width, height = height, width
    pixels: Pixels = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="BICUBIC")  # type: ignore[assignment]
    return np.ascontiguousarray(_turn_upright(pixels, matrix))  # libav pads the rows of most sizes


def check_size(width: int, height: int) -> None:
    """Raise MediaError if no frame can have this size in px."""
    if width < 1 or height < 1:
        raise MediaError(f"the header states {width} x {height} px: it is damaged")
    check_num_pixels(width, height)


class _DisplayMatrix(NamedTuple):
    """Where a pixel is shown: x' = xx * x + yx * y, y' = xy * x + yy * y; all zero means unknown."""

    xx: int
    xy: int
    yx: int
    yy: int


def _read_display_matrix(frame: VideoFrame) -> _DisplayMatrix:
    """Return the frame's display matrix; zeros if it has none, or side data that PyAV cannot list."""
    try:
        # Not frame.side_data: that keeps the frame in a cycle, and 32 frames of 8K are 1.6 GB.
        data = bytes(SideDataContainer(frame)["DISPLAYMATRIX"])  # type: ignore[call-arg]
    except (KeyError, ValueError):
        data = bytes(_MATRIX_BYTES)
    values = np.frombuffer(data, np.int32).tolist()
    return _DisplayMatrix(values[0], values[1], values[3], values[4])


def _is_on_its_side(matrix: _DisplayMatrix) -> bool:
    return _find_angle(matrix) in (-90, 90)


def _turn_upright(pixels: Pixels, matrix: _DisplayMatrix) -> Pixels:
    """Turn and mirror by one of the eight orientations, as ffmpeg does; leave the pixels at any other angle."""
    angle = _find_angle(matrix)
    if angle not in (-180, -90, 0, 90, 180):
        return pixels
    if is_swapped := _is_on_its_side(matrix):
        pixels = pixels.transpose(1, 0, 2)
    across, down = (matrix.yx, matrix.xy) if is_swapped else (matrix.xx, matrix.yy)
    pixels = pixels[:, ::-1] if across < 0 else pixels
    return pixels[::-1] if down < 0 else pixels


def _find_angle(matrix: _DisplayMatrix) -> int:
    """Return the clockwise angle in whole degrees, as ffmpeg rounds it; 1 for a matrix that shows nothing."""
    across, down = math.hypot(matrix.xx, matrix.yx), math.hypot(matrix.xy, matrix.yy)
    if not across or not down:
        return 1
    return round(math.degrees(math.atan2(matrix.xy / down, matrix.xx / across)))
