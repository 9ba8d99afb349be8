"""Write tiny benchmarks of drawn images and videos, one per family of scores: `python -m demo.benchmarks DIRECTORY`.

They are files as VLMEvalKit has them, so that `ovis2 evaluate` can be tried with the demo model (`make eval-demo`).
"""

from __future__ import annotations

import base64
import csv
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from demo.drawings import Scene, SceneQuestion, make_picture, make_questions
from demo.video_benchmarks import MAKE_VIDEO_ROWS, MakeVideoRows, write_subtitles, write_video

NUM_SCENES = 6
_FIRST_SEED = 7_000_000
_ROTATION = 1_000_000

Row = dict[str, object]
Picture = tuple[int, Scene, str]
"""A seed, the scene that it draws, and the image as base64."""


def write_benchmarks(directory: Path, num_scenes: int = NUM_SCENES) -> None:
    """Write NAME.tsv for each family, and the folders `video` and `subtitle`."""
    directory.mkdir(parents=True, exist_ok=True)
    pictures = [_draw(_FIRST_SEED + i) for i in range(num_scenes)]
    for picture in pictures:
        name = _name_video(picture)
        write_video(directory / "video" / f"{name}.mp4", _decode(picture[2]))
        write_subtitles(directory / "subtitle" / f"{name}.srt", picture[1].caption)
    for name, make_rows in {**FAMILIES, **VIDEO_FAMILIES}.items():
        found = [row for picture in pictures for row in make_rows(picture)]
        rows = [{"index": row.pop("id", number), **row} for number, row in enumerate(found)]
        with (directory / f"{name}.tsv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), delimiter="\t")
            writer.writeheader()
            writer.writerows(rows)


def _draw(seed: int) -> Picture:
    image, scene = make_picture(seed, held_out=True)
    return seed, scene, _encode(image)


def _encode(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _decode(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def _name_video(picture: Picture) -> str:
    return f"drawing-{picture[0] - _FIRST_SEED}"


def _ask_about_video(make_rows: MakeVideoRows) -> Callable[[Picture], Iterator[Row]]:
    """Return what makes the rows of a benchmark about videos from a drawing."""

    def make(picture: Picture) -> Iterator[Row]:
        question = _list_questions(picture, "choice")[0]
        return make_rows(_name_video(picture), question, _fit(question.choices[:4], question))

    return make


def _ask_choices(picture: Picture) -> Iterator[Row]:
    for question in _list_questions(picture, "choice"):
        yield {**_list_options(question.choices[:4], question), "category": question.kind, "image": picture[2]}


def _ask_rotations(picture: Picture) -> Iterator[Row]:
    """Ask a question with its options in each rotation; all but the first refer to the first's image."""
    question = _list_questions(picture, "choice")[0]
    group, options = picture[0] - _FIRST_SEED, question.choices[:4]
    for turn in range(len(_fit(options, question))):
        fitted = _fit(options, question)
        row = _list_options((*fitted[turn:], *fitted[:turn]), question)
        about = {"category": question.kind, "l2-category": "coarse_perception", "split": "dev"}
        yield {"id": group + turn * _ROTATION, **row, **about, "image": f"{group}" if turn else picture[2]}


def _ask_numbered(picture: Picture) -> Iterator[Row]:
    question = _list_questions(picture, "choice")[0]
    row = _list_options(question.choices[:4], question)
    about = {"category": "Drawing", "l2-category": "Art", "split": "validation"}
    yield {**row, "question": f"<image 1> {question.text}", **about, "image": picture[2]}
    images = repr([picture[2], picture[2]])
    yield {"question": f"<image 1> and <image 2>: {question.text}", "answer": question.answer, **about, "image": images}


def _ask_yes_no(picture: Picture) -> Iterator[Row]:
    for number, question in enumerate(_list_questions(picture, "bool")):
        place = {"category": "VD", "l2-category": "drawing", "id": f"VD_drawing_1_{picture[0]}_0_{number}"}
        yield {**place, "question": question.text, "answer": question.answer, "image": picture[2]}


def _ask_captions(picture: Picture) -> Iterator[Row]:
    answers = repr([picture[1].caption])
    yield {"question": "Describe the image.", "answer": answers, "category": "Doc-oriented VQA", "image": picture[2]}


def _ask_languages(picture: Picture) -> Iterator[Row]:
    yield {"question": "Describe the image.", "answer": picture[1].caption, "category": "en", "image": picture[2]}


def _ask_mathematics(picture: Picture) -> Iterator[Row]:
    question = _list_questions(picture, "choice")[0]
    options = _fit(question.choices[:4], question)
    about = {"task": "drawing", "skills": "['counting']", "image": picture[2]}
    kind = {"question_type": "multi_choice", "answer_type": "text", "choices": repr(list(options))}
    letter = "ABCD"[options.index(question.answer)]
    yield {"question": question.text, **kind, "answer": question.answer, "answer_option": letter, **about}


def _ask_freely(picture: Picture) -> Iterator[Row]:
    yield {"question": "Describe the image.", "answer": picture[1].caption, "category": "rec", "image": picture[2]}


def _list_questions(picture: Picture, kind: str) -> list[SceneQuestion]:
    return [question for question in make_questions(picture[1], picture[0]) if question.kind == kind]


def _list_options(choices: tuple[str, ...], question: SceneQuestion) -> Row:
    """Return the question with options A, B ... and the letter of the right one."""
    options = _fit(choices, question)
    letters = "ABCD"[: len(options)]
    named = dict(zip(letters, options, strict=True))
    return {"question": question.text, **named, "answer": letters[options.index(question.answer)]}


def _fit(choices: tuple[str, ...], question: SceneQuestion) -> tuple[str, ...]:
    """Return the choices, with the right one in place of the last if it is not among them."""
    return choices if question.answer in choices else (*choices[:-1], question.answer)


FAMILIES: dict[str, Callable[[Picture], Iterator[Row]]] = {
    "MMStar": _ask_choices,
    "MMBench_DEV_EN": _ask_rotations,
    "MMMU_DEV_VAL": _ask_numbered,
    "HallusionBench": _ask_yes_no,
    "OCRBench": _ask_captions,
    "MTVQA_TEST": _ask_languages,
    "MathVista_MINI": _ask_mathematics,
    "MMVet": _ask_freely,
}
VIDEO_FAMILIES = {name: _ask_about_video(make_rows) for name, make_rows in MAKE_VIDEO_ROWS.items()}


if __name__ == "__main__":
    write_benchmarks(Path(sys.argv[1]))
