"""The job `ovis2 demo`: caption drawn images with the demo model, and report the share that is exactly right.

It draws the images and runs the captioning job on them as a user would. A second run answers one question of each kind
that the model has learnt: about an image, two images, a clip, or text alone.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import PositiveInt, field_validator

from demo.data import NUM_FRAMES
from demo.drawings import make_picture
from demo.examples import Example, write_examples
from jobs.command_line import Command, parse_command_line
from jobs.usage import BAD_USAGE
from ovis_model.wording import count_nouns
from pipelines.config import Location, Section, declare_option
from pipelines.output.run_record import check_replaceable
from pipelines.output.sink import read_results

CAPTIONS = "captions"
SHOWN = 12
SEEDS_APART = 1_000_000  # two --seed values share no image


class DemoOptions(Section):
    """The options of the job."""

    title = "demo"

    output: Location = declare_option("demo_output", description="directory for the images and their captions")
    count: PositiveInt = declare_option(200, description="number of images to draw")
    seed: int = declare_option(1, description="random seed; each seed draws other images")

    @field_validator("output")
    @classmethod
    def _check_local(cls, output: str) -> str:
        if "://" in output:
            raise ValueError(f"{output} is a URI; give a local directory")
        return output


COMMAND = Command(
    "demo",
    DemoOptions,
    "Draw images that the demo model has never seen, caption them, and compare the captions with the truth.",
    "",
    ("", "--count 1000 --seed 50"),
)


@dataclass(frozen=True)
class Comparison:
    """The caption of an image and the true one. `num_tiles` counts the overview."""

    file_name: str
    caption: str
    truth: str
    num_tiles: int

    @property
    def is_right(self) -> bool:
        """Whether the caption equals the true one."""
        return self.caption == self.truth


def main(argv: Sequence[str] | None = None, prog: str = "python -m jobs.demo") -> int:
    """Run the job -> its exit code."""
    options = parse_command_line(COMMAND, argv, prog)
    output = Path(options.output)
    return run_checked(output / CAPTIONS, lambda: run_demo(output, options.count, options.seed))


def run_checked(results: Path, job: Callable[[], int]) -> int:
    """Run a job that overwrites the run in `results` -> its exit code; that of wrong usage if it cannot."""
    try:
        check_replaceable(str(results))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_USAGE
    return job()


def run_demo(output: Path, count: int, seed: int) -> int:
    """Draw, caption and compare -> the exit code: 0, or 1 if the captioning job failed."""
    pictures, captions = output / "pictures", output / CAPTIONS
    truths = draw_pictures(pictures, count, seed)
    print(f"drew {count_nouns(count, 'image')} into {pictures}; no training image had the same caption", flush=True)
    if exit_code := _run_captioning(pictures, captions):
        print(f"error: the captioning job failed with exit code {exit_code}; its messages are above")
        return 1
    _print_comparisons(compare(captions, truths))
    if exit_code := _answer_examples(output, seed):
        return exit_code
    print(f"images: {pictures}\ncaptions: {captions / 'data'}/*.parquet")
    print("next: run the command above on your own directories; use --model AIDC-AI/Ovis2-1B for photographs")
    return 0


def _run_captioning(pictures: Path, captions: Path) -> int:
    return run_module("jobs.caption", str(pictures), str(captions), "--model", "demo", "--overwrite")


def _answer_examples(output: Path, seed: int) -> int:
    """Ask one question of each skill -> the exit code of the job."""
    questions, answers = output / "questions", output / "answers"
    examples = write_examples(questions, seed)
    options = ["--model", "demo", "--num-frames", str(NUM_FRAMES), "--overwrite"]
    if exit_code := run_module("jobs.caption", str(questions / "questions.jsonl"), str(answers), *options):
        return exit_code
    _print_answers(examples, {row["id"]: row["text"] for row in read_results(str(answers)).to_pylist()})
    return 0


def _print_answers(examples: Sequence[Example], answers: dict[str, str]) -> None:
    for example in examples:
        answer = answers[example.skill]
        mark = "right" if answer == example.truth else f"WRONG, it is {example.truth}"
        print(f"\n{example.skill}: {', '.join(example.files) or 'text alone'}")
        print(f"  {example.prompt.replace(chr(10), ' | ')}\n  {answer}  ({mark})")
    print()


def run_module(*command: str) -> int:
    """Run `python -m COMMAND` -> its exit code. Its progress appears on stderr of this terminal."""
    print(f"$ {shlex.join(['python', '-m', *command])}", flush=True)
    return subprocess.run([sys.executable, "-m", *command], stdout=subprocess.DEVNULL).returncode


def draw_pictures(directory: Path, count: int, seed: int) -> dict[str, str]:
    """Draw images into a directory -> {file name: true caption}. Every fourth one is a JPEG, the others are PNG."""
    directory.mkdir(parents=True, exist_ok=True)
    for picture in directory.iterdir():
        if re.fullmatch(r"\d{4}\.(png|jpg)", picture.name):  # from an earlier demo; other files stay
            picture.unlink()
    truths = {}
    for i in range(count):
        image, scene = make_picture(seed * SEEDS_APART + i, held_out=True)
        name = f"{i:04}.jpg" if i % 4 == 3 else f"{i:04}.png"
        image.save(directory / name, quality=90)  # PNG ignores the quality
        truths[name] = scene.caption
    return truths


def compare(captions: Path, truths: dict[str, str]) -> list[Comparison]:
    """Return one comparison per image, in the order of the file names."""
    rows = {Path(row["uri"]).name: row for row in read_results(str(captions)).to_pylist()}
    return [Comparison(name, rows[name]["text"], truth, rows[name]["num_tiles"]) for name, truth in truths.items()]


def _print_comparisons(comparisons: list[Comparison]) -> None:
    """Print the first images, the first mistakes after them, and the shares that are right."""
    wrong = [c for c in comparisons[SHOWN:] if not c.is_right]
    for c in [*comparisons[:SHOWN], *wrong[: SHOWN // 3]]:
        mark = "right" if c.is_right else "WRONG"
        print(f"\n{mark}  {c.file_name}  {c.caption}\n       truth     {c.truth}")
    print(f"\nexactly right: {_format_share(comparisons)}")
    print(f"  in one tile: {_format_share([c for c in comparisons if c.num_tiles == 1])}")
    print(f"  in several:  {_format_share([c for c in comparisons if c.num_tiles > 1])}\n")


def _format_share(comparisons: list[Comparison]) -> str:
    num_right, count = sum(c.is_right for c in comparisons), len(comparisons)
    return f"{num_right} of {count} ({num_right / count:.1%})" if count else "none"


if __name__ == "__main__":
    sys.exit(main())
