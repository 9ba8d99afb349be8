"""Ask about drawn scenes: questions with their true answers, by skill, in English and Chinese.

A scene is shown as an image (`<image>`) or written as a list of its objects, from which the language model learns what
the questions mean before it sees images. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from demo.drawings import (
    COLOURS,
    DIRECTIONS,
    POSITIONS,
    RELATIONS,
    SHAPES,
    Scene,
    Thing,
    add_article,
    find_place,
    make_questions,
)

Skill = Literal[
    "caption", "bool", "count", "choice", "relation", "number", "compare", "motion",
    "chinese caption", "chinese answer", "text", "scan", "free",
]  # fmt: skip
"""What is measured apart from the others."""

CAPTION_PROMPT = "Describe the image."
SCAN_PROMPT = "List the objects."
SEE_PROMPT = "What do you see?"

COLOURS_ZH = dict(zip(COLOURS, ("红色", "橙色", "黄色", "绿色", "蓝色", "紫色"), strict=True))
BACKGROUNDS_ZH = {"white": "白色", "grey": "灰色", "black": "黑色"}
SHAPES_ZH = dict(zip(SHAPES, ("圆环", "方块", "三角", "星星", "十字", "爱心"), strict=True))
SIZES_ZH = {"small": "小", "large": "大"}
PLACES_ZH = dict(
    zip(
        (place for row in POSITIONS for place in row),
        ("左上角", "上边", "右上角", "左边", "中间", "右边", "左下角", "下边", "右下角"),
        strict=True,
    )
)
NUMBERS_ZH = ("零", "一", "两", "三", "四", "五", "六")
DIRECTIONS_ZH = dict(zip(DIRECTIONS, ("右", "左", "下", "上"), strict=True))
CHINESE_WORDS = (
    *COLOURS_ZH.values(), *BACKGROUNDS_ZH.values(), *SHAPES_ZH.values(), *SIZES_ZH.values(), *PLACES_ZH.values(),
    *NUMBERS_ZH, *DIRECTIONS_ZH.values(), "背景", "描述", "图片", "数字", "颜色", "形状", "多少", "什么", "物体",
    "没有", "往", "一个", "哪边", "移动", "的", "在", "个", "有", "上", "是", "吗", "？", "。",
)  # fmt: skip


class Asked(NamedTuple):
    """A question and its true answer."""

    skill: Skill
    text: str
    answer: str


def write_scan(scene: Scene) -> str:
    """Return all that a scene shows, in reading order: `white: small red star top left, large blue heart right`."""
    things = sorted(scene.things, key=lambda thing: find_place(thing)[::-1])
    shown = [f"{thing.size} {thing.colour} {thing.shape} {name_place(thing)}" for thing in things]
    shown += [f"number {scene.number} {scene.number_colour}"] if scene.number else []
    return f"{scene.background}: {', '.join(shown)}"


def name_place(thing: Thing) -> str:
    """Return the name of the cell of three by three that an object is in."""
    column, row = find_place(thing)
    return POSITIONS[row][column]


def ask_caption(scene: Scene, rng: np.random.Generator) -> list[Asked]:
    """Ask for the caption."""
    return [Asked("caption", CAPTION_PROMPT, scene.caption)]


def ask_answers(scene: Scene, rng: np.random.Generator) -> list[Asked]:
    """Ask for truths, counts and choices: many, of which some are alike."""
    seeds = [int(seed) for seed in rng.integers(1 << 62, size=8)]
    return [Asked(q.kind, q.text, q.answer) for seed in seeds for q in make_questions(scene, seed)]


def ask_relation(scene: Scene, rng: np.random.Generator) -> list[Asked]:
    """Ask what is left of, right of, above and below each of two objects."""
    if scene.kind != "two":
        return []
    first, second = scene.things
    names = ("left of", "right of") if RELATIONS[0] in scene.caption else ("above", "below")
    pairs = ((names[0], first, second), (names[1], second, first))
    return [Asked("relation", f"What is {name} the {_name(b)}?", f"A {a.size} {_name(a)}.") for name, a, b in pairs]


def ask_number(scene: Scene, rng: np.random.Generator) -> list[Asked]:
    """Ask for the digits of a number."""
    return [Asked("number", "Which number is it?", scene.number)] if scene.number else []


def caption_in_chinese(scene: Scene) -> str:
    """Return the caption in Chinese."""
    background = f"{BACKGROUNDS_ZH[scene.background]}背景"
    if scene.number:
        return f"{background}上有{COLOURS_ZH[scene.number_colour]}数字{scene.number}。"
    first = scene.things[0]
    if scene.kind == "count":
        return f"{background}上有{NUMBERS_ZH[len(scene.things)]}个{_name_in_chinese(first)}。"
    if scene.kind == "one":
        return f"{background}的{PLACES_ZH[name_place(first)]}有一个{_describe_in_chinese(first)}。"
    side = "左边" if RELATIONS[0] in scene.caption else "上边"
    second = _describe_in_chinese(scene.things[1])
    return f"{background}上{_describe_in_chinese(first)}在{second}的{side}。"


def ask_chinese_caption(scene: Scene, rng: np.random.Generator) -> list[Asked]:
    """Ask for the caption in Chinese."""
    return [Asked("chinese caption", "描述图片。", caption_in_chinese(scene))]


def ask_in_chinese(scene: Scene, rng: np.random.Generator) -> list[Asked]:
    """Ask for background, number of objects, presence, colour and shape in Chinese."""
    asked = [("背景是什么颜色？", BACKGROUNDS_ZH[scene.background]), ("有多少个物体？", str(len(scene.things)))]
    if scene.number:
        asked += [("数字是多少？", scene.number), ("数字是什么颜色？", COLOURS_ZH[scene.number_colour])]
    things = scene.things
    if things:
        thing = things[rng.integers(len(things))]
        absent = sorted(set(COLOURS) - {t.colour for t in things})
        asked.append((f"有{COLOURS_ZH[thing.colour]}的物体吗？", "有"))
        asked.append((f"有{COLOURS_ZH[absent[rng.integers(len(absent))]]}的物体吗？", "没有"))
    if len({t.shape for t in things}) == 1 == len({t.colour for t in things}):
        asked += [("是什么颜色？", COLOURS_ZH[things[0].colour]), ("是什么形状？", SHAPES_ZH[things[0].shape])]
    return [Asked("chinese answer", *pair) for pair in asked]


def ask_comparison(first: Scene, second: Scene) -> list[Asked]:
    """Ask about two images: their backgrounds, their numbers of objects, and which one shows each colour."""
    asked = [("Do both have the same background?", "Yes" if first.background == second.background else "No")]
    counts = len(first.things), len(second.things)
    if counts[0] != counts[1]:
        asked.append(("Which image shows more objects?", ("The first", "The second")[counts[1] > counts[0]]))
    return [*(Asked("compare", *pair) for pair in asked), *_ask_which_shows(*map(_list_colours, (first, second)))]


def ask_which(first: Scene, second: Scene) -> list[Asked]:
    """Ask which of two images shows each colour and each shape."""
    return _ask_which_shows(*(_list_colours(s) | {f"a {thing.shape}" for thing in s.things} for s in (first, second)))


def _ask_which_shows(first: set[str], second: set[str]) -> list[Asked]:
    """Ask for each name that only one of two images shows."""
    shown = ((first - second, "The first"), (second - first, "The second"))
    return [Asked("compare", f"Which image shows {name}?", answer) for names, answer in shown for name in sorted(names)]


def _list_colours(scene: Scene) -> set[str]:
    return {thing.colour for thing in scene.things} | ({scene.number_colour} - {""})


def ask_motion(thing: Thing, direction: str) -> list[Asked]:
    """Ask what moves, in English and Chinese."""
    where = {"left": "to the left", "right": "to the right"}.get(direction, direction)
    return [
        Asked("motion", "What moves where?", f"{add_article(_name(thing)).capitalize()} moves {where}."),
        Asked("motion", "Which way does it move?", direction.capitalize()),
        Asked("motion", "往哪边移动？", DIRECTIONS_ZH[direction]),
    ]


def answer_briefly(scene: Scene) -> str:
    """Return what a scene shows in two words, an answer as true as the caption."""
    if scene.number:
        return f"Number {scene.number}."
    return f"{_name(scene.things[0]).capitalize()}."


def ask_freely(scene: Scene, rng: np.random.Generator, is_brief: bool | None = None) -> list[Asked]:
    """Ask what is seen: the answer is the caption or, by chance, a brief one; both are true."""
    is_brief = bool(rng.random() < 0.5) if is_brief is None else is_brief
    return [Asked("free", SEE_PROMPT, answer_briefly(scene) if is_brief else scene.caption)]


def ask_scan(scene: Scene) -> Asked:
    """Ask for the list of all objects."""
    return Asked("scan", SCAN_PROMPT, write_scan(scene))


def ask_sum(rng: np.random.Generator) -> Asked:
    """Ask for the sum of two digits."""
    first, second = (int(i) for i in rng.integers(10, size=2))
    return Asked("text", f"What is {first} plus {second}?", str(first + second))


def ask_word(rng: np.random.Generator) -> Asked:
    """Ask for a word in the other language."""
    words = [*COLOURS_ZH.items(), *SHAPES_ZH.items(), *BACKGROUNDS_ZH.items()]
    english, chinese = words[rng.integers(len(words))]
    if rng.random() < 0.5:
        return Asked("text", f"What is {english} in Chinese?", chinese)
    return Asked("text", f"What is {chinese} in English?", english)


SHORT: Sequence[Callable[[Scene, np.random.Generator], list[Asked]]] = (
    ask_answers, ask_relation, ask_number, ask_in_chinese,
)  # fmt: skip
LONG = (ask_caption, ask_chinese_caption, ask_freely)
"""What can be asked about one scene: what has a short answer, and what tells most of the scene."""


def needs_search(asked: Asked) -> bool:
    """Return whether a question is about some of the objects, not about the background, a number or all objects."""
    return asked.text not in _ABOUT_ALL and not any(word in asked.text for word in ("background", "number", "背景"))


def names_colour_or_place(asked: Asked) -> bool:
    """Return whether a question names no more of what it asks for than its colour, also with a shape, or its place."""
    return asks_which(asked) or any(asked.text.startswith(f"How many {colour} ") for colour in COLOURS)


def asks_which(asked: Asked) -> bool:
    """Return whether a question asks which shape or which image has something."""
    return asked.text.startswith(("Which shape is ", "Which image shows ")) and asked.text != "Which shape is it?"


_ABOUT_ALL = ("How many objects are there?", "有多少个物体？")


def _name(thing: Thing) -> str:
    return f"{thing.colour} {thing.shape}"


def _name_in_chinese(thing: Thing) -> str:
    return f"{COLOURS_ZH[thing.colour]}{SHAPES_ZH[thing.shape]}"


def _describe_in_chinese(thing: Thing) -> str:
    return f"{SIZES_ZH[thing.size]}{_name_in_chinese(thing)}"
