"""Score multiple-choice benchmarks: one question each, or MMBench's groups of rotated options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipelines.evaluation.scoring.options import find_option, get_options, list_mmmu_options
from pipelines.evaluation.scoring.scores import (
    Answers,
    Item,
    Line,
    Scores,
    ScoringRules,
    average,
    get_index,
    is_missing,
    list_distinct,
    read_answers,
    read_as_text,
)

_ROTATION = 1_000_000  # rotation k of question g has the index g + k * 1e6
_MMBENCH_NAMES = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}
_MMT_NAMES = {
    "visual_recognition": "VR",
    "localization": "Loc",
    "ocr": "OCR",
    "counting": "Count",
    "hallucination": "HLN",
    "image_retrieval": "IR",
    "threed": "3D",
    "visual_captioning": "VC",
    "visual_grounding": "VG",
    "doc_understanding": "DU",
    "action_recognition": "AR",
    "pixel_level_perception": "PLP",
    "image-to-image_translation": "I2IT",
    "relation_reasoning": "RR",
    "intelligence_quotient_test": "IQT",
    "emotion": "Emo",
    "visual_illusion": "VI",
    "meme_understanding": "MemU",
    "visual_prompt_understanding": "VPU",
    "anomaly_detection": "AND",
    "keypoint_detection": "KD",
    "visual_commonsense_reasoning": "VCR",
    "image_evaluation_judgement": "IEJ",
    "multiple_image_analysis": "MIA",
    "cross_image_matching": "CIM",
    "temporal_understanding": "TU",
    "visual_code": "VP",
    "medical_understanding": "MedU",
    "autonomous_driving": "AUD",
    "discipline_knowledge_reasoning": "DKR",
    "embodied_ai": "EA",
    "gui_navigation": "GN",
}


def score_choices(items: Sequence[Item], answers: Answers, rules: ScoringRules) -> Scores:
    """Score each question by itself: 1 if the option that the answer names is the right one, else 0."""
    _check_options(items)
    found = read_answers(items, answers, lambda item, answer: read_option(item, answer, rules))
    rows = {get_index(item): int(found[get_index(item)] == item["answer"]) for item in items}
    return Scores(rows, summarize(items, rows), unread=[index for index, letter in found.items() if letter is None])


def score_mmmu(items: Sequence[Item], answers: Answers, rules: ScoringRules) -> Scores:
    """Score MMMU; a question without options becomes a choice between its answer and "Other Answers"."""
    return score_choices([_close_question(item) for item in items], answers, rules)


def score_mmt(items: Sequence[Item], answers: Answers, rules: ScoringRules) -> Scores:
    """Score MMT-Bench, whose summary also has a line over all splits and means of categories."""
    scores = score_choices(items, answers, rules)
    return Scores(scores.rows, _summarize_mmt(items, scores.rows), scores.unread)


def score_rotations(items: Sequence[Item], answers: Answers, rules: ScoringRules) -> Scores:
    """Score MMBench: a question counts as right if the answer to each of its rotations is.

    Raise ValueError if rotations are missing, unless artefacts of VLMEvalKit are asked for, which then scores those
    that are present.
    """
    groups: dict[int, list[Item]] = {}
    for item in items:
        groups.setdefault(_get_group(item), []).append(item)
    _check_options(items)
    if not rules.kit_artefacts:
        _check_rotations(groups)
    found = read_answers(items, answers, lambda item, answer: read_option(item, answer, rules))
    mains = [item for item in items if int(item["index"]) == _get_group(item)]
    rows = {
        get_index(main): int(all(found[get_index(item)] == item["answer"] for item in groups[int(main["index"])]))
        for main in mains
    }
    return Scores(rows, summarize(mains, rows), unread=[index for index, letter in found.items() if letter is None])


def read_option(item: Item, answer: str | None, rules: ScoringRules) -> str | None:
    """Return the letter that the answer to `item` names, None if the rules find none."""
    return find_option(read_as_text(answer), get_options(item), rules.version)


def _check_options(items: Sequence[Item]) -> None:
    if not any(map(get_options, items)):
        raise ValueError("no item has an option; the columns A, B, C ... are missing or empty")


def _close_question(item: Item) -> Item:
    closed = {**item, **list_mmmu_options(item)} if is_missing(item["A"]) else dict(item)
    is_letter = isinstance(item["answer"], str) and len(item["answer"]) == 1 and item["answer"].isupper()
    return {**closed, "answer": item["answer"] if is_letter else "A"}


def _get_group(item: Item) -> int:
    return int(item.get("g_index", int(item["index"]) % _ROTATION))


def _check_rotations(groups: Mapping[int, list[Item]]) -> None:
    for group, items in groups.items():
        present = sorted(int(item["index"]) // _ROTATION for item in items)
        if present != list(range(max(len(get_options(items[0])), len(items)))):
            raise ValueError(
                f"question {group} has the rotations {present} of its {len(get_options(items[0]))} options; give the "
                "whole file, or --kit-artefacts to score what is present"
            )


def summarize(items: Sequence[Item], rows: Mapping[str, int]) -> list[Line]:
    """Return one line per split: the mean over all, per l2-category and per category, in alphabetical order."""
    splits = _get_splits(items)
    table: list[Line] = [{"split": split, "Overall": _average_hits(items, rows, split=split)} for split in splits]
    for column in ("l2-category", "category"):
        for name in sorted(list_distinct(item.get(column) for item in items)):
            for line in table:
                hits = _average_hits(items, rows, **{column: name}, split=line["split"])
                line[_MMBENCH_NAMES.get(name, name)] = hits
    return table


def _summarize_mmt(items: Sequence[Item], rows: Mapping[str, int]) -> list[Line]:
    table = []
    for split in [*_get_splits(items), None]:
        line: Line = {"split": split or "ALL", "Overall": _average_hits(items, rows, split=split)}
        of_category = {
            name: _average_hits(items, rows, category=name, split=split)
            for name in sorted(list_distinct(item["category"] for item in items))
        }
        for ability, short in _MMT_NAMES.items():
            names = list_distinct(item["category"] for item in items if item["l2-category"] == ability)
            line[short] = average(of_category[name] for name in names)
        table.append({**line, **of_category})
    return table


def _get_splits(items: Sequence[Item]) -> list[str]:
    return sorted(list_distinct(item.get("split", "none") for item in items))


def _average_hits(items: Sequence[Item], rows: Mapping[str, int], *, split: str | None, **columns: str) -> float:
    """Return the mean score of the items of a split (None: of all) that hold these values."""
    return average(
        rows[get_index(item)]
        for item in items
        if split in (None, item.get("split", "none")) and all(item.get(name) == is_ for name, is_ in columns.items())
    )
