"""The job `ovis2 demo-answers`: ask the demo model questions about drawn images, and write a report of its answers.

It draws the images, lists them with a question and the truth for each, and runs the jobs as a user would:
`jobs.annotate` with demo/tasks.yaml, then `jobs.report`, which compares the answers with the truth.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from demo.drawings import make_picture, make_questions
from jobs.command_line import Command, parse_command_line
from jobs.demo import SEEDS_APART, DemoOptions, run_checked, run_module
from pipelines.config import Location, declare_option
from pipelines.output.sink import read_results

TASKS = Path(__file__).parents[1] / "demo" / "tasks.yaml"
ANSWERS = "answers"
TRUTHS = {"is_so": "is_so_truth", "count": "count_truth", "background": "background_truth"}


class DemoAnswersOptions(DemoOptions):
    """The options of the job."""

    output: Location = declare_option("demo_answers", description="directory for the images, answers and the report")


COMMAND = Command(
    "demo-answers",
    DemoAnswersOptions,
    "Draw images, ask the demo model several questions about each, and report how many answers are right.",
    "",
    ("", "--count 1000 --seed 50"),
)


def main(argv: Sequence[str] | None = None, prog: str = "python -m jobs.demo_answers") -> int:
    """Run the job -> its exit code."""
    options = parse_command_line(COMMAND, argv, prog)
    output = Path(options.output)
    return run_checked(output / ANSWERS, lambda: run_demo_answers(output, options.count, options.seed))


def run_demo_answers(output: Path, count: int, seed: int) -> int:
    """Draw, annotate and report -> the exit code: 0, or that of the job that failed."""
    listed, answers = draw_questioned_images(output, count, seed), output / ANSWERS
    options = ["--tasks", str(TASKS), "--model", "demo", "--keep-columns", ",".join(TRUTHS.values()), "--overwrite"]
    truths = [part for task, column in TRUTHS.items() for part in ("--truth", f"{task}={column}")]
    exit_code = run_module("jobs.annotate", str(listed), str(answers), *options)
    exit_code = exit_code or run_module("jobs.report", str(answers), *truths)
    if exit_code == 0:
        rows = read_results(str(answers)).to_pylist()
        for task, truth in TRUTHS.items():
            print(f"{task}: {sum(row[task] == row[truth] for row in rows) / len(rows):.1%} of {count} right")
        print(f"answers: {answers / 'data'}/*.parquet\npage: {answers / 'report.html'}")
    return exit_code


def draw_questioned_images(output: Path, count: int, seed: int) -> Path:
    """Draw images -> a JSON lines file of image, a yes-or-no question and the truth."""
    pictures = output / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    lines = [_describe_picture(pictures / f"{i:04}.png", seed * SEEDS_APART + i) for i in range(count)]
    listed = output / "pictures.jsonl"
    listed.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return listed


def _describe_picture(path: Path, seed: int) -> dict[str, Any]:
    image, scene = make_picture(seed, held_out=True)
    image.save(path)
    true, false, count, *_ = make_questions(scene, seed)
    asked = (true, false)[seed % 2]
    return {
        "image": f"pictures/{path.name}",
        "question": asked.text,
        "is_so_truth": asked.answer == "Yes",
        "count_truth": int(count.answer),
        "background_truth": scene.background,
    }


if __name__ == "__main__":
    sys.exit(main())
