"""What the demo model learns from: true answers, rows that training reads, and nothing of what it is measured on."""

from __future__ import annotations

import json
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo.data import FILES, FORMS, DataFile, Form, make_lesson, make_rows, write_lessons
from demo.drawings import COLOURS, DIRECTIONS, SHAPES, Scene, is_held_out, make_clip, make_picture
from demo.examples import write_examples
from demo.questions import CHINESE_WORDS, Asked, ask_comparison, ask_relation, ask_which, needs_search, write_scan
from demo.skills import MEASURED, render_table
from demo.start import make_tokenizer, write_start
from demo.vision import draw_batch, train_tower
from jobs.train import main
from ovis_model.config import OvisConfig
from ovis_model.training.export import export_network, make_network

RECIPE = Path(__file__).parents[1] / "demo" / "recipe.yaml"
RNG = np.random.default_rng(0)


def list_scenes(count: int = 60, **options: object) -> list[Scene]:
    return [make_picture(seed, held_out=False, **options)[1] for seed in range(count)]  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["caption", "large", "preference", "plain"])
@pytest.mark.parametrize("held_out", [False, True])
def test_captions_of_held_out_rows_are_never_learnt(form: Form, held_out: bool) -> None:
    answers = chain.from_iterable(make_lesson(form, seed, held_out=held_out).asked for seed in range(40))
    english = [asked.answer for asked in answers if asked.answer.isascii() and len(asked.answer.split()) > 2]
    assert english and {is_held_out(answer) for answer in english} == {held_out}


def test_a_moving_object_moves_as_the_answer_says() -> None:
    ways = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
    assert set(ways) == set(DIRECTIONS)
    for seed in range(30):
        clip = make_clip(seed, held_out=True, num_frames=4)
        moved = find_centre(clip.frames[-1]) - find_centre(clip.frames[0])
        assert np.argmax(np.abs(moved)) == np.argmax(np.abs(ways[clip.direction]))
        assert moved @ ways[clip.direction] > 20


def find_centre(image: Image.Image) -> np.ndarray:
    """Return the mean (x, y) in pixels of what differs from the corner."""
    pixels = np.asarray(image, np.int16)
    rows, columns = np.nonzero(np.abs(pixels - pixels[0, 0]).max(-1) > 40)
    return np.array([columns.mean(), rows.mean()])


def test_relations_name_the_other_object() -> None:
    for scene in list_scenes(kind="two"):
        places = {f"{t.colour} {t.shape}": (t.x, t.y) for t in scene.things}
        for asked in ask_relation(scene, RNG):
            name, _, other = asked.text.removeprefix("What is ").removesuffix("?").partition(" the ")
            (x, y), (other_x, other_y) = places[asked.answer[2:-1].partition(" ")[2]], places[other]
            assert {"left of": x < other_x, "right of": x > other_x, "above": y < other_y, "below": y > other_y}[name]


def test_comparisons_are_true() -> None:
    scenes, seen = list_scenes(200), set()
    for first, second in pairwise(scenes):
        for asked in ask_comparison(first, second) + ask_which(first, second):
            seen.add((asked.text[0], "more" in asked.text, asked.answer))
            named = {"The first": (first, second), "The second": (second, first)}.get(asked.answer)
            if named is None:
                assert (first.background == second.background) == (asked.answer == "Yes")
            elif "more" in asked.text:
                assert len(named[0].things) > len(named[1].things)
            else:
                name = asked.text.removesuffix("?").rpartition(" ")[2]
                assert name in (*COLOURS, *SHAPES)
                assert [name in write_scan(scene).split() for scene in named] == [True, False]
    assert len(seen) == 6


def test_which_of_two_is_asked_once_in_a_row_in_words_or_of_images() -> None:
    seen = set()
    for seed in range(40):
        image, words = (make_lesson(form, seed, held_out=False) for form in ("which", "which in words"))
        assert image.asked == words.asked and len(words.asked) == 1
        assert len(image.images) == (2 if words.preface.startswith("Image 1: ") else 1) and not words.images
        seen.add(words.asked[0].text.split()[1])
    assert {"image", "shape"} <= seen


def test_searches_need_an_object_to_be_found_and_no_question_is_asked_twice() -> None:
    for seed in range(40):
        lesson = make_lesson("search", seed, held_out=False)
        texts = [asked.text for asked in lesson.asked]
        assert len(set(texts)) == len(texts) > 0
        if lesson.asked[0].skill != "compare":
            assert all(map(needs_search, lesson.asked)) and len(texts) == 12
    assert not needs_search(Asked("count", "How many objects are there?", "2"))


def test_words_are_single_tokens() -> None:
    tokenizer = make_tokenizer()
    words = {
        word
        for seed in range(100)
        for word in make_lesson("caption", seed, held_out=False).asked[0].answer[:-1].split()
    }
    english = [f" {word}" for word in words if word.islower() and word.isascii()]
    assert len(english) > 20
    for word in [*english, *CHINESE_WORDS]:
        assert len(tokenizer.encode(word).ids) == 1, word


def test_every_form_is_learnt_or_measured() -> None:
    learnt = {form for file in FILES.values() for form in file.shares}
    assert learnt == set(FORMS) and set(MEASURED) <= learnt
    assert all(sum(file.shares.values()) == pytest.approx(1) for file in FILES.values())


def test_examples_show_each_skill_once(tmp_path: Path) -> None:
    examples = write_examples(tmp_path, seed=1)
    rows = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text("utf-8").splitlines()]
    assert [row["id"] for row in rows] == [example.skill for example in examples] and len(rows) == len(
        {*map(str, rows)}
    )
    assert all((tmp_path / name).exists() for row in rows for name in row.get("image", ()))


def test_a_table_has_a_column_per_model() -> None:
    table = render_table({"made/1-4/model": {"bool": 0.5}, "demo": {"bool": 1.0}})
    assert table.splitlines() == ["| skill | 1-4 | demo |", "|---|---|---|", "| bool | 50.0% | 100.0% |"]


@pytest.mark.slow
def test_the_recipe_makes_a_model_from_nothing(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole recipe with few rows; its result with all of them is in docs/training.md."""
    monkeypatch.chdir(tmp_path)
    start, data = tmp_path / "demo_model" / "start", tmp_path / "demo_model" / "data"
    write_start(start)
    network = make_network(OvisConfig.from_directory(start), seed=0)
    train_tower(network, num_steps=2)
    export_network(network, start, start, {})
    data.mkdir()
    for number, (name, file) in enumerate(FILES.items()):
        write_lessons(data / f"{name}.jsonl", DataFile(number * 1000, 160, file.shares))
    assert main(["--recipe", str(RECIPE), "demo_model/made"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["stages"]) == 11 and all(stage["error_rows"] == 0 for stage in report["stages"].values())
    assert Path(report["model"], "model.safetensors").stat().st_size < 10_000_000


def test_rows_have_the_shares_of_their_file() -> None:
    rows = list(make_rows(DataFile(0, 200, {"text": 0.5, "clip": 0.5})))
    assert len(rows) == 200 and 60 < sum("video_frames" in row for row in rows) < 140


def test_the_tower_learns_what_stands_at_each_visual_token(tmp_path: Path) -> None:
    write_start(tmp_path)
    network = make_network(OvisConfig.from_directory(tmp_path), seed=0)
    tiles, _, labels = draw_batch(0, network)
    side = network.config.vision.image_size // 3
    shown = np.argwhere(labels.objects[..., 0] > 0)
    assert len(shown) > 100 and len(tiles) > 32  # some images have several tiles
    colours = np.array(list(COLOURS.values()))
    right = 0
    for tile, token in shown:
        row, column = divmod(int(token), 3)
        part = (
            tiles[tile, :, row * side : (row + 1) * side, column * side : (column + 1) * side].numpy().reshape(3, -1).T
        )
        wanted = colours[labels.objects[tile, token, 0] - 1]
        right += bool((np.abs(part.astype(int) - wanted).max(-1) < 25).any())
    assert right > 0.98 * len(shown)
