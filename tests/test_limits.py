"""A run says what limits it: the CPUs that prepare, the store, the engine or the driver."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from pipelines.cluster import watch
from pipelines.cluster.attempts import AttemptCounts
from pipelines.cluster.exits import Exit, Process
from pipelines.config import CaptionConfig
from pipelines.monitoring import progress
from pipelines.monitoring.limits import StageUse, Use, UseWindow, find_limit
from pipelines.monitoring.phases import Phases
from pipelines.monitoring.usage import Meter, PoolReadings, Reading
from pipelines.pipeline import run_pipeline
from tests.support.fake_engine import FakeEngineFactory
from tests.support.golden_data import checkpoint_dir
from tests.support.pictures import draw


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_meter_counts_the_work_of_all_threads_once() -> None:
    clock = Clock()
    meter = Meter(max_calls=2, clock=clock)
    with meter.work():
        clock.now_s += 1
        with meter.work():
            clock.now_s += 2
    clock.now_s += 5
    reading = meter.read({"steps": 3})
    assert (reading.ready_s, reading.busy_s, reading.full_s) == (8, 3, 2)
    assert reading.engine == {"steps": 3} and reading.peak_bytes > 1 << 20


def test_a_generator_is_busy_only_while_it_makes_an_item() -> None:
    clock = Clock()
    meter = Meter(clock=clock)

    def make_items() -> object:
        for item in range(3):
            clock.now_s += 1
            with meter.wait():
                clock.now_s += 2
            yield item

    for _ in meter.follow(make_items()):  # type: ignore[var-annotated, arg-type]
        clock.now_s += 10  # the caller does not take the next one
    reading = meter.read()
    assert (reading.busy_s, reading.waiting_s, reading.ready_s) == (9, 6, 39)


def test_a_replaced_process_adds_to_its_actor() -> None:
    readings = PoolReadings()
    readings.add("a", Reading(10, 5, rows=7, engine={"steps": 1}))
    readings.restart("a")
    readings.add("a", Reading(2, 1, rows=1, engine={"steps": 2}))
    readings.add("b", Reading(4))
    assert readings.read()["a"] == Reading(12, 6, rows=8, engine={"steps": 3})
    assert list(readings.read()) == ["a", "b"]


def test_the_window_forgets_what_is_old() -> None:
    window = UseWindow(window_s=60)
    for now_s in range(0, 200, 10):  # idle for 100 s, busy since
        window.add({"replica": {"a": Reading(now_s, max(0, now_s - 100))}}, now_s)
        if now_s == 90:
            assert window.summarize("replica").busy == 0
    assert window.summarize("replica").busy == 1
    assert window.summarize("preprocessor") == StageUse()


CPUS = StageUse(actors=24, busy=0.97, rows_per_s=100)
IDLE = StageUse(actors=24, busy=0.1, rows_per_s=100)
FED = StageUse(actors=2, busy=0.99, full=0.9, occupancy=0.95)


@pytest.mark.parametrize(
    ("use", "name", "line"),
    [
        (Use(CPUS, StageUse(2, 0.63)), "prepare", "engine idle 37 %; give ~14 more or lower --max-tiles"),
        (
            Use(CPUS, StageUse(2, 0.99, full=0.1, occupancy=0.2)),
            "prepare",
            "engine busy, but only 20 % full; give more",
        ),
        (Use(StageUse(24, 0.97, waiting=0.8), StageUse(2, 0.5)), "read", "wait for it 80 % of the time; give ~24 more"),
        (Use(IDLE, FED), "engine", "preprocessors idle 90 %; add replicas"),
        (Use(CPUS, FED), "engine", "preprocessors idle 3 %"),  # balanced, or the queue is filled
        (Use(IDLE, StageUse(2, 0.99)), "engine", ""),  # too few rows to fill the replica
        (Use(CPUS, FED, driver=0.9), "driver", "--shard I/N"),
        (Use(IDLE, StageUse(2, 0.2)), "none", "engine idle 80 %, preprocessors idle 90 %"),
        (Use(), "none", ""),
    ],
)
def test_the_busiest_stage_limits_a_run(use: Use, name: str, line: str) -> None:
    limit = find_limit(use)
    assert limit.name == name and line in limit.line


def test_phases_add_up() -> None:
    phases = Phases()
    for name in ("start", "load", "rows", "rows", "check"):
        phases.begin(name)  # type: ignore[arg-type]
    assert list(phases.read()) == ["list", "start", "load", "rows", "check"]


def test_starts_deaths_and_retries_are_events() -> None:
    counts = AttemptCounts("replica", find=lambda process: Exit("memory", "10.0.0.1", "low on memory"))
    for number in range(2):
        counts.start(Process("abc", str(number), "node", "10.0.0.1"))
        counts.begin("generate 4 rows from 0", "abc")
    counts.begin("generate 4 rows from 0", "abc")
    _, events = counts.read_use()
    assert [(event.kind, event.stage) for event in events] == [
        ("start", "replica"),
        ("death", "replica"),
        ("start", "replica"),
        ("retry", "replica"),
    ]
    assert str(events[1]).startswith(
        'event=death stage=replica actor=abc address=10.0.0.1 kind=memory reason="low on memory" at=20'
    )
    assert 'work="generate 4 rows from 0" attempt=2' in str(events[3])
    assert counts.read_use()[1] == []


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pictures")
    for i in range(96):
        draw(directory / f"{i:03}.png", seed=i, width=60, height=60)
    return directory


@pytest.mark.parametrize(
    ("slow", "seconds_per_row", "wanted"), [("engine", 0.04, "engine"), ("preprocess", 0.001, "prepare")]
)
def test_the_progress_of_a_real_run_names_its_limit(
    ray_cluster: None,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    slow: str,
    seconds_per_row: float,
    wanted: str,
) -> None:
    """A preprocessor is slow because its pictures are large, an engine because it sleeps."""
    monkeypatch.setattr(watch, "_LOOK_S", 0.5)
    monkeypatch.setattr(progress, "_LOG_EVERY_S", 0.5)
    large = tmp_path / "large"
    if slow == "preprocess":
        large.mkdir()
        draw(large / "0.jpg", seed=1, width=4000, height=3000)
        for i in range(1, 32):
            (large / f"{i}.jpg").hardlink_to(large / "0.jpg")
    inputs = large if slow == "preprocess" else pictures
    config = CaptionConfig(
        input=(str(inputs),), output=str(tmp_path / "out"), model=str(checkpoint_dir("tiny56-tied")), max_new_tokens=4
    )
    with caplog.at_level(logging.WARNING):
        run_pipeline(config, make_engine=FakeEngineFactory(seconds_per_row=seconds_per_row))
    start = "the engine, preprocessors idle" if wanted == "engine" else "CPUs that prepare, engine idle"
    lines = [line for line in capsys.readouterr().err.splitlines() if "limited by" in line]
    assert lines and all(f"limited by: {start}" in line for line in lines[-2:]), lines
    stages = [r.getMessage().split()[1] for r in caplog.records if r.getMessage().startswith("event=start")]
    assert sorted(stages) == ["stage=preprocessor", "stage=replica"]
    [session] = json.loads((tmp_path / "out" / "run.json").read_text())["sessions"]
    assert session["limited_by"] == wanted
    assert list(session["seconds"]) == ["list", "start", "load", "rows", "check"]
    assert session["replicas"]["idle"] < 0.3 if wanted == "engine" else session["replicas"]["idle"] > 0.5
    assert session["preprocessors"]["peak_bytes"] > 50 << 20
    found = json.loads((tmp_path / "out" / "progress.json").read_text())
    assert (found["done"], found["limited_by"]) == (found["rows"], wanted)
