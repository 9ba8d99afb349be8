"""README.md tells the truth: its commands run in a directory of one's own, its snippet and its tables are right."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

import jobs.caption
from jobs.cli import EXIT_CODES
from jobs.demo import draw_pictures
from pipelines import schema
from pipelines.config import RunConfig
from tests.support.markdown import list_blocks, list_code_lines, read_page, read_table
from tests.support.roots import ROOT
from tests.support.tars import write_tar
from tests.support.videos import write_video

README = ROOT / "README.md"
MODEL = re.compile(r"--model \S+")


def read_readme() -> str:
    return read_page(README)


def test_it_is_short() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 180 and max(map(len, lines)) <= 110


def test_its_first_block_is_two_targets_of_make() -> None:
    first = list_blocks(README, "bash")[0]
    assert [line.split("#")[0].split() for line in first.splitlines()] == [["make", "demo"], ["make", "test"]]


def test_files_named_exist() -> None:
    folders = [path.name for path in ROOT.iterdir() if path.is_dir()]
    named = {line.strip("`") for line in re.findall(rf"`(?:{'|'.join(folders)})/[^`*]+`", read_readme())}
    tree = re.findall(r"(?<![\w/])([a-z_]+)/(?= )", list_blocks(README, "text")[-1])
    assert len(tree) > 15
    known = {path.name for path in ROOT.glob("**/") if ".venv" not in path.parts}
    assert [name for name in named if not (ROOT / name).exists()] == [] == [name for name in tree if name not in known]


def test_columns_are_those_of_the_schema() -> None:
    rows = [(names, type_) for names, type_, _ in read_table(read_readme(), "column") if names != "kept columns"]
    table = [(name, type_) for names, type_ in rows for name in re.findall(r"`(\w+)`", names)]
    assert table == [(field.name, spell_type(field.type)) for field in schema.OUTPUT]


def test_exit_codes_have_the_wording_of_help() -> None:
    table = {int(code): meaning.replace("`", "") for code, meaning in read_table(read_readme(), "exit code")}
    assert table == EXIT_CODES


@pytest.mark.parametrize(
    ("type_", "name"),
    [(pa.string(), "string"), (pa.float32(), "float32"), (pa.list_(pa.float32()), "list<float32>")],
)
def test_types_are_spelled_as_in_the_table(type_: pa.DataType, name: str) -> None:
    assert spell_type(type_) == name


def spell_type(type_: pa.DataType) -> str:
    if pa.types.is_list(type_):
        return f"list<{spell_type(type_.value_type)}>"
    return {"float": "float32", "double": "float64"}.get(str(type_), str(type_))


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make what a reader has: the images of `make demo`, and images, shards, videos and questions of their own."""
    place = tmp_path_factory.mktemp("clone")
    truths = draw_pictures(place / "demo_output" / "pictures", count=2, seed=1)
    shutil.copytree(place / "demo_output" / "pictures", place / "my" / "images")
    members = [
        ("a.png", (place / "my" / "images" / "0000.png").read_bytes()),
        ("a.txt", b"What colour is the background?"),
    ]
    (place / "shards").mkdir()
    write_tar(place / "shards" / "0.tar", members)
    (place / "my" / "videos").mkdir()
    write_video(place / "my" / "videos" / "clip.mp4", 50)
    (place / "tasks.yaml").write_text('tasks: [{name: background, prompt: "Which colour?", answer: bool}]')
    assert len(truths) == 2
    return place


def run(command: list[str], place: Path, **environment: str) -> str:
    result = subprocess.run(
        command,
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 0, f"{shlex.join(command)}\n{result.stderr}"
    return result.stdout


def test_its_python_runs(clone: Path) -> None:
    [snippet] = list_blocks(README, "python")
    printed = run([sys.executable, "-c", snippet], clone)
    assert f"right  0000.png  {printed}" in list_blocks(README, "text")[0]


def test_its_commands_run(clone: Path, ray_address: str) -> None:
    """With the demo model in place of published weights."""
    commands = [line for line in list_code_lines(README) if re.match(r"ovis2 \w+ .*(--model|captions)", line)]
    assert len(commands) == 6
    for command in commands:
        arguments = shlex.split(MODEL.sub("--model demo --max-new-tokens 16", command))[1:]
        run([sys.executable, "-m", "jobs", *arguments], clone, RAY_ADDRESS=ray_address)
    rows = pd.read_parquet(clone / "captions" / "data")
    assert len(rows) == 2 and rows["text"].str.endswith(" background.").all()
    assert pd.read_parquet(clone / "tar-captions" / "data")["prompt"].tolist() == ["What colour is the background?"]
    assert pd.read_parquet(clone / "video-captions" / "data")["num_images"].tolist() == [12]
    assert pd.read_parquet(clone / "answers" / "data")["background"].notna().all()
    assert (clone / "captions" / "report.html").exists()


def test_its_command_for_clusters_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the start of the run; tests/test_job_submit.py submits one to a cluster."""
    [command] = [line for line in list_code_lines(README) if line.startswith("ray job submit --")]
    submit, _, entrypoint = command.partition(" -- ")
    assert submit == "ray job submit --working-dir ."
    python, dash_m, module, *arguments = shlex.split(entrypoint)
    assert (python, dash_m, module) == ("python", "-m", "jobs.caption")
    started: list[RunConfig] = []

    def start(config: RunConfig) -> Any:
        started.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.pipeline.run_pipeline", start)
    jobs.caption.main(arguments)
    assert [config.model for config in started] == ["AIDC-AI/Ovis2-8B"]
