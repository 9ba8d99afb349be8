"""Compare what `ovis2 plan` foretells with the run that follows, on three kinds of INPUT.

    python -m benchmarks.forecast [--scale 1.0]

Small pictures and questions are limited by the engine, photographs of 12 megapixels by the processors that prepare
them, with the demo model. Prints a table: the seconds foretold and taken, and what limits the run, foretold and found.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jobs.demo import draw_pictures
from tests.support.roots import ROOT


def draw_small(directory: Path, count: int) -> Path:
    """Draw the pictures of the demo."""
    draw_pictures(directory, count, seed=1)
    return directory


def draw_photographs(directory: Path, count: int) -> Path:
    """Draw files of 12 megapixels, which compress as photographs do."""
    directory.mkdir()
    rng = np.random.default_rng(1)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(256, size=(150, 200, 3), dtype=np.uint8))
        coarse.resize((4000, 3000), Image.Resampling.BICUBIC).save(directory / f"{number:05}.jpg", quality=90)
    return directory


def write_questions(directory: Path, count: int) -> Path:
    """Write questions without images, with a number in each."""
    directory.mkdir()
    rows = [{"id": str(number), "prompt": f"What is {number % 10} plus {number % 7}?"} for number in range(count)]
    (path := directory / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


CASES: dict[str, tuple[Callable[[Path, int], Path], int]] = {
    "small pictures": (draw_small, 6000),
    "photographs": (draw_photographs, 800),
    "questions": (write_questions, 40_000),
}
"""How INPUT is made, and its number of rows."""


def compare(place: Path, source: Path) -> dict[str, Any]:
    """Foretell a run, and run it -> the seconds and limits of both."""
    output = place / "output"
    foretold, _ = _run("plan", str(source), str(output), "--model", "demo", "--sample-report", str(place / "s.html"))
    _, taken_s = _run("caption", str(source), str(output), "--model", "demo")
    record = json.loads((output / "run.json").read_text())
    return {
        "foretold_s": round(foretold["eta_s"], 1),
        "taken_s": round(taken_s, 1),
        "ratio": round(foretold["eta_s"] / taken_s, 3),
        "foretold_limit": foretold["limited_by"],
        "found_limit": record["metrics"]["limited_by"],
    }


def _run(job: str, *arguments: str) -> tuple[dict[str, Any], float]:
    """Run a job -> the last line that it prints, and its seconds."""
    started_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", f"jobs.{job}", *arguments],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), time.monotonic() - started_s


def main() -> None:
    """Print the table, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the numbers of rows")
    scale = parser.parse_args().scale
    found = {}
    for name, (make, count) in CASES.items():
        with tempfile.TemporaryDirectory() as directory:
            place = Path(directory)
            found[name] = {"rows": int(count * scale)} | compare(place, make(place / "input", int(count * scale)))
        print(f"{name:16}" + "".join(f" {key} {value};" for key, value in found[name].items()), flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
