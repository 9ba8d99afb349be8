"""The row types that stages exchange (manifest, prepared, result), each with its codec to and from columns.

Each type is frozen; only its codec knows how a row is laid out in columns.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ovis_model.types import Request
from pipelines.media.reference import ImageRef, parse_reference
from pipelines.schema import Stage, Status
from pipelines.tasks.questionnaire import Columns

Batch = dict[str, NDArray[Any]]
"""Columns of prepared rows, as Ray passes them between stages."""


@dataclass(frozen=True)
class ManifestRow:
    """A row of the frozen input.

    prompt: as the manifest stores it; with several tasks a JSON array.
    error: why listing the row failed, or "".
    """

    row: int
    id: str
    uri: str
    images: tuple[ImageRef, ...]
    prompt: str
    has_own_prompt: bool
    error: str

    @classmethod
    def from_table(cls, table: pa.Table) -> list[ManifestRow]:
        """Decode rows of `schema.MANIFEST`."""
        return [
            cls(**{**values, "images": tuple(map(parse_reference, values["images"]))}) for values in table.to_pylist()
        ]


@dataclass(frozen=True)
class MediaFacts:
    """What is known of a row's image or video: the columns `schema.MEDIA`; None where one does not apply."""

    width: int
    height: int
    format: str
    bytes: int
    duration_s: float | None = None
    fps: float | None = None
    codec: str | None = None
    repeated_share: float | None = None
    corrupt_share: float | None = None


@dataclass(frozen=True, eq=False)
class PreparedRow:
    """A row that is ready for the model, or a failed row with its `stage` and `error`.

    requests: one per task, all with the same tiles; empty if the row failed.
    frame_timestamps_s: float32[F] for the frames of a video; empty for images.
    media: facts about the video or the first image; None without one.
    warning: why the answer may be doubtful, or "".
    saved_frames: paths of the JPEG files of the images or frames in the directory of --save-frames.
    """

    row: int
    id: str
    uri: str
    prompt: str
    requests: tuple[Request, ...] = ()
    num_images: int = 0
    frame_timestamps_s: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    stage: Stage = ""
    error: str = ""
    warning: str = ""
    media: MediaFacts | None = None
    saved_frames: tuple[str, ...] = ()

    @property
    def num_tiles(self) -> int:
        """Number of tiles, overviews included."""
        return len(self.requests[0].tiles) if self.requests else 0

    @property
    def num_tile_bytes(self) -> int:
        """Bytes of the tiles, nearly the whole size of the row."""
        return self.requests[0].tiles.nbytes if self.requests else 0

    @property
    def num_prompt_tokens(self) -> int:
        """Number of tokens in the prompts of all tasks."""
        return sum(len(request.input_ids) for request in self.requests)

    @classmethod
    def to_columns(cls, rows: Sequence[PreparedRow]) -> Batch:
        """Encode one or more rows. Requests' shared tiles are stored once per row, their prompts concatenated."""
        requests = [row.requests for row in rows]
        return {
            **{name: np.array([getattr(row, name) for row in rows], object) for name in _TEXTS},
            **{name: np.array([getattr(row, name) for row in rows], np.int64) for name in ("row", "num_images")},
            "saved_frames": np.array([json.dumps(row.saved_frames) for row in rows], object),
            "media": np.array([json.dumps(row.media and vars(row.media)) for row in rows], object),
            "frame_timestamps_s": _stack([row.frame_timestamps_s for row in rows]),
            "input_ids": _stack([np.concatenate([_NO_IDS, *(r.input_ids for r in each)]) for each in requests]),
            "prompt_lengths": _stack([np.array([len(r.input_ids) for r in each], np.int32) for each in requests]),
            "tiles": _stack([each[0].tiles if each else _NO_TILES for each in requests]),
            "tile_sizes": _stack([each[0].tile_sizes if each else _NO_SIZES for each in requests]),
        }

    @classmethod
    def from_columns(cls, batch: Batch) -> list[PreparedRow]:
        """Decode the result of `to_columns`. The requests of a row form a group and share their tiles again."""
        return [
            cls(
                **{name: str(batch[name][i]) for name in _TEXTS},  # type: ignore[arg-type]
                row=int(batch["row"][i]),
                num_images=int(batch["num_images"][i]),
                frame_timestamps_s=batch["frame_timestamps_s"][i],
                media=_read_facts(batch["media"][i]),
                saved_frames=tuple(json.loads(batch["saved_frames"][i])),
                requests=_split_requests(int(batch["row"][i]), *(batch[name][i] for name in _REQUEST_COLUMNS)),
            )
            for i in range(len(batch["row"]))
        ]


_COPIED = (
    "row",
    "id",
    "uri",
    "prompt",
    "num_images",
    "num_tiles",
    "num_prompt_tokens",
    "frame_timestamps_s",
    "warning",
    "saved_frames",
)
_TEXTS = ("id", "uri", "prompt", "stage", "error", "warning")
_REQUEST_COLUMNS = ("input_ids", "prompt_lengths", "tiles", "tile_sizes")
# Empty arrays instead of None: a Ray column may not mix tensors and objects.
_NO_IDS, _NO_TILES, _NO_SIZES = np.zeros(0, np.int32), np.zeros((0, 3, 1, 1), np.uint8), np.zeros((0, 2), np.int32)


def _read_facts(text: str) -> MediaFacts | None:
    values = json.loads(text)
    return values and MediaFacts(**values)


def _split_requests(
    group: int,
    input_ids: NDArray[np.int32],
    lengths: NDArray[np.int32],
    tiles: NDArray[np.uint8],
    sizes: NDArray[np.int32],
) -> tuple[Request, ...]:
    prompts = np.split(input_ids, np.cumsum(lengths)[:-1]) if len(lengths) else []
    return tuple(Request(ids, tiles, sizes, group) for ids in prompts)


def _stack(values: Sequence[NDArray[Any]]) -> NDArray[Any]:
    # Filled one by one: np.array would stack arrays of equal shape.
    column = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        column[i] = value
    return column


@dataclass(frozen=True)
class ResultRow:
    """A finished row. `answers`: the questionnaire's columns; for an error row, its empty answer."""

    prepared: PreparedRow
    answers: Columns
    stage: Stage = ""
    error: str = ""

    @property
    def status(self) -> Status:
        """`error` if the row failed in any stage, else `ok`."""
        return "error" if self.stage else "ok"

    @classmethod
    def to_table(cls, rows: Sequence[ResultRow], result_schema: pa.Schema) -> pa.Table:
        """Encode rows as a table of `result_schema`, the result schema of the questionnaire's schema."""
        return pa.Table.from_pylist([row._to_columns() for row in rows], result_schema)

    def _to_columns(self) -> Columns:
        return {
            **{name: getattr(self.prepared, name) for name in _COPIED},
            "status": self.status,
            "stage": self.stage,
            "error": self.error,
            **(vars(self.prepared.media) if self.prepared.media and self.status == "ok" else {}),
            **self.answers,
        }
