"""A run with INPUT and OUTPUT in an S3 store, configured by the environment as a user would."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from s3fs import S3FileSystem

from pipelines.media.fetch import Fetcher
from pipelines.media.reference import VideoLocation, parse_reference
from pipelines.media.video.process import VideoDecoder
from pipelines.media.video.sampling import Sampling
from pipelines.output.sink import read_results
from tests.support.buckets import BUCKET
from tests.support.golden_data import checkpoint_dir
from tests.support.parquet_files import HF, write
from tests.support.pictures import encode_picture
from tests.support.processes import run_caption
from tests.support.rows import list_input
from tests.support.tars import write_tar
from tests.support.videos import read_number, write_video

MODEL = str(checkpoint_dir("tiny56-tied"))


@pytest.fixture
def store(bucket: S3FileSystem, tmp_path: Path) -> S3FileSystem:
    """Fill the bucket with pictures, two tars, a Parquet file and JSON lines."""
    for i in range(4):
        bucket.pipe_file(f"bucket/in/{i}.png", encode_picture(i))
    members = [(f"{i}.png", encode_picture(i)) for i in range(4)]
    bucket.put_file(str(write_tar(tmp_path / "a.tar", members)), "bucket/in/a.tar")
    bucket.put_file(str(write_tar(tmp_path / "b.tgz", members, "w:gz")), "bucket/in/b.tgz")
    images = pa.array([{"bytes": encode_picture(i), "path": None} for i in range(2)], HF)
    bucket.put_file(str(write(tmp_path / "c.parquet", {"image": images, "n": [0, 1]})), "bucket/in/c.parquet")
    lines = [{"image": ["0.png", "1.png"], "n": 2}, {"prompt": "2 + 2?", "n": 3}, {"image": "nowhere.png"}]
    bucket.pipe_file("bucket/in/d.jsonl", "\n".join(map(json.dumps, lines)).encode())
    return bucket


def test_references_are_read_by_range(store: S3FileSystem) -> None:
    rows = list_input(f"{BUCKET}/in", f"{BUCKET}/in/a.tar", f"{BUCKET}/in/b.tgz", f"{BUCKET}/in/c.parquet")
    assert len(rows) == 14 and all(row["uri"].startswith(f"{BUCKET}/in/") for row in rows)
    fetcher = Fetcher()
    data = [fetcher.submit([parse_reference(image) for image in row["images"]]).result() for row in rows]
    assert data == [[encode_picture(i)] for i in (0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1)]


def test_a_run_from_s3_to_s3_is_complete_and_a_second_one_does_nothing(ray_address: str, store: S3FileSystem) -> None:
    inputs = [f"--input={BUCKET}/in/{name}" for name in ("a.tar", "b.tgz", "c.parquet", "d.jsonl")]
    arguments = [f"{BUCKET}/in", f"{BUCKET}/out", *inputs, "--keep-columns", "n", "--model", MODEL]
    finished = run_caption(*arguments, "--max-new-tokens", 2, ray_address=ray_address)
    assert finished.exit_code == 0, finished.stderr
    assert (finished.summary["rows"], finished.summary["ok"], finished.summary["error"]) == (17, 16, 1)
    again = run_caption(*arguments, "--max-new-tokens", 2, ray_address=ray_address)
    assert again.summary["skipped_done"] == again.summary["rows"] == 17
    fsspec.filesystem("s3").invalidate_cache()
    rows = read_results(f"{BUCKET}/out").to_pylist()
    assert [row["n"] for row in rows] == [*[None] * 12, 0, 1, 2, 3, None]
    assert [row["num_images"] for row in rows] == [*[1] * 14, 2, 0, 0]
    assert (rows[-1]["uri"], rows[-1]["stage"]) == (f"{BUCKET}/in/nowhere.png", "read")
    assert rows[1]["text"] == rows[5]["text"] == rows[9]["text"] == rows[13]["text"]


def test_videos_are_decoded_directly_from_the_store(
    store: S3FileSystem, endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The decoder process gets this process's store settings, and not through its command line."""
    data = write_video(tmp_path / "a.mp4", 200).read_bytes()
    store.pipe_file("bucket/in/a.mp4", data)
    store.pipe_file("bucket/in/joined", bytes(1000) + data + bytes(1000))
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": endpoint})
    decoder = VideoDecoder()
    for place in (VideoLocation(f"{BUCKET}/in/a.mp4"), VideoLocation(f"{BUCKET}/in/joined", 1000, len(data))):
        assert [read_number(frame.pixels) for frame in decoder.sample_frames(place, Sampling(4))] == [25, 75, 125, 175]
    assert decoder._process is not None
    assert endpoint.encode() not in Path(f"/proc/{decoder._process.pid}/cmdline").read_bytes()
    with pytest.raises(OSError, match="nowhere"):
        decoder.sample_frames(VideoLocation(f"{BUCKET}/nowhere.mp4"), Sampling(4))
    decoder.close()
