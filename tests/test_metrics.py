"""The page and the dashboard name metrics that exist; `test_job_submit.py` scrapes them from a Ray head."""

from __future__ import annotations

import json
import re
from typing import Any

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from pipelines.monitoring.metrics import METRICS
from tests.support.markdown import read_section, read_table
from tests.support.roots import ROOT

DASHBOARD = json.loads((ROOT / "deploy" / "grafana.json").read_text())


def test_grafanas_types_know_every_field_of_the_dashboard() -> None:
    """Unknown fields, and values of another type, do not survive reading into the types and writing again."""
    register_default_plugins()
    written = json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(DASHBOARD)))
    assert_contains(written, DASHBOARD)


def assert_contains(written: Any, given: Any) -> None:
    if isinstance(given, dict):
        assert given.keys() <= written.keys()
        for name, value in given.items():
            assert_contains(written[name], value)
    elif isinstance(given, list):
        assert len(written) == len(given)
        for one, other in zip(written, given, strict=True):
            assert_contains(one, other)
    else:
        assert written == given


def test_the_dashboard_queries_each_metric_and_only_labels_that_exist() -> None:
    queries = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    variables = [v["query"]["query"] for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]
    named = [found for query in queries for found in re.findall(r"ray_(\w+)\{([^}]*)\}", query)]
    assert {name for name, _ in named} == METRICS.keys()
    for name, matchers in named:
        assert {m.split("=")[0].strip() for m in matchers.split(",")} <= {"run", *METRICS[name][1]}
    assert all(re.match(r"label_values\(ray_(\w+), run\)", v)[1] in METRICS for v in variables)  # type: ignore[index]
    for panel in DASHBOARD["panels"]:
        labels = {label for target in panel["targets"] for label in re.findall(r"{{(\w+)}}", target["legendFormat"])}
        assert labels <= {"run", "stage", "limit"} and panel["description"]


def test_panels_do_not_overlap() -> None:
    taken = [
        (x, y)
        for place in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(taken) == len(set(taken)) and all(x < 24 for x, _ in taken)


def test_the_page_lists_the_metrics() -> None:
    rows = read_table(read_section(ROOT / "docs" / "operate.md", "Metrics"), "metric")
    assert {row[0].strip("`"): row[2] for row in rows} == {
        f"ray_{name}": ", ".join(("run", *labels)) for name, (_, labels) in METRICS.items()
    }
