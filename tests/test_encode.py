"""Where encoders of frames run, and what the captioner has to do without."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from pipelines.cluster import plan_pools
from pipelines.config import CaptionConfig
from pipelines.encode import NO_ENCODERS, plan_encoders


def config(**options: Any) -> CaptionConfig:
    return CaptionConfig(input=("in",), output="out", model="demo", **{"frame_selection": "mdp3", **options})


@pytest.mark.parametrize("options", [{"frame_selection": "uniform"}, {"frame_encoder": "pixels"}])
def test_no_actors_where_none_are_needed(options: dict[str, Any]) -> None:
    assert plan_encoders(config(**options), cpus=64, gpus=8) == NO_ENCODERS


@pytest.mark.parametrize(("gpus", "encoders", "replicas"), [(2, 1, 1), (8, 1, 7), (16, 1, 15), (64, 7, 57)])
def test_a_gpu_of_their_own_if_there_are_several(gpus: int, encoders: int, replicas: int) -> None:
    pool = plan_encoders(config(), cpus=gpus * 12, gpus=gpus)
    assert (pool.device, pool.num_encoders, pool.gpus) == ("cuda", encoders, encoders)
    pools = plan_pools(config(), cpus=gpus * 12 - pool.cpus, gpus=gpus - pool.gpus)
    assert pools.num_replicas == replicas


def test_the_only_gpu_is_the_captioners(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        pool = plan_encoders(config(), cpus=16, gpus=1)
    assert (pool.device, pool.num_encoders, pool.cpus, pool.gpus) == ("cpu", 2, 2, 0)
    assert "siglip-base-patch16-224" in caplog.text


@pytest.mark.parametrize("cpus", [1, 2, 4, 8, 64])
def test_pools_and_encoders_fit_together_on_cpus(cpus: int) -> None:
    """What cannot start waits for ever."""
    pool = plan_encoders(config(), cpus=cpus, gpus=0)
    pools = plan_pools(config(), cpus=cpus - pool.cpus, gpus=0)
    wanted = pools.num_replicas * pools.replica_cpus + pools.num_preprocessors * pools.preprocessor_cpus
    assert wanted + pool.cpus <= cpus
    assert pool.num_encoders >= 1
