"""Options of an evaluation: those of any run over rows, the benchmarks, and whose prompts and rules are used."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import PositiveInt, model_validator

from pipelines.config import Location, RunConfig, declare_option
from pipelines.evaluation.benchmarks import Dataset, Size, get_dataset
from pipelines.evaluation.frames import FrameRule
from pipelines.evaluation.judge import JudgeEndpoint
from pipelines.evaluation.scoring.scores import RuleVersion, ScoringRules
from pipelines.tasks.questionnaire import FlatLayout, Questionnaire
from pipelines.tasks.task import Task

IMAGES, PROMPT = "images of the item", "prompt of the item"
"""Columns of the file of items, besides those of the benchmark."""

CATEGORIES = ("split", "category", "l2-category", "task_type", "task", "domain", "duration", "dim", "answer_type")
"""Columns of benchmarks by whose values scores are averaged."""

_FIXED = ("image_column", "id_column", "split", "window_s")  # the benchmark decides them
_MAX_NEW_TOKENS = 1024  # VLMEvalKit's, for all sizes


class EvaluateConfig(RunConfig):
    """Benchmarks whose items are asked as VLMEvalKit's Ovis2 class asks them."""

    title = "benchmark"

    benchmark: Annotated[str, "NAME,..."] = declare_option(
        ..., description="names of the benchmarks' files in VLMEvalKit, separated by commas, such as MMStar,AI2D_TEST"
    )
    input: tuple[Location, ...] = declare_option(
        ..., min_length=1, description="the benchmark's TSV file, or a directory that holds NAME.tsv for each"
    )
    image_root: Location | None = declare_option(
        None,
        description="directory of the images that image_path names, or of videos and subtitles",
        unset="the directory of the TSV file",
        decides_rows=False,
    )
    size: Size | None = declare_option(
        None, description="size whose prompts are used and whose published values are shown", unset="the model's own"
    )
    rules: RuleVersion = declare_option(
        "2026-08", description="VLMEvalKit's rules of that time, for tiles of several images and for reading answers"
    )
    num_frames: PositiveInt = declare_option(64, description="number of frames per video; VLMEvalKit has 8 and 64")
    fps: float | None = declare_option(
        None, gt=0, description="frames per second of video; VLMEvalKit has 1 and 0.5", unset="--num-frames"
    )
    subtitles: bool = declare_option(False, description="show subtitles with the frames, in Video-MME")
    kit_artefacts: bool = declare_option(
        False, description="also count as right what VLMEvalKit counts for a wrong reason", decides_rows=False
    )
    judge: Annotated[str, "URL"] | None = declare_option(
        None,
        description="OpenAI-compatible endpoint, up to /v1, whose model grades free answers and reads those that no "
        "rule can read; its key is in OPENAI_API_KEY",
        unset="no judge",
        decides_rows=False,
    )
    judge_model: Annotated[str, "NAME"] | None = declare_option(
        None, description="the judge's name at its endpoint; needed with --judge", unset="no judge", decides_rows=False
    )
    judge_price: tuple[float, ...] = declare_option(
        (),
        description="US dollars per million tokens of the judge's prompts and of its replies, such as 0.15,0.6",
        unset="tokens are counted only",
        decides_rows=False,
    )
    max_new_tokens: PositiveInt = declare_option(_MAX_NEW_TOKENS, description="maximum length of an answer, in tokens")

    @property
    def datasets(self) -> list[Dataset]:
        """The benchmarks in the order given. Raise ValueError for an unknown one."""
        return [get_dataset(name.strip()) for name in self.benchmark.split(",")]

    @property
    def judge_endpoint(self) -> JudgeEndpoint | None:
        """Where a judge answers, None for no judge."""
        if self.judge is None or self.judge_model is None:
            return None
        price = (self.judge_price[0], self.judge_price[1]) if self.judge_price else None
        return JudgeEndpoint(self.judge, self.judge_model, price)

    @property
    def frame_rule(self) -> FrameRule:
        """How many frames of a video are shown."""
        return FrameRule(self.num_frames, self.fps)

    @property
    def scoring(self) -> ScoringRules:
        """How answers are scored."""
        return ScoringRules(self.rules, self.kit_artefacts)

    @property
    def questionnaire(self) -> Questionnaire:
        """One task without a name; every row has its own prompt."""
        task = Task.model_construct(name="", prompt="-", **self.task_defaults())
        return Questionnaire(tasks=(task,), layout=FlatLayout(), prompt_column=PROMPT, row_columns=self.row_columns)

    def max_tiles_per_image(self, num_images: int) -> int:
        """Return the benchmark's maximum number of tiles, unless --max-tiles is given."""
        return self.max_tiles or self.datasets[0].max_tiles_per_image(num_images, self.scoring)

    @model_validator(mode="after")
    def _check_benchmarks(self) -> Self:
        names = [dataset.name for dataset in self.datasets]
        if len(set(names)) < len(names):
            raise ValueError(f"BENCHMARK names one twice: {self.benchmark}")
        for dataset in self.datasets:
            self._check_videos(dataset)
        if given := [name for name in _FIXED if getattr(self, name) is not None]:
            raise ValueError(f"--{given[0].replace('_', '-')} does not apply to a benchmark; leave it out")
        return self

    @model_validator(mode="after")
    def _check_judge(self) -> Self:
        if (self.judge is None) != (self.judge_model is None):
            raise ValueError("--judge and --judge-model go together: an endpoint and the model's name there")
        if self.judge is not None and not self.judge.startswith(("http://", "https://")):
            raise ValueError(f"--judge {self.judge}: give a URL such as http://127.0.0.1:8000/v1")
        if self.judge_price and len(self.judge_price) != 2:
            raise ValueError("--judge-price takes two numbers: for prompts and for replies, such as 0.15,0.6")
        return self

    def _check_videos(self, dataset: Dataset) -> None:
        if self.subtitles and not dataset.has_subtitles:
            raise ValueError(f"{dataset.name} is asked without subtitles; leave out --subtitles")
        if self.fps is not None and dataset.frames == "bounded":
            raise ValueError(f"{dataset.name} is asked with a number of frames; leave out --fps, or take MVBench_MP4")
