"""An export holds the chosen rows with their media, resumes, and is an INPUT again."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from jobs import export
from jobs.__main__ import main as run_ovis2
from pipelines.errors import RunError
from pipelines.export import run as run_module
from pipelines.export.formats import FORMATS
from pipelines.export.options import Exported, ExportOptions
from pipelines.export.run import export_run
from pipelines.media.reference import FileRef
from tests.support.annotations import make_answers, make_item, write_run
from tests.support.pictures import write_image
from tests.support.rows import list_input

NUM_ROWS = 10


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a run of ten rows: row 7 is an error row, the picture of row 8 is gone."""
    directory = tmp_path_factory.mktemp("answers")
    items = []
    for n in range(NUM_ROWS):
        picture = directory / "pictures" / f"{n}.png"
        picture.parent.mkdir(exist_ok=True)
        if n != 8:
            write_image(picture, size=(20 + n, 10))
        refs = [FileRef(str(picture))]
        flags = ["caption:repetition"] if n == 3 else []
        row = make_answers(red=n % 2 == 0, count=n, sure=0.5 + n / 20, tags=["a"] * n, caption=f'Ça, "{n}".\nNo.')
        failed = {"stage": "decode", "error": "not an image"} if n == 7 else {}
        items.append(make_item(f"id {n}", row, images=refs, flags=flags, **failed))
    return write_run(directory / "out", items, rows_per_file=4)


def run_export(output: Path, target: Path, kind: Any, **options: Any) -> Exported:
    return export_run(
        ExportOptions(output=str(output), target=str(target), format=kind, **{"min_confidence": {}, **options})
    )


def read_ids(target: Path) -> list[str]:
    return [json.loads(line)["id"] for line in (target / "rows.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_every_format_holds_the_same_rows_and_counts_what_cannot_be_read(
    answers: Path, tmp_path: Path, kind: Any
) -> None:
    exported = run_export(answers, tmp_path / kind, kind, rows_per_file=3)
    assert (exported.rows, exported.chosen, exported.written, exported.error, exported.files) == (10, 9, 8, 1, 3)
    [error] = map(json.loads, (tmp_path / kind / "_errors.jsonl").read_text().splitlines())
    assert (error["id"], error["error"]) == ("id 8", "No such file or directory")
    rows = READERS[kind](tmp_path / kind)
    assert [(name, size[0] - 20) for name, _, size in rows] == [(f"id {n}", n) for n in (0, 1, 2, 3, 4, 5, 6, 9)]
    assert {text for _, text, _ in rows} == {f'Ça, "{n}".\nNo.' for n in (0, 1, 2, 3, 4, 5, 6, 9)}


def read_webdataset(target: Path) -> Any:
    for shard in sorted(target.glob("*.tar")):
        data = {}
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                data[member.name] = file.read()
        for key in sorted({name.split(".")[0] for name in data}):
            values = json.loads(data[f"{key}.json"])
            yield values["id"], data[f"{key}.txt"].decode(), read_size(data[f"{key}.png"])


def read_size(image: bytes) -> tuple[int, int]:
    return Image.open(io.BytesIO(image)).size


def read_hf(target: Path) -> Any:
    found = datasets.load_dataset(str(target), split="train", cache_dir=str(target / "_cache"))
    assert isinstance(found.features["image"], datasets.Image)
    return [(row["id"], row["caption"], row["image"].size) for row in found]


def read_rows(target: Path, rows: Any) -> Any:
    return [(row["id"], row["caption"], Image.open(target / row["image"]).size) for row in rows]


def read_csv(target: Path) -> Any:
    with (target / "rows.csv").open(newline="") as file:
        return read_rows(target, list(csv.DictReader(file)))


def read_jsonl(target: Path) -> Any:
    return read_rows(target, map(json.loads, (target / "rows.jsonl").read_text().splitlines()))


def read_llava(target: Path) -> Any:
    for row in json.loads((target / "llava.json").read_text()):
        first, answer, *others = row["conversations"]
        assert first["value"].startswith("<image>\n") and len(others) == 10
        assert [turn["from"] for turn in (first, answer)] == ["human", "gpt"]
        yield row["id"], answer["value"], Image.open(target / row["image"]).size


def read_coco(target: Path) -> Any:
    found = json.loads((target / "captions.json").read_text())
    captions = {caption["image_id"]: caption["caption"] for caption in found["annotations"]}
    assert len({caption["id"] for caption in found["annotations"]}) == len(found["images"])
    for image in found["images"]:
        assert Image.open(target / image["file_name"]).size == (image["width"], image["height"])
        yield image["row_id"], captions[image["id"]], (image["width"], image["height"])


READERS: Any = {
    "webdataset": lambda target: list(read_webdataset(target)),
    "hf": read_hf,
    "csv": read_csv,
    "jsonl": read_jsonl,
    "llava": lambda target: list(read_llava(target)),
    "coco": lambda target: list(read_coco(target)),
}


@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_a_store_is_a_target_like_a_directory(
    answers: Path, tmp_path: Path, bucket: Any, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_export(answers, tmp_path / "here", kind, rows_per_file=3)
    target = "s3://bucket/some/export"
    write = run_module._write_part
    monkeypatch.setattr(run_module, "_write_part", lambda *given: write(*given) if given[1] < 1 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_export(answers, target, kind, rows_per_file=3)  # type: ignore[arg-type]
    monkeypatch.setattr(run_module, "_write_part", write)
    resumed = run_export(answers, target, kind, rows_per_file=3)  # type: ignore[arg-type]
    assert (resumed.chosen, resumed.error, resumed.skipped_done, resumed.files) == (9, 1, 3, 3)
    bucket.get("bucket/some/export/", f"{tmp_path}/there/", recursive=True)
    assert list_files(tmp_path / "there") == list_files(tmp_path / "here")
    assert READERS[kind](tmp_path / "there") == READERS[kind](tmp_path / "here")
    with pytest.raises(RunError, match="other options"):
        run_export(answers, target, kind, rows_per_file=2)  # type: ignore[arg-type]


def list_files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def test_webdataset_reads_the_shards(answers: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    run_export(answers, tmp_path / "shards", "webdataset", rows_per_file=3)
    shards = f"{tmp_path}/shards/shard-{{000000..000002}}.tar"
    rows = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil"))
    assert [row["json"]["id"] for row in rows] == [f"id {n}" for n in (0, 1, 2, 3, 4, 5, 6, 9)]
    assert [row["png"].width - 20 for row in rows] == [row["json"]["count"] for row in rows]
    assert all(row["txt"] == row["json"]["caption"] for row in rows)


def test_pycocotools_reads_the_captions(answers: Path, tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco", reason="pycocotools is not installed")
    run_export(answers, tmp_path / "coco", "coco", rows_per_file=3)
    found = coco.COCO(str(tmp_path / "coco" / "captions.json"))
    assert sorted(found.getImgIds()) == [0, 1, 2, 3, 4, 5, 6, 9]
    for image in found.loadImgs(found.getImgIds()):
        [caption] = found.loadAnns(found.getAnnIds(imgIds=[image["id"]]))
        assert caption["caption"] == f'Ça, "{image["id"]}".\nNo.' and image["width"] == 20 + image["id"]


@pytest.mark.parametrize(
    ("kind", "name"), [("webdataset", ""), ("hf", ""), ("jsonl", "rows.jsonl"), ("llava", "llava.json"), ("coco", "")]
)
def test_an_export_is_an_input_again(answers: Path, tmp_path: Path, kind: Any, name: str) -> None:
    run_export(answers, tmp_path / kind, kind, rows_per_file=3)
    rows = list_input(tmp_path / kind / name if name else tmp_path / kind)
    assert len(rows) == 8 and all(len(row["images"]) == 1 and not row["error"] for row in rows)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"where": "count > 4 and has_red"}, [6, 8]),
        ({"where": "list_contains(flags, 'caption:repetition')"}, [3]),
        ({"status": "all", "where": "true -- a comment"}, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ({"status": "error"}, [7]),
        ({"without_flags": True}, [0, 1, 2, 4, 5, 6, 8, 9]),
        ({"min_confidence": {"kind": 0.8}}, [6, 8, 9]),
        ({"where": "false"}, []),
    ],
)
def test_rows_are_chosen_by_their_columns(answers: Path, tmp_path: Path, options: Any, wanted: list[int]) -> None:
    exported = run_export(answers, tmp_path / "rows", "jsonl", media=False, **options)
    assert exported.chosen == exported.written == len(wanted)
    assert read_ids(tmp_path / "rows") == [f"id {n}" for n in wanted]


def test_a_stopped_export_resumes_and_a_finished_one_does_nothing(
    answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_export(answers, tmp_path / "whole", "jsonl", rows_per_file=2)
    write, written = run_module._write_part, 0

    def stop_at_the_third(*arguments: Any) -> Any:
        nonlocal written
        written += 1
        if written == 3:
            raise KeyboardInterrupt
        return write(*arguments)

    monkeypatch.setattr(run_module, "_write_part", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run_export(answers, tmp_path / "stopped", "jsonl", rows_per_file=2)
    again = run_export(answers, tmp_path / "stopped", "jsonl", rows_per_file=2)
    assert (again.chosen, again.error, again.skipped_done) == (9, 1, 4)
    assert written == 6  # parts 0 and 1, the one that was stopped, then 2, 3 and 4
    files = [sorted(path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*")) for name in NAMES]
    assert files[0] == files[1]
    assert len({(tmp_path / name / "rows.jsonl").read_bytes() for name in NAMES}) == 1
    done = run_export(answers, tmp_path / "stopped", "jsonl", rows_per_file=2)
    assert done.skipped_done == done.chosen == 9 and written == 6
    with pytest.raises(RunError, match="other options"):
        run_export(answers, tmp_path / "stopped", "jsonl", rows_per_file=3)


NAMES = ("whole", "stopped")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--where", "nothing = 1"], "--where 'nothing = 1': Binder Error"),
        (["--where", "true; drop table chosen"], "--where"),
        (["--where", "id in (select id from read_csv('/etc/passwd'))"], "--where"),
        (["--min-confidence", "season=0.5"], "--min-confidence names season; the tasks are caption, has_red"),
        (["--min-confidence", "kind"], "is not TASK=P"),
        (["--text", "nothing"], "--text 'nothing' is no task"),
        (["--format", "xml"], "--format: got 'xml'"),
    ],
)
def test_wrong_usage_is_refused(
    answers: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(answers), str(tmp_path / "rows"), "--format", "jsonl", "--no-media", *arguments]
    try:
        code: Any = export.main(given)
    except SystemExit as error:
        code = error.code
    assert code == 2 and message in capsys.readouterr().err


def test_the_command_prints_the_counts(answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run_ovis2(["export", str(answers), str(tmp_path / "rows"), "--format", "csv", "--no-media"])
    assert code == 0 and json.loads(capsys.readouterr().out.splitlines()[-1])["written"] == 9
