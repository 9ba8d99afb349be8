"""WebDataset shards become rows, whatever the order of their members, duplicates and damage."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import SourceError
from pipelines.sources.rows import ColumnRoles
from pipelines.sources.tar import TarLimits, list_tar
from pipelines.storage.store import FileInfo
from tests.support.fetched import fetch_images
from tests.support.rows import Row, list_input
from tests.support.tars import write_tar


def list_keys(rows: list[Row]) -> list[str]:
    return [row["id"].partition("#")[2] for row in rows]


@pytest.mark.parametrize(("name", "mode"), [("a.tar", "w"), ("a.tar.gz", "w:gz"), ("a.tgz", "w:gz")])
def test_members_of_a_key_form_a_row_in_any_order(tmp_path: Path, name: str, mode: str) -> None:
    path = write_tar(
        tmp_path / name,
        [
            ("d/1.txt", b"What?\n"),
            ("d/2.jpg", b"two"),
            ("e/1.jpg", b"another one"),
            ("d/1.jpg", b"one"),
            ("d/2.json", b'{"label": "x", "n": 2}'),
            ("d/3.v1.PNG", b"three"),
            ("d/2.txt", b""),
        ],
        mode,
    )
    rows = list_input(path, prompt_column="txt", keep_columns=("label", "n"))
    assert list_keys(rows) == ["d/1", "d/2", "e/1", "d/3"]
    assert fetch_images(rows) == [[b"one"], [b"two"], [b"another one"], [b"three"]]
    assert [row["prompt"] for row in rows] == ["What?", *["Describe the image."] * 3]
    assert [row["kept"] for row in rows][:2] == [{"label": None, "n": None}, {"label": "x", "n": 2}]
    assert {row["uri"] for row in rows} == {str(path)} and not any(row["error"] for row in rows)


def test_several_images_of_a_key_form_one_row(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("k.left.jpg", b"l"), ("other.png", b"o"), ("k.right.jpg", b"r")])
    rows = list_input(path)
    assert list_keys(rows) == ["k", "other"]
    assert fetch_images(rows) == [[b"l", b"r"], [b"o"]]


def test_a_repeated_member_starts_another_row(tmp_path: Path) -> None:
    members = [("k.jpg", b"1"), ("k.json", b'{"n": 1}'), ("x.jpg", b"x"), ("k.jpg", b"2"), ("k.json", b'{"n": 2}')]
    rows = list_input(write_tar(tmp_path / "a.tar", [*members, ("k.jpg", b"3")]), keep_columns=("n",))
    assert list_keys(rows) == ["k", "x", "k~2", "k~3"]
    assert fetch_images(rows) == [[b"1"], [b"x"], [b"2"], [b"3"]]
    assert [row["kept"]["n"] for row in rows] == [1, None, 2, None]


def test_listing_reads_no_images_and_sidecars_only_for_columns(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("1.jpg", b"x" * 5000), ("1.json", b"not JSON")])
    assert [row["error"] for row in list_input(path)] == [""]
    [row] = list_input(path, keep_columns=())
    assert row["images"][0]["offset"] == 512 and row["images"][0]["num_bytes"] == 5000
    [row] = list_input(path, prompt="{a}{", limit=1)  # no sidecar is readable: no columns, so braces are text
    assert row["prompt"] == "{a}{" and "1.json cannot be read" in row["error"]


def test_other_members_are_skipped_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_tar(tmp_path / "a.tar", [("1.jpg", b"x"), ("1.cls", b"3"), ("README", b""), ("._1.jpg", b"junk")])
    assert list_keys(list_input(path)) == ["1"]
    assert "skipped 3 files" in caplog.text


def test_a_row_without_an_image_needs_its_own_prompt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_tar(tmp_path / "a.tar", [("1.txt", b"Why?"), ("2.json", b"{}")])
    asked, silent = list_input(path, prompt_column="txt")
    assert (asked["prompt"], asked["error"], asked["has_own_prompt"]) == ("Why?", "", True)
    assert "no image" in silent["error"]
    assert "1 row without an image" in caplog.text


@pytest.mark.parametrize("field", ["image", "url", "of_another_name"])
def test_a_row_whose_sidecar_names_an_image_is_not_sent_as_text(field: str, tmp_path: Path) -> None:
    named = json.dumps({field: "https://example.com/1.jpg", "ask": "Why?"}).encode()
    members = [("1.json", named), ("2.jpg", b"x"), ("2.json", named), ("3.json", b'{"ask": "Who?"}')]
    path = write_tar(tmp_path / "a.tar", members)
    lost, *others = list_input(path, prompt_column="ask")
    assert f"no image, but the field '{field}' of its sidecar seems to name one" in lost["error"]
    assert not any(row["error"] for row in others)
    assert not any(row["error"] for row in list_input(path, prompt_column="ask", image_column=""))


def test_unsafe_names_are_only_names_and_links_are_error_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as file:
        for name in ("../../etc/passwd.jpg", "/absolute/1.jpg", "dir/./1.jpg", "n" * 300 + ".jpg"):
            info = tarfile.TarInfo(name)
            info.size = 1
            file.addfile(info, io.BytesIO(b"x"))
        for name, type_ in (("sym.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE), ("dev.jpg", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = type_, "/etc/passwd"
            file.addfile(info)
        file.addfile(tarfile.TarInfo("folder.jpg"))
        info = tarfile.TarInfo("a.directory.jpg")
        info.type = tarfile.DIRTYPE
        file.addfile(info)
    rows = list_input(path)
    assert list_keys(rows)[:4] == ["../../etc/passwd", "/absolute/1", "dir/./1", "n" * 300]
    assert list_keys(rows)[4:] == ["sym", "hard", "dev", "folder"]
    assert fetch_images(rows[:4]) == [[b"x"]] * 4
    assert all("link or device" in row["error"] for row in rows[4:7]) and not rows[7]["error"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar"]


def make_tar(tmp_path: Path) -> bytes:
    return write_tar(tmp_path / "whole.tar", [(f"{i}.jpg", bytes([i]) * 700) for i in range(10)]).read_bytes()


@pytest.mark.parametrize("keep", [512 * 3 * 5, 512 * 3 * 5 + 100, 512 * 3 * 5 + 512])
def test_a_truncated_tar_gives_its_readable_rows_and_one_error_row(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(make_tar(tmp_path)[:keep])
    rows = list_input(path)
    *readable, damage = rows
    assert list_keys(readable)[:5] == [f"{i}" for i in range(5)] and not any(row["error"] for row in readable)
    assert fetch_images(readable[:5]) == [[bytes([i]) * 700] for i in range(5)]
    assert damage["id"].startswith(f"{path}#byte-") and "damaged at byte" in damage["error"]
    if len(readable) > 5:  # its header is whole, its data is not
        with pytest.raises(OSError, match=r"ends within 5\.jpg"):
            fetch_images(readable[5:])


@pytest.mark.parametrize("junk", [b"\xff" * 512, b"\0" * 512, b"junk" * 128])
def test_a_damaged_header_is_an_error_row_and_not_the_end_of_the_archive(tmp_path: Path, junk: bytes) -> None:
    """Python's tarfile would treat each of these as the end of the archive."""
    data = bytearray(make_tar(tmp_path))
    data[512 * 3 * 4 : 512 * 3 * 4 + 512] = junk
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    *readable, damage = list_input(path)
    assert list_keys(readable) == [f"{i}" for i in range(4)]
    assert "damaged at byte 6,144" in damage["error"]


def test_a_truncated_gz_gives_its_readable_rows(tmp_path: Path) -> None:
    import random

    noise = random.Random(0).randbytes
    path = write_tar(tmp_path / "a.tgz", [(f"{i}.jpg", noise(50_000)) for i in range(10)], "w:gz")
    path.write_bytes(path.read_bytes()[:250_000])
    *readable, damage = list_input(path)
    assert 4 <= len(readable) <= 6 and "damaged at byte" in damage["error"]
    assert [len(images[0]) for images in fetch_images(readable[:4])] == [50_000] * 4


@pytest.mark.parametrize("data", [b"", b"not a tar at all", b"<html>" * 1000])
def test_a_file_that_is_no_tar_is_one_error_row(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    [row] = list_input(tmp_path / "a.tar")
    assert "damaged at byte 0" in row["error"]


def test_headers_with_impossible_sizes_count_as_damage(tmp_path: Path) -> None:
    for size in (-1024, 1 << 40):
        info = tarfile.TarInfo("1.jpg")
        info.size, info.type = size, tarfile.GNUTYPE_LONGNAME
        (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 10240)
        [row] = list_input(tmp_path / "a.tar")
        assert "damaged at byte 0" in row["error"]


def test_the_number_of_members_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(make_tar(tmp_path))
    info, limits = FileInfo(str(tmp_path / "a.tar"), -1), TarLimits(max_members=3)
    [chunk] = list_tar(info, ColumnRoles(), is_gzip=False, limits=limits)
    *readable, damage = chunk.rows
    assert len(readable) == 3 and "more than 3 members" in damage.error


def test_bad_sidecars_are_error_rows(tmp_path: Path) -> None:
    bad = [b"[1]", b"{", b"\xff\xfe", json.dumps({"n": "\ud800"}).encode()]
    members = [member for i, data in enumerate(bad) for member in ((f"{i}.jpg", b"x"), (f"{i}.json", data))]
    rows = list_input(
        write_tar(tmp_path / "a.tar", [*members, ("9.jpg", b"x"), ("9.json", b'{"n": "y"}')]), keep_columns=("n",)
    )
    assert [bool(row["error"]) for row in rows] == [True] * 4 + [False]
    assert all("cannot be read" in row["error"] for row in rows[:4])


def test_ids_and_prompts_come_from_json_sidecars(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("1.jpg", b"x"), ("1.json", b'{"key": 17, "what": "a dog"}')])
    [row] = list_input(path, id_column="key", prompt="Is it {what}?")
    assert (row["id"], row["prompt"]) == ("17", "Is it a dog?")
    with pytest.raises(SourceError, match=r"no column colour; its columns: key, what"):
        list_input(path, prompt="Is it {colour}?")


def test_many_tars_keep_their_order_also_under_a_limit(tmp_path: Path) -> None:
    for i in range(30):
        write_tar(tmp_path / f"{i:02}.tar", [(f"{j}.jpg", b"x") for j in range(3)])
    rows = list_input(tmp_path / "*.tar")
    assert [row["id"] for row in rows] == [f"{tmp_path}/{i:02}.tar#{j}" for i in range(30) for j in range(3)]
    assert [row["id"] for row in list_input(tmp_path / "*.tar", limit=5)] == [row["id"] for row in rows[:5]]


def test_a_gz_is_unpacked_once_when_read_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewinds = []
    original = gzip.GzipFile.rewind
    monkeypatch.setattr(gzip.GzipFile, "rewind", lambda self: (rewinds.append(1), original(self)))
    path = write_tar(tmp_path / "a.tgz", [(f"{i}.jpg", bytes([i])) for i in range(50)], "w:gz")
    assert fetch_images(list_input(path)) == [[bytes([i])] for i in range(50)]
    assert len(rewinds) <= 1


_NAMES = st.builds("{}.{}".format, st.sampled_from("abc"), st.sampled_from(["jpg", "v2.png", "json", "txt", "cls"]))


@settings(max_examples=60, deadline=None)
@given(names=st.lists(_NAMES, max_size=12), mode=st.sampled_from(["w", "w:gz"]))
def test_every_image_is_in_one_row_and_every_id_is_unique(names: list[str], mode: str) -> None:
    members = [(name, b"{}" if name.endswith("json") else f"{i} {name}".encode()) for i, name in enumerate(names)]
    with tempfile.TemporaryDirectory() as directory:
        path = write_tar(Path(directory) / ("a.tar" if mode == "w" else "a.tgz"), [*members, ("z.jpg", b"last")], mode)
        rows = list_input(path, prompt_column="txt") if any(".txt" in name for name in names) else list_input(path)
        read = [data for images in fetch_images(rows) for data in images]
    assert sorted(read) == sorted([data for name, data in members if name.endswith(("jpg", "png"))] + [b"last"])
    assert len({row["id"] for row in rows}) == len(rows)
    assert all(row["images"] or row["error"] or row["has_own_prompt"] for row in rows)
