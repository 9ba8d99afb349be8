"""The stage Preprocess: CPU actors fetch, decode, select frames, tile and tokenize, without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
from PIL import Image

from ovis_model.inputs.processor import Processor
from ovis_model.inputs.prompt import IMAGE_MARK, build_video_query, remove_marks
from ovis_model.inputs.tiling import choose_reduction
from ovis_model.types import IMAGE_ATOM_ID, Request
from pipelines.cluster.actor import register_fast_exit
from pipelines.cluster.attempts import CONTROL, GIVEN_UP, MAX_TRIES, Attempts
from pipelines.cluster.resources import BATCH_BYTES
from pipelines.config import ImageOptions
from pipelines.errors import MediaError, RowError, StoreFault
from pipelines.media.fetch import Fetcher, PendingImages
from pipelines.media.frame_selection import Encoder, FrameSelector
from pipelines.media.images import DecodedImage, read_image
from pipelines.media.reference import ImageRef, Window, is_seekable_video, locate_video
from pipelines.media.saving import FrameSaver, encode_jpeg
from pipelines.media.subtitles import MARK_START, Cue, drop_subtitles, fill_subtitles
from pipelines.media.video.container import has_video_signature
from pipelines.media.video.frames import TiledFrame, VideoInfo
from pipelines.monitoring.usage import Meter
from pipelines.output.ledger import RowRange
from pipelines.output.manifest import is_store_down, read_rows
from pipelines.rows import Batch, ManifestRow, MediaFacts, PreparedRow
from pipelines.schema import Stage
from pipelines.storage import store
from pipelines.tasks.questionnaire import Questionnaire
from pipelines.tasks.task import Task


class Preprocess:
    """Turns ranges of row numbers into batches of prepared rows; a row that fails carries its stage and error."""

    def __init__(
        self,
        output: str,
        model: str,
        revision: str | None,
        images: ImageOptions,
        questionnaire: Questionnaire,
        attempts: Attempts,
        encoder: Encoder | None = None,
        *,
        save_frames: str | None = None,
        allow_private_addresses: bool = False,
    ) -> None:
        """Load the processor of `model`. `encoder` scores video frames; None for uniform sampling and for images.

        `save_frames` is the directory for JPEG files of what the model sees; None saves nothing.
        """
        register_fast_exit()
        attempts.start()
        store.allow_private_addresses(allow_private_addresses)
        self._output, self._attempts = output, attempts
        self._requests = RequestBuilder(Processor.from_pretrained(model, revision), images, questionnaire)
        self._fetcher, self._images = Fetcher(), images
        self._meter = Meter()
        attempts.follow(self._meter.read)
        self._saver = FrameSaver(save_frames) if save_frames is not None else None
        self._frames = FrameSelector(
            images, encoder, tile_size=self._requests.tile_size, with_jpeg=self._saver is not None
        )

    def __call__(self, batch: Batch) -> Iterator[Batch]:
        """Yield the columns of the prepared rows of each range, in batches of one row or at most BATCH_BYTES.

        batch: int64 columns `start` and `stop`, a range of row numbers per entry.
        """
        yield from self._meter.follow(self._prepare_units(batch))

    def _prepare_units(self, batch: Batch) -> Iterator[Batch]:
        for start, stop in zip(batch["start"].tolist(), batch["stop"].tolist(), strict=True):
            work = f"prepare rows {start} to {stop}"
            rows = ManifestRow.from_table(read_rows(self._output, RowRange(start, stop)))
            if self._attempts.begin(work) <= MAX_TRIES:
                yield from _group_into_batches(self._prepare(row, images) for row, images in self._fetch_ahead(rows))
            else:
                yield from _group_into_batches(self._prepare_each_alone(work, rows))
            self._meter.count(len(rows))
            self._attempts.end(work, reading=self._meter.read())

    def _fetch_ahead(self, rows: Iterable[ManifestRow]) -> Iterator[tuple[ManifestRow, PendingImages]]:
        return self._fetcher.fetch_ahead((row, self._select_needed_images(row)) for row in rows)

    def _select_needed_images(self, row: ManifestRow) -> Sequence[ImageRef]:
        """Return the images to fetch: none for a row that will fail, nor for a video that is decoded in place."""
        is_needed = not row.error and len(row.images) <= self._requests.max_images and not is_seekable_video(row.images)
        return row.images if is_needed else ()

    def _prepare(self, row: ManifestRow, images: PendingImages) -> PreparedRow:
        try:
            prepared, files = self._prepare_or_raise(row, images)
        except RowError as error:
            return _make_error_row(row, error)
        except StoreFault as fault:
            if is_store_down(self._output, row.images):  # every further row would fail too: stop the run
                raise
            return _make_error_row(row, RowError("read", f"{fault}; other files can be read"))
        return self._save(prepared, files)

    def _save(self, row: PreparedRow, files: Sequence[bytes]) -> PreparedRow:
        """Write the JPEG files of a row before it is handed on, so that every finished row has them."""
        return row if self._saver is None else replace(row, saved_frames=self._saver.save(row.id, files))

    def _prepare_each_alone(self, work: str, rows: Sequence[ManifestRow]) -> Iterator[PreparedRow]:
        """Prepare rows one by one that killed their process together, those first that are not suspicious.

        A row that an earlier process prepared is prepared again: pixels are too large to be kept by `attempts`.
        """
        by_number = {row.row: row for row in rows}
        alone = self._attempts.resume_alone(work, list(by_number))
        for number in (*alone.kept, *alone.order):
            if number == CONTROL:
                self._prepare_control(work)
            else:
                yield self._prepare_alone(work, by_number[number])

    def _prepare_alone(self, work: str, row: ManifestRow) -> PreparedRow:
        if not self._attempts.begin_alone(row.row):
            self._attempts.keep(work, row.row)
            return _make_error_row(row, RowError("decode", GIVEN_UP))
        prepared = self._prepare(row, self._fetcher.submit(self._select_needed_images(row)))
        self._attempts.end_alone(work, row.row)
        return prepared

    def _prepare_control(self, work: str) -> None:
        self._attempts.begin_alone(CONTROL)
        self._requests.build_image_requests("", [Image.new("RGB", (64, 64))])
        self._attempts.end_alone(work, CONTROL)

    def _prepare_or_raise(self, row: ManifestRow, images: PendingImages) -> tuple[PreparedRow, list[bytes]]:
        """Return the prepared row and the JPEG files to save. Raise RowError or StoreFault."""
        if row.error:
            raise RowError("list", row.error)
        with convert_errors("read", OSError), self._meter.wait():
            encoded = images.result()
        with convert_errors("tile", ValueError):
            self._requests.check_num_images(max(len(encoded), len(row.images)))
        if is_seekable_video(row.images) or any(map(has_video_signature, encoded)):
            return self._prepare_video(row, encoded)
        if not encoded and not row.has_own_prompt:
            raise RowError("read", "the row has neither an image nor its own prompt")
        row = self._fill_subtitles(row, Window(), list)
        with convert_errors("decode", MediaError):
            decoded = decode_images(
                encoded,
                self._images,
                max_tiles=self._images.max_tiles_per_image(len(encoded)),
                tile_size=self._requests.tile_size,
            )
        with convert_errors("tile", ValueError):
            requests = self._requests.build_image_requests(row.prompt, [image.pixels for image in decoded])
        prepared = _make_row(row, requests, len(decoded))
        media = _describe_image(decoded[0], encoded[0]) if decoded else None
        warning = "; ".join(image.warning for image in decoded if image.warning)
        files = [encode_jpeg(image.pixels) for image in decoded if self._saver]
        return replace(prepared, media=media, warning=warning), files

    def _prepare_video(self, row: ManifestRow, encoded: list[bytes]) -> tuple[PreparedRow, list[bytes]]:
        with convert_errors("decode", MediaError), convert_errors("read", OSError):
            video, window = locate_video(row.images, encoded)
            frames, info = self._frames.select(video, window, self._requests.join_prompts(row.prompt))
            row = self._fill_subtitles(row, window, lambda: self._frames.read_subtitles(video, window))
        with convert_errors("tile", ValueError):
            self._requests.check_num_images(len(frames))
            requests = self._requests.build_video_requests(row.prompt, frames)
        prepared = replace(_make_row(row, requests, len(frames), frames), media=_describe_video(info))
        return prepared, [frame.jpeg for frame in frames if self._saver]

    def _fill_subtitles(self, row: ManifestRow, window: Window, read_track: Callable[[], list[Cue]]) -> ManifestRow:
        """Return the row with its subtitles in the window in its prompts; only a video has a text track to read."""
        if MARK_START not in row.prompt:
            return row
        fill = partial(fill_subtitles, window=window, read_track=read_track)
        return replace(row, prompt=self._requests.change_prompts(row.prompt, fill))


class RequestBuilder:
    """Builds the requests of a row: one prompt per task, all with the same tiles."""

    def __init__(self, processor: Processor, images: ImageOptions, questionnaire: Questionnaire) -> None:
        self._processor, self._images, self._questionnaire = processor, images, questionnaire
        self._max_length = processor.config.max_length
        self.tile_size = processor.config.vision.image_size
        self._tokens_per_tile = processor.config.vision.tokens_per_tile
        # An image has at least one tile. One image is always tried: its error message gives the excess tokens.
        self.max_images = max(1, self._max_length // self._tokens_per_tile)

    def join_prompts(self, prompt: str) -> str:
        """Return all prompts of a row as one text without subtitles, to match frames against.

        `prompt`: as in the manifest.
        """
        return remove_marks("\n".join(self._questionnaire.split_prompts(drop_subtitles(prompt))))

    def change_prompts(self, prompt: str, change: Callable[[str], str]) -> str:
        """Return `prompt`, as in the manifest, with each prompt in it changed."""
        return self._questionnaire.change_prompts(prompt, change)

    def build_image_requests(self, prompt: str, pictures: Sequence[Image.Image]) -> list[Request]:
        """Return the requests of a row with these images, possibly none. Raise ValueError if one is too long."""
        texts = self._questionnaire.split_prompts(prompt)
        questions = [_remove_stray_marks(text, num_images=len(pictures)) for text in texts]
        max_tiles = self._images.max_tiles_per_image(len(pictures))
        # Before tiling: a row that is far too long would also need far too much memory.
        prompts = self._encode_prompts(questions, [picture.size for picture in pictures], max_tiles)
        return self._processor.build_requests(prompts, pictures, max_tiles)

    def build_video_requests(self, prompt: str, frames: Sequence[TiledFrame]) -> list[Request]:
        """Return the requests of a row with the frames of a video. Raise ValueError if one is too long."""
        questions = [_build_video_prompt(text, len(frames)) for text in self._questionnaire.split_prompts(prompt)]
        sizes = [(frame.width, frame.height) for frame in frames]
        prompts = self._encode_prompts(questions, sizes, self._images.max_tiles_per_frame)
        tiles = np.concatenate([frame.tiles for frame in frames])
        return self._processor.join_tiles(prompts, tiles, np.concatenate([frame.sizes for frame in frames]))

    def _encode_prompts(
        self, questions: Sequence[str], sizes: Sequence[tuple[int, int]], max_tiles: int
    ) -> list[list[int]]:
        """Encode the questions about images of (width_px, height_px). Raise ValueError if one is too long."""
        prompts = []
        for task, question in zip(self._questionnaire.tasks, questions, strict=True):
            ids = self._processor.encode_prompt(question, sizes, max_tiles, task.system)
            self._check_length(task, len(ids) + ids.count(IMAGE_ATOM_ID) * (self._tokens_per_tile - 1))
            prompts.append(ids)
        return prompts

    def check_num_images(self, num_images: int) -> None:
        """Raise ValueError if the images alone exceed the model's limit."""
        if num_images > self.max_images:
            raise ValueError(f"{num_images} images exceed the model's limit of {self.max_images} per row")

    def _check_length(self, task: Task, num_prompt_tokens: int) -> None:
        # Choices are scored, not generated; the engine accounts for their length.
        output = 0 if task.answer.options else task.max_new_tokens or 0
        excess = num_prompt_tokens + output - self._max_length
        if excess > 0:
            raise ValueError(
                f"{task.label}{num_prompt_tokens} prompt + {output} output tokens are {excess} over the model's limit "
                f"of {self._max_length}; lower --max-new-tokens, --max-tiles or --num-frames, or shorten the prompt"
            )


@contextmanager
def convert_errors(stage: Stage, expected: type[Exception]) -> Iterator[None]:
    """Raise RowError in `stage` instead of the expected exception, with its reason."""
    try:
        yield
    except expected as error:
        # `strerror` of an OSError leaves out the path: the row has it, and equal reasons are counted together.
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise RowError(stage, reason) from error


def decode_images(
    encoded: Sequence[bytes], options: ImageOptions, *, max_tiles: int, tile_size: int
) -> list[DecodedImage]:
    """Decode the images of a row. Raise MediaError that names the image if there are several."""
    keep_partial, background = options.partial_images == "keep", options.background_colour
    choose = partial(choose_reduction, max_tiles=max_tiles, tile_size=tile_size) if options.fast_decode else None
    decoded = []
    for number, data in enumerate(encoded, 1):
        place = f"image {number} of {len(encoded)}: " if len(encoded) > 1 else ""
        try:
            image = read_image(data, keep_partial=keep_partial, background=background, choose_reduction=choose)
        except MediaError as error:
            raise MediaError(f"{place}{error}") from error
        decoded.append(replace(image, warning=place + image.warning) if image.warning else image)
    return decoded


def _describe_image(image: DecodedImage, data: bytes) -> MediaFacts:
    return MediaFacts(*image.size, image.format, len(data))


def _describe_video(info: VideoInfo) -> MediaFacts:
    return MediaFacts(
        info.width,
        info.height,
        info.format,
        info.num_bytes,
        *(info.duration_s, info.fps, info.codec, info.repeated_share, info.corrupt_share),
    )


def _remove_stray_marks(prompt: str, *, num_images: int) -> str:
    """Return the prompt without image marks, unless there is exactly one per image: others are the user's text."""
    return prompt if prompt.count(IMAGE_MARK) == num_images else remove_marks(prompt)


def _build_video_prompt(prompt: str, num_frames: int) -> str:
    question = _remove_stray_marks(prompt, num_images=num_frames)
    return question if IMAGE_MARK in question else build_video_query(question, num_frames)


def _make_row(
    row: ManifestRow, requests: Sequence[Request], num_images: int, frames: Sequence[TiledFrame] = ()
) -> PreparedRow:
    timestamps_s = np.array([frame.timestamp_s for frame in frames], np.float32)
    return PreparedRow(row.row, row.id, row.uri, row.prompt, tuple(requests), num_images, timestamps_s)


def _make_error_row(row: ManifestRow, error: RowError) -> PreparedRow:
    prompt = drop_subtitles(row.prompt)
    return PreparedRow(row.row, row.id, row.uri, prompt, stage=error.stage, error=str(error))


def _group_into_batches(rows: Iterable[PreparedRow]) -> Iterator[Batch]:
    waiting: list[PreparedRow] = []
    waiting_bytes = 0
    for row in rows:
        if waiting and waiting_bytes + row.num_tile_bytes > BATCH_BYTES:
            yield PreparedRow.to_columns(waiting)
            waiting, waiting_bytes = [], 0
        waiting.append(row)
        waiting_bytes += row.num_tile_bytes
    if waiting:
        yield PreparedRow.to_columns(waiting)
