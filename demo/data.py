"""Make what the demo model learns from: images, clips or text, each with questions and their true answers.

    python -m demo.data DIRECTORY

The files of the recipe (`demo/recipe.yaml`) are JSON lines in the forms of `ovis2 train`, with images in base64. Every
row follows from its seed; `held_out` rows have captions or motions that no row of training has.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from PIL import Image

from demo import questions
from demo.drawings import Kind, Scene, make_clip, make_picture, make_scattered_picture
from demo.questions import Asked, write_scan

Form = Literal[
    "text", "search", "scan", "plain", "caption", "large", "picture", "pair", "find", "lookup", "which",
    "which in words", "clip", "preference",
]  # fmt: skip
FORMS: tuple[Form, ...] = get_args(Form)
"""Text alone, also with the hardest questions only; lists of objects; captions, also without a chat, and of images of
several tiles; questions about an image, two images, one image with the hardest only, text or images with those that are
learnt last only, which of two images or texts shows what, or a clip; and two true answers, of which the longer one is
preferred."""
_STREAM = 9  # of random numbers; those of images and questions have other ones
_NUM_QUESTIONS = 12
NUM_FRAMES = 4


@dataclass(frozen=True, eq=False)
class Lesson:
    """Images, or the frames of a clip, and what is asked about them; text alone begins with `preface`.

    rejected: an answer to the only question that is as true, and not preferred.
    is_plain: the answer is a caption without a chat.
    """

    asked: Sequence[Asked]
    images: Sequence[Image.Image] = ()
    is_clip: bool = False
    preface: str = ""
    rejected: str = ""
    is_plain: bool = False


class DataFile(NamedTuple):
    """A file of rows: the seed of the first, their number, and the form and the share of each kind."""

    first_seed: int
    num_rows: int
    shares: dict[Form, float]


FILES = {
    "language": DataFile(0, 96_000, {"text": 1}),
    "searches": DataFile(60_000_000, 38_400, {"search": 1}),
    "captions": DataFile(10_000_000, 25_600, {"plain": 0.4, "scan": 0.6}),
    "details": DataFile(20_000_000, 19_200, {"large": 0.4, "scan": 0.6}),
    "dialogues": DataFile(30_000_000, 12_800, {"caption": 0.7, "large": 0.3}),
    "instructions": DataFile(
        40_000_000, 128_000, {"picture": 0.4, "caption": 0.3, "pair": 0.16, "clip": 0.06, "text": 0.08}
    ),
    "refinements": DataFile(
        70_000_000,
        64_000,
        {"find": 0.3, "picture": 0.05, "caption": 0.35, "pair": 0.2, "clip": 0.04, "search": 0.06},
    ),
    "lookups": DataFile(
        80_000_000, 38_400, {"lookup": 0.5, "caption": 0.3, "find": 0.08, "picture": 0.08, "clip": 0.04}
    ),
    "comparisons": DataFile(90_000_000, 134_400, {"which in words": 1}),
    "images": DataFile(
        100_000_000,
        96_000,
        {
            "which": 0.31,
            "which in words": 0.07,
            "caption": 0.25,
            "picture": 0.12,
            "find": 0.07,
            "lookup": 0.06,
            "pair": 0.02,
            "clip": 0.06,
            "text": 0.04,
        },
    ),
    "preferences": DataFile(50_000_000, 6_400, {"preference": 1}),
}
"""What each stage learns from."""


def main() -> None:
    """Write all files that are not there."""
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for name, file in FILES.items():
        path = directory / f"{name}.jsonl"
        if not path.exists():
            write_lessons(path, file)
            print(f"{path}: {file.num_rows} rows", flush=True)


def write_lessons(path: Path, file: DataFile) -> None:
    """Write the rows to a file that is there only when it is whole."""
    partial = path.with_suffix(".partial")
    with partial.open("w") as lines:
        for row in make_rows(file):
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    partial.replace(path)


def make_rows(file: DataFile) -> Iterator[dict[str, Any]]:
    """Yield the rows, as `ovis2 train` reads them."""
    rng = np.random.default_rng(file.first_seed)
    forms = rng.choice(list(file.shares), size=file.num_rows, p=list(file.shares.values()))
    for seed, form in enumerate(forms.tolist(), file.first_seed):
        yield to_row(make_lesson(form, seed, held_out=False), seed)


def to_row(lesson: Lesson, seed: int) -> dict[str, Any]:
    """Return a lesson as a row of training data. One image in four is compressed as JPEG."""
    encoded = [_encode(image, "JPEG" if seed % 4 == 3 else "PNG") for image in lesson.images]
    row: dict[str, Any] = {"video_frames" if lesson.is_clip else "image": encoded} if encoded else {}
    if lesson.is_plain:
        return row | {"caption": lesson.asked[0].answer}
    questioned = [lesson.preface + lesson.asked[0].text, *(asked.text for asked in lesson.asked[1:])]
    turns = [{"role": "user", "content": questioned[0]}]
    if lesson.rejected:
        return row | {"prompt": turns, "chosen": lesson.asked[0].answer, "rejected": lesson.rejected}
    turns = [
        turn
        for text, asked in zip(questioned, lesson.asked, strict=True)
        for turn in ({"role": "user", "content": text}, {"role": "assistant", "content": asked.answer})
    ]
    return row | {"messages": turns}


def _encode(image: Image.Image, kind: str) -> str:
    image.save(file := BytesIO(), kind, quality=90, compress_level=1)
    return base64.b64encode(file.getvalue()).decode()


def make_lesson(form: Form, seed: int, *, held_out: bool) -> Lesson:
    """Make the lesson of a seed."""
    rng = np.random.default_rng([seed, int(held_out), _STREAM])
    if form == "text":
        return _make_text(seed, rng, held_out)
    if form == "search":
        return _make_search(seed, rng, held_out)
    if form == "lookup":
        return _make_lookup(seed, rng, held_out)
    if form in ("which", "which in words"):
        return _make_which(seed, rng, held_out, is_text=form != "which")
    if form == "clip":
        clip = make_clip(seed, held_out=held_out, num_frames=NUM_FRAMES)
        asked = questions.ask_motion(clip.thing, clip.direction)
        return Lesson(_pick(asked, rng), clip.frames, is_clip=True)
    if form == "pair":
        drawn = _draw_scenes(seed, 2, None, held_out)
        return _show(drawn, _pick(questions.ask_comparison(*(scene for _, scene in drawn)), rng), is_text=False)
    image, scene = _draw(form, seed, held_out)
    if form == "preference":
        preferred = questions.ask_freely(scene, rng, is_brief=False)
        return Lesson(preferred, [image], rejected=questions.answer_briefly(scene))
    if form == "scan":
        return Lesson([questions.ask_scan(scene)], [image])
    if form == "plain":
        return Lesson(questions.ask_caption(scene, rng), [image], is_plain=True)
    if form == "picture":
        return Lesson(_ask_about(scene, rng), [image])
    if form == "find":
        return Lesson(_ask_for_one(scene, rng), [image])
    return Lesson(_pick(_ask_at_length(scene, rng), rng, 2), [image])


def _draw(form: Form, seed: int, held_out: bool) -> tuple[Image.Image, Scene]:
    """Draw the image of a form; lists of objects are learnt from many objects at random, and from many numbers."""
    if form == "scan":
        turn = seed % 4
        if turn in (0, 2):
            return make_scattered_picture(seed, held_out=held_out)
        return make_picture(seed, held_out=held_out, kind="number" if turn == 1 else None)
    if form == "find":
        return make_picture(seed, held_out=held_out, kind="two")
    is_cut = True if form == "large" else None
    return make_picture(seed, held_out=held_out, kind=_choose_kind(seed), many_tiles=is_cut)


def _ask_about(scene: Scene, rng: np.random.Generator) -> list[Asked]:
    """Draw a dozen questions about a scene, no two alike; no answer gives away the others, as a caption would."""
    return _pick(_ask_briefly(scene, rng), rng)


def _ask_briefly(scene: Scene, rng: np.random.Generator) -> list[Asked]:
    return list(dict.fromkeys(asked for ask in questions.SHORT for asked in ask(scene, rng)))


def _ask_at_length(scene: Scene, rng: np.random.Generator) -> list[Asked]:
    return [asked for ask in questions.LONG for asked in ask(scene, rng)]


def _make_text(seed: int, rng: np.random.Generator, held_out: bool) -> Lesson:
    """Write scenes as lists, and ask what is asked about images; or ask for sums and words."""
    share = rng.random()
    if share < 0.05:
        return Lesson([ask(rng) for ask in (questions.ask_sum, questions.ask_word) for _ in range(_NUM_QUESTIONS // 2)])
    if share < 0.25:
        return _compare_texts(seed, rng, held_out)
    scene = _make_scene(seed, held_out)
    at_length = [questions.ask_scan(scene), *_ask_at_length(scene, rng)]
    asked = _pick(at_length, rng, 1) if share < 0.4 else _ask_about(scene, rng)
    return Lesson(asked, preface=_write_scenes(scene))


def _make_search(seed: int, rng: np.random.Generator, held_out: bool) -> Lesson:
    """Write scenes of two objects as lists, and ask what needs one of them to be found, seldom whether it is there."""
    if rng.random() < 0.25:
        return _compare_texts(seed, rng, held_out)
    scene = make_picture(seed, held_out=held_out, kind="two")[1]
    return Lesson(_ask_for_one(scene, rng), preface=_write_scenes(scene))


def _ask_for_one(scene: Scene, rng: np.random.Generator) -> list[Asked]:
    pool = [*filter(questions.needs_search, _ask_briefly(scene, rng))]
    harder, truths = ([asked for asked in pool if (asked.skill == "bool") == is_bool] for is_bool in (False, True))
    return _pick([*_pick(harder, rng, _NUM_QUESTIONS - 3), *_pick(truths, rng, 3)], rng)


def _make_lookup(seed: int, rng: np.random.Generator, held_out: bool) -> Lesson:
    """Ask what has a colour or is at a place, of one scene or two, in words or as images."""
    is_text, is_pair = rng.random() < 0.5, rng.random() < 0.4
    drawn = _draw_scenes(seed, 1 + is_pair, None if is_pair else "two", held_out)
    scenes = [scene for _, scene in drawn]
    pool = questions.ask_comparison(*scenes) if is_pair else _ask_briefly(scenes[0], rng)
    return _show(drawn, _pick([*filter(questions.names_colour_or_place, pool)] or pool, rng), is_text)


def _make_which(seed: int, rng: np.random.Generator, held_out: bool, is_text: bool) -> Lesson:
    """Ask once which of two scenes shows what, or which shape is where or has a colour.

    A second answer could be read off the first one: what is next to it is in the same image.
    """
    is_pair = rng.random() < 0.65
    drawn = _draw_scenes(seed, 1 + is_pair, None if is_pair and seed % 3 == 0 else "two", held_out)
    scenes = [scene for _, scene in drawn]
    if is_pair:
        pool = questions.ask_which(*scenes) or questions.ask_comparison(*scenes)
    else:
        pool = _ask_briefly(scenes[0], rng)
    return _show(drawn, _pick([*filter(questions.asks_which, pool)] or pool, rng, 1), is_text)


def _draw_scenes(seed: int, count: int, kind: Kind | None, held_out: bool) -> list[tuple[Image.Image, Scene]]:
    """Draw scenes of one tile."""
    return [make_picture(2 * seed + i, held_out=held_out, kind=kind, many_tiles=False) for i in range(count)]


def _show(drawn: Sequence[tuple[Image.Image, Scene]], asked: Sequence[Asked], is_text: bool) -> Lesson:
    """Return the lesson about scenes in words or as images."""
    if is_text:
        return Lesson(asked, preface=_write_scenes(*(scene for _, scene in drawn)))
    return Lesson(asked, [image for image, _ in drawn])


def _write_scenes(*scenes: Scene) -> str:
    """Return a line per scene, numbered if there are several."""
    titles = [f"Image {number}: " for number in range(1, len(scenes) + 1)] if len(scenes) > 1 else [""]
    return "".join(f"{title}{write_scan(scene)}\n" for title, scene in zip(titles, scenes, strict=True))


def _compare_texts(seed: int, rng: np.random.Generator, held_out: bool) -> Lesson:
    scenes = [_make_scene(2 * seed + i, held_out) for i in range(2)]
    return Lesson(_pick(questions.ask_comparison(*scenes), rng), preface=_write_scenes(*scenes))


def _make_scene(seed: int, held_out: bool) -> Scene:
    return make_picture(seed, held_out=held_out, kind=_choose_kind(seed))[1]


def _choose_kind(seed: int) -> Kind | None:
    """Draw more scenes of two objects, which take longest to learn."""
    return "two" if seed // 3 % 3 == 0 else None


def _pick(asked: Sequence[Asked], rng: np.random.Generator, count: int = _NUM_QUESTIONS) -> list[Asked]:
    return [asked[i] for i in rng.permutation(len(asked))[:count]]


if __name__ == "__main__":
    main()
