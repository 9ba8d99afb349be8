"""JSON rows: fields that name images, images as text, and the rule that a row with an image is never text only."""

from __future__ import annotations

import base64
import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.errors import SourceError
from pipelines.media.fetch import Fetcher
from pipelines.media.reference import parse_reference
from tests.support.fetched import fetch_images
from tests.support.jsonl_files import write_lines
from tests.support.rows import list_input

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)
PACKED = base64.b64encode(PNG).decode()
DATA_URI = f"data:image/png;base64,{PACKED}"


def list_one(directory: Path, values: dict[str, Any], **options: object) -> dict[str, Any]:
    [row] = list_input(write_lines(directory / "a.jsonl", values), **options)
    return row


@pytest.mark.parametrize(
    "name", ["image", "images", "Image_Path", "image_url", "URL", "path", "file_name", "img", "photo", "jpg", "videos"]
)
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x], lambda x: {"path": x, "bytes": None}], ids=range(3))
def test_usual_names_and_forms_name_the_image(tmp_path: Path, name: str, wrap: Any) -> None:
    row = list_one(tmp_path, {name: wrap("1.png"), "prompt": "Why?"})
    assert [image["uri"] for image in row["images"]] == [f"{tmp_path}/1.png"] and not row["error"]


def test_the_higher_name_is_taken_and_equal_ones_are_refused(tmp_path: Path) -> None:
    assert list_one(tmp_path, {"url": "http://h/page", "image": "1.png"})["uri"] == f"{tmp_path}/1.png"
    assert list_one(tmp_path, {"image": None, "url": "http://h/1.png"})["uri"] == "http://h/1.png"
    both = {"image": "1.png", "images": ["2.png", "3.png"]}
    with pytest.raises(SourceError, match=r"image, images may all hold the images.*--image-column"):
        list_one(tmp_path, both)
    assert len(list_one(tmp_path, both, image_column="images")["images"]) == 2


@pytest.mark.parametrize(
    "values",
    [
        {"shot": "sub/1.png"},
        {"shot": ["sub/1.png"]},
        {"shot": {"where": "sub/1.png"}},
        {"shot": [{"where": "sub/1.png"}]},
        {"shot": "https://host/a/1.JPG?w=3"},
        {"shot": "s3://bucket/1.mp4"},
        {"shot": DATA_URI},
        {"shot": PACKED},
    ],
)
def test_a_field_of_another_name_that_holds_an_image_is_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/1.png").write_bytes(PNG)
    row = {"prompt": "What is it?", **values}
    with pytest.raises(SourceError, match=r"the field 'shot' holds an image.*--image-column shot.*''") as caught:
        list_one(tmp_path, row)
    assert PACKED[20:] not in str(caught.value)
    text_only = list_one(tmp_path, row, image_column="")
    assert not text_only["images"] and not text_only["error"]


def test_texts_that_only_mention_images_are_no_images(tmp_path: Path) -> None:
    values = {
        "prompt": "What is in missing.png?",
        "a": "see https://h/1.png",
        "b": "missing.png",
        "c": "x" * 9999,
        "d": "a\0.png",
    }
    assert list_one(tmp_path, values)["images"] == []


def test_no_image_column_means_text_only(tmp_path: Path) -> None:
    row = list_one(tmp_path, {"image": DATA_URI, "prompt": "Why?"}, image_column="", keep_columns="image")
    assert row["images"] == [] and not row["error"] and PACKED not in repr(row)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz"])
def test_images_as_text_are_read_from_their_place_and_never_copied(tmp_path: Path, name: str) -> None:
    gif = b"GIF89a" + bytes(range(200))
    escaped = b'{"image": "' + DATA_URI.replace("/", "\\/").encode() + b'", "id": "\xc3\xa9"}'
    parts = [{"type": "text", "text": "Why?"}, {"type": "image_url", "image_url": {"url": DATA_URI}}]
    lines: list[Any] = [
        {"image": DATA_URI, "id": "ü"},
        {"images": [PACKED, "x.png", {"bytes": base64.b64encode(gif).decode(), "path": "lost.gif"}]},
        escaped,
        {"messages": [{"role": "user", "content": parts}]},
        {"image": "data:image/png," + "".join(f"%{byte:02x}" for byte in PNG)},
    ]
    (tmp_path / "x.png").write_bytes(b"a file")
    if ".jsonl" in name:
        path = write_lines(tmp_path / name, *lines)
    else:
        texts = [line if isinstance(line, bytes) else json.dumps(line, indent=1).encode() for line in lines]
        data = b"\xef\xbb\xbf[\n" + b" ,\n".join(texts) + b"]\n"
        path = tmp_path / name
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    rows = list_input(path, keep_columns="image,messages")
    assert PACKED not in repr(rows) and PACKED[:40] not in repr(rows)
    assert [row["uri"] for row in rows] == [str(path)] * 5
    assert fetch_images(rows) == [[PNG], [PNG, b"a file", gif], [PNG], [PNG], [PNG]]


def test_a_damaged_text_fails_only_its_row_and_is_not_shown(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"image": f"data:image/png;base64,{PACKED}*"}, {"image": DATA_URI})
    bad, good = list_input(path)
    with pytest.raises(OSError, match="cannot be decoded") as caught:
        fetch_images([bad])
    assert PACKED[20:] not in str(caught.value) and fetch_images([good]) == [[PNG]]


def test_a_file_that_has_changed_since_it_was_listed_is_noticed(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"image": DATA_URI})
    [row] = list_input(path)
    for data in (b"x" + path.read_bytes(), path.read_bytes()[:30], b""):
        path.write_bytes(data)
        with pytest.raises(OSError, match="has changed since it was listed"):
            Fetcher().fetch([parse_reference(row["images"][0])])


def test_images_of_a_wrong_type_are_error_rows(tmp_path: Path) -> None:
    values = [5, {"a": 1}, [["1.png"]], "x" * 100_000, ["1.png", None], {"bytes": [1, 2], "path": None}]
    rows = list_input(write_lines(tmp_path / "a.jsonl", *({"image": value} for value in values)))
    assert all("an image must be" in row["error"] and len(row["error"]) < 300 for row in rows) and len(rows) == 6


NAMES = st.sampled_from(["image", "images", "img", "shot", "pic_of", "meta", "text", "uri", "answer"])
TEXTS = st.sampled_from(["1.png", "https://h/1.jpg", DATA_URI, PACKED, "a text", "", "0.5"])
VALUES = st.one_of(
    TEXTS,
    st.none(),
    st.integers(0, 2),
    st.lists(TEXTS, max_size=2),
    st.fixed_dictionaries({"path": TEXTS, "n": st.none()}),
)
OBJECTS = st.lists(st.dictionaries(NAMES, VALUES, max_size=4), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(OBJECTS, st.booleans())
def test_no_row_with_an_image_is_text_only(objects: list[dict[str, Any]], is_array: bool) -> None:
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "1.png").write_bytes(PNG)
        lines = [{"prompt": "Why?", **values} for values in objects]
        path = Path(directory) / ("a.json" if is_array else "a.jsonl")
        path.write_text(json.dumps(lines) if is_array else "\n".join(map(json.dumps, lines)))
        try:
            rows = list_input(path)
        except SourceError as error:
            assert "--image-column" in str(error)
            return
        assert len(rows) == len(lines) and PACKED not in repr(rows)
        for values, row in zip(lines, rows, strict=True):
            names_image = any(text in json.dumps(values) for text in ("1.png", "1.jpg", "base64", PACKED))
            assert row["images"] or row["error"] or not names_image


def test_paths_in_a_store_are_looked_up_for_the_first_rows_of_each_field(bucket: Any, tmp_path: Path) -> None:
    bucket.pipe_file("bucket/sub/1.png", PNG)
    missing = [{"prompt": "Why?", "other": f"{number}.png"} for number in range(200)]
    path = write_lines(tmp_path / "a.jsonl", *missing, {"prompt": "Why?", "shot": "sub/1.png"})
    bucket.put_file(str(path), "bucket/a.jsonl")
    with pytest.raises(SourceError, match="the field 'shot' holds an image"):
        list_input("s3://bucket/a.jsonl")
    write_lines(path, *missing)
    bucket.put_file(str(path), "bucket/a.jsonl")
    assert len(list_input("s3://bucket/a.jsonl")) == 200
