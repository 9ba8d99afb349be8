"""Row references -> model inputs: fetch, decode, tile and tokenise, in CPU actors that hold no torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from ovis_model.processor import Processor
from ovis_model.prompt import IMAGE_MARK, without_marks
from ovis_model.types import Request
from pipelines import store
from pipelines.attempts import MAX_TRIES, Attempts
from pipelines.cluster import BATCH_BYTES
from pipelines.config import CaptionConfig
from pipelines.ledger import RowRange
from pipelines.manifest import read_rows
from pipelines.media import MediaError, decode_image
from pipelines.schema import Stage

MAX_FILE_BYTES = 256 << 20
_FETCHES = 16  # files on their way at once: object stores answer slowly and in parallel

Row = dict[str, Any]
Batch = dict[str, np.ndarray]


class RowError(ValueError):
    """This row cannot be prepared, others can."""

    def __init__(self, stage: Stage, reason: str) -> None:
        super().__init__(reason)
        self.stage = stage


class Preprocess:
    """Takes ranges of row numbers, gives batches of prepared rows; one that fails is a row with stage and error."""

    def __init__(self, config: CaptionConfig, output: str, revision: str | None, attempts: Attempts) -> None:
        self._config, self._output, self._attempts = config, output, attempts
        self._processor = Processor.from_pretrained(config.model, revision)
        self._fetcher = ThreadPoolExecutor(_FETCHES, thread_name_prefix="fetch")

    def __call__(self, batch: Batch) -> Iterator[Batch]:
        """int64 `start`, `stop` -> columns of `_prepared` rows, at most BATCH_BYTES or one row at once."""
        for start, stop in zip(batch["start"], batch["stop"], strict=True):
            work = f"prepare rows {start} to {stop}"
            prepare = self._prepare if self._attempts.begin(work) <= MAX_TRIES else self._prepare_alone
            rows: list[Row] = read_rows(self._output, RowRange(int(start), int(stop))).to_pylist()
            yield from _batches(prepare(row, data) for row, data in self._fetched(rows))
            self._attempts.end(work)

    def _fetched(self, rows: list[Row]) -> Iterator[tuple[Row, Future[bytes]]]:
        """Rows in order with their bytes, a bounded number of fetches ahead."""
        ahead: deque[tuple[Row, Future[bytes]]] = deque()
        for row in rows:
            ahead.append((row, self._fetcher.submit(_fetch, row)))
            if len(ahead) == _FETCHES:
                yield ahead.popleft()
        yield from ahead

    def _prepare(self, row: Row, data: Future[bytes]) -> Row:
        try:
            return _prepared(row, self._request(row, data), num_images=1)
        except RowError as error:
            return self._failed(row, error)

    def _prepare_alone(self, row: Row, data: Future[bytes]) -> Row:
        """A row among others of which one killed its process again and again."""
        work = f"prepare row {row['row']}"
        tries = self._attempts.begin(work)
        if tries > MAX_TRIES:
            return self._failed(row, RowError("decode", f"the process died {tries - 1} times on this row alone"))
        prepared = self._prepare(row, data)
        self._attempts.end(work)
        return prepared

    def _failed(self, row: Row, error: RowError) -> Row:
        return _failed(row, error, self._processor.config.vision.image_size)

    def _request(self, row: Row, data: Future[bytes]) -> Request:
        with _stage("read", OSError):
            encoded = data.result()
        with _stage("decode", MediaError):
            image = decode_image(encoded)
        with _stage("tile", ValueError):
            request = self._processor.request(
                _harmless(row["prompt"], num_images=1),
                [image],
                max_tiles=self._config.tiles_for(1),
                system_prompt=self._config.system_prompt,
            )
            self._check_length(len(request.input_ids))
        return request

    def _check_length(self, num_prompt_tokens: int) -> None:
        limit = self._processor.config.max_length
        excess = num_prompt_tokens + self._config.max_new_tokens - limit
        if excess > 0:
            raise ValueError(
                f"{num_prompt_tokens} prompt + {self._config.max_new_tokens} output tokens are {excess} over the "
                f"model's limit of {limit}; lower --max-new-tokens or --max-tiles, or shorten the prompt"
            )


@contextmanager
def _stage(stage: Stage, expected: type[Exception]) -> Iterator[None]:
    try:
        yield
    except expected as error:
        # Of an OSError the plain reason: its path is in the row, and reasons are counted.
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise RowError(stage, reason) from error


def _fetch(row: Row) -> bytes:
    if row["error"]:
        raise RowError("list", row["error"])
    if row["num_bytes"] > MAX_FILE_BYTES:
        raise RowError("read", f"the file has {row['num_bytes']:,} bytes, more than the limit of {MAX_FILE_BYTES:,}")
    return store.read_bytes(row["uri"])


def _harmless(prompt: str, *, num_images: int) -> str:
    """Marks that do not place each image once are the user's text, not ours."""
    return prompt if prompt.count(IMAGE_MARK) == num_images else without_marks(prompt)


def _prepared(row: Row, request: Request, *, num_images: int) -> Row:
    return {
        "row": row["row"],
        "id": row["id"],
        "uri": row["uri"],
        "prompt": row["prompt"],
        "stage": "",
        "error": "",
        "num_images": num_images,
        "input_ids": request.input_ids,
        "tiles": request.tiles,
        "tile_sizes": request.tile_sizes,
    }


def _failed(row: Row, error: RowError, tile_size: int) -> Row:
    # Arrays of no tiles, not None: a column may not mix tensors and objects.
    nothing = Request(
        np.zeros(0, np.int32), np.zeros((0, 3, tile_size, tile_size), np.uint8), np.zeros((0, 2), np.int32)
    )
    return {**_prepared(row, nothing, num_images=0), "stage": error.stage, "error": str(error)}


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
