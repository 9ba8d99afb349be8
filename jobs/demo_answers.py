"""Questions about pictures that the demo model has never seen, answered by the annotation job, and a page to look at.

    python -m jobs.demo_answers [--output demo_answers] [--count 200] [--seed 1]

Draws the pictures, writes a list of them with a question about each and what is true, and runs the jobs as a user
would: `jobs.annotate` with jobs/tasks.yaml, then `jobs.report`, which compares the answers with the truth.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from jobs.shapes import make_picture, questions
from pipelines.sink import read_results

TASKS = Path(__file__).with_name("tasks.yaml")
TRUTHS = {"is_so": "is_so_truth", "count": "count_truth", "background": "background_truth"}
_SEEDS_APART = 1_000_000  # as in jobs.demo


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m jobs.demo_answers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo_answers"), help="default demo_answers")
    parser.add_argument("--count", type=int, default=200, help="number of pictures (default 200)")
    parser.add_argument("--seed", type=int, default=1, help="other seeds draw other pictures (default 1)")
    args = parser.parse_args()
    sys.exit(run_demo(args.output, args.count, args.seed))


def run_demo(output: Path, count: int, seed: int) -> int:
    """The exit code: 0, or that of the job that failed."""
    listed, answers = draw_pictures(output, count, seed), output / "answers"
    options = ["--tasks", str(TASKS), "--model", "demo", "--keep-columns", ",".join(TRUTHS.values()), "--overwrite"]
    truths = [part for task, column in TRUTHS.items() for part in ("--truth", f"{task}={column}")]
    exit_code = _run("jobs.annotate", str(listed), str(answers), *options) or _run("jobs.report", str(answers), *truths)
    if exit_code == 0:
        for task, right in shares_right(answers).items():
            print(f"{task}: {right:.1%} of {count} right")
        print(f"answers: {answers / 'data'}/*.parquet\npage: {answers / 'report.html'}")
    return exit_code


def draw_pictures(output: Path, count: int, seed: int) -> Path:
    """A JSON lines file: image, a question to answer with yes or no, and what is true."""
    pictures = output / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    lines = [_line(pictures / f"{i:04}.png", seed * _SEEDS_APART + i) for i in range(count)]
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


def shares_right(answers: Path) -> dict[str, float]:
    rows = read_results(str(answers)).to_pylist()
    return {task: sum(row[task] == row[truth] for row in rows) / len(rows) for task, truth in TRUTHS.items()}


def _run(*command: str) -> int:
    """The exit code. Progress comes to this terminal on stderr."""
    print(f"$ {shlex.join(['python', '-m', *command])}", flush=True)
    return subprocess.run([sys.executable, "-m", *command], stdout=subprocess.DEVNULL).returncode


if __name__ == "__main__":
    main()
