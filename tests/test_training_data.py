"""Rows of training data are read in the public forms; a bad row becomes an error with its place and its reason."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.errors import SourceError
from pipelines.media.reference import CellRef, FileRef, TarRef
from pipelines.training.data.data_sets import DataSet, ListedRow, list_training_rows, read_data_sets
from pipelines.training.data.forms import Dialogue, place_marks
from pipelines.training.data.row_table import RowTable, write_rows

ASKED = [("user", "<image>\nWhat is it?"), ("assistant", "A cat.")]
LLAVA = {
    "image": "a.png",
    "conversations": [{"from": "human", "value": ASKED[0][1]}, {"from": "gpt", "value": ASKED[1][1]}],
}
OPENAI = {
    "images": ["a.png"],
    "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ],
}
OPENAI_WITH_URL = {
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "a.png"}},
                {"type": "text", "text": "What is it?"},
            ],
        },
        {"role": "assistant", "content": "A cat."},
    ]
}
SWIFT = {
    "images": ["a.png"],
    "messages": [{"role": "user", "content": ASKED[0][1]}, {"role": "assistant", "content": ASKED[1][1]}],
}
CAPTION = {"image_path": "a.png", "caption": "A cat."}


def list_rows(tmp_path: Path, *rows: Any, name: str = "data.jsonl", **fields: Any) -> list[ListedRow]:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    text = f"[{','.join(lines)}]" if name.endswith(".json") else "\n".join(lines)
    (tmp_path / name).write_text(text)
    return list(list_training_rows([DataSet(name="x", files=(str(tmp_path / name),), **fields)]))


def read_one(tmp_path: Path, row: Any, **fields: Any) -> Dialogue:
    [listed] = list_rows(tmp_path, row, **fields)
    assert listed.dialogue is not None, listed.error
    return listed.dialogue


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
@pytest.mark.parametrize("row", [LLAVA, OPENAI, OPENAI_WITH_URL, SWIFT], ids=["llava", "openai", "url", "swift"])
def test_all_forms_of_a_dialogue_are_the_same_row(tmp_path: Path, row: Any, name: str) -> None:
    dialogue = read_one(tmp_path, row, name=name)
    assert [tuple(turn) for turn in dialogue.turns] == ASKED
    assert dialogue.media == (FileRef(f"{tmp_path}/a.png"),)
    assert Dialogue.from_json(dialogue.to_json()) == dialogue


def test_a_caption_answers_the_template(tmp_path: Path) -> None:
    row = read_one(tmp_path, CAPTION, caption_template="<image>\nDescribe it.", image_root="/photos")
    assert row.turns == (("user", "<image>\nDescribe it."), ("assistant", "A cat.")) and not row.is_caption
    assert row.media == (FileRef("/photos/a.png"),)
    assert read_one(tmp_path, CAPTION, caption_form="plain").is_caption


def test_captions_in_a_table_and_dialogues_in_a_tar_are_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image_path": ["x/a.png"], "caption": ["A cat."]}), tmp_path / "a.parquet")
    image = make_png()
    bytes_ = {"image": [image], "conversations": [LLAVA["conversations"]]}
    pq.write_table(pa.table(bytes_), tmp_path / "b.parquet")
    with tarfile.open(tmp_path / "c.tar", "w") as tar:
        for name, data in (("1.png", image), ("1.json", json.dumps(LLAVA).encode())):
            tar.addfile(make_member(name, data), io.BytesIO(data))
    rows = list(list_training_rows([DataSet(name="x", files=(str(tmp_path / "*.*"),), image_root="/photos")]))
    assert [row.error for row in rows] == ["", "", ""]
    media = [row.dialogue.media[0] for row in rows if row.dialogue]
    assert media[0] == FileRef("/photos/x/a.png")
    assert isinstance(media[1], CellRef) and isinstance(media[2], TarRef)
    assert all(row.dialogue and row.dialogue.turns == tuple(ASKED) for row in rows[1:])


def make_png() -> bytes:
    Image.new("RGB", (20, 10), "red").save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def make_member(name: str, data: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    return member


QUESTION = {"from": "human", "value": "Who?"}
PAIRS = {
    "ours": {"conversations": [QUESTION], "chosen": "You.", "rejected": "I."},
    "trl text": {"prompt": "Who?", "chosen": "You.", "rejected": "I."},
    "trl messages": {
        "prompt": [{"role": "user", "content": "Who?"}],
        "chosen": [{"role": "assistant", "content": "You."}],
        "rejected": [{"role": "assistant", "content": "I."}],
    },
    "trl implicit prompt": {
        "chosen": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "You."}],
        "rejected": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}],
    },
    "swift": {
        "messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "You."}],
        "rejected_response": "I.",
    },
}


@pytest.mark.parametrize("form", PAIRS)
def test_all_forms_of_a_pair_are_the_same_row(tmp_path: Path, form: str) -> None:
    row = read_one(tmp_path, PAIRS[form])
    assert (row.turns, row.chosen, row.rejected) == ((("user", "Who?"),), "You.", "I.")


def make_dialogue(*turns: tuple[str, str], **fields: Any) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **fields}


BAD = {
    "empty answer": (make_dialogue(("human", "Hi."), ("gpt", " ")), "the answer in turn 2 is empty"),
    "only system turns": (make_dialogue(("system", "Be brief.")), "only system turns: there is nothing to learn"),
    "no answer": (make_dialogue(("human", "Hi.")), "no turn is an answer: there is nothing to learn"),
    "no turns": (make_dialogue(), "the conversation has no turn"),
    "wrong order": (make_dialogue(("gpt", "Hi."), ("human", "Hi.")), "user and assistant must alternate"),
    "unknown role": (make_dialogue(("tool", "4")), "turns of 'tool' are not supported"),
    "wrong JSON": ('{"conversations": [', "line 1: not JSON|not JSON: Expecting value"),
    "identical pair": ({"prompt": "Who?", "chosen": "You.", "rejected": "You."}, "are identical"),
    "empty pair": ({"prompt": "Who?", "chosen": "You.", "rejected": ""}, "the chosen or the rejected answer is empty"),
    "other images": ({"rejected_images": ["b.png"], **PAIRS["ours"]}, "differ in their images"),
    "no form": ({"image": "a.png"}, "neither turns"),
    "two videos": (make_dialogue(("human", "<video>"), ("gpt", "x"), video=["a.mp4", "b.mp4"]), "exactly one"),
    "bad max_partition": ({**CAPTION, "max_partition": 0}, "max_partition is 0"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_has_its_place_and_its_reason(tmp_path: Path, kind: str) -> None:
    row, reason = BAD[kind]
    first, bad, last = list_rows(tmp_path, LLAVA, row, LLAVA)
    assert first.dialogue and last.dialogue and bad.dialogue is None and bad.place == "line 2"
    assert any(part in bad.error for part in reason.split("|"))


def test_images_without_marks_come_first_and_another_count_is_refused(tmp_path: Path) -> None:
    row = read_one(tmp_path, make_dialogue(("human", "Compare."), ("gpt", "Equal."), image=["a.png", "b.png"]))
    assert place_marks(row, 2).turns[0].text == "Image 1: <image>\nImage 2: <image>\nCompare."
    marked = read_one(tmp_path, make_dialogue(("human", "<image><image>?"), ("gpt", "Equal."), image="a.png"))
    with pytest.raises(ValueError, match="the turns mark 2 images with <image>, but the row has 1"):
        place_marks(marked, 1)


def test_the_mark_of_a_video_becomes_a_line_per_frame(tmp_path: Path) -> None:
    row = read_one(tmp_path, make_dialogue(("human", "<video>\nWhat moves?"), ("gpt", "A dot."), video="a.mp4"))
    assert place_marks(row, 3).turns[0].text == "<image>\n<image>\n<image>\nWhat moves?"
    unmarked = read_one(tmp_path, make_dialogue(("human", "What?"), ("gpt", "A dot."), video_frames=["1.png", "2.png"]))
    assert place_marks(unmarked, 2).turns[0].text == "<image>\n<image>\nWhat?"


def test_several_data_sets_come_from_one_file_with_their_weights(tmp_path: Path) -> None:
    registry = tmp_path / "data.yaml"
    registry.write_text(
        "a: {meta_file: a.json, image_dir: /p, data_format: conversation}\nb: {files: [b], weight: 0.5}"
    )
    first, second = read_data_sets([str(registry)], image_root=None)
    assert (first.files, first.image_root, second.weight) == (("a.json",), "/p", 0.5)


@pytest.mark.parametrize("weight", [".nan", "0", "-1", ".inf", "often"])
def test_a_weight_that_is_no_positive_number_is_refused(tmp_path: Path, weight: str) -> None:
    (tmp_path / "data.yaml").write_text(f"a: {{files: a.json, weight: {weight}}}")
    with pytest.raises(ValueError, match=r"data\.yaml: a, weight"):
        read_data_sets([str(tmp_path / "data.yaml")])


def test_data_that_does_not_exist_is_named() -> None:
    with pytest.raises(SourceError, match=r"'none\.json' does not exist"):
        list(list_training_rows([DataSet(name="x", files=("none.json",))]))


def test_frozen_rows_are_read_by_number(tmp_path: Path) -> None:
    rows = list_rows(tmp_path, LLAVA, "{", SWIFT)
    assert write_rows(str(tmp_path / "out"), rows) == 3
    with RowTable(str(tmp_path / "out"), 3) as table:
        assert [table.get(number) for number in (2, 0, 1)] == [rows[2], rows[0], rows[1]]
        assert table.get_dialogues([2]) == [rows[2].dialogue]
