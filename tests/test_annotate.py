"""Annotation: one request per task, answers in typed columns, and each image encoded once for all tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pytest

from ovis_model.engine.engine import OvisEngine
from ovis_model.inputs.processor import Processor
from ovis_model.types import Completion, Request, RequestError, SamplingParams
from pipelines.answering import Answerer
from pipelines.config import AnnotateConfig, CaptionConfig, RunConfig
from pipelines.errors import RunError
from pipelines.output.run_record import check_output, open_run
from pipelines.output.sink import read_results, write_file
from pipelines.pipeline import run_pipeline
from pipelines.schema import build_result_schema
from tests.support.engines import load_engine
from tests.support.fake_engine import FakeEngineFactory
from tests.support.golden_data import checkpoint_dir
from tests.support.job_configs import make_annotate_config
from tests.support.pictures import draw
from tests.support.processes import run_job
from tests.support.stages import prepare_rows

MODEL = str(checkpoint_dir("tiny56-tied"))
TASKS: list[dict[str, Any]] = [
    {"name": "caption", "prompt": "Describe the image."},
    {"name": "sharp", "prompt": "Is it sharp?", "answer": "bool"},
    {"name": "kind", "prompt": "What is it?", "answer": {"choices": ["cat", "category", "dog"]}, "system": "Be brief."},
    {"name": "mood", "prompt": "What is its mood?", "max_new_tokens": 3},
]
CONSTRAINED: list[dict[str, Any]] = [
    {"name": "cut", "prompt": "How many?", "answer": {"regex": "[0-9]{30}"}, "max_new_tokens": 2},
    {"name": "count", "prompt": "How many?", "answer": {"int": {"min": 0, "max": 20}}},
    {"name": "tags", "prompt": "Tags?", "answer": {"list[str]": {"max_items": 3}}, "max_new_tokens": 200},
    {"name": "code", "prompt": "Read the code.", "answer": {"regex": "[A-Z]{2}-[0-9]{2}"}},
    {
        "name": "record",
        "prompt": "Read it.",
        "max_new_tokens": 100,
        "answer": {
            "json_schema": {
                "type": "object",
                "properties": {"kind": {"enum": ["bill", "receipt"]}, "paid": {"type": "boolean"}},
                "required": ["kind", "paid"],
            }
        },
    },
]

PROBS = np.array([0.25, 0.75], np.float32)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    directory = tmp_path / "pictures"
    directory.mkdir()
    for i in range(6):
        draw(directory / f"{i}.png", seed=i, width=60 + 20 * i)
    return directory


def make_config(inputs: Path, output: Path, **options: Any) -> AnnotateConfig:
    return make_annotate_config(inputs, output, **{"tasks": TASKS, **options})


def answer_without_ray(config: RunConfig) -> list[dict[str, Any]]:
    """Return the id, the number of tiles and the columns that the engine decides, for each row."""
    rows = prepare_rows(config)
    answered = Answerer(config.questionnaire, Processor.from_pretrained(MODEL), load_engine("tiny56-tied")).answer(rows)
    return [
        {"id": row.id, "num_tiles": row.num_tiles, **columns}
        for row, columns in zip(rows, answered, strict=True)
        if not isinstance(columns, RequestError)
    ]


def read_rows(output: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_results(str(output)).to_pylist()
    return rows


def test_each_task_answers_like_a_caption_run_with_its_prompt(
    ray_cluster: None, pictures: Path, tmp_path: Path
) -> None:
    summary = run_pipeline(make_config(pictures, tmp_path / "all"))
    assert (summary.rows, summary.ok) == (6, 6)
    rows = read_rows(tmp_path / "all")
    for task in (TASKS[0], TASKS[3]):
        name, prompt = task["name"], task["prompt"]
        options = {"max_new_tokens": task.get("max_new_tokens", 8), "model": MODEL, "prompt": prompt}
        caption = CaptionConfig(input=(str(pictures),), output=str(tmp_path / name), **options)
        for row, alone in zip(rows, answer_without_ray(caption), strict=True):
            assert (row["id"], row["num_tiles"]) == (alone["id"], alone["num_tiles"])
            assert row[name] == row[f"{name}_text"] == alone["text"]
            assert row[f"{name}_finish_reason"] == alone["finish_reason"]
            assert row[f"{name}_confidence"] == pytest.approx(alone["mean_logprob"], abs=1e-4)
    for row in rows:
        assert row["sharp"] is (row["sharp_confidence"]["Yes"] > row["sharp_confidence"]["No"])
        assert row["kind"] == row["kind_text"] == max(row["kind_confidence"], key=row["kind_confidence"].get)
        assert sum(row["kind_confidence"].values()) == pytest.approx(1, abs=1e-5)


def test_an_image_is_encoded_once_for_all_tasks(pictures: Path, tmp_path: Path) -> None:
    config = make_config(
        pictures, tmp_path / "out", tasks=[{"name": f"task{i}", "prompt": f"What {i}?"} for i in range(8)]
    )
    rows = prepare_rows(config)
    engine = OvisEngine.from_model(load_engine("tiny56-tied").model)
    values = Answerer(config.questionnaire, Processor.from_pretrained(MODEL), engine).answer(rows)
    assert len(values) == 6 and all(isinstance(row, dict) for row in values)
    assert engine.stats.tiles == sum(row.num_tiles for row in rows)
    assert engine.stats.prompt_tokens < sum(row.num_prompt_tokens for row in rows) / 2


def test_every_reader_sees_typed_columns(ray_cluster: None, pictures: Path, tmp_path: Path) -> None:
    config = make_config(pictures, tmp_path / "out", tasks=TASKS + CONSTRAINED, rows_per_file=4)
    run_pipeline(config)
    (pictures / "6.png").write_text("no picture")
    run_pipeline(config.model_copy(update={"extend": True}))
    data = tmp_path / "out" / "data"
    files = [pyarrow.parquet.read_schema(file) for file in data.iterdir()]
    assert len(files) >= 3 and all(schema.equals(config.questionnaire.schema) for schema in files)
    assert pd.read_parquet(data)["count"].notna().sum() == 6
    assert len(pyarrow.dataset.dataset(data).to_table()) == 7
    query = f"select count(*) from '{data}/*.parquet' where sharp is not null and record.kind in ('bill', 'receipt')"
    assert duckdb.sql(query).fetchall() == [(6,)]
    *good, bad = read_rows(tmp_path / "out")
    for row in good:
        assert 0 <= row["count"] <= 20 and row["count_text"] == str(row["count"])
        assert row["code"] == row["code_text"] and len(row["code"]) == 5
        assert row["record"] == json.loads(row["record_text"])
        assert row["tags"] is None or len(row["tags"]) <= 3
        assert ("tags:truncated" in row["flags"]) is (row["tags_finish_reason"] == "length")
        assert row["cut"] is None and {"cut:truncated", "cut:invalid"} <= set(row["flags"])
        assert ("tags:invalid" in row["flags"]) is (row["tags"] is None)
    assert (bad["status"], bad["stage"], bad["flags"], bad["caption_text"]) == ("error", "decode", [], "")
    nulls = {name for name, value in bad.items() if value is None}
    assert nulls == {*(task["name"] for task in TASKS + CONSTRAINED), "sharp_confidence", "kind_confidence"}
    assert np.isnan(bad["caption_confidence"])


def test_flagged_answers_are_regenerated_and_the_better_one_is_kept(
    ray_cluster: None, pictures: Path, tmp_path: Path
) -> None:
    run_pipeline(make_config(pictures, tmp_path / "again", regenerate="flagged"))
    once_asked = answer_without_ray(make_config(pictures, tmp_path / "once"))
    num_flagged = 0
    for once, again in zip(once_asked, read_rows(tmp_path / "again"), strict=True):
        for name in ("caption", "sharp", "kind", "mood"):
            flags = [flag.split(":")[1] for flag in once["flags"] if flag.startswith(f"{name}:")]
            other = again[f"{name}_alternative"]
            assert (other is not None) is bool(flags)
            if other:
                num_flagged += 1
                texts = {again[f"{name}_text"], other["text"]}
                assert once[f"{name}_text"] in texts
                chosen = [flag for flag in again["flags"] if flag.startswith(f"{name}:")]
                assert len(chosen) <= len(other["flags"]) and len(chosen) <= len(flags)
    assert num_flagged >= 6


def test_an_exhausted_grammar_is_an_error_of_its_task_only(pictures: Path, tmp_path: Path) -> None:
    words = {"type": "string", "minLength": 1, "maxLength": 100_000, "pattern": r"^(?:\S+\s+){0,99}\S+$"}
    tasks = [TASKS[0], {"name": "words", "prompt": "Words?", "answer": {"json_schema": words}}, TASKS[1]]
    config = make_config(pictures, tmp_path / "out", tasks=tasks)
    alone = answer_without_ray(make_config(pictures, tmp_path / "out", tasks=[TASKS[0], TASKS[1]]))
    for row, other in zip(answer_without_ray(config), alone, strict=True):
        assert (row["caption"], row["sharp"]) == (other["caption"], other["sharp"])
        assert row["words"] is None and "words:error" in row["flags"] and row["words_finish_reason"] == ""
        assert row["error"].startswith("task words: the answer cannot be continued within its constraint: ")
        assert "steps of the lexer per token" in row["error"]
    only = make_config(pictures, tmp_path / "out", tasks=[tasks[1]])
    assert answer_without_ray(only) == []  # error rows: no task has an answer


def test_null_is_a_value_and_many_choices_have_a_list_of_probabilities(pictures: Path, tmp_path: Path) -> None:
    many = {"choices": [f"class {n}" for n in range(100)]}
    tasks = [
        {"name": "nothing", "prompt": "A?", "answer": {"json_schema": {"anyOf": [{"type": "null"}]}}},
        {"name": "many", "prompt": "B?", "answer": many},
        {"name": "case", "prompt": "C?", "answer": {"choices": ["us", "US"]}},
    ]
    config = make_config(pictures, tmp_path / "out", tasks=tasks)
    rows = answer_without_ray(config)
    for row in rows:
        assert row["nothing"] is None and row["nothing_text"] == "null" and row["flags"] == []
        assert max(row["many_confidence"], key=lambda pair: pair["p"])["choice"] == row["many"]
        assert [pair["choice"] for pair in row["case_confidence"]] == ["us", "US"]
    columns = config.questionnaire.schema
    held = pa.schema([columns.field(name) for name in columns.names if name in rows[0]])
    assert pa.Table.from_pylist(rows, held).num_rows == 6
    assert config.questionnaire.make_empty_columns().get("many_confidence") is None


def test_regeneration_uses_another_seed(pictures: Path, tmp_path: Path) -> None:
    tasks = [{"name": "caption", "prompt": "Describe."}, {"name": "sharp", "prompt": "Sharp?", "answer": "bool"}]
    sampling: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "stop": ("e", "o"), "regenerate": "flagged"}
    config = make_config(pictures / "0.png", tmp_path / "out", tasks=tasks, **sampling)
    drawn: list[SamplingParams] = []

    class EmptyTextEngine:
        def generate(self, requests: list[Request], params: list[SamplingParams]) -> list[Completion]:
            drawn.extend(params)
            return [
                Completion(
                    np.array(p.choices[1] if p.choices else [], np.int32), "stop", 0.0, PROBS if p.choices else None
                )
                for p in params
            ]

    answerer = Answerer(config.questionnaire, Processor.from_pretrained(MODEL), EmptyTextEngine())
    [values] = answerer.answer(prepare_rows(config))
    assert values["sharp_text"] == "No" and values["sharp"] is False  # stop strings do not cut choices ("N")
    first, _, again = drawn
    assert (again.temperature, again.top_p) == (first.temperature, first.top_p) and again.seed != first.seed


def test_the_error_names_the_task_that_exceeds_the_models_limit(
    ray_cluster: None, pictures: Path, tmp_path: Path
) -> None:
    tasks = [TASKS[0], {**TASKS[3], "max_new_tokens": 32_760}]
    run_pipeline(make_config(pictures / "0.png", tmp_path / "out", tasks=tasks), make_engine=FakeEngineFactory())
    [row] = read_rows(tmp_path / "out")
    assert (row["status"], row["stage"]) == ("error", "tile")
    assert row["error"].startswith("task mood: ") and "over the model's limit" in row["error"]


def test_an_output_of_other_tasks_is_refused(ray_cluster: None, tmp_path: Path) -> None:
    unread = tmp_path / "no-picture.png"  # an error row, which needs no generation
    unread.touch()
    run_pipeline(make_config(unread, tmp_path / "out"), make_engine=FakeEngineFactory())
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert [task["name"] for task in record["tasks"]] == ["caption", "sharp", "kind", "mood"]
    assert record["tasks"][1]["answer"] == "bool" and record["tasks"][3]["max_new_tokens"] == 3
    with pytest.raises(RunError, match=r"options: tasks \['caption', 'sharp', 'kind', 'mood'\] there, .* here\. Use"):
        run_pipeline(make_config(unread, tmp_path / "out", tasks=TASKS[:2]))


def test_a_run_whose_columns_had_other_types_is_not_resumed(pictures: Path, tmp_path: Path) -> None:
    """An earlier version wrote dates, tuples and maps of a schema as text: one OUTPUT never mixes both."""
    day = {"name": "day", "prompt": "When?", "answer": {"json_schema": {"type": "string", "format": "date"}}}
    config = make_config(pictures, tmp_path / "out", tasks=[day])
    run = open_run(config, {"id": "demo"})
    columns = build_result_schema(config.questionnaire.schema)
    earlier = columns.set(columns.get_field_index("day"), pa.field("day", pa.string()))
    rows = [{**dict.fromkeys(earlier.names), "row": n, "status": "ok", "day": "2024-02-29"} for n in range(6)]
    nullable = pa.schema([field.with_nullable(True) for field in earlier])
    write_file(run.data_uri, pa.Table.from_pylist(rows[:4], nullable))
    before = {file.name: file.read_bytes() for file in (tmp_path / "out" / "data").iterdir()}
    for resumed in (config, config.model_copy(update={"extend": True})):
        with pytest.raises(RunError, match=r"other types: day is string there, date32\[day\] here\. Resume it with"):
            open_run(resumed, {"id": "demo"})
        with pytest.raises(RunError, match="other types"):
            check_output(resumed, {"id": "demo"})
    assert {file.name: file.read_bytes() for file in (tmp_path / "out" / "data").iterdir()} == before
    write_file(run.data_uri, pa.Table.from_pylist(rows[4:], nullable))
    assert open_run(config, {"id": "demo"}).num_rows == 6  # nothing is left to write


def test_the_annotate_command_writes_structs(ray_address: str, pictures: Path, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text(json.dumps({"tasks": TASKS + CONSTRAINED}))
    arguments = [pictures, tmp_path / "out", "--tasks", tasks, "--model", MODEL]
    finished = run_job("annotate", *arguments, ray_address=ray_address)
    assert finished.exit_code == 0, finished.stderr
    assert finished.summary["ok"] == finished.summary["rows"] == 6
    assert pa.types.is_struct(read_results(str(tmp_path / "out")).schema.field("record").type)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"json_schema": {"not": {"type": "string"}}}, "not"),
        ({"json_schema": {"type": 5}}, "#/type"),
        ({"json_schema": {"properties": [1]}}, "#/properties"),
        ({"choices": ["caf\u00e9", "cafe\u0301"]}, r"'cafe\u0301' as 'caf\xe9'"),
        ({"regex": "(a"}, "task odd"),
        ({"json_schema": {"$ref": "https://example.com/schema.json"}}, "$ref"),
    ],
)
def test_an_unsupported_answer_type_is_refused_before_the_run(
    pictures: Path, tmp_path: Path, answer: Any, message: str
) -> None:
    tasks = [{"name": "odd", "prompt": "Read it.", "answer": answer}]
    with pytest.raises(ValueError, match="task odd: ") as info:
        run_pipeline(make_config(pictures, tmp_path / "out", tasks=tasks))
    assert message in str(info.value) and not (tmp_path / "out").exists()
