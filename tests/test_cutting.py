"""Videos of every kind of INPUT are cut into rows by a run of its own, which resumes."""

from __future__ import annotations

import base64
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.config import CaptionConfig
from pipelines.cutting.run import list_cut_rows
from pipelines.errors import SourceError
from pipelines.output.ledger import Ranges
from pipelines.output.run_record import Run, acquire_lease, prepare_run
from pipelines.output.sink import read_results
from pipelines.rows import PreparedRow
from pipelines.sources import Listing
from tests.support.golden_data import checkpoint_dir
from tests.support.stages import find_cuts_here, list_input, prepare_rows
from tests.support.videos import SHOT_STARTS, find_clip, write_video

MODEL = str(checkpoint_dir("tiny112-untied"))
ENDS = ["#t=0,1.5", "#t=1.5,3", "#t=3"]  # of four seconds, with windows of 1.5 s

Row = dict[str, Any]


def configure(tmp_path: Path, *inputs: Path | str, **options: Any) -> CaptionConfig:
    values = {"output": str(tmp_path / "out"), "model": MODEL, "max_new_tokens": 8, "num_frames": 2, **options}
    return CaptionConfig(input=tuple(map(str, inputs)), **values)


def list_cut(tmp_path: Path, *inputs: Path | str, **options: Any) -> list[Row]:
    """Return the manifest rows of the parts."""
    with list_input(configure(tmp_path, *inputs, **options)) as listing:
        return [row for table in listing.read_tables() for row in table.to_pylist()]


def to_frame_numbers(row: PreparedRow) -> list[int]:
    return [round(float(time_s) * 25) for time_s in row.frame_timestamps_s]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a video of 100 numbered frames, four seconds."""
    return write_video(tmp_path_factory.mktemp("drawn") / "a.mp4", 100)


def test_long_videos_are_cut_into_rows(tmp_path: Path, drawn: Path) -> None:
    directory = tmp_path / "media"
    directory.mkdir()
    (directory / "4s.mp4").write_bytes(drawn.read_bytes())
    write_video(directory / "1s.mp4", 25)
    Image.new("RGB", (50, 40)).save(directory / "b.png")
    (directory / "broken.mp4").write_bytes(b"broken")
    rows = prepare_rows(configure(tmp_path, directory, window_s=1.5))
    names = ["1s.mp4", *(f"4s.mp4{end}" for end in ENDS), "b.png", "broken.mp4"]
    assert [Path(row.id).name for row in rows] == [Path(row.uri).name for row in rows] == names
    assert [to_frame_numbers(row) for row in rows[1:4]] == [[9, 27], [46, 64], [81, 93]]
    assert [row.stage for row in rows] == ["", "", "", "", "", "list"]
    assert rows[-1].error.startswith("its cuts cannot be found: not a video, or its header is damaged")


def test_videos_inside_shards_are_cut(tmp_path: Path, drawn: Path) -> None:
    data = drawn.read_bytes()
    for name, mode in (("plain.tar", "w"), ("packed.tar.gz", "w:gz")):
        with tarfile.open(tmp_path / name, mode) as tar:  # type: ignore[call-overload]
            tar.add(drawn, "c.mp4")
    picture = tmp_path / "picture.png"
    Image.new("RGB", (50, 40)).save(picture)
    pq.write_table(pa.table({"clip": [data, picture.read_bytes(), b"junk"]}), tmp_path / "cells.parquet")
    with (
        pa.OSFile(str(tmp_path / "cells.arrow"), "wb") as file,
        pa.ipc.new_stream(file, pa.schema({"clip": pa.binary()})) as out,
    ):
        out.write_table(pa.table({"clip": [data]}))
    inline = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
    (tmp_path / "rows.jsonl").write_text(json.dumps({"video": inline, "id": "inline"}))
    inputs = [tmp_path / name for name in ("plain.tar", "packed.tar.gz", "cells.parquet", "cells.arrow", "rows.jsonl")]
    rows = prepare_rows(configure(tmp_path, *inputs, window_s=1.5))
    whole = ["plain.tar#c", "packed.tar.gz#c", "cells.parquet#0", "cells.arrow#0", "inline"]
    assert [Path(row.id).name for row in rows if "#t=" in row.id] == [name + end for name in whole for end in ENDS]
    assert [Path(row.id).name for row in rows if "#t=" not in row.id] == ["cells.parquet#1", "cells.parquet#2"]
    parts = [to_frame_numbers(row) for row in rows if "#t=" in row.id]
    assert parts == [[9, 27], [46, 64], [81, 93]] * len(whole)
    assert [row.stage for row in rows if row.stage] == ["decode"]


def test_shots_become_rows(tmp_path: Path) -> None:
    rows = prepare_rows(configure(tmp_path, find_clip("bikes.mp4"), split="shots", num_frames=3))
    starts = [*SHOT_STARTS[:-1], 250]
    assert [row.id.rpartition("#")[2] for row in rows] == [
        "t=0,1.2",
        "t=1.2,3.04",
        "t=3.04,5.48",
        "t=5.48,7.48",
        "t=7.48",
    ]
    for row, first, stop in zip(rows, starts, starts[1:], strict=False):
        assert all(first <= number < stop for number in to_frame_numbers(row)), row.id
    (found,) = read_results(str(tmp_path / "out" / "cuts")).to_pylist()
    assert found["cuts_s"] == [1.2, 3.04, 5.48, 7.48]
    assert (found["id"], found["status"]) == (str(find_clip("bikes.mp4")), "ok")


def test_a_named_window_is_cut_inside(tmp_path: Path) -> None:
    rows = list_cut(tmp_path, f"{find_clip('bikes.mp4')}#t=2,6.5", split="shots")
    assert [row["id"].rpartition("#")[2] for row in rows] == ["t=2,3.04", "t=3.04,5.48", "t=5.48,6.5"]


def test_each_part_has_the_kept_columns(tmp_path: Path, drawn: Path) -> None:
    lines = [json.dumps({"video": str(drawn), "id": name, "label": name}) for name in ("one", "two")]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    rows = list_cut(tmp_path, tmp_path / "list.jsonl", keep_columns=("label",), window_s=2)
    assert [row["id"] for row in rows] == ["one#t=0,2", "one#t=2", "two#t=0,2", "two#t=2"]
    assert [row["kept"]["label"] for row in rows] == ["one", "one", "two", "two"]


def test_limit_counts_parts(tmp_path: Path, drawn: Path) -> None:
    assert len(list_cut(tmp_path, drawn, window_s=1, limit=3)) == 3


def test_parts_that_share_an_id_are_refused(tmp_path: Path, drawn: Path) -> None:
    """Two windows of one video that overlap can have a part in common."""
    windows = [f"{drawn}#t=0,2", f"{drawn}#t=1,3"]
    assert len(list_cut(tmp_path / "suffix", *windows, window_s=1, on_duplicate_id="suffix")) == 4
    with pytest.raises(SourceError, match="1 row repeats an id"):
        list_cut(tmp_path, *windows, window_s=1)


class Stopped(Exception):  # noqa: N818
    """The process would be killed here."""


class Counted:
    """A stage in this process that counts the rows it cuts, and stops after some."""

    def __init__(self, max_rows: int = 1000) -> None:
        self.num_rows, self._max_rows = 0, max_rows

    def __call__(self, config: CaptionConfig, run: Run, missing: Ranges) -> Iterator[pa.Table]:
        for table in find_cuts_here(config, run, missing):
            if self.num_rows >= self._max_rows:
                raise Stopped
            self.num_rows += len(table)
            yield table


def start(config: CaptionConfig, stage: Counted) -> Run:
    """Start a run as the pipeline does, without Ray."""
    with acquire_lease(config.output) as lease:

        def list_them(*arguments: Any, **options: Any) -> Listing:
            return list_cut_rows(*arguments, **options, lease=lease, stream=stage)

        with prepare_run(config, {"id": "demo"}, list_them) as prepared:
            return prepared.start(lease)


@pytest.fixture
def clips(tmp_path: Path, drawn: Path) -> Path:
    """Write a directory of eight videos of four seconds."""
    directory = tmp_path / "clips"
    directory.mkdir()
    for number in range(8):
        (directory / f"{number}.mp4").write_bytes(drawn.read_bytes())
    return directory


def test_what_was_cut_before_a_stop_is_not_cut_again(tmp_path: Path, clips: Path) -> None:
    config = configure(tmp_path, clips, window_s=2, rows_per_file=1)
    with pytest.raises(Stopped) as stopped:
        start(config, Counted(max_rows=4))
    assert stopped.value.__notes__[0] == "The cuts found so far are saved; run the same command again"
    assert not (tmp_path / "out" / "run.json").exists()
    rest = Counted()
    assert start(config, rest).num_rows == 16
    assert rest.num_rows == 4
    again = Counted()
    assert start(config, again).num_rows == 16
    assert again.num_rows == 0


def test_extend_cuts_only_new_videos(tmp_path: Path, clips: Path, drawn: Path) -> None:
    config = configure(tmp_path, clips, window_s=2)
    start(config, Counted())
    (clips / "new.mp4").write_bytes(drawn.read_bytes())
    added = Counted()
    assert start(config.model_copy(update={"extend": True}), added).num_rows == 18
    assert added.num_rows == 1


def test_overwrite_cuts_again_but_resumes_its_own_cuts(tmp_path: Path, clips: Path) -> None:
    config = configure(tmp_path, clips, window_s=2, rows_per_file=1)
    begun = start(config, Counted())
    other = config.model_copy(update={"overwrite": True, "window_s": 1.0})
    with pytest.raises(Stopped):
        start(other, Counted(max_rows=4))
    record = tmp_path / "out" / "cuts" / "run.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "started_at": "9999"}))  # surely later than begun
    assert start(config, Counted()).record["fingerprint"] == begun.record["fingerprint"]
    rest = Counted()
    assert start(other, rest).num_rows == 32
    assert rest.num_rows == 4
