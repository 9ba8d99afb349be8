"""Row references -> model inputs: fetch, decode, select frames, tile and tokenise, in CPU actors without torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from ovis_model.inputs.processor import Processor
from ovis_model.inputs.prompt import IMAGE_MARK, video_query, without_marks
from ovis_model.types import IMAGE_ATOM_ID, Request
from pipelines.cluster.actor import end_with_python
from pipelines.cluster.attempts import GIVEN_UP, MAX_TRIES, Attempts
from pipelines.cluster.resources import BATCH_BYTES
from pipelines.config import RunConfig
from pipelines.errors import MediaError, RowError, StoreFault
from pipelines.media.fetch import Fetcher, Pending
from pipelines.media.frame_selection import Encoder, FrameSelector
from pipelines.media.images import decode_image
from pipelines.media.reference import ImageRef
from pipelines.media.video import Frame, looks_like_video
from pipelines.output.ledger import RowRange
from pipelines.output.manifest import read_rows, sample_images
from pipelines.schema import Stage
from pipelines.sources.videos import is_in_place, video_of
from pipelines.storage import store
from pipelines.tasks.task import Task

Row = dict[str, Any]
Batch = dict[str, np.ndarray]


class Preprocess:
    """Takes ranges of row numbers, gives batches of prepared rows; one that fails is a row with stage and error."""

    def __init__(
        self,
        config: RunConfig,
        output: str,
        revision: str | None,
        attempts: Attempts,
        encoder: Encoder | None = None,
    ) -> None:
        """`encoder` compares frames of videos; None is needed for images and for frames that are spread evenly."""
        end_with_python()
        self._config, self._output, self._attempts = config, output, attempts
        self._tasks = config.asked
        self._processor = Processor.from_pretrained(config.model, revision)
        store.allow_private_addresses(config.allow_private_addresses)
        self._fetcher = Fetcher()
        self._frames = FrameSelector(config, encoder)

    def __call__(self, batch: Batch) -> Iterator[Batch]:
        """int64 `start`, `stop` -> columns of `_prepared` rows, at most BATCH_BYTES or one row at once."""
        for start, stop in zip(batch["start"], batch["stop"], strict=True):
            work = f"prepare rows {start} to {stop}"
            rows: list[Row] = read_rows(self._output, RowRange(int(start), int(stop))).to_pylist()
            if self._attempts.begin(work) <= MAX_TRIES:
                yield from _batches(self._prepare(row, images) for row, images in self._fetched(rows))
            else:
                yield from _batches(map(self._prepare_alone, rows))
            self._attempts.end(work)

    def _fetched(self, rows: list[Row]) -> Iterator[tuple[Row, Pending]]:
        return self._fetcher.ahead((row, self._images_of(row)) for row in rows)

    def _images_of(self, row: Row) -> list[ImageRef]:
        """Nothing is fetched for a row that fails anyway, nor for a video that is decoded where it is."""
        images = [ImageRef(**image) for image in row["images"]]
        is_needed = not row["error"] and len(images) <= self._most_images and not is_in_place(images)
        return images if is_needed else []

    def _prepare(self, row: Row, images: Pending) -> Row:
        try:
            return self._request(row, images)
        except RowError as error:
            return self._failed(row, error)
        except StoreFault as fault:
            if self._is_store_down(row):  # then the run has to stop
                raise
            return self._failed(row, RowError("read", f"{fault}; other files are read"))

    def _prepare_alone(self, row: Row) -> Row:
        """A row among others of which one killed its process again and again; nothing else is on its way meanwhile."""
        work = f"prepare row {row['row']}"
        if self._attempts.begin(work) > MAX_TRIES:
            return self._failed(row, RowError("decode", GIVEN_UP))
        prepared = self._prepare(row, self._fetcher.submit(self._images_of(row)))
        self._attempts.end(work)
        return prepared

    def _failed(self, row: Row, error: RowError) -> Row:
        return _failed(row, error, self._processor.config.vision.image_size)

    def _request(self, row: Row, images: Pending) -> Row:
        """The prepared row. Raises RowError and StoreFault."""
        if row["error"]:
            raise RowError("list", row["error"])
        with _stage("read", OSError):
            encoded = images.result()
        with _stage("tile", ValueError):
            self._check_number(max(len(encoded), len(row["images"])))
        references = [ImageRef(**image) for image in row["images"]]
        if is_in_place(references) or any(map(looks_like_video, encoded)):
            return self._video_request(row, references, encoded)
        if not encoded and not row["has_own_prompt"]:
            raise RowError("read", "no image, and no prompt of its own")
        with _stage("decode", MediaError):
            pictures = _decoded(encoded)
        with _stage("tile", ValueError):
            questions = [_harmless(prompt, num_images=len(pictures)) for prompt in self._config.prompts(row["prompt"])]
            requests = self._tiled(questions, pictures, self._config.tiles_for(len(pictures)))
        return _prepared(row, requests, len(pictures))

    def _is_store_down(self, row: Row) -> bool:
        """No other image there can be read; a place that no other row names says nothing of the run's store."""
        own = {(image["uri"], image["offset"]) for image in row["images"]}
        places = {store.place_of(image["uri"]) for image in row["images"]}
        others = [image for image in sample_images(self._output) if (image.uri, image.offset) not in own]
        there = [image for image in others if store.place_of(image.uri) in places]
        if others and not there:
            return False
        return not any(store.can_read(image.uri, image.offset if image.kind == "tar" else 0) for image in there)

    def _video_request(self, row: Row, references: list[ImageRef], encoded: list[bytes]) -> Row:
        with _stage("decode", MediaError), _stage("read", OSError):
            video, window = video_of(references, encoded)
            prompts = self._config.prompts(row["prompt"])
            frames = self._frames.select(video, window, without_marks("\n".join(prompts)))
        with _stage("tile", ValueError):
            self._check_number(len(frames))
            questions = [_about_video(prompt, len(frames)) for prompt in prompts]
            pictures = [Image.fromarray(frame.pixels) for frame in frames]
            requests = self._tiled(questions, pictures, self._config.tiles_for_frames)
        return _prepared(row, requests, len(frames), frames)

    def _tiled(self, questions: Sequence[str], pictures: list[Image.Image], max_tiles: int) -> list[Request]:
        """A request for each question, all with the same tiles."""
        sizes = [picture.size for picture in pictures]
        prompts = []
        for task, question in zip(self._tasks, questions, strict=True):
            ids = self._processor.prompt_ids(question, sizes, max_tiles, task.system)
            # Before tiling: a row that is far too long would also need far too much memory.
            self._check_length(task, len(ids) + ids.count(IMAGE_ATOM_ID) * (self._tokens_per_tile - 1))
            prompts.append(ids)
        return self._processor.with_tiles(prompts, pictures, max_tiles)

    def _check_number(self, num_images: int) -> None:
        if num_images > self._most_images:
            raise ValueError(f"{num_images} images are more than the {self._most_images} that the model's limit allows")

    def _check_length(self, task: Task, num_prompt_tokens: int) -> None:
        # Choices are scored, not generated; the engine knows how long they are.
        limit, output = self._processor.config.max_length, 0 if task.answer.options else task.max_new_tokens or 0
        excess = num_prompt_tokens + output - limit
        if excess > 0:
            raise ValueError(
                f"{task.where}{num_prompt_tokens} prompt + {output} output tokens are {excess} over the "
                f"model's limit of {limit}; lower --max-new-tokens, --max-tiles or --num-frames, or shorten the prompt"
            )

    @property
    def _tokens_per_tile(self) -> int:
        return self._processor.config.vision.tokens_per_tile

    @property
    def _most_images(self) -> int:
        """An image is a tile at least. One is always tried, for the message that says by how much it is too long."""
        return max(1, self._processor.config.max_length // self._tokens_per_tile)


@contextmanager
def _stage(stage: Stage, expected: type[Exception]) -> Iterator[None]:
    try:
        yield
    except expected as error:
        # Of an OSError the plain reason: its path is in the row, and reasons are counted.
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise RowError(stage, reason) from error


def _decoded(encoded: list[bytes]) -> list[Image.Image]:
    pictures = []
    for number, data in enumerate(encoded, 1):
        try:
            pictures.append(decode_image(data))
        except MediaError as error:
            raise MediaError(f"image {number} of {len(encoded)}: {error}" if len(encoded) > 1 else error) from error
    return pictures


def _harmless(prompt: str, *, num_images: int) -> str:
    """Marks that do not place each image once are the user's text, not ours."""
    return prompt if prompt.count(IMAGE_MARK) == num_images else without_marks(prompt)


def _about_video(prompt: str, num_frames: int) -> str:
    question = _harmless(prompt, num_images=num_frames)
    return question if IMAGE_MARK in question else video_query(question, num_frames)


def _prepared(row: Row, requests: Sequence[Request], num_images: int, frames: Sequence[Frame] = ()) -> Row:
    return {
        "row": row["row"],
        "id": row["id"],
        "uri": row["uri"],
        "prompt": row["prompt"],
        "stage": "",
        "error": "",
        "num_images": num_images,
        "frame_timestamps_s": np.array([frame.timestamp_s for frame in frames], np.float32),
        # One after the other: a column takes arrays, not lists of them.
        "input_ids": np.concatenate([request.input_ids for request in requests]),
        "prompt_lengths": np.array([len(request.input_ids) for request in requests], np.int32),
        "tiles": requests[0].tiles,
        "tile_sizes": requests[0].tile_sizes,
    }


def _failed(row: Row, error: RowError, tile_size: int) -> Row:
    # Arrays of no tiles, not None: a column may not mix tensors and objects.
    nothing = Request(
        np.zeros(0, np.int32), np.zeros((0, 3, tile_size, tile_size), np.uint8), np.zeros((0, 2), np.int32)
    )
    return {**_prepared(row, [nothing], 0), "stage": error.stage, "error": str(error)}


def _batches(rows: Iterable[Row]) -> Iterator[Batch]:
    waiting: list[Row] = []
    waiting_bytes = 0
    for row in rows:
        if waiting and waiting_bytes + row["tiles"].nbytes > BATCH_BYTES:
            yield _columns(waiting)
            waiting, waiting_bytes = [], 0
        waiting.append(row)
        waiting_bytes += row["tiles"].nbytes
    if waiting:
        yield _columns(waiting)


def _columns(rows: list[Row]) -> Batch:
    return {name: _column([row[name] for row in rows]) for name in rows[0]}


def _column(values: list[Any]) -> np.ndarray:
    if not isinstance(values[0], np.ndarray):
        return np.array(values, dtype=object if isinstance(values[0], str) else np.int64)
    # Filled one by one: numpy would try to stack arrays of one shape.
    column = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        column[i] = value
    return column
