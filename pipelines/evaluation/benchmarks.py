"""The table of benchmarks: their files, how items are asked and scored, and the values published for Ovis2."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal, TypeAlias

from pipelines.evaluation import prompts
from pipelines.evaluation.prompts import ImagePrompt, VideoPrompt
from pipelines.evaluation.scoring import grading, options
from pipelines.evaluation.scoring.choices import score_choices, score_mmmu, score_mmt, score_rotations
from pipelines.evaluation.scoring.grading import Grading
from pipelines.evaluation.scoring.hallusion import score_hallusion
from pipelines.evaluation.scoring.mathvista import score_mathvista
from pipelines.evaluation.scoring.mlvu import score_mlvu, summarize_mlvu
from pipelines.evaluation.scoring.mtvqa import score_mtvqa
from pipelines.evaluation.scoring.mvbench import score_mvbench
from pipelines.evaluation.scoring.ocr import score_ocr
from pipelines.evaluation.scoring.scores import Answers, Item, Scores, ScoringRules, average
from pipelines.evaluation.scoring.temp_compass import score_temp_compass, summarize_temp_compass
from pipelines.evaluation.scoring.video_mme import score_video_mme

Size: TypeAlias = Literal["1B", "2B", "4B", "8B", "16B", "34B"]
SIZES: tuple[Size, ...] = ("1B", "2B", "4B", "8B", "16B", "34B")
Judge: TypeAlias = Literal["no", "optional", "needed"]
"""Whether a score needs a judge model: optional means that one could read answers that the rules cannot."""

Scorer: TypeAlias = Callable[[Sequence[Item], Answers, ScoringRules], Scores]
Frames: TypeAlias = Literal["evenly", "segments", "bounded"]
"""How frames are spread: evenly, in the middle of segments, or in those of the part that an item names."""

_SINGLE, _FINE_PRINT, _FRAME = 9, 12, 1  # tiles
_MULTI = 12  # tiles over all images of an item


@dataclass(frozen=True)
class Dataset:
    """One file of a benchmark, by VLMEvalKit's name.

    md5: of the file that VLMEvalKit checks for; the first is today's, others are older ones.
    scorer: None if each answer needs a judge, which then grades it as `grading` says.
    list_options: what a judge may read in an answer: item -> {an answer that the scorer reads: text of the option}.
    headline: the number to compare with the published one, from the table of the scores; None if no table has it.
    published_place: which of several published values is this file's, from 0; None if they are of all parts together.
    score_scale: 100 if scores of rows are shown in percent.
    split: value of the column `split` whose items the headline is about, None for all.
    reasons: the sizes that are asked to reason before they answer.
    """

    name: str
    md5: tuple[str, ...]
    num_rows: int | None
    ask: ImagePrompt | None = None
    ask_about_video: VideoPrompt | None = None
    scorer: Scorer | None = None
    grading: Grading | None = None
    list_options: Callable[[Item], Mapping[str, Any]] = options.get_options
    split: str | None = None
    published_place: int | None = 0
    score_scale: float = 100.0
    headline: Callable[[Any, ScoringRules], float | None] = lambda _table, _rules: None
    max_tiles: int = _SINGLE
    reasons: frozenset[Size] = frozenset()
    frames: Frames | None = None
    has_subtitles: bool = False
    has_numbered_images: bool = False

    def max_tiles_per_image(self, num_images: int, rules: ScoringRules) -> int:
        """Return the maximum number of tiles for each of an item's images; the rule for several is of 2025-06."""
        if num_images > 1 and rules.version != "2025-02":
            return max(1, _MULTI // num_images) if self.max_tiles == _SINGLE else self.max_tiles
        return self.max_tiles

    def make_style(self, size: Size) -> prompts.Style:
        """Return what a prompt for a model of this size depends on."""
        return prompts.Style(size, chain_of_thought=size in self.reasons)


@dataclass(frozen=True)
class Benchmark:
    """A line of the published table: its name there, its files, and the values that it gives for each size.

    Where a benchmark has alternative files (languages, splits) the first is the one that the value is compared with;
    `has_parts` says that the score is over all of them together.
    """

    name: str
    datasets: tuple[Dataset, ...]
    judge: Judge
    published: tuple[str, ...]
    has_parts: bool = False
    num_items: int | None = None
    """Number of items of all parts, where that of each is not known."""

    @property
    def num_rows(self) -> int | None:
        """Number of items, None if it is not known."""
        counted = self.datasets if self.has_parts else self.datasets[:1]
        return sum(dataset.num_rows or 0 for dataset in counted) or self.num_items

    def get_published(self, size: Size) -> str:
        """Return the value published for a size."""
        return self.published[SIZES.index(size)]


def _to_percent(value: float) -> float:
    return 100 * value


def _read_split(split: str | None = None) -> Callable[[Any, ScoringRules], float | None]:
    """Return what reads the accuracy of a split, or of the only one, from a table of choices."""

    def read(table: Any, _rules: ScoringRules) -> float | None:
        lines = [line for line in table if split in (None, line["split"])]
        return _to_percent(lines[0]["Overall"]) if len(lines) == 1 else None

    return read


def _read_hallusion(table: Any, _rules: ScoringRules) -> float:
    return average([table[0]["aAcc"], table[0]["fAcc"], table[0]["qAcc"]])


def _read_mlvu(table: Any, rules: ScoringRules) -> float | None:
    lines = {line["task"]: line["acc"] for line in summarize_mlvu(table, rules)}
    return lines.get("M-Avg", lines.get("G-Avg"))


def _read_temp_compass(table: Any, _rules: ScoringRules) -> float:
    [overall] = (line for line in summarize_temp_compass(table) if line["dim.task_type"] == "overall")
    return float(overall["acc"])


def _read_mvbench(table: Any, _rules: ScoringRules) -> float:
    return float(table["overall"][2].rstrip("%"))


def _vary(base: Dataset, name: str, *md5: str, **fields: Any) -> Dataset:
    return replace(base, name=name, md5=md5, **fields)


_LARGE: frozenset[Size] = frozenset(["8B", "16B", "34B"])
_CHOICE = Dataset("", (), None, ask=prompts.ask_choice, scorer=score_choices, headline=_read_split())
_CIRCULAR = replace(_CHOICE, scorer=score_rotations)
_MMT = replace(_CHOICE, scorer=score_mmt, headline=_read_split("ALL"), num_rows=3127)
_PLAIN = Dataset("", (), None, ask=prompts.ask_plainly)
_FINE = replace(_PLAIN, max_tiles=_FINE_PRINT)
_VIDEO = Dataset("", (), None, max_tiles=_FRAME, frames="evenly")
_MVBENCH = replace(
    _VIDEO,
    ask_about_video=prompts.ask_mvbench,
    scorer=score_mvbench,
    list_options=options.list_bracketed_candidates,
    headline=_read_mvbench,
    frames="bounded",
)
_TEMP_COMPASS = replace(
    _VIDEO,
    ask_about_video=prompts.ask_temp_compass,
    scorer=score_temp_compass,
    list_options=options.list_temp_compass_options,
    headline=_read_temp_compass,
    published_place=None,
)

BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark(
        "MMBench-V1.1",
        (
            _vary(_CIRCULAR, "MMBench_DEV_EN_V11", "30c05be8f2f347a50be25aa067248184"),
            _vary(_CIRCULAR, "MMBench_DEV_CN_V11", "593f9b5f6bea453d870a798b34ae4f37"),
            _vary(
                _CIRCULAR, "MMBench_TEST_EN_V11", "8d1a704e791df6f5d9fb3ef782b65365", "26f0f15381a21720255091d3e0316ce6"
            ),
            _vary(_CIRCULAR, "MMBench_TEST_CN_V11", "156e6569f9547afb16603eca16e85373"),
        ),
        "optional",
        ("68.4", "76.9", "81.4", "83.6", "85.6", "86.6"),
    ),
    Benchmark(
        "MMStar",
        (_vary(_CHOICE, "MMStar", "e1ecd2140806c1b1bbf54b43372efb9e", num_rows=1500, reasons=_LARGE | {"2B"}),),
        "optional",
        ("52.1", "56.7", "61.9", "64.6", "67.2", "69.2"),
    ),
    Benchmark(
        "MMMU",
        (
            _vary(
                _CHOICE,
                "MMMU_DEV_VAL",
                "585e8ad75e73f75dcad265dfd0417d64",
                num_rows=1050,
                scorer=score_mmmu,
                list_options=options.list_mmmu_options,
                headline=_read_split("validation"),
                split="validation",
                reasons=_LARGE,
                has_numbered_images=True,
            ),
        ),
        "optional",
        ("36.1", "45.6", "49.0", "57.4", "60.7", "66.7"),
    ),
    Benchmark(
        "MathVista",
        (
            _vary(
                _PLAIN,
                "MathVista_MINI",
                "f199b98e178e5a2a20e7048f5dcb0464",
                num_rows=1000,
                scorer=score_mathvista,
                list_options=options.list_mathvista_options,
                headline=lambda table, _: table[0]["acc"],
                reasons=_LARGE,
            ),
        ),
        "needed",
        ("59.4", "64.1", "69.6", "71.8", "73.7", "76.1"),
    ),
    Benchmark(
        "HallusionBench",
        (
            _vary(
                _FINE,
                "HallusionBench",
                "0c23ac0dc9ef46832d7a24504f2a0c7c",
                num_rows=951,
                ask=prompts.ask_yes_no,
                scorer=score_hallusion,
                list_options=options.list_yes_no,
                headline=_read_hallusion,
            ),
        ),
        "optional",
        ("45.2", "50.2", "53.8", "56.3", "56.8", "58.8"),
    ),
    Benchmark(
        "AI2D",
        (_vary(_CHOICE, "AI2D_TEST", "0f593e0d1c7df9a3d69bf1f947e71975", num_rows=3088),),
        "optional",
        ("76.4", "82.7", "85.7", "86.6", "86.3", "88.3"),
    ),
    Benchmark(
        "OCRBench",
        (
            _vary(
                _FINE,
                "OCRBench",
                "e953d98a987cc6e26ef717b61260b778",
                num_rows=1000,
                scorer=score_ocr,
                headline=lambda table, _: table["Final Score Norm"],
            ),
        ),
        "no",
        ("89.0", "87.3", "91.1", "89.1", "87.9", "89.4"),
    ),
    Benchmark(
        "MMVet",
        (
            _vary(
                _PLAIN,
                "MMVet",
                "748aa6d4aa9d4de798306a63718455e3",
                num_rows=218,
                ask=prompts.ask_mmvet,
                grading=grading.MMVET,
                headline=lambda table, _: table[-1]["acc"],
                reasons=_LARGE | {"2B"},
            ),
        ),
        "needed",
        ("50.0", "58.3", "65.5", "65.1", "68.4", "77.1"),
    ),
    Benchmark(
        "MMBench",
        (
            _vary(_CIRCULAR, "MMBench_DEV_EN", "b6caf1133a01c6bb705cf753bb527ed8"),
            _vary(_CIRCULAR, "MMBench_DEV_CN", "08b8fc3324a5ed74155350f57be69fbd"),
            _vary(_CIRCULAR, "MMBench_TEST_EN", "6939fadb0ce626fefc0bdc9c64efc528"),
            _vary(_CIRCULAR, "MMBench_TEST_CN", "7e1239baf0ee4c8b513e19705a0f317e"),
        ),
        "optional",
        ("70.2", "78.9", "83.2", "84.9", "87.1", "87.8"),
    ),
    Benchmark(
        "MMT-Bench",
        (
            _vary(_MMT, "MMT-Bench_VAL", "8dd4b730f53dbf9c3aed90ca31c928e0"),
            _vary(_MMT, "MMT-Bench_VAL_MI", "c7d7b998eb5cd9aa36c7d4f721472462"),
        ),
        "optional",
        ("55.5", "61.7", "65.2", "66.6", "69.2", "71.2"),
    ),
    Benchmark(
        "RealWorldQA",
        (_vary(_CHOICE, "RealWorldQA", "4de008f55dc4fd008ca9e15321dc44b7", num_rows=765),),
        "optional",
        ("63.9", "66.0", "71.1", "72.5", "74.1", "75.6"),
    ),
    Benchmark(
        "BLINK",
        (
            _vary(
                _CHOICE, "BLINK", "d5e8af148b10ac69f535ff7b23f3f989", "3b6649b6a662184ea046908e5506260e", num_rows=1901
            ),
        ),
        "optional",
        ("44.0", "47.9", "53.0", "54.3", "59.0", "60.1"),
    ),
    Benchmark(
        "QBench",
        (_vary(_CHOICE, "Q-Bench1_VAL", "837bdb6cd2da571713543462815187b7", num_rows=1495),),
        "optional",
        ("71.3", "76.2", "78.1", "78.9", "79.5", "79.8"),
    ),
    Benchmark(
        "ABench",
        (_vary(_CHOICE, "A-Bench_VAL", "218563ec50d34bb336c814143a5bb9c1", num_rows=950),),
        "optional",
        ("71.3", "76.6", "77.5", "76.4", "79.4", "78.7"),
    ),
    Benchmark(
        "MTVQA",
        (
            _vary(
                _FINE,
                "MTVQA_TEST",
                "d87c17dbab934b7cd89c0a3c1c5657f4",
                num_rows=6778,
                ask=prompts.ask_mtvqa,
                scorer=score_mtvqa,
                headline=lambda table, _: table["Average"],
            ),
        ),
        "no",
        ("23.7", "25.6", "29.4", "29.7", "30.3", "30.6"),
    ),
    Benchmark(
        "VideoMME (w/o | w/ subs)",
        (
            _vary(
                _VIDEO,
                "Video-MME",
                "85bdd91f9b29a99354c23b97ab7c113c",
                num_rows=2700,
                ask_about_video=prompts.ask_video_mme,
                has_subtitles=True,
                scorer=score_video_mme,
                list_options=options.list_lettered_candidates,
                headline=lambda table, _: _to_percent(float(table["overall"]["overall"])),
            ),
        ),
        "optional",
        ("48.6 | 49.5", "57.2 | 60.8", "64.0 | 66.3", "68.0 | 71.6", "70.0 | 74.4", "71.2 | 75.6"),
    ),
    Benchmark(
        "MVBench",
        (
            _vary(_MVBENCH, "MVBench", "fd21d36522cdedd46d84dc46715ad832", num_rows=4000),
            _vary(_MVBENCH, "MVBench_MP4", "5c8c6f8b7972c2de65a629590f7c42f5", frames="segments"),
        ),
        "optional",
        ("60.32", "64.9", "68.45", "68.15", "68.6", "70.3"),
    ),
    Benchmark(
        "MLVU (M-Avg | G-Avg)",
        (
            _vary(
                _VIDEO,
                "MLVU_MCQ",
                "bb5c37e7cf8d43fc9a25c23d2b4633f5",
                num_rows=2174,
                ask_about_video=prompts.ask_mlvu,
                scorer=score_mlvu,
                list_options=options.list_bracketed_candidates,
                headline=_read_mlvu,
            ),
            _vary(
                _VIDEO,
                "MLVU_OpenEnded",
                "cee573a3627c6ac434ded704c60511ba",
                num_rows=420,
                ask_about_video=prompts.ask_mlvu_open,
                grading=grading.MLVU_OPEN,
                headline=_read_mlvu,
                published_place=1,
                score_scale=1,
            ),
        ),
        "needed",
        ("58.5 | 3.66", "68.6 | 3.86", "70.8 | 4.23", "76.4 | 4.25", "77.7 | 4.44", "77.8 | 4.59"),
        has_parts=True,
    ),
    Benchmark(
        "MMBench-Video",
        (
            _vary(
                _VIDEO,
                "MMBench-Video",
                "98f7df3eb1007fc375ea6fe88a98e2ff",
                num_rows=1998,
                ask_about_video=prompts.ask_mmbench_video,
                grading=grading.MMBENCH_VIDEO,
                headline=lambda table, _: float(table["coarse_all"]["Overall"]),
                score_scale=1,
            ),
        ),
        "needed",
        ("1.26", "1.57", "1.69", "1.85", "1.92", "1.98"),
    ),
    Benchmark(
        "TempCompass",
        (
            _vary(_TEMP_COMPASS, "TempCompass_MCQ", "7efbb9e6d9dabacd22daf274852691dd"),
            _vary(
                _TEMP_COMPASS,
                "TempCompass_Captioning",
                "35be9bf2581ea7767f02e9a8f37ae1ab",
                scorer=None,
                grading=grading.TEMP_COMPASS,
            ),
            _vary(_TEMP_COMPASS, "TempCompass_YorN", "c72c046d7fa0e82c8cd7462f2e844ea8"),
        ),
        "needed",
        ("51.43", "62.64", "67.02", "69.28", "74.16", "75.97"),
        has_parts=True,
        num_items=7540,
    ),
)

DATASETS: dict[str, Dataset] = {dataset.name: dataset for benchmark in BENCHMARKS for dataset in benchmark.datasets}


def get_dataset(name: str) -> Dataset:
    """Return the dataset of this name. Raise ValueError with the names that exist."""
    if name in DATASETS:
        return DATASETS[name]
    lower = {known.lower(): known for known in (*DATASETS, *(benchmark.name for benchmark in BENCHMARKS))}
    close = get_close_matches(name.lower(), lower, n=1)
    meant = f"; did you mean {lower[close[0]]}?" if close else ""
    raise ValueError(f"{name!r} is not a benchmark{meant or '; use ' + ', '.join(DATASETS)}")
