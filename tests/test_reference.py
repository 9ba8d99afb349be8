"""A manifest records the location of an image in the same way in every version."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from pipelines.media.reference import (
    ByteRange,
    CellRef,
    FileRef,
    ImageRef,
    InlineRef,
    TarRef,
    Window,
    is_seekable_video,
    is_video,
    locate_video,
    parse_reference,
)
from pipelines.schema import MANIFEST

INFINITY = float("inf")
NAMES = ("kind", "uri", "offset", "num_bytes", "member", "row", "start_s", "stop_s")
STORED: list[tuple[ImageRef, tuple[Any, ...]]] = [
    (FileRef("s3://b/a.png"), ("file", "s3://b/a.png", -1, -1, "", -1, 0.0, INFINITY)),
    (FileRef("/a.png", 5), ("file", "/a.png", -1, 5, "", -1, 0.0, INFINITY)),
    (FileRef("/a.mp4", 5, window=Window(1.5, 20)), ("file", "/a.mp4", -1, 5, "", -1, 1.5, 20.0)),
    (TarRef("/a.tar", 512, 5, "1.jpg"), ("tar", "/a.tar", 512, 5, "1.jpg", -1, 0.0, INFINITY)),
    (TarRef("/a.tar", 512, 5, "1.mp4", window=Window(3)), ("tar", "/a.tar", 512, 5, "1.mp4", -1, 3.0, INFINITY)),
    (TarRef("/a.tgz", 512, 5, "1.jpg", is_gzip=True), ("tgz", "/a.tgz", 512, 5, "1.jpg", -1, 0.0, INFINITY)),
    (CellRef("/a.parquet", "image", 7), ("parquet", "/a.parquet", -1, -1, "image", 7, 0.0, INFINITY)),
    (CellRef("/a.arrow", "image", 7, ByteRange(64, 900)), ("arrow", "/a.arrow", 64, 900, "image", 7, 0.0, INFINITY)),
    (InlineRef("/a.jsonl", 64, 900), ("json", "/a.jsonl", 64, 900, "", -1, 0.0, INFINITY)),
    (InlineRef("/a.jsonl.gz", 64, 900, True), ("json.gz", "/a.jsonl.gz", 64, 900, "", -1, 0.0, INFINITY)),
]


@pytest.mark.parametrize(("reference", "stored"), STORED)
def test_the_manifest_stays_as_the_first_version_wrote_it(reference: ImageRef, stored: tuple[Any, ...]) -> None:
    """A run begun by an older version can therefore be resumed."""
    struct = dict(zip(NAMES, stored, strict=True))
    assert reference.to_struct() == struct
    [[read]] = pa.array([[struct]], MANIFEST.field("images").type).to_pylist()
    assert parse_reference(read) == reference


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind 'zip' are not supported"):
        parse_reference({**FileRef("a").to_struct(), "kind": "zip"})


def test_a_single_video_in_a_file_or_a_part_of_it_is_decoded_in_place() -> None:
    file, part = FileRef("http://host/a.MP4?x=1.png", 5), TarRef("/a.tar", 512, 7, "1.mp4", window=Window(2, 3))
    assert is_seekable_video([file]) and is_seekable_video([part]) and not is_seekable_video([file, part])
    assert locate_video([part], []) == (("/a.tar", 512, 7, b""), (2, 3))
    packed = TarRef("/a.tgz", 512, 7, "1.mp4", is_gzip=True)
    assert is_video(packed) and not is_seekable_video([packed])
    assert locate_video([packed], [b"data"])[0].data == b"data"
    assert not is_seekable_video([FileRef("/a.png")]) and not is_seekable_video([CellRef("/a.parquet", "video.mp4", 0)])
