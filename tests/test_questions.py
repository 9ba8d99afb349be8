"""Questions about the demo's pictures have one true answer each; Yes and No are equally frequent."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from demo.drawings import (
    BACKGROUNDS,
    COLOURS,
    NUM_QUESTIONS,
    SHAPES,
    Scene,
    SceneQuestion,
    Thing,
    make_picture,
    make_questions,
)


def make_thing(colour: str, shape: str) -> Thing:
    return Thing(shape, "small", colour, 0.5, 0.5, 0.2)


PAIR = Scene(
    *("two", "A small red circle left of a small blue star on a white background.", "white", 84, 84),
    things=(make_thing("red", "circle"), make_thing("blue", "star")),
)
EQUAL_SHAPES = Scene(
    *("two", "A small red cross above a small orange cross on a grey background.", "grey", 84, 84),
    things=(make_thing("red", "cross"), make_thing("orange", "cross")),
)
THREE = Scene(
    "count", "Three green crosses on a black background.", "black", 84, 84, (make_thing("green", "cross"),) * 3
)
NUMBER = Scene("number", "The number 42 in red on a white background.", "white", 84, 84, (), "42", "red")
BACKGROUND_IS = "What is the background?", "What colour is the background?"


def collect_questions(scene: Scene) -> dict[str, dict[str, str]]:
    """Return {kind: {question: answer}} of all questions asked about the scene."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for question in (question for seed in range(600) for question in make_questions(scene, seed)):
        assert found[question.kind].setdefault(question.text, question.answer) == question.answer
    return found


def select_by_answer(answers: dict[str, str], answer: str) -> set[str]:
    return {text for text, a in answers.items() if a == answer}


@pytest.mark.parametrize(
    ("scene", "true"),
    [
        (PAIR, "a red circle|a blue star|a red object|a blue object|a circle|a star"),
        (EQUAL_SHAPES, "a red cross|an orange cross|a red object|an orange object|a cross"),
        (THREE, "a green cross|a green object|a cross"),
    ],
)
def test_only_what_the_scene_shows_is_confirmed(scene: Scene, true: str) -> None:
    expected = {f"Is there {what}?" for what in true.split("|")} | {f"Is the background {scene.background}?"}
    assert select_by_answer(collect_questions(scene)["bool"], "Yes") == expected


def test_only_the_number_and_its_colours_are_confirmed() -> None:
    answers = collect_questions(NUMBER)["bool"]
    assert select_by_answer(answers, "Yes") == {"Is there a number?", "Is the number red?", "Is the background white?"}
    assert {"Is there a red heart?", "Is there a red object?", "Is the number blue?"} <= select_by_answer(answers, "No")


def test_near_misses_are_denied_and_asked_often() -> None:
    denied = select_by_answer(collect_questions(PAIR)["bool"], "No")
    assert {"Is there a red star?", "Is there a blue circle?", "Is there a number?"} <= denied
    often = Counter(question.text for seed in range(600) for question in make_questions(PAIR, seed))
    assert often["Is there a red star?"] + often["Is there a blue circle?"] > 80


@pytest.mark.parametrize(
    ("scene", "expected"),
    [
        (PAIR, {"objects": 2, "red circles": 1, "blue stars": 1, "red objects": 1, "circles": 1, "red stars": 0}),
        (EQUAL_SHAPES, {"objects": 2, "red crosses": 1, "orange objects": 1, "crosses": 2, "green crosses": 0}),
        (THREE, {"objects": 3, "green crosses": 3, "green objects": 3, "crosses": 3, "green stars": 0}),
        (NUMBER, {"objects": 0, "red hearts": 0, "red objects": 0}),
    ],
)
def test_counts_are_those_of_the_scene(scene: Scene, expected: dict[str, int]) -> None:
    answers = collect_questions(scene)["count"]
    assert {what: int(answers[f"How many {what} are there?"]) for what in expected} == expected


@pytest.mark.parametrize(
    ("scene", "expected"),
    [
        (
            PAIR,
            {
                "What colour is the circle?": "red",
                "What colour is the star?": "blue",
                "Which shape is red?": "circle",
                "Which shape is blue?": "star",
                "Which shape is on the left?": "circle",
                "Which shape is on the right?": "star",
            },
        ),
        (  # "What colour is the cross?" would have two answers
            EQUAL_SHAPES,
            {
                "Which shape is red?": "cross",
                "Which shape is orange?": "cross",
                "Which shape is at the top?": "cross",
                "Which shape is at the bottom?": "cross",
            },
        ),
        (
            THREE,
            {
                "What colour are the crosses?": "green",
                "Which shape is green?": "cross",
                "Which shape is it?": "cross",
            },
        ),
        (NUMBER, {"What colour is the number?": "red"}),
    ],
)
def test_choice_questions_have_one_answer(scene: Scene, expected: dict[str, str]) -> None:
    assert collect_questions(scene)["choice"] == expected | dict.fromkeys(BACKGROUND_IS, scene.background)


def test_questions_are_repeatable_and_do_not_change_the_picture() -> None:
    scene = make_picture(3, held_out=True)[1]
    assert make_questions(scene, 3) == make_questions(scene, 3) != make_questions(scene, 4)
    assert make_picture(3, held_out=True)[1] == scene


def test_questions_are_balanced() -> None:
    drawn = _draw_questions(500)
    assert len(drawn) == 500 * NUM_QUESTIONS
    counts = Counter((question.kind, question.answer) for question in drawn)
    assert counts["bool", "Yes"] == counts["bool", "No"] == 500
    assert {answer for kind, answer in counts if kind == "count"} == set("0123456")
    assert {answer for kind, answer in counts if kind == "choice"} == {*COLOURS, *SHAPES, *BACKGROUNDS}
    assert all(question.answer in question.choices for question in drawn)


def _draw_questions(count: int) -> list[SceneQuestion]:
    return [
        question for seed in range(count) for question in make_questions(make_picture(seed, held_out=True)[1], seed)
    ]
