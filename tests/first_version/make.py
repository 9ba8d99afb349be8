"""Write the files next to this one with the first version of this project (commit 38e6894).

    cd FIRST_VERSION && PYTHONPATH=. python PATH/TO/tests/first_version/make.py

FIRST_VERSION is a checkout of that commit, and this interpreter has what it needs. The runs are made in PLACE, which so
becomes a part of the absolute paths in run.json and in the manifests. tests/test_first_version.py replaces it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from jobs.shapes import make_picture, questions  # of the first version

HERE, PLACE = Path(__file__).parent, Path("/tmp/first_version")
NUM_PICTURES = 12
TASKS = """\
- {name: caption, prompt: "Describe the image.", max_new_tokens: 24}
- {name: is_so, prompt: "{question}", answer: bool}
- {name: objects, prompt: "How many objects are there?", answer: {int: {min: 0, max: 6}}}
- {name: background, prompt: "What colour is the background?", answer: {choices: [white, grey, black]}}
- {name: tags, prompt: "Name up to two things.", answer: {"list[str]": {max_items: 2}}, max_new_tokens: 12}
"""


def main() -> None:
    shutil.rmtree(PLACE, ignore_errors=True)
    (PLACE / "pictures").mkdir(parents=True)
    lines = [write_picture(number) for number in range(NUM_PICTURES)]
    (PLACE / "pictures.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (PLACE / "tasks.yaml").write_text(TASKS)
    options = ["--model", "demo", "--rows-per-file", "4", "--max-error-rate", "0.5"]
    run("caption", PLACE / "pictures", PLACE / "caption", "--max-new-tokens", "24", *options)
    asked = ["--tasks", PLACE / "tasks.yaml", "--keep-columns", "question,weight"]
    run("annotate", PLACE / "pictures.jsonl", PLACE / "annotate", *asked, *options)
    shutil.copytree(PLACE, HERE, dirs_exist_ok=True)


def write_picture(number: int) -> dict[str, object]:
    """Write a picture, two of the twelve broken, and return its line of pictures.jsonl."""
    image, scene = make_picture(number, held_out=True, many_tiles=False)
    path = PLACE / "pictures" / f"{number:02}.{'jpg' if number % 4 == 3 else 'png'}"
    image.save(path, quality=90)
    if number in (2, 7):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return {"image": f"pictures/{path.name}", "question": questions(scene, number)[0].text, "weight": number / 8}


def run(job: str, *arguments: object) -> None:
    subprocess.run([sys.executable, "-m", f"jobs.{job}", *map(str, arguments)], check=True)


if __name__ == "__main__":
    main()
