"""Read the images of manifest rows with a `Fetcher`."""

from __future__ import annotations

from pipelines.media.fetch import Fetcher, PendingImages
from pipelines.media.reference import parse_reference
from tests.support.rows import Row


def fetch_images(rows: list[Row], fetcher: Fetcher | None = None) -> list[list[bytes]]:
    fetcher = fetcher or Fetcher()
    return [fetcher.submit([parse_reference(image) for image in row["images"]]).result() for row in rows]


def is_refused(images: PendingImages) -> bool:
    try:
        images.result()
    except OSError:
        return True
    return False
