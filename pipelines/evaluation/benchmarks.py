"""The table of benchmarks: the file, how its items are scored, and the values published for Ovis2."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipelines.evaluation.choices import score_choices, score_mmmu, score_mmt, score_rotations
from pipelines.evaluation.hallusion import score_hallusion
from pipelines.evaluation.mathvista import score_mathvista
from pipelines.evaluation.mlvu import score_mlvu
from pipelines.evaluation.mtvqa import score_mtvqa
from pipelines.evaluation.mvbench import score_mvbench
from pipelines.evaluation.ocr import score_ocr
from pipelines.evaluation.scores import Answers, Item, Rules, Scores
from pipelines.evaluation.temp_compass import score_temp_compass
from pipelines.evaluation.video_mme import score_video_mme

Scorer = Callable[[Sequence[Item], Answers, Rules], Scores]

SCORERS: dict[str, Scorer] = {
    **dict.fromkeys(["MMBench_DEV_EN", "MMBench_DEV_CN", "MMBench_DEV_EN_V11", "MMBench_DEV_CN_V11"], score_rotations),
    **dict.fromkeys(["MMStar", "AI2D_TEST", "RealWorldQA", "BLINK", "Q-Bench1_VAL", "A-Bench_VAL"], score_choices),
    "MMMU_DEV_VAL": score_mmmu,
    **dict.fromkeys(["MMT-Bench_VAL", "MMT-Bench_VAL_MI"], score_mmt),
    "HallusionBench": score_hallusion,
    "OCRBench": score_ocr,
    "MTVQA_TEST": score_mtvqa,
    "MathVista_MINI": score_mathvista,
    "Video-MME": score_video_mme,
    "MVBench": score_mvbench,
    "MVBench_MP4": score_mvbench,
    "MLVU_MCQ": score_mlvu,
    "TempCompass_MCQ": score_temp_compass,
    "TempCompass_YorN": score_temp_compass,
}
