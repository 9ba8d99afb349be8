"""{subtitles} in a prompt is what is spoken in the row's part of the video: its text track, or a column of SRT."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import MediaError, SourceError
from pipelines.media.reference import VideoLocation, Window
from pipelines.media.subtitles import (
    TRACK_MARK,
    Cue,
    drop_subtitles,
    fill_subtitles,
    mark_subtitles,
    narrow_subtitles,
    parse_subtitles,
    remove_subtitle_marks,
)
from pipelines.media.video.process import VideoDecoder
from pipelines.media.video.text_track import read_track
from tests.support.job_configs import make_annotate_config, make_job_config
from tests.support.pictures import draw
from tests.support.stages import prepare_rows
from tests.support.text_tracks import add_text_tracks, format_srt
from tests.support.videos import draw_shots, write_video

LINES = [(0.2, 0.8, "one"), (0.9, 1.4, "two"), (2.2, 2.6, "three"), (3.1, 3.9, "four")]
TRACKS = {
    "mp4": ("libx264", "mov_text"),
    "mkv": ("libx264", "srt"),
    "webm": ("libvpx", "webvtt"),
    "mov": ("libx264", "mov_text"),
}


@pytest.mark.parametrize(
    "text",
    [
        "1\n00:00:01,000 --> 00:00:02,500\nHello\nthere\n\n2\n00:00:03,000 --> 00:00:04,000\nBye\n",
        "\ufeff1\r\n00:00:01,000 --> 00:00:02,500 X\r\n<i>Hello</i>\r\nthere\r\n\r\n2\r\n0:00:03.0 --> 00:04.0\r\nBye",
        "WEBVTT\n\nNOTE x\n\nid\n00:01.000 --> 00:02.500 align:end\n<v A>Hello\nthere\n\n00:03.000 --> 00:04.000\nBye",
        "1\n00:00:01,000 --> 00:00:02,500\n{\\an8}Hello\nthere\n2\n00:00:03,000-->00:00:04,000\nBye\n\nno cue",
    ],
)
def test_srt_and_webvtt_are_parsed(text: str) -> None:
    assert parse_subtitles(text) == [Cue(1, 2.5, "Hello\nthere"), Cue(3, 4, "Bye")]


def test_a_text_without_times_is_refused() -> None:
    with pytest.raises(ValueError, match="no line such as"):
        parse_subtitles("just text")
    assert mark_subtitles("  \n") == mark_subtitles(None) == ""


_CUES = st.lists(st.tuples(st.integers(0, 9000), st.integers(0, 5000), st.sampled_from(["a", "b", "c\nd", "12"])))


@given(_CUES, st.integers(0, 9000), st.integers(1, 9000), st.text())
def test_a_part_has_the_subtitles_of_its_window(
    drawn: list[tuple[int, int, str]], start: int, length: int, rest: str
) -> None:
    """Narrowed or not, a prompt is filled with the same lines; the marks never reach the model."""
    lines = [(begin / 1000, (begin + count) / 1000, text) for begin, count, text in drawn]
    window = Window(start / 1000, (start + length) / 1000)
    prompt = f"{mark_subtitles(format_srt(lines))} {remove_subtitle_marks(rest)}"
    filled = fill_subtitles(prompt, window, list)
    assert fill_subtitles(narrow_subtitles(prompt, window), window, list) == filled
    shown = {
        line
        for begin, end, text in lines
        for line in text.split("\n")
        if begin < window.stop_s and max(end, begin + 0.001) > window.start_s
    }
    assert set(filled.removesuffix(f" {remove_subtitle_marks(rest)}").split("\n")) - {""} == shown
    assert drop_subtitles(prompt) == f" {remove_subtitle_marks(rest)}"


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("films")
    paths = {}
    for suffix, (codec, track) in TRACKS.items():
        video = write_video(directory / f"plain.{suffix}", 100, codec=codec, options=None)
        paths[suffix] = add_text_tracks(directory / f"film.{suffix}", video, LINES, codec=track)
    return paths


@pytest.mark.parametrize("suffix", TRACKS)
def test_a_text_track_is_read_within_the_window(film: dict[str, Path], suffix: str) -> None:
    with film[suffix].open("rb") as file:
        cues = read_track(file, Window())
        assert [cue.text for cue in cues] == ["one", "two", "three", "four"]
        for column in range(2):
            assert [cue[column] for cue in cues] == pytest.approx([line[column] for line in LINES], abs=0.05)
        assert [cue.text for cue in read_track(file, Window(1, 2.3))] == ["two", "three"]
        assert read_track(file, Window(1.5, 2.1)) == []


def test_a_far_window_is_reached_by_seeking(tmp_path: Path) -> None:
    lines = [(number, number + 0.5, f"line {number}") for number in range(200)]
    path = add_text_tracks(tmp_path / "a.mkv", write_video(tmp_path / "a.mp4", 400, fps=2), lines, codec="srt")
    with path.open("rb") as file:
        assert [cue.text for cue in read_track(file, Window(150, 152))] == ["line 150", "line 151"]


def test_the_default_track_is_read_and_a_forced_one_only_if_it_is_alone(tmp_path: Path) -> None:
    video, other = write_video(tmp_path / "a.mp4", 50), [(0.1, 1.0, "other")]
    for names, expected in ((("forced", "0"), "one"), (("0", "default"), "one"), (("0", "0"), "other")):
        path = add_text_tracks(tmp_path / "b.mkv", video, other, LINES[:1], codec="srt", dispositions=names)
        with path.open("rb") as file:
            assert [cue.text for cue in read_track(file, Window())] == [expected]


def test_the_process_reads_the_track_and_reports_what_is_no_video(film: dict[str, Path]) -> None:
    decoder = VideoDecoder()
    assert decoder.read_subtitles(VideoLocation(str(film["mp4"])), Window(2)) == [
        Cue(2.2, 2.6, "three"),
        Cue(3.1, 3.9, "four"),
    ]
    with pytest.raises(MediaError, match="not a video"):
        decoder.read_subtitles(VideoLocation("", data=b"nothing"), Window())
    decoder.close()


PROMPT = "They say: {subtitles}|{{so}}"


def test_rows_of_files_get_the_text_track(film: dict[str, Path], tmp_path: Path) -> None:
    """Without columns braces are not doubled. An image, and a video without a track, have no subtitles."""
    draw(tmp_path / "a.png", seed=1, width=40, height=30)
    inputs = [film["mkv"], f"{film['mp4']}#t=1,2.3", write_video(tmp_path / "plain.mp4", 50), tmp_path / "a.png"]
    rows = prepare_rows(make_job_config(inputs, tmp_path / "out", prompt="They say: {subtitles}|", num_frames=2))
    assert [row.prompt for row in rows] == [
        "They say: one\ntwo\nthree\nfour|",
        "They say: two\nthree|",
        "They say: |",
        "They say: |",
    ]
    assert len(rows[0].requests[0].input_ids) > len(rows[2].requests[0].input_ids)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_column_of_srt_is_cut_to_each_part(tmp_path: Path, kind: str) -> None:
    clip = write_video(tmp_path / "a.mp4", 100)
    columns = {
        "video": [str(clip)] * 4 if kind == "jsonl" else [clip.read_bytes()] * 4,
        "words": [format_srt(LINES), None, "", "no subtitles at all"],
        "name": ["Ann\ufdd0\ufdd1"] * 4,
    }
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text(
            "".join(
                json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in zip(*columns.values(), strict=True)
            )
        )
    else:
        pq.write_table(pa.table(columns), path)
    options = {"prompt": "{name}: {subtitles}|{{so}}", "subtitle_column": "words", "window_s": 2, "num_frames": 1}
    config = make_job_config([path], tmp_path / "out", image_column="video", **options)
    rows = prepare_rows(config)
    assert [row.prompt for row in rows[:-1]] == [
        "Ann: one\ntwo|{so}",
        "Ann: three\nfour|{so}",
        *["Ann: |{so}"] * 4,
    ]
    assert rows[-1].stage == "list" and "'words' holds neither SRT nor WebVTT" in rows[-1].error
    if kind == "jsonl":
        stored = pq.read_table(next((tmp_path / "out" / "manifest").iterdir())).column("prompt").to_pylist()
        assert "two" in stored[0] and "two" not in stored[1]  # a film's text is not repeated in each of its parts


def test_shots_and_tasks_have_the_words_of_their_part(tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.mp4", draw_shots(50, 50))
    film = add_text_tracks(tmp_path / "film.mkv", video, LINES, codec="srt")
    tasks = [{"name": "a", "prompt": "A: {subtitles}"}, {"name": "b", "prompt": "B", "answer": "bool"}]
    rows = prepare_rows(make_annotate_config(film, tmp_path / "out", tasks=tasks, split="shots", num_frames=1))
    assert [json.loads(row.prompt) for row in rows] == [["A: one\ntwo", "B"], ["A: three\nfour", "B"]]


def test_the_words_are_no_query_for_frames(film: dict[str, Path], tmp_path: Path) -> None:
    """Frames are compared with the question; a transcript would drown it."""
    from pipelines.media.frame_selection import PixelEncoder

    texts: list[str] = []

    class Recorder(PixelEncoder):
        def encode_text(self, text: str) -> None:
            texts.append(text)

    options = {"frame_selection": "mdp3", "num_candidates": 8, "num_frames": 2, "prompt": "Who? {subtitles}"}
    [row] = prepare_rows(make_job_config([film["mkv"]], tmp_path / "out", **options), Recorder())
    assert row.prompt.endswith("four") and texts == ["Who? "]


def test_what_is_not_clear_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"video": "a.mp4", "subtitles": "x"}) + "\n")
    for options, reason in (
        ({"prompt": PROMPT}, "give --subtitle-column subtitles"),
        ({"prompt": "Who?", "subtitle_column": "subtitles"}, "none has it"),
        ({"prompt": PROMPT, "subtitle_column": "words"}, "no column words"),
    ):
        with pytest.raises(SourceError, match=reason):
            prepare_rows(make_job_config([path], tmp_path / "out", **options))


def test_a_prompt_of_its_own_is_no_template(film: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"video": str(film["mp4"]), "prompt": f"{{subtitles}}{TRACK_MARK}?"}) + "\n")
    [row] = prepare_rows(make_job_config([path], tmp_path / "out", num_frames=1))
    assert row.prompt == "{subtitles}?"


def test_an_error_row_shows_its_prompt_without_marks(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video")
    [row] = prepare_rows(make_job_config([tmp_path / "a.mp4"], tmp_path / "out", prompt="Say {subtitles}!"))
    assert (row.stage, row.prompt) == ("decode", "Say !")
