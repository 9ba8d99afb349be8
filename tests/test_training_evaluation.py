"""Held-out rows, those drawn from INPUT and those of --eval-input, have a validation loss per data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from ovis_model.training.learning.parallel import open_meeting_point
from pipelines.output.ledger import RowRange
from pipelines.training.data.check import _CHECKED, CheckedRows, RowChecker
from pipelines.training.data.data_sets import DataSet, list_short_names, list_training_rows
from pipelines.training.data.row_table import write_rows
from pipelines.training.metrics import MetricLog
from pipelines.training.page import render_training_page
from pipelines.training.plan import TrainingPlan
from pipelines.training.record import TrainingRun, identify_run
from pipelines.training.run import make_prepare_options, make_settings
from pipelines.training.worker import MeetingPoint, TrainingWorker, WorkerSettings
from tests.support.training_files import make_train_config, write_data

PLAN = TrainingPlan("cpu", "float32", num_workers=1, cpus_per_worker=1, threads=1, num_cpus=1)


def prepare(tmp_path: Path, **options: Any) -> WorkerSettings:
    """List and check rows as a run does, without Ray: 14 to train on, and 5 and a bad one that are held out."""
    data, others = write_data(tmp_path / "train", 12), write_data(tmp_path / "others", 3)
    rows = [*json.loads(others.read_text()), {"conversations": []}]
    (others.parent / "held-out.json").write_text(json.dumps(rows))
    options = {"eval_input": (str(others.parent / "held-out.*"),), "eval_rows": 2, **options}
    config = make_train_config(data, tmp_path / "out", **options)
    data_sets, eval_sets = config.read_data_sets(), config.read_eval_sets()
    num_rows = write_rows(str(tmp_path / "out"), list_training_rows([*data_sets, *eval_sets]))
    checker = RowChecker(str(tmp_path / "out"), num_rows, make_prepare_options(config))
    found = [row._asdict() for row in checker.check(RowRange(0, num_rows))]
    checked = CheckedRows(pa.Table.from_pylist(found, _CHECKED).sort_by("row"))
    names = list_short_names([*data_sets, *eval_sets])
    record = {"num_rows": num_rows, "weights": [1.0] * len(data_sets), "data_sets": names, "threads": 1}
    return make_settings(config, TrainingRun(str(tmp_path / "out"), record), PLAN, checked)


def evaluate(settings: WorkerSettings) -> dict[str, float]:
    worker = TrainingWorker(settings, 0)
    worker._meeting = open_meeting_point("127.0.0.1", 1)
    worker.start(MeetingPoint("127.0.0.1", worker._meeting.port), None)
    return worker.evaluate()


def test_rows_of_eval_input_are_held_out_and_never_trained_on(tmp_path: Path) -> None:
    settings = prepare(tmp_path)
    assert {name: len(rows) for name, rows in settings.held_out.items()} == {"data": 2, "held-out": 5}
    held_out = {row for rows in settings.held_out.values() for row in rows}
    assert len(settings.order.numbers) == 12 and not held_out & set(settings.order.numbers.tolist())
    assert settings.held_out["held-out"] == (14, 15, 16, 17, 18) and set(settings.shown) <= held_out


def test_each_data_set_has_a_loss_and_the_whole_is_their_mean_by_tokens(tmp_path: Path) -> None:
    found = evaluate(prepare(tmp_path))
    assert found.keys() == {"eval_loss", "eval_data_loss", "eval_held-out_loss"}
    low, high = sorted(value for name, value in found.items() if name != "eval_loss")
    assert 0 < low < found["eval_loss"] < high
    alone = evaluate(prepare(tmp_path, eval_rows=0))
    assert alone.keys() == {"eval_loss"}
    assert alone["eval_loss"] == pytest.approx(found["eval_held-out_loss"], rel=1e-5)


def test_the_page_draws_the_losses_of_data_sets(tmp_path: Path) -> None:
    log = MetricLog(str(tmp_path), until_step=0)
    values = {"eval_loss": 1.0, "eval_a_loss": 1.0, "eval_b_loss": 2.0}
    log.add({"step": step, "kind": "eval", **values} for step in (1, 2))
    page = render_training_page("Training", {}, log)
    assert "<h2>validation: a, b</h2>" in page and page.count("<polyline") == 3


def test_names_of_data_sets_fit_into_metrics() -> None:
    names = ["s3://bucket/a.b/dev.jsonl.gz", "captions", "/x/dev.json", "/y/*.json", "my set"]
    found = list_short_names([DataSet(name=name, files=("f",)) for name in names])
    assert found == ["dev", "captions", "dev_2", "_", "my_set"]


def test_another_eval_input_is_another_run(tmp_path: Path) -> None:
    model = {"weights": "w"}
    configs = [make_train_config("d.json", tmp_path, eval_input=given) for given in ("a.json", ("a.json", "b.json"))]
    one, two = (identify_run(config, model)["eval_input"] for config in configs)
    assert len(one) == 1 and len(two) == 2 and one[0].endswith("/a.json")
