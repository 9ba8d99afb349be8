"""Turn rows into examples: fetch, decode, tile, tokenize. A row that does not fit fails with both numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ovis_model.checkpoint import fetch_checkpoint
from ovis_model.config import OvisConfig
from ovis_model.inputs.tiling import choose_grid, tile_images
from ovis_model.tokenizer import load_tokenizer
from ovis_model.training.examples import (
    ExampleBuilder,
    PreferenceExample,
    TiledImages,
    TrainingExample,
)
from pipelines.config import FRAME_MAX_TILES, ImageOptions
from pipelines.errors import MediaError, RowError
from pipelines.media.fetch import Fetcher, PendingImages
from pipelines.media.frame_selection import FrameSelector
from pipelines.media.reference import ImageRef, is_seekable_video, locate_video
from pipelines.media.video.container import has_video_signature
from pipelines.media.video.frames import TiledFrame
from pipelines.preprocess import convert_errors, decode_images
from pipelines.training.data.forms import Dialogue, place_marks

AnyExample = TrainingExample | PreferenceExample


class PreparedExample(NamedTuple):
    """The example of a row, or the reason why it has none."""

    example: AnyExample | None
    error: RowError | None = None


class ExamplePreparer:
    """Prepares the rows for one checkpoint, for use by one thread; the bytes of the next rows are fetched ahead."""

    def __init__(self, model: str, revision: str | None, images: ImageOptions, max_length: int | None) -> None:
        """Load tokenizer and sizes of `model`; `max_length` is in tokens, None for the model's own."""
        directory = fetch_checkpoint(model, revision, weights=False)
        config = OvisConfig.from_directory(directory)
        self._builder = ExampleBuilder(config, load_tokenizer(directory), max_length)
        self._images, self._tile_size = images, config.vision.image_size
        self._frames = FrameSelector(images, tile_size=self._tile_size)
        self._fetcher = Fetcher()

    def prepare(self, rows: Iterable[Dialogue]) -> Iterator[PreparedExample]:
        """Yield the example of each row, in order. Raise StoreFault if the store does not answer."""
        for row, pending in self._fetcher.fetch_ahead((row, self._list_needed(row)) for row in rows):
            try:
                yield PreparedExample(self._prepare(row, pending))
            except RowError as error:
                yield PreparedExample(None, error)

    def _list_needed(self, row: Dialogue) -> Sequence[ImageRef]:
        """Return the media to fetch: a video in a file is decoded in place."""
        return () if is_seekable_video(row.media) else row.media

    def _prepare(self, row: Dialogue, pending: PendingImages) -> AnyExample:
        """Return the example. Raise RowError or StoreFault."""
        with convert_errors("read", OSError):
            encoded = pending.result()
        if row.kind == "video" or is_seekable_video(row.media) or any(map(has_video_signature, encoded)):
            images = self._tile_video(row, encoded)
        else:
            images = self._tile_images(row, encoded)
        with convert_errors("tile", ValueError):
            return self._build(row, images)

    def _tile_images(self, row: Dialogue, encoded: list[bytes]) -> TiledImages:
        with convert_errors("decode", MediaError):
            max_tiles = self._choose_max_tiles(row, len(encoded))
            decoded = decode_images(encoded, self._images, max_tiles=max_tiles, tile_size=self._tile_size)
        with convert_errors("tile", ValueError):
            pictures = [image.pixels for image in decoded]
            place_marks(row, len(pictures))  # before tiling, which is slow
            tiles, sizes = tile_images(pictures, max_tiles, self._tile_size)
        grids = (choose_grid(*picture.size, max_tiles, self._tile_size) for picture in pictures)
        return TiledImages(tiles, sizes, tuple(grids))

    def _choose_max_tiles(self, row: Dialogue, num_images: int) -> int:
        if row.max_tiles is not None:
            return row.max_tiles
        if row.kind == "frames":
            return self._images.max_tiles or FRAME_MAX_TILES
        return self._images.max_tiles_per_image(num_images)

    def _tile_video(self, row: Dialogue, encoded: list[bytes]) -> TiledImages:
        with convert_errors("decode", MediaError), convert_errors("read", OSError):
            video, window = locate_video(row.media, encoded)
            frames, _ = self._frames.select(video, window, "")
        if not frames:
            raise RowError("decode", "the video has no frames")
        return self._join_frames(frames)

    def _join_frames(self, frames: Sequence[TiledFrame]) -> TiledImages:
        max_tiles = self._images.max_tiles_per_frame
        grids = tuple(choose_grid(frame.width, frame.height, max_tiles, self._tile_size) for frame in frames)
        tiles = np.concatenate([frame.tiles for frame in frames])
        return TiledImages(tiles, np.concatenate([frame.sizes for frame in frames]), grids)

    def _build(self, row: Dialogue, images: TiledImages) -> AnyExample:
        placed = place_marks(row, len(images.grids))
        if placed.is_pair:
            return self._builder.build_preference(placed.turns, placed.chosen, placed.rejected, images)
        if placed.is_caption:
            return self._builder.build_caption(placed.turns[0].text, placed.turns[1].text, images)
        return self._builder.build_dialogue(placed.turns, images)


def count_tokens(example: AnyExample) -> int:
    """Return the length of the longest sequence of an example."""
    if isinstance(example, PreferenceExample):
        return len(example.prompt_ids) + max(len(example.chosen_ids), len(example.rejected_ids))
    return len(example.input_ids)
