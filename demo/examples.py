"""Show one example of each skill of the demo model: files of images and a clip, and a list of questions about them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.data import NUM_FRAMES, Form, Lesson, make_lesson
from demo.questions import Asked, Skill
from demo.video_benchmarks import write_frames

_FORMS: dict[Skill, Form] = {
    "caption": "caption",
    "bool": "picture",
    "count": "picture",
    "choice": "picture",
    "relation": "picture",
    "number": "picture",
    "compare": "pair",
    "motion": "clip",
    "chinese caption": "caption",
    "chinese answer": "picture",
    "text": "search",
}
_MAX_SEEDS = 1000


@dataclass(frozen=True)
class Example:
    """A question about `files`, and its true answer; `skill` is also the id of its row."""

    skill: Skill
    files: tuple[str, ...]
    prompt: str
    truth: str

    def to_row(self) -> dict[str, Any]:
        """Return the row of the job's input."""
        return {"id": self.skill, "prompt": self.prompt} | ({"image": list(self.files)} if self.files else {})


def write_examples(directory: Path, seed: int) -> list[Example]:
    """Write the files and `questions.jsonl`, which lists the examples."""
    directory.mkdir(parents=True, exist_ok=True)
    examples = [_write_example(directory, skill, form, seed) for skill, form in _FORMS.items()]
    lines = [json.dumps(example.to_row(), ensure_ascii=False) + "\n" for example in examples]
    (directory / "questions.jsonl").write_text("".join(lines), "utf-8")
    return examples


def _write_example(directory: Path, skill: Skill, form: Form, seed: int) -> Example:
    lesson, asked = next(_find(skill, form, seed))
    name = skill.replace(" ", "-")
    files = tuple(f"{name}-{number}.png" for number in range(len(lesson.images)))
    if lesson.is_clip:
        files = (f"{name}.mp4",)
        write_frames(directory / files[0], [frame for frame in lesson.images for _ in range(NUM_FRAMES)])
    else:
        for file, image in zip(files, lesson.images, strict=True):
            image.save(directory / file)
    return Example(skill, files, lesson.preface + asked.text, asked.answer)


def _find(skill: Skill, form: Form, seed: int) -> Iterator[tuple[Lesson, Asked]]:
    """Yield held-out lessons that ask for the skill; all questions about text alone are of the skill "text"."""
    for number in range(seed * _MAX_SEEDS, (seed + 1) * _MAX_SEEDS):
        lesson = make_lesson(form, number, held_out=True)
        yield from ((lesson, asked) for asked in lesson.asked if skill in (asked.skill, "text"))
