"""Sections are a partition of the options; a run that an older version began keeps its fingerprint and is resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from pydantic import Field

from jobs.options import list_options
from jobs.options_page import render_page
from pipelines.config import (
    AnnotateConfig,
    CaptionConfig,
    ImageOptions,
    ModelOptions,
    OutputOptions,
    ResourceOptions,
    ResumeOptions,
    RunConfig,
    SamplingOptions,
    SourceOptions,
    read_extra,
)
from pipelines.errors import RunError
from pipelines.output.run_record import open_run
from pipelines.tasks.task import Task
from tests.support.roots import ROOT

SECTIONS = (SourceOptions, ModelOptions, ImageOptions, SamplingOptions, ResourceOptions, OutputOptions, ResumeOptions)
MODEL = {"id": "demo", "revision": None, "weights": "none"}


class LaterConfig(CaptionConfig):
    """The options of a version to come: `sharpen` changes what rows hold."""

    sharpen: float = Field(0.0, json_schema_extra={"since": "9.9"})


class LaterTask(Task):
    """The fields of a task of a version to come."""

    sharpen: float = Field(0.5, json_schema_extra={"since": "9.9"})


class LaterAnnotateConfig(AnnotateConfig):
    """A job whose tasks have more fields."""

    tasks: tuple[LaterTask, ...]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (20, 10)).save(tmp_path / "in" / "a.png")
    return tmp_path / "in"


def config(kind: type[CaptionConfig], pictures: Path, **options: object) -> CaptionConfig:
    return kind(input=(str(pictures),), output=str(pictures.parent / "out"), model="demo", **options)  # type: ignore[arg-type]


def test_every_option_is_in_one_section() -> None:
    names = [name for section in SECTIONS for name in section.model_fields]
    assert len(set(names)) == len(names)
    assert set(names) == set(RunConfig.model_fields)


def test_the_page_of_options_is_up_to_date() -> None:
    page = (ROOT / "docs" / "options.md").read_text()
    assert page == render_page(), "run python -m jobs.options_page > docs/options.md"
    assert all(option.flag in page for option in list_options(AnnotateConfig))


def test_the_page_says_which_options_are_in_the_fingerprint(pictures: Path) -> None:
    fingerprint = config(CaptionConfig, pictures).fingerprint_fields()
    options = list_options(CaptionConfig)
    added = {name for name in CaptionConfig.model_fields if read_extra(CaptionConfig, name).get("since")}
    assert {option.name for option in options if option.decides_rows} == fingerprint.keys() | added


def test_a_stage_needs_its_section_only() -> None:
    assert ImageOptions().max_tiles_per_image(1) == 9
    assert ResourceOptions(device="cpu").num_replicas == "auto"
    assert not SourceOptions(input=("in",)).allow_private_addresses


def test_how_the_work_is_done_is_no_part_of_the_fingerprint(pictures: Path) -> None:
    plain = config(CaptionConfig, pictures)
    how = {"num_replicas": 7, "device": "cpu", "rows_per_file": 3, "overwrite": True, "max_error_rate": 1}
    assert config(CaptionConfig, pictures, **how).fingerprint_fields() == plain.fingerprint_fields()
    for option, value in {"top_p": 0.5, "max_tiles": 2, "limit": 1, "dtype": "bfloat16", "prompt": "Why?"}.items():
        assert config(CaptionConfig, pictures, **{option: value}).fingerprint_fields() != plain.fingerprint_fields()


def test_a_later_option_at_its_default_changes_no_fingerprint(pictures: Path) -> None:
    plain = config(CaptionConfig, pictures)
    assert config(LaterConfig, pictures).fingerprint_fields() == plain.fingerprint_fields()
    assert config(LaterConfig, pictures, sharpen=1).fingerprint_fields()["sharpen"] == 1


def test_an_option_that_a_record_lacks_counts_as_its_default(pictures: Path) -> None:
    begun = open_run(config(CaptionConfig, pictures), MODEL)
    assert open_run(config(LaterConfig, pictures), MODEL).record["fingerprint"] == begun.record["fingerprint"]
    with pytest.raises(RunError, match=r"sharpen 0\.0 there, 1\.0 here"):
        open_run(config(LaterConfig, pictures, sharpen=1), MODEL)


def test_a_record_without_options_of_today_is_resumed_at_their_defaults(pictures: Path) -> None:
    run = open_run(config(CaptionConfig, pictures), MODEL)
    record = json.loads((Path(run.output) / "run.json").read_text())
    for option in ("top_k", "fps", "chain_of_thought", "on_duplicate_id"):
        del record["config"][option]
    (Path(run.output) / "run.json").write_text(json.dumps(record))
    assert open_run(config(CaptionConfig, pictures), MODEL).num_rows == 1
    with pytest.raises(RunError, match="top-k 0 there, 5 here"):
        open_run(config(CaptionConfig, pictures, top_k=5), MODEL)


def test_a_later_option_of_a_record_is_not_ignored(pictures: Path) -> None:
    open_run(config(LaterConfig, pictures, sharpen=1), MODEL)
    with pytest.raises(RunError, match=r"sharpen 1\.0 there, not set here"):
        open_run(config(CaptionConfig, pictures), MODEL)


def annotate(kind: type[AnnotateConfig], pictures: Path, **fields: object) -> AnnotateConfig:
    tasks = ({"name": "round", "prompt": "Is it round?", "answer": "bool", **fields},)
    return kind(input=(str(pictures),), output=str(pictures.parent / "out"), model="demo", tasks=tasks)  # type: ignore[arg-type]


def test_a_later_field_of_a_task_counts_as_its_default(pictures: Path) -> None:
    begun = open_run(annotate(AnnotateConfig, pictures), MODEL)
    assert open_run(annotate(LaterAnnotateConfig, pictures), MODEL).record == begun.record
    assert (
        annotate(LaterAnnotateConfig, pictures).fingerprint_fields()
        == annotate(AnnotateConfig, pictures).fingerprint_fields()
    )
    with pytest.raises(RunError, match=r"options: task round sharpen 0\.5 there, 1\.0 here\. Use"):
        open_run(annotate(LaterAnnotateConfig, pictures, sharpen=1), MODEL)


def test_a_task_of_a_record_without_fields_of_today_is_resumed_at_their_defaults(pictures: Path) -> None:
    run = open_run(annotate(AnnotateConfig, pictures), MODEL)
    record = json.loads((Path(run.output) / "run.json").read_text())
    record["config"]["tasks"] = [{name: record["config"]["tasks"][0][name] for name in ("name", "prompt", "answer")}]
    (Path(run.output) / "run.json").write_text(json.dumps(record))
    assert open_run(annotate(AnnotateConfig, pictures), MODEL).num_rows == 1
    with pytest.raises(RunError, match=r"options: task round seed not set there, 7 here\. Use"):
        open_run(annotate(AnnotateConfig, pictures, seed=7), MODEL)
