"""tasks.yaml: the options of a task, the run's defaults for them, the output columns, and errors in the file."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from pydantic import ValidationError

from jobs import annotate
from jobs.command_line import parse_command_line
from ovis_model.types import Constraint
from pipelines import schema
from pipelines.checks import check_model
from pipelines.config import AnnotateConfig
from pipelines.errors import SourceError
from pipelines.sources import list_rows
from tests.support.golden_data import checkpoint_dir
from tests.support.pictures import draw

MODEL = checkpoint_dir("tiny56-tied")
TASKS = """
tasks:
  - name: caption
    prompt: Describe this {kind}.
    max_new_tokens: 40
    temperature: 0.5
  - name: has_red
    prompt: Is there red?
    answer: bool
    system: Be brief.
  - name: tags
    prompt: Tags?
    answer: {"list[str]": {max_items: 5}}
  - name: record
    prompt: Read it.
    answer: {json_schema: record.json}
"""
RECORD = {"type": "object", "properties": {"what": {"type": "string"}}}


def tokenize(text: str) -> list[int]:
    return list(text.encode())


@pytest.fixture
def tasks_file(tmp_path: Path) -> Path:
    (tmp_path / "record.json").write_text(json.dumps(RECORD))
    (tmp_path / "tasks.yaml").write_text(TASKS)
    return tmp_path / "tasks.yaml"


def list_task_rows(config: AnnotateConfig) -> list[dict[str, Any]]:
    with list_rows(config, config.questionnaire) as listing:
        return [row for table in listing.read_tables() for row in table.to_pylist()]


def parse(*argv: str) -> AnnotateConfig:
    return parse_command_line(annotate.COMMAND, ["in", "out", "--model", "demo", *argv], "annotate")


def test_tasks_override_the_options_of_the_run(tasks_file: Path) -> None:
    config = parse("--tasks", str(tasks_file), "--max-new-tokens", "7", "--stop", "END", "--system-prompt", "Hello.")
    caption, has_red, _, record = config.questionnaire.tasks
    assert (caption.max_new_tokens, caption.temperature, caption.system) == (40, 0.5, "Hello.")
    assert (has_red.max_new_tokens, has_red.temperature, has_red.system) == (7, 0.0, "Be brief.")
    assert record.answer.spec == {"json_schema": RECORD}
    params = [task.make_sampling_params("row", tokenize) for task in config.questionnaire.tasks]
    assert [p.stop for p in params] == [("END",), (), (), ()]
    assert params[1].choices == (tuple(b"Yes"), tuple(b"No"))
    assert isinstance(params[2].constraint, Constraint) and params[0].constraint is None
    assert len({p.seed for p in params}) == 4
    assert len({caption.make_sampling_params(row, tokenize).seed for row in "abc"}) == 3


def test_tasks_survive_the_way_through_a_config_file(tasks_file: Path, tmp_path: Path) -> None:
    config = parse("--tasks", str(tasks_file))
    written = tmp_path / "config.yaml"
    written.write_text(yaml.safe_dump({"tasks": config.questionnaire.describe()["tasks"]}, sort_keys=False))
    again = parse("--config", str(written))
    assert [task.model_dump() for task in again.questionnaire.tasks] == [
        task.model_dump() for task in config.questionnaire.tasks
    ] and again.questionnaire.schema == config.questionnaire.schema
    assert pickle.loads(pickle.dumps(config)) == config
    assert json.loads(json.dumps(config.fingerprint_fields()))["tasks"][1]["answer"] == "bool"


def test_each_task_adds_its_columns_to_the_output(tasks_file: Path) -> None:
    columns = parse("--tasks", str(tasks_file)).questionnaire.schema
    assert columns.names[: len(schema.ITEM)] == schema.ITEM.names
    assert columns.names[len(schema.ITEM) :] == [
        "flags",
        *("caption", "caption_text", "caption_finish_reason", "caption_confidence"),
        *("has_red", "has_red_text", "has_red_finish_reason", "has_red_confidence"),
        *("tags", "tags_text", "tags_finish_reason", "tags_confidence"),
        *("record", "record_text", "record_finish_reason", "record_confidence"),
    ]
    assert columns.field("has_red").type == pa.bool_() and columns.field("has_red").nullable
    assert [field.name for field in columns.field("has_red_confidence").type] == ["Yes", "No"]
    assert columns.field("tags_confidence").type == pa.float32()
    assert columns.field("record").type == pa.struct({"what": pa.string()})
    again = parse("--tasks", str(tasks_file), "--regenerate", "flagged").questionnaire.schema
    assert set(again.names) - set(columns.names) == {
        f"{t}_alternative" for t in ("caption", "has_red", "tags", "record")
    }


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("tasks: []", "give at least one"),
        ("tasks: {name: a}", "must hold `tasks:` and a list of them"),
        ("tasks: [{name: a}]", "task 'a': prompt is missing"),
        ("tasks: [{name: A, prompt: b}]", "task 'A': name: got 'A'"),
        ("tasks: [{name: a, prompt: b, answer: yes-no}]", "'yes-no' is unknown; give text, bool"),
        (
            "tasks: [{name: a, prompt: b, max_tokens: 5}]",
            "task 'a': max_tokens is not a field of a task; did you mean max_new_tokens?",
        ),
        ("tasks: [{name: a, prompt: b}, {name: a, prompt: c}]", "would be named a, a_confidence"),
        ("tasks: [{name: a, prompt: b}, {name: a_text, prompt: c}]", "line 1, task a_text: two columns of"),
        ("tasks: [{name: status, prompt: b}]", "would be named status"),
        ("tasks: [{name: row, prompt: b}]", "would be named row"),
        ("tasks: [{name: a, prompt: b, answer: {json_schema: {enum: [2030-12-31]}}}]", "quote them"),
        ("tasks: [{name: a, prompt: b, answer: {json_schema: {properties: {yes: {}}}}}]", "quote them"),
        ("tasks: [{name: a, prompt: b, answer: {json_schema: no.json}}]", "line 1, task 'a': cannot read"),
        ("tasks: [{name: a, prompt: b, answer: {json_schema: tasks.yaml}}]", "is not JSON"),
        ("tasks: [{name: a, prompt: ''}]", "task 'a': prompt: got ''"),
        ("tasks:\n- name: a\n  prompt: b\n  prompt: c", "line 4, task 'a': 'prompt' is given twice"),
        (
            "tasks:\n- {name: a, prompt: b}\n- {name: c, answer: text,\n   answer: bool, prompt: d}",
            "line 4, task 'c': 'answer'",
        ),
        ("version: 2\ntasks: [{name: a, prompt: b}]", "line 1: 'version' next to `tasks` has no effect"),
        (
            "tasks:\n- {name: a, prompt: x, answer: {json_schema: {properties: {a: {enum: [yes, no]}}}}}",
            "line 2, task 'a': YAML reads words such as yes as true: quote them",
        ),
        ("tasks:\n- {name: a, prompt: b}\n- {name: B, prompt: c}", "tasks.yaml, line 3, task 'B': name: got"),
        (": :", "tasks.yaml, line 1, column 1 is not YAML"),
    ],
)
def test_an_invalid_file_is_refused_with_the_reason(
    tmp_path: Path, tasks: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tasks.yaml").write_text(tasks)
    with pytest.raises(SystemExit) as exit_info:
        parse("--tasks", str(tmp_path / "tasks.yaml"))
    error = capsys.readouterr().err
    assert exit_info.value.code == 2 and message in error and "at least 1 item" not in error


@pytest.mark.parametrize("prompt", ["As JSON, e.g. {{}} of it", "What is the {kind}?"])
def test_braces_in_the_prompt_of_an_input_without_columns_are_reported(
    tmp_path: Path, prompt: str, caplog: pytest.LogCaptureFixture
) -> None:
    draw(tmp_path / "a.png", seed=1)
    task = {"name": "rec", "prompt": prompt}
    list_task_rows(AnnotateConfig(input=(str(tmp_path / "a.png"),), output="b", model="demo", tasks=[task]))
    assert "task rec: the input has no columns, so the prompt's {" in caplog.text


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("answer: {json_schema: {not: {type: string}}}", "the keyword 'not' is not supported"),
        ("answer: {choices: [a, 'cafe\u0301']}", "the model's tokenizer reads the choice"),
        ("max_new_tokens: 99999", "leaves no room for a prompt"),
        (f"answer: {{choices: [a, {'b ' * 33000}]}}", "leave no room for an image"),
        ("answer: {json_schema: {x-a: 1, type: integer}}", "ignored in the schema, as they say nothing"),
        ("system: Be brief", "sent as it is, braces included"),
    ],
)
def test_messages_before_the_run_name_the_file_the_line_and_the_task(
    tmp_path: Path, task: str, message: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    draw(tmp_path / "a.png", seed=1)
    file = tmp_path / "tasks.yaml"
    file.write_text(f"tasks:\n- {{name: a, prompt: b}}\n- {{name: c, prompt: 'The {{kind}}?', {task}}}", "utf-8")
    config = AnnotateConfig.model_validate(
        {"input": (str(tmp_path / "a.png"),), "output": "b", "model": str(MODEL), "tasks": str(file)}
    )
    refused = ""
    try:
        check_model(config)
        list_task_rows(config)
    except ValueError as error:
        refused = str(error)
    said = f"{refused}\n{caplog.text}\n{capsys.readouterr().err}"
    assert re.search(rf"{re.escape(str(file))}, line 3, task c: .*{re.escape(message)}", said), said


def test_rows_do_not_hold_the_file_of_their_tasks(tmp_path: Path, tasks_file: Path) -> None:
    config = parse("--tasks", str(tasks_file))
    assert [task.label for task in config.questionnaire.tasks][:2] == ["task caption: ", "task has_red: "]
    assert str(tasks_file) not in json.dumps(config.model_dump(mode="json"))


def test_kept_columns_may_not_clash_with_tasks(tasks_file: Path) -> None:
    tasks = yaml.safe_load(TASKS)["tasks"][:1]
    with pytest.raises(ValidationError, match="already has caption_text"):
        AnnotateConfig(input=("a",), output="b", model="demo", tasks=tasks, keep_columns=("caption_text",))


def test_a_row_without_an_image_is_not_logged_as_text_only(
    tmp_path: Path, tasks_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "list.jsonl").write_text('{"prompt": "Why?", "kind": "dog"}\n')
    list_task_rows(parse("--tasks", str(tasks_file)).model_copy(update={"input": (str(tmp_path / "list.jsonl"),)}))
    assert "sent as text" not in caplog.text


def test_only_free_text_ends_at_a_stop_string(tasks_file: Path) -> None:
    asked = parse("--tasks", str(tasks_file), "--stop", "o").questionnaire.tasks
    assert [task.stops for task in asked] == [("o",), (), (), ()]


def test_an_error_row_has_no_answer_whatever_the_name_of_its_task() -> None:
    task = {"name": "prompt", "prompt": "How many?", "answer": "int"}
    config = AnnotateConfig(input=("a",), output="b", model="demo", tasks=[task])
    assert config.questionnaire.make_empty_columns()["prompt"] is None


def test_the_prompt_of_every_task_is_filled_from_columns(tmp_path: Path, tasks_file: Path) -> None:
    lines = [{"image": "1.jpg", "kind": "dog", "prompt": "ignored"}, {"image": "2.jpg"}, {"kind": "cat"}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = parse("--tasks", str(tasks_file)).model_copy(update={"input": (str(tmp_path / "list.jsonl"),)})
    dog, nothing, no_image = list_task_rows(config)
    assert config.questionnaire.split_prompts(dog["prompt"]) == [
        "Describe this dog.",
        "Is there red?",
        "Tags?",
        "Read it.",
    ]
    assert (dog["error"], dog["has_own_prompt"]) == ("", False)
    assert nothing["error"] == "task caption: names the column 'kind', which is null in this row"
    assert no_image["error"].endswith("no image, and no prompt of its own")
    for braces in ("{", "{unknown}"):
        broken = config.model_copy(update={"tasks": (config.tasks[1].model_copy(update={"prompt": f"Is {braces}?"}),)})
        with pytest.raises(SourceError, match=r"task has_red: |no column unknown"):
            list_task_rows(broken)
