"""Options that other trainers have are refused with what to do in their place."""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from jobs import train
from jobs.trainer_names import advise
from pipelines.training.config import TrainConfig

OPTIONS = {name.replace("_", "-") for name in TrainConfig.model_fields}
OF_OTHERS = ["lora_r", "model_max_length", "train_file", "validation_file", "trust_remote_code", "overwrite_output_dir"]


def list_names_of_the_trainer() -> list[str]:
    """Return the fields of Hugging Face's TrainingArguments, without importing them."""
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        pytest.skip("needs transformers")
    tree = ast.parse((Path(spec.origin).parent / "training_args.py").read_text())
    [arguments] = [x for x in tree.body if isinstance(x, ast.ClassDef) and x.name == "TrainingArguments"]
    targets = (field.target for field in arguments.body if isinstance(field, ast.AnnAssign))
    return [target.id for target in targets if isinstance(target, ast.Name)]


def test_each_option_of_the_trainer_is_ours_or_has_advice() -> None:
    names = [*list_names_of_the_trainer(), *OF_OTHERS]
    assert len(names) > 100
    ours = set(TrainConfig.model_fields)
    assert [name for name in names if name not in ours and not advise(name)] == []
    assert {"learning_rate", "num_train_epochs", "warmup_ratio", "max_grad_norm", "fsdp", "seed"} <= ours


def test_advice_names_options_that_exist() -> None:
    from jobs.trainer_names import _ADVICE

    named = {flag for advice in _ADVICE.values() for flag in re.findall(r"--([a-z-]+[a-z])", advice)}
    assert named - OPTIONS == set() and len(named) > 20


@pytest.mark.parametrize(
    ("flag", "advice"),
    [
        ("--bf16", "--bf16 is not an option; use --dtype bfloat16"),
        ("--report_to=wandb", "--report_to is not an option; metrics.jsonl"),
        ("--resume-from-checkpoint", "the same command continues from the last checkpoint"),
        ("--learning_rate=1", "did you mean --learning-rate?"),
        ("--lerning-rate=1", "did you mean --learning-rate?"),
    ],
)
def test_the_command_says_what_to_do(flag: str, advice: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        train.main(["data.json", "out", "--model", "m", flag])
    assert exit_.value.code == 2 and advice in capsys.readouterr().err


def test_a_file_of_options_says_it_with_the_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "options.yaml").write_text("model: m\nfp16: true\n")
    with pytest.raises(SystemExit):
        train.main(["data.json", "out", "--config", str(tmp_path / "options.yaml")])
    assert "line 2: fp16 is not an option; use --dtype bfloat16 or float32" in capsys.readouterr().err
