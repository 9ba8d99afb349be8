"""Summarize grades that a judge gave: MMVet and MMBench-Video."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipelines.evaluation.scoring.scores import Item, average, list_distinct, parse_list

_CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
_ABILITIES = {
    "CP": ("Video Topic", "Video Emotion", "Video Scene", "Video Style"),
    "FP-S": (
        "OCR",
        "Object Recognition",
        "Attribute Recognition",
        "Event Recognition",
        "Human Motion",
        "Counting",
    ),
    "FP-C": ("Spatial Relationship", "Human-object Interaction", "Human Interaction"),
    "HL": ("Hallucination",),
    "LR": ("Structuralized Image-Text Understanding", "Mathematical Calculation"),
    "AR": ("Physical Property", "Function Reasoning", "Identity Reasoning"),
    "RR": ("Natural Relation", "Physical Relation", "Social Relation"),
    "CSR": ("Common Sense Reasoning",),
    "TR": ("Counterfactual Reasoning", "Causal Reasoning", "Future Prediction"),
}
_PERCEPTION = ("CP", "FP-S", "FP-C", "HL")
_GROUPS = {
    **{name: frozenset(dimensions) for name, dimensions in _ABILITIES.items()},
    "Perception": frozenset(d for name in _PERCEPTION for d in _ABILITIES[name]),
    "Reasoning": frozenset(d for name in _ABILITIES.keys() - set(_PERCEPTION) for d in _ABILITIES[name]),
    "Overall": frozenset(d for dimensions in _ABILITIES.values() for d in dimensions),
}


def summarize_mmvet(items: Sequence[Item], *, by_combination: bool = False) -> list[dict[str, Any]]:
    """Return the mean of `score` (0 to 1) in percent per capability, or per combination of them, and over all.

    As in VLMEvalKit an item of one capability counts twice for it: once as itself and once as a combination of one.
    """
    grades: dict[str, list[float]] = {name: [] for name in _CAPABILITIES}
    for item in items:
        combination = str(item["category"]).replace(",", "_")
        for name in (*(name for name in _CAPABILITIES if name in item["category"]), combination, "Overall"):
            grades.setdefault(name, []).append(float(item["score"]))
    combinations = list_distinct(str(item["category"]).replace(",", "_") for item in items)
    names = [*(combinations if by_combination else _CAPABILITIES), "Overall"]
    return [{"Category": name, "tot": len(grades[name]), "acc": average(grades[name]) * 100} for name in names]


def summarize_mmbench_video(items: Sequence[Item]) -> dict[str, dict[str, str]]:
    """Return the mean of `score` (0 to 3, -1 for a failed request) per ability and per dimension, as text.

    In the tables `all` a failed request counts as 0, in `valid` it is left out.
    """
    graded = [(frozenset(parse_list(item["dimensions"])), item["score"]) for item in items]
    dimensions = {name: frozenset([name]) for names in _ABILITIES.values() for name in names}
    return {
        f"{level}_{which}": {name: _format_mean(graded, members, which) for name, members in groups.items()}
        for level, groups in (("coarse", _GROUPS), ("fine", dimensions))
        for which in ("all", "valid")
    }


def _format_mean(graded: Sequence[tuple[frozenset[str], float]], members: frozenset[str], which: str) -> str:
    grades = [grade for dimensions, grade in graded if dimensions & members]
    return f"{average(max(g, 0) for g in grades) if which == 'all' else average(g for g in grades if g >= 0):.2f}"
