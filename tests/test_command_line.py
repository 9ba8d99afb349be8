"""Flags, YAML and Python give the same configuration; a usage error is one plain line and exit code 2."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import jobs.__main__
from jobs import JOBS, annotate, caption
from jobs.command_line import Command, parse_command_line
from jobs.options import Option, list_options
from pipelines.config import CaptionConfig
from tests.support.roots import ROOT

COMMANDS: dict[str, Command[Any]] = {name: import_module(f"jobs.{name.replace('-', '_')}").COMMAND for name in JOBS}
OPTIONS = [(command, option) for command in COMMANDS.values() for option in command.options.values()]
REQUIRED = ("in", "out", "--model", "demo")
WORDS_OF_LIBRARIES = re.compile(
    r"[Ff]ield required|Input should|[Vv]alue error|unable to parse|not permitted|validation|pydantic|constrained|"
    r"literal|Errno|unicode string|argument --|expected one argument|unrecognized"
)


def parse(*argv: str) -> CaptionConfig:
    return parse_command_line(caption.COMMAND, argv, "ovis2 caption")


def read_usage_errors(
    capsys: pytest.CaptureFixture[str], *argv: str, command: Command[Any] = caption.COMMAND
) -> list[str]:
    """Run a command that fails with usage errors and return their lines without "error: "."""
    with pytest.raises(SystemExit) as exit_info:
        parse_command_line(command, argv, f"ovis2 {command.name}")
    assert exit_info.value.code == 2
    out, err = capsys.readouterr()
    *errors, pointer = err.splitlines()
    assert not out and errors and pointer == f"See ovis2 {command.name} --help"
    assert all(line.startswith("error: ") for line in errors), errors
    assert not WORDS_OF_LIBRARIES.search(err), err
    return [line.removeprefix("error: ") for line in errors]


def test_flags_give_the_same_configuration_as_python() -> None:
    config = parse("in", "out", "--model", "demo", "--max-tiles", "4", "--top-p", "0.5", "--overwrite")
    wanted = CaptionConfig(input=("in",), output="out", model="demo", max_tiles=4, top_p=0.5, overwrite=True)
    assert config == wanted


def test_paths_and_flags_in_any_order() -> None:
    assert parse("--model", "demo", "in", "--seed", "-3", "out") == parse(*REQUIRED, "--seed=-3")
    assert parse("in", "--model", "demo", "--", "-out").output == "-out"


def test_repeated_flags_keep_values_with_commas_whole() -> None:
    config = parse("a,b.jpg", "out", "--input", "c d.jpg", "--model", "demo", "--stop", ",", "--stop", ". ")
    assert config.input == ("a,b.jpg", "c d.jpg")
    assert config.stop == (",", ". ")
    assert parse("out", "--input", "x", "--model", "demo").input == ("x",)
    assert parse(*REQUIRED, "--stop=-x").stop == ("-x",)


def test_flags_override_yaml(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "input: [a, b]\noutput: out\nmodel: demo\nmax-new-tokens: 7\nprompt: |\n  Two\n  lines\ntop_p: 0.5\n"
    )
    config = parse("--config", str(file), "--top-p", "0.9")
    assert parse("c", "other", "--config", str(file)).input == ("c",)
    assert parse("other", "--config", str(file)).output == "other"
    assert (config.input, config.output, config.max_new_tokens) == (("a", "b"), "out", 7)
    assert (config.prompt, config.top_p) == ("Two\nlines\n", 0.9)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([*REQUIRED, "--promt", "Why?"], ["--promt", "did you mean --prompt?"]),
        ([*REQUIRED, "--max-tokens=2"], ["--max-tokens is not an option", "did you mean --max-new-tokens?"]),
        (["in", "out"], ["--model is missing"]),
        (["out", "--model", "demo"], ["'out'", "INPUT and OUTPUT"]),
        (["a", "b", "c", "--model", "demo"], ["'a', 'b', 'c'", "--input"]),
        ([*REQUIRED, "--top-p", "2"], ["--top-p", "'2'", "above 0 and at most 1"]),
        ([*REQUIRED, "--max-new-tokens", "1.5"], ["--max-new-tokens", "'1.5'", "whole number of at least 1"]),
        ([*REQUIRED, "--num-replicas", "some"], ["--num-replicas", "'some'", "auto or a whole number of at least 1"]),
        ([*REQUIRED, "--device", "gpu"], ["--device", "'gpu'", "auto, cpu or cuda"]),
        ([*REQUIRED, "--stop"], ["--stop needs a value"]),
        ([*REQUIRED, "--stop", "-x"], ["--stop needs a value", "--stop=VALUE"]),
        ([*REQUIRED, "--overwrite=yes"], ["--overwrite takes no value", "'yes'"]),
        ([*REQUIRED, "--stop", ""], ["--stop: ''", "may not be empty"]),
        ([*REQUIRED, "--prompt", "a\udcff"], ["--prompt: 'a\\udcff'", "is not UTF-8"]),
        ([*REQUIRED, "--keep-columns", "a,a"], ["--keep-columns", "twice"]),
        ([*REQUIRED, "--autoscale"], ["--autoscale", "--num-replicas N"]),
        ([*REQUIRED, "--overwrite", "--extend"], ["--overwrite", "--extend"]),
        ([*REQUIRED, "--config", "nowhere.yaml"], ["nowhere.yaml"]),
    ],
)
def test_a_usage_error_is_one_line(argv: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    [line] = read_usage_errors(capsys, *argv)
    assert all(part in line for part in parts), line


def test_several_errors_have_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        len(read_usage_errors(capsys, "--model", "demo", "--top-p", "2", "--device", "gpu")) == 4
    )  # and INPUT, OUTPUT


@pytest.mark.parametrize(
    ("yaml", "parts"),
    [
        ("modle: demo", ["line 1: modle is not an option", "did you mean model?"]),
        ("model: demo\nmax-tokens: 5", ["line 2: max-tokens", "did you mean max-new-tokens?"]),
        ("model: demo\ntop-p: 2", ["line 2: top-p: got 2", "at most 1"]),
        ("model: demo\nautoscale: 5", ["line 2: autoscale: got 5", "true or false"]),
        ("model: demo\nid_column: [a]", ["line 2: id_column: got ['a']", "a column name"]),
        ("model: demo\nprompt: 5", ["line 2: prompt: got 5", "text in quotes"]),
        ("model: demo\nstop: null", ["line 2: stop: got null"]),
        ("model: demo\n  top-p: [2", ["line 2, column 8", "not YAML"]),
        ("model: \0", ["not YAML"]),
        ("- model", ["must hold options"]),
        ("model: \udcff", ["not UTF-8"]),
    ],
)
def test_an_error_in_yaml_names_file_line_and_key(
    tmp_path: Path, yaml: str, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(yaml.encode("utf-8", "surrogateescape"))
    line = read_usage_errors(capsys, "in", "out", "--config", str(file))[0]
    assert line.startswith(str(file)) and all(part in line for part in parts), line


@pytest.mark.parametrize("line", ["input: 5", "input:", "input: [1]", "input: []"])
def test_a_wrong_input_in_yaml_is_named(tmp_path: Path, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"model: demo\noutput: out\n{line}\n")
    assert read_usage_errors(capsys, "--config", str(file))[0].startswith(f"{file}, line 3: input")


def test_an_error_in_tasks_names_task_and_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tasks.yaml"
    file.write_text("tasks: [{name: hue, prompt: Hue, temprature: 1}, {prompt: 7, top_k: many}, {name: a, prompt: a}]")
    lines = read_usage_errors(capsys, *REQUIRED, "--tasks", str(file), command=annotate.COMMAND)
    assert lines == [
        f"{file}, line 1, task 'hue': temprature is not a field of a task; did you mean temperature?",
        f"{file}, line 1, task 2: name is missing",
        f"{file}, line 1, task 2: prompt: got 7; use non-empty text",
        f"{file}, line 1, task 2: top_k: got 'many'; use a whole number of at least 0",
    ]


@pytest.mark.parametrize(("command", "option"), OPTIONS, ids=[f"{c.name} {o.flag}" for c, o in OPTIONS])
def test_a_wrong_value_of_any_option_is_one_plain_line(
    tmp_path: Path, command: Command[Any], option: Option, capsys: pytest.CaptureFixture[str]
) -> None:
    """The value comes from YAML, where it may have any type; no option accepts a mapping."""
    given = {
        "benchmark": "MMStar",
        "input": "in",
        "output": "out",
        "model": "demo",
        "tasks": [{"name": "a", "prompt": "b"}],
    }
    values = {name: value for name, value in given.items() if name in command.options} | {option.name: {"x": 1}}
    file = tmp_path / "run.yaml"
    file.write_text("".join(f"{name}: {value}\n" for name, value in values.items()))
    if "--config" in format_help(command):
        [line] = read_usage_errors(capsys, "--config", str(file), command=command)
        assert line.startswith(f"{file}, line ") and f"{option.name}: got {{'x': 1}}; use {option.allowed}" in line
    elif not option.is_switch and option.allowed != "text" and "number" in option.allowed:
        [line] = read_usage_errors(capsys, *["out"] * len(command.positionals), option.flag, "x", command=command)
        assert line == f"{option.flag}: got 'x'; use {option.allowed}"


def format_help(command: Command[Any]) -> str:
    """Return the --help of a command as one line."""
    from jobs.command_line import build_parser

    return " ".join(build_parser(command, f"ovis2 {command.name}").format_help().split())


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_help_shows_every_option_with_its_values_and_default(command: Command[Any]) -> None:
    text = format_help(command)
    for option in list_options(command.kind):
        assert option.description, f"{option.flag} is not described"
        if option.name in command.positionals:
            assert f"{option.name.upper()} {option.field.description}" in text
        elif option.is_switch:
            assert f"{option.flag}, --no-{option.flag[2:]} {option.description} (default: {option.default})" in text
        else:
            note = f"default: {option.default}" if option.default else "required"
            assert option.default or option.is_required, f"{option.flag} does not say what happens without it"
            assert f"{option.flag} {option.metavar} {option.description} ({note})" in text
    assert all(f"ovis2 {command.name} {example}".strip() in text for example in command.examples)


def test_the_command_lists_its_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        jobs.__main__.main(["--help"])
    out = capsys.readouterr().out
    assert exit_info.value.code == 0 and all(f"{name} " in out and about in out for name, about in JOBS.items())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["captoin"], "error: 'captoin' is not a job; did you mean caption?"),
        (["cook"], "error: 'cook' is not a job; use caption, annotate, "),
        ([], "error: JOB is missing; use caption, annotate, "),
        (["--versoin"], "error: --versoin is not an option; did you mean --version?"),
    ],
)
def test_an_unknown_job_is_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        jobs.__main__.main(argv)
    out, err = capsys.readouterr()
    assert exit_info.value.code == 2 and not out
    assert err.startswith(message) and err.endswith("\nSee ovis2 --help\n") and err.count("\n") == 2


@pytest.mark.parametrize("arguments", [["--help"], ["caption", "--help"], ["caption", "in", "out"]])
def test_help_and_usage_errors_load_neither_ray_nor_torch(arguments: list[str]) -> None:
    loads = (
        "import sys, jobs.__main__\n"
        f"try: jobs.__main__.main({arguments})\n"
        "except SystemExit: print(sorted({'ray', 'torch', 'pandas'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", loads], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"


def test_python_m_jobs_is_the_command() -> None:
    shown = subprocess.run([sys.executable, "-m", "jobs", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0 and shown.stdout.startswith("usage: python -m jobs JOB")


def test_each_row_has_its_own_repeatable_seed() -> None:
    config = parse("in", "out", "--model", "demo", "--seed", "5")
    [task] = config.questionnaire.tasks
    seeds = {task.make_sampling_params(row_id, lambda _: []).seed for row_id in "abc"}
    assert len(seeds) == 3 and all(0 <= seed < 2**63 for seed in seeds if seed is not None)
    assert task.make_sampling_params("a", lambda _: []) == task.make_sampling_params("a", lambda _: [])


def test_the_tile_limit_depends_on_the_number_of_images() -> None:
    config = parse("in", "out", "--model", "demo")
    assert (config.max_tiles_per_image(1), config.max_tiles_per_image(3)) == (9, 4)
    assert parse("in", "out", "--model", "demo", "--max-tiles", "2").max_tiles_per_image(3) == 2
