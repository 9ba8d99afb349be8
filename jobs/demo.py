"""Caption drawn pictures with the demo model, and report the share that is exactly right.

    python -m jobs.demo [--output demo_output] [--count 200] [--seed 1]

Draws the pictures and runs the captioning job on them as a user would.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from demo.drawings import make_picture
from pipelines.output.sink import read_results

SHOWN = 12
SEEDS_APART = 1_000_000  # two --seed values share no picture


@dataclass(frozen=True)
class Comparison:
    """What the model said about a picture and what is true. `num_tiles` counts the overview."""

    file_name: str
    caption: str
    truth: str
    num_tiles: int

    @property
    def is_right(self) -> bool:
        return self.caption == self.truth


def main(argv: Sequence[str] | None = None, prog: str = "python -m jobs.demo") -> int:
    return run_from_command_line(run_demo, argv, prog, __doc__, Path("demo_output"))


def run_from_command_line(
    demo: Callable[[Path, int, int], int], argv: Sequence[str] | None, prog: str, about: str | None, output: Path
) -> int:
    """Run `demo` with the output directory, the number of images and the seed of the command line -> its exit code."""
    parser = argparse.ArgumentParser(prog=prog, description=(about or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=output, help=f"default {output}")
    parser.add_argument("--count", type=int, default=200, help="number of pictures (default 200)")
    parser.add_argument("--seed", type=int, default=1, help="other seeds draw other pictures (default 1)")
    args = parser.parse_args(argv)
    return demo(args.output, args.count, args.seed)


def run_demo(output: Path, count: int, seed: int) -> int:
    """The exit code: 0, or 1 if the job failed."""
    pictures, captions = output / "pictures", output / "captions"
    truths = draw_pictures(pictures, count, seed)
    print(f"{count} pictures drawn in {pictures}; none of their captions was in the training data", flush=True)
    if exit_code := _caption(pictures, captions):
        print(f"error: the captioning job failed with exit code {exit_code}; its messages are above")
        return 1
    _report(compare(captions, truths))
    print(f"pictures: {pictures}\ncaptions: {captions / 'data'}/*.parquet")
    print("your own: the same command with your own directories; --model AIDC-AI/Ovis2-1B reads photographs")
    return 0


def _caption(pictures: Path, captions: Path) -> int:
    return run_module("jobs.caption", str(pictures), str(captions), "--model", "demo", "--overwrite")


def run_module(*command: str) -> int:
    """The exit code of `python -m ...`. Its progress comes to this terminal on stderr."""
    print(f"$ {shlex.join(['python', '-m', *command])}", flush=True)
    return subprocess.run([sys.executable, "-m", *command], stdout=subprocess.DEVNULL).returncode


def draw_pictures(directory: Path, count: int, seed: int) -> dict[str, str]:
    """File name -> true caption. Every fourth picture is a JPEG, the others are PNG."""
    directory.mkdir(parents=True, exist_ok=True)
    for picture in directory.iterdir():
        if re.fullmatch(r"\d{4}\.(png|jpg)", picture.name):  # of an earlier demo; nothing else is touched
            picture.unlink()
    truths = {}
    for i in range(count):
        image, scene = make_picture(seed * SEEDS_APART + i, held_out=True)
        name = f"{i:04}.jpg" if i % 4 == 3 else f"{i:04}.png"
        image.save(directory / name, quality=90)  # which PNG ignores
        truths[name] = scene.caption
    return truths


def compare(captions: Path, truths: dict[str, str]) -> list[Comparison]:
    """One for each picture, in the order of the file names."""
    rows = {Path(row["uri"]).name: row for row in read_results(str(captions)).to_pylist()}
    return [Comparison(name, rows[name]["text"], truth, rows[name]["num_tiles"]) for name, truth in truths.items()]


def _report(comparisons: list[Comparison]) -> None:
    """Print the first ones, the first mistakes, which say more than a share, and the shares."""
    wrong = [c for c in comparisons[SHOWN:] if not c.is_right]
    for c in [*comparisons[:SHOWN], *wrong[: SHOWN // 3]]:
        mark = "right" if c.is_right else "WRONG"
        print(f"\n{mark}  {c.file_name}  {c.caption}\n       truth     {c.truth}")
    print(f"\nexactly right: {_share(comparisons)}")
    print(f"  in one tile: {_share([c for c in comparisons if c.num_tiles == 1])}")
    print(f"  in several:  {_share([c for c in comparisons if c.num_tiles > 1])}\n")


def _share(comparisons: list[Comparison]) -> str:
    num_right, count = sum(c.is_right for c in comparisons), len(comparisons)
    return f"{num_right} of {count} ({num_right / count:.1%})" if count else "none"


if __name__ == "__main__":
    sys.exit(main())
