"""The cluster files are valid for Ray's launcher and KubeRay, use the pinned versions, and run existing commands."""

from __future__ import annotations

import re
import shlex
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from jobs import caption
from jobs.command_line import parse_command_line
from ovis_model.config import SIZES
from pipelines.cluster.resources import Hardware, plan_pools, plan_tensor_parallel
from pipelines.errors import ResourceError
from tests.support.roots import ROOT

RAY_VERSION = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]  # type: ignore[index]


def load_yaml(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def test_rays_launcher_accepts_cluster_yaml() -> None:
    validate_config(prepare_config(load_yaml("cluster.yaml")))


def test_rays_launcher_refuses_a_wrong_field() -> None:
    config = load_yaml("cluster.yaml")
    config["available_node_types"]["gpu"]["resources"]["GPU"] = "four"
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(config))


def test_workers_are_spot_machines_and_the_head_is_not() -> None:
    types = load_yaml("cluster.yaml")["available_node_types"]
    spot = {name for name, node in types.items() if "InstanceMarketOptions" in node["node_config"]}
    assert spot == {"cpu", "gpu"} == types.keys() - {"head"}
    assert sum(types[name]["max_workers"] for name in spot) == load_yaml("cluster.yaml")["max_workers"]


def test_the_job_matches_kuberays_schema() -> None:
    jsonschema.validate(load_yaml("deploy/rayjob.yaml"), load_yaml("tests/rayjob_schema.yaml"))


def test_the_jobs_command_parses_and_plans_on_an_empty_cluster() -> None:
    words = shlex.split(load_yaml("deploy/rayjob.yaml")["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "jobs.caption"]
    config = parse_command_line(caption.COMMAND, words[3:], "jobs.caption")
    groups = {
        group["groupName"]: group
        for group in load_yaml("deploy/rayjob.yaml")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    }
    assert config.autoscale and config.num_replicas == groups["gpu"]["maxReplicas"]
    assert plan_tensor_parallel(config, Hardware(0), SIZES["8B"]) == 1  # no node has started
    assert plan_pools(config, Hardware(0), 1).num_replicas == config.num_replicas
    unspecified = config.model_copy(update={"tensor_parallel": "auto"})
    with pytest.raises(ResourceError, match="--tensor-parallel N"):
        plan_tensor_parallel(unspecified, Hardware(0), SIZES["8B"])


def test_images_and_pip_use_the_pinned_versions() -> None:
    cluster, job = load_yaml("cluster.yaml"), load_yaml("deploy/rayjob.yaml")["spec"]["rayClusterSpec"]
    templates = [job["headGroupSpec"]["template"], *(group["template"] for group in job["workerGroupSpecs"])]
    images = [cluster["docker"]["image"], *(c["image"] for t in templates for c in t["spec"]["containers"])]
    assert {image.rpartition(":")[2] for image in images} == {RAY_VERSION} == {job["rayVersion"]}
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert all("--constraint constraints.txt" in line for line in dockerfile.splitlines() if line.startswith("RUN pip"))
    copied = re.findall(r"^COPY (.+) \S+$", dockerfile, re.MULTILINE)
    assert all((ROOT / name).exists() for names in copied for name in names.split())
