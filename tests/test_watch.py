"""A run says why it waits and which processes died."""

from __future__ import annotations

from collections import Counter

import pytest

from pipelines.cluster import watch
from pipelines.cluster.attempts import WARN_DEATHS
from pipelines.cluster.census import Census, take_census
from pipelines.cluster.exits import Exit
from pipelines.cluster.watch import DeathReports, WaitReports

LOW = Exit("memory", "10.0.0.1", "node 10.0.0.1 is low on memory (1.4 of 2 GB)")
KILLED = Exit("unknown", "10.0.0.1", "killed, on node 10.0.0.1")


def count_actors(**changes: object) -> Census:
    found: dict[str, object] = {
        "alive": Counter(preprocessors=2),
        "ended": Counter(),
        "unready": Counter(replicas=2),
        "unplaced": Counter(replicas=1),
        "free": {"GPU": 1.0},
        "total": {"CPU": 4.0, "GPU": 2.0},
        "others": ["1 GPU, `python train.py` (process 7 on 10.0.0.9)"],
    }
    return Census(**(found | changes))  # type: ignore[arg-type]


def test_waiting_is_said_after_15_s_and_then_every_minute() -> None:
    reports = WaitReports({"replicas": 2, "preprocessors": 2}, autoscale=False)
    said_s = [now_s for now_s in range(5, 200, 5) if reports.report(count_actors(), now_s)]
    assert said_s == [15, 75, 135, 195]
    assert not reports.report(count_actors(unready=Counter()), 255)
    assert not reports.report(count_actors(), 260), "a new wait"


def test_waiting_names_what_is_free_and_who_holds_the_rest() -> None:
    reports = WaitReports({"replicas": 2, "preprocessors": 2}, autoscale=False)
    reports.report(count_actors(), 0)
    [line] = reports.report(count_actors(alive=Counter(), ended=Counter(preprocessors=2)), 30)
    assert line == (
        "waiting for 35 s: 0 of 2 replicas and 2 of 2 preprocessors have started; 1 wait for a node with free "
        "resources; the cluster has 0 of 4 CPUs and 1 of 2 GPUs free; another job holds 1 GPU, `python train.py` "
        "(process 7 on 10.0.0.9); 1 are loading"
    )


@pytest.mark.parametrize(("found", "is_said"), [(False, True), (True, False), (None, False)])
def test_a_missing_autoscaler_is_named(monkeypatch: pytest.MonkeyPatch, found: bool | None, is_said: bool) -> None:
    monkeypatch.setattr(watch, "has_autoscaler", lambda: found)
    reports = WaitReports({"replicas": 2, "preprocessors": 2}, autoscale=True)
    reports.report(count_actors(), 0)
    assert ("no autoscaler" in reports.report(count_actors(), 30)[0]) == is_said


def test_deaths_of_a_kind_are_one_line_a_minute() -> None:
    reports = DeathReports()
    assert reports.report("preprocessor", [LOW], 1, 0) == [
        "Ray killed 1 preprocessor because node 10.0.0.1 is low on memory (1.4 of 2 GB); use fewer --num-preprocessors "
        "or nodes with more memory. Their rows run again"
    ]
    assert reports.report("preprocessor", [LOW, LOW], 1, 10) == []
    assert [line[:26] for line in reports.report("preprocessor", [LOW], 1, 60)] == ["Ray killed 3 preprocessors"]
    assert reports.report("replica", [KILLED], 1, 60) == [
        "1 replica died (killed, on node 10.0.0.1); their rows run again"
    ]


def test_deaths_without_a_finished_row_are_a_warning() -> None:
    reports = DeathReports()
    assert "died 5 times and no row was finished" in reports.report("replica", [], WARN_DEATHS, 0)[0]
    assert reports.report("replica", [], WARN_DEATHS + 1, 5) == []


def test_a_census_counts_free_cpus(ray_cluster: None) -> None:
    census = take_census()
    assert census.total["CPU"] == 4 and not census.others
