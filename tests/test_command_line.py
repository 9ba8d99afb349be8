"""Flags, YAML and Python give the same configuration; bad usage names the option and exits with 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.options import parse_command_line
from pipelines.config import CaptionConfig


def parse(*argv: str) -> CaptionConfig:
    return parse_command_line(CaptionConfig, "caption", "Caption.", argv)


def test_flags_give_the_same_configuration_as_python() -> None:
    config = parse("in", "out", "--model", "demo", "--max-tiles", "4", "--top-p", "0.5", "--overwrite")
    wanted = CaptionConfig(input=("in",), output="out", model="demo", max_tiles=4, top_p=0.5, overwrite=True)
    assert config == wanted


def test_repeated_flags_keep_values_with_commas_whole() -> None:
    config = parse("a,b.jpg", "out", "--input", "c d.jpg", "--model", "demo", "--stop", ",", "--stop", ". ")
    assert config.input == ("a,b.jpg", "c d.jpg")
    assert config.stop == (",", ". ")
    assert parse("out", "--input", "x", "--model", "demo").input == ("x",)


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
    ("argv", "message"),
    [
        (["in", "out"], "--model: Field required"),
        (["out", "--model", "demo"], "expected INPUT and OUTPUT"),
        (["a", "b", "c", "--model", "demo"], "--input"),
        (
            ["in", "out", "--model", "demo", "--top-p", "2"],
            "--top-p: Input should be less than or equal to 1 (got '2')",
        ),
        (["in", "out", "--model", "demo", "--num-replicas", "some"], "--num-replicas"),
        (["in", "out", "--model", "demo", "--tensor-parallel", "0"], "--tensor-parallel"),
        (
            ["in", "out", "--model", "demo", "--autoscale"],
            "--autoscale needs to know for how many: give --num-replicas N",
        ),
        (["in", "out", "--model", "demo", "--max-tokens", "2"], "unrecognized arguments: --max-tokens"),
        (["in", "out", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["in", "out", "--model", "demo", "--stop", ""], "--stop: Value error, may not be empty"),
        (["in", "out", "--model", "demo", "--prompt", "a\udcff"], "--prompt: Value error, is not UTF-8"),
    ],
)
def test_bad_usage_exits_with_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse(*argv)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("line", ["input: 5", "input:", "input: [1]"])
def test_a_wrong_input_in_yaml_is_named(tmp_path: Path, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"{line}\nmodel: demo\noutput: out\n")
    with pytest.raises(SystemExit):
        parse("--config", str(file))
    assert "INPUT" in capsys.readouterr().err


def test_an_unknown_option_in_yaml_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("modle: demo\n")
    with pytest.raises(SystemExit):
        parse("in", "out", "--model", "demo", "--config", str(file))
    assert "--modle: Extra inputs are not permitted" in capsys.readouterr().err


def test_each_row_has_its_own_repeatable_seed() -> None:
    config = parse("in", "out", "--model", "demo", "--seed", "5")
    [task] = config.questionnaire.tasks
    seeds = {task.sampling(row_id, lambda _: []).seed for row_id in "abc"}
    assert len(seeds) == 3 and all(0 <= seed < 2**63 for seed in seeds if seed is not None)
    assert task.sampling("a", lambda _: []) == task.sampling("a", lambda _: [])


def test_the_tile_limit_depends_on_the_number_of_images() -> None:
    config = parse("in", "out", "--model", "demo")
    assert (config.max_tiles_per_image(1), config.max_tiles_per_image(3)) == (9, 4)
    assert parse("in", "out", "--model", "demo", "--max-tiles", "2").max_tiles_per_image(3) == 2
