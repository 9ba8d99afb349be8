"""Ask the demo model questions about drawn pictures, and write the report of its answers.

    python -m jobs.demo_answers [--output demo_answers] [--count 200] [--seed 1]

Draws the pictures, writes a list of them with a question about each and what is true, and runs the jobs as a user
would: `jobs.annotate` with demo/tasks.yaml, then `jobs.report`, which compares the answers with the truth.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from demo.drawings import make_picture, questions
from jobs.demo import SEEDS_APART, run_from_command_line, run_module
from pipelines.output.sink import read_results

TASKS = Path(__file__).parents[1] / "demo" / "tasks.yaml"
TRUTHS = {"is_so": "is_so_truth", "count": "count_truth", "background": "background_truth"}


def main(argv: Sequence[str] | None = None, prog: str = "python -m jobs.demo_answers") -> int:
    return run_from_command_line(run_demo, argv, prog, __doc__, Path("demo_answers"))


def run_demo(output: Path, count: int, seed: int) -> int:
    """The exit code: 0, or that of the job that failed."""
    listed, answers = draw_pictures(output, count, seed), output / "answers"
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


def draw_pictures(output: Path, count: int, seed: int) -> Path:
    """A JSON lines file: image, a question to answer with yes or no, and what is true."""
    pictures = output / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    lines = [_line(pictures / f"{i:04}.png", seed * SEEDS_APART + i) for i in range(count)]
    listed = output / "pictures.jsonl"
    listed.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return listed


def _line(path: Path, seed: int) -> dict[str, Any]:
    image, scene = make_picture(seed, held_out=True)
    image.save(path)
    true, false, count, *_ = questions(scene, seed)
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
