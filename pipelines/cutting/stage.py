"""The stage FindCuts: CPU actors that find the times at which to cut the videos of a manifest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa

from pipelines import schema
from pipelines.cluster.actor import register_fast_exit
from pipelines.cluster.attempts import CONTROL, GIVEN_UP, MAX_TRIES, Attempts
from pipelines.errors import MediaError, StoreFault
from pipelines.media.fetch import Fetcher, PendingImages
from pipelines.media.reference import ImageRef, is_seekable_video, locate_video, may_be_video
from pipelines.media.video.container import has_video_signature
from pipelines.media.video.process import VideoDecoder
from pipelines.media.video.shots import Cutting
from pipelines.output.ledger import RowRange
from pipelines.output.manifest import is_store_down, read_rows
from pipelines.rows import Batch, ManifestRow
from pipelines.schema import Stage, Status
from pipelines.storage import store

_TIMEOUT_S = 7200.0  # per video: to find shots, every frame is decoded

CUTS = pa.schema(
    [
        schema.MANIFEST.field(schema.ROW),
        schema.MANIFEST.field("id"),
        schema.MANIFEST.field("uri"),
        *(pa.field(name, pa.string(), nullable=False) for name in ("status", "stage", "error")),
        pa.field("cuts_s", pa.list_(pa.field("item", pa.float64(), nullable=False)), nullable=False),
    ]
)


@dataclass(frozen=True)
class CutRow:
    """The ascending times in seconds at which the video of a row is cut, or why they cannot be found."""

    row: int
    id: str
    uri: str
    cuts_s: tuple[float, ...] = ()
    stage: Stage = ""
    error: str = ""

    @property
    def status(self) -> Status:
        """`error` if the cuts cannot be found, else `ok`."""
        return "error" if self.stage else "ok"

    @classmethod
    def to_table(cls, rows: Sequence[CutRow]) -> pa.Table:
        """Encode rows in the schema CUTS."""
        return pa.Table.from_pylist([{**asdict(row), "status": row.status} for row in rows], CUTS)


class FindCuts:
    """Turns ranges of row numbers into tables of cuts; images and rows with an error have none."""

    def __init__(
        self, output: str, cutting: Cutting, attempts: Attempts, *, allow_private_addresses: bool = False
    ) -> None:
        register_fast_exit()
        attempts.start()
        store.allow_private_addresses(allow_private_addresses)
        self._output, self._cutting, self._attempts = output, cutting, attempts
        self._fetcher = Fetcher()
        self._decoder = VideoDecoder(timeout_s=_TIMEOUT_S)

    def __call__(self, batch: Batch) -> Iterator[pa.Table]:
        """Yield one table of CUTS per range. batch: int64 columns `start` and `stop`, a range of rows per entry."""
        for start, stop in zip(batch["start"].tolist(), batch["stop"].tolist(), strict=True):
            work = f"cut rows {start} to {stop}"
            rows = ManifestRow.from_table(read_rows(self._output, RowRange(start, stop)))
            is_safe = self._attempts.begin(work) <= MAX_TRIES
            yield CutRow.to_table(list(self._cut_ahead(rows) if is_safe else self._cut_each_alone(work, rows)))
            self._attempts.end(work)

    def _cut_ahead(self, rows: Iterable[ManifestRow]) -> Iterator[CutRow]:
        for row, images in self._fetcher.fetch_ahead((row, _select_needed_images(row)) for row in rows):
            yield self._cut(row, images)

    def _cut_each_alone(self, work: str, rows: Sequence[ManifestRow]) -> Iterator[CutRow]:
        """Cut rows one by one that killed their process together, but not those that an earlier process has cut."""
        by_number = {row.row: row for row in rows}
        alone = self._attempts.resume_alone(work, list(by_number))
        yield from alone.kept.values()
        for number in alone.order:
            if number == CONTROL:  # a process that works without a row
                self._attempts.begin_alone(CONTROL)
                self._attempts.end_alone(work, CONTROL)
            else:
                yield self._cut_alone(work, by_number[number])

    def _cut_alone(self, work: str, row: ManifestRow) -> CutRow:
        if self._attempts.begin_alone(row.row):
            cut = self._cut(row, self._fetcher.submit(_select_needed_images(row)))
            self._attempts.end_alone(work, row.row, cut)
        else:
            cut = _make_error_row(row, "decode", GIVEN_UP)
            self._attempts.keep(work, row.row, cut)
        return cut

    def _cut(self, row: ManifestRow, images: PendingImages) -> CutRow:
        try:
            return CutRow(row.row, row.id, row.uri, self._find_cuts(row, images.result()))
        except MediaError as error:
            return _make_error_row(row, "decode", str(error))
        except OSError as error:
            return _make_error_row(row, "read", error.strerror or str(error) or type(error).__name__)
        except StoreFault as fault:
            if is_store_down(self._output, row.images):
                raise
            return _make_error_row(row, "read", f"{fault}; other files can be read")

    def _find_cuts(self, row: ManifestRow, encoded: Sequence[bytes]) -> tuple[float, ...]:
        is_video = is_seekable_video(row.images) or (len(encoded) == 1 and has_video_signature(encoded[0]))
        if row.error or not is_video:
            return ()
        video, window = locate_video(row.images, encoded)
        return tuple(self._decoder.find_cuts(video, self._cutting, window))


def _select_needed_images(row: ManifestRow) -> Sequence[ImageRef]:
    """Return the images to fetch: a single one that may be a video and cannot be decoded in place."""
    is_needed = not row.error and len(row.images) == 1 and not is_seekable_video(row.images)
    return row.images if is_needed and may_be_video(row.images[0]) else ()


def _make_error_row(row: ManifestRow, stage: Stage, error: str) -> CutRow:
    return CutRow(row.row, row.id, row.uri, stage=stage, error=error)
