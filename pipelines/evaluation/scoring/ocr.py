"""Score OCRBench: one of the accepted texts must occur in the answer."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.evaluation.scoring.scores import (
    Answers,
    Item,
    Scores,
    ScoringRules,
    get_index,
    parse_list,
    parse_literal,
    read_answers,
    read_as_text,
)

FORMULAS = "Handwritten Mathematical Expression Recognition"
_RECOGNITION = (
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
)
_OTHERS = ("Scene Text-centric VQA", "Doc-oriented VQA", "Key Information Extraction", FORMULAS)


def score_ocr(items: Sequence[Item], answers: Answers, rules: ScoringRules) -> Scores:
    """Score each item 0 or 1. Raise ValueError for accepted answers that are no list, or an unknown category.

    VLMEvalKit takes a plain text for the list of its characters; `rules.kit_artefacts` does so too.
    """
    if unknown := sorted({str(item["category"]) for item in items}.difference(_RECOGNITION, _OTHERS)):
        raise ValueError(f"OCRBench has no category {unknown[0]!r}; it has {', '.join((*_RECOGNITION, *_OTHERS))}")
    rows = read_answers(items, answers, lambda item, answer: int(_is_right(item, read_as_text(answer), rules)))
    points = dict.fromkeys(("Text Recognition", *_OTHERS), 0)
    for item in items:
        points["Text Recognition" if item["category"] in _RECOGNITION else item["category"]] += rows[get_index(item)]
    total = sum(points.values())
    return Scores(rows, {**points, "Final Score": total, "Final Score Norm": total / 10})


def _is_right(item: Item, answer: str, rules: ScoringRules) -> bool:
    accepted = (parse_literal if rules.kit_artefacts else parse_list)(item["answer"])
    normalize = _join_formula if item["category"] == FORMULAS else _normalize
    return any(normalize(text) in normalize(answer) for text in accepted)


def _normalize(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def _join_formula(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")
