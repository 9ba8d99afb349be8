"""Where encoders of frames run, and what the captioner has to do without."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from ovis_model.config import SIZES
from pipelines.cluster.resources import Hardware, plan_pools
from pipelines.config import CaptionConfig
from pipelines.media.frame_encoder import NO_ENCODERS, plan_encoders
from pipelines.plan import share_hardware


def config(**options: Any) -> CaptionConfig:
    return CaptionConfig(input=("in",), output="out", model="demo", **{"frame_selection": "mdp3", **options})


@pytest.mark.parametrize("options", [{"frame_selection": "uniform"}, {"frame_encoder": "pixels"}])
def test_no_actors_where_none_are_needed(options: dict[str, Any]) -> None:
    assert plan_encoders(config(**options), device="auto", cpus=64, gpus=8) == NO_ENCODERS


@pytest.mark.parametrize(("gpus", "encoders", "replicas"), [(2, 1, 1), (8, 1, 7), (16, 1, 15), (64, 7, 57)])
def test_a_gpu_of_their_own_if_there_are_several(gpus: int, encoders: int, replicas: int) -> None:
    pool = plan_encoders(config(), device="auto", cpus=gpus * 12, gpus=gpus)
    assert (pool.device, pool.num_encoders, pool.gpus) == ("cuda", encoders, encoders)
    hardware = Hardware(gpus * 12, (8,) * (gpus // 8) or (gpus,))
    pools = plan_pools(config(), hardware.subtract(cpus=pool.cpus, gpus=pool.gpus, gpus_per_replica=1))
    assert pools.num_replicas == replicas


def test_replicas_fit_wherever_ray_puts_the_encoders() -> None:
    """Of two nodes of 4 GPUs and one of 3, an encoder may take one where two replicas of 2 would have been."""
    hardware = Hardware(64, (4, 4, 3))
    assert hardware.subtract(cpus=0, gpus=1, gpus_per_replica=2).count_replicas(2) == 4
    assert hardware.subtract(cpus=2, gpus=2, gpus_per_replica=2).count_replicas(2) == 3
    assert hardware.subtract(cpus=2, gpus=2, gpus_per_replica=2).cpus == 62


def test_the_only_gpu_is_the_captioners(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        pool = plan_encoders(config(), device="auto", cpus=16, gpus=1)
    assert (pool.device, pool.num_encoders, pool.cpus, pool.gpus) == ("cpu", 2, 2, 0)
    assert "siglip-base-patch16-224" in caplog.text


@pytest.mark.parametrize("cpus", [1, 2, 4, 8, 64])
def test_pools_and_encoders_fit_together_on_cpus(cpus: int) -> None:
    """What cannot start waits for ever."""
    pool = plan_encoders(config(), device="auto", cpus=cpus, gpus=0)
    pools = plan_pools(config(), Hardware(cpus).subtract(cpus=pool.cpus, gpus=0, gpus_per_replica=1))
    wanted = pools.num_replicas * pools.replica_cpus + pools.num_preprocessors * pools.preprocessor_cpus
    assert wanted + pool.cpus <= cpus
    assert pool.num_encoders >= 1


def test_encoders_leave_the_gpus_to_replicas_that_need_them() -> None:
    """Two GPUs and a model that takes both: frames are compared on CPUs."""
    for options, on_gpus in (({"tensor_parallel": 2}, 0), ({"tensor_parallel": 1}, 1), ({"num_replicas": 2}, 0)):
        encoders, pools = share_hardware(
            config(device="cuda", **{"tensor_parallel": 1, **options}), Hardware(32, (2,)), SIZES["8B"]
        )
        assert encoders.gpus == on_gpus and encoders.num_encoders > 0
        assert pools.num_replicas * pools.replica_gpus == 2 - on_gpus
