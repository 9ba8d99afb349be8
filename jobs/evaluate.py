"""The job `ovis2 evaluate`: the benchmarks of the Ovis2 release, scored as VLMEvalKit scores them.

`--list` shows the benchmarks; `score` scores answers that exist already, without a model.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

from jobs.cli import OK, RUN_NOTES, TOO_MANY_ERRORS, run_job
from jobs.command_line import Command, parse_command_line
from pipelines.config import Section, declare_option
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.scoring.scores import RuleVersion, ScoringRules


class ScoreFlags(Section):
    """The options of `evaluate score`."""

    title = "score"

    benchmark: Annotated[str, "BENCHMARK"] = declare_option(
        ..., description="name of the benchmark's file in VLMEvalKit, such as MMStar; --list shows all"
    )
    data: Annotated[str, "LOCAL_FILE"] = declare_option(..., description="the benchmark's TSV file")
    predictions: Annotated[str, "LOCAL_FILE"] = declare_option(
        ..., description="JSON lines, TSV or xlsx file with the columns index and prediction"
    )
    scores: Annotated[str, "LOCAL_FILE"] = declare_option(..., description="JSON file to write")
    rules: RuleVersion = declare_option(
        "2026-08", description="how answers are read: as VLMEvalKit did when Ovis2 was published, or as it does now"
    )
    kit_artefacts: bool = declare_option(
        False,
        description="also count as right what VLMEvalKit counts for a wrong reason, such as empty answers in MVBench",
    )


COMMAND = Command(
    "evaluate",
    EvaluateConfig,
    "Ask the questions of benchmarks and score the answers as VLMEvalKit does, without a judge model.",
    "BENCHMARK INPUT OUTPUT --model MODEL",
    ("MMStar MMStar.tsv scores --model AIDC-AI/Ovis2-8B", "MMStar,AI2D_TEST files scores --model AIDC-AI/Ovis2-8B"),
    "\n".join(
        [
            "other commands:",
            "  --list   show the benchmarks",
            "  score BENCHMARK DATA PREDICTIONS SCORES   score answers that exist; see score --help",
            "",
            RUN_NOTES,
        ]
    ),
    places=("benchmark", "input", "output"),
)
SCORE = Command(
    "evaluate score",
    ScoreFlags,
    "Score answers to a benchmark of the Ovis2 release as VLMEvalKit does, without a model.",
    "BENCHMARK DATA PREDICTIONS SCORES",
    ("MMStar MMStar.tsv predictions.jsonl scores.json --rules 2025-02",),
    places=("benchmark", "data", "predictions", "scores"),
)


def main(argv: Sequence[str] | None = None, prog: str = "python -m jobs.evaluate") -> int:
    """Run the job -> its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--list"]:
        return _list_benchmarks()
    if arguments[:1] == ["score"]:
        return _score(arguments[1:], f"{prog} score")
    config = parse_command_line(COMMAND, arguments, prog)
    from pipelines.evaluation.run import run_evaluation  # loads Ray, which --help and usage errors do without

    max_rate = config.max_error_rate
    return run_job(
        lambda: run_evaluation(config), lambda run: TOO_MANY_ERRORS if run.error > max_rate * run.rows else OK
    )


def _score(argv: Sequence[str], prog: str) -> int:
    flags = parse_command_line(SCORE, argv, prog)
    from pipelines.evaluation.score import score_file

    rules = ScoringRules(flags.rules, flags.kit_artefacts)
    files = (flags.benchmark, flags.data, flags.predictions, flags.scores)
    return run_job(lambda: score_file(*files, rules), is_resumable=False)


def _list_benchmarks() -> int:
    """Print the table of benchmarks: a line each, with the values published for all sizes."""
    from pipelines.evaluation.benchmarks import BENCHMARKS, SIZES

    lines = [["benchmark", "file", "rows", "judge", *SIZES]]
    for benchmark in BENCHMARKS:
        files = (" + " if benchmark.has_parts else " or ").join(dataset.name for dataset in benchmark.datasets)
        rows = f"{benchmark.num_rows or '?'}"
        lines.append([benchmark.name, files, rows, benchmark.judge, *benchmark.published])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return OK


if __name__ == "__main__":
    sys.exit(main())
