"""Planning of frame encoders: where they run, and what is left for the captioner."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from ovis_model.config import SIZES
from pipelines.cluster.resources import Hardware, plan_pools
from pipelines.config import CaptionConfig
from pipelines.media.frame_encoder import NO_ENCODERS, plan_encoders
from pipelines.plan import share_hardware


def make_config(**options: Any) -> CaptionConfig:
    return CaptionConfig(input=("in",), output="out", model="demo", **{"frame_selection": "mdp3", **options})


@pytest.mark.parametrize("options", [{"frame_selection": "uniform"}, {"frame_encoder": "pixels"}])
def test_no_encoders_are_planned_without_need(options: dict[str, Any]) -> None:
    assert plan_encoders(make_config(**options), device="auto", cpus=64, gpus=8) == NO_ENCODERS


@pytest.mark.parametrize(("gpus", "encoders", "replicas"), [(2, 1, 1), (8, 1, 7), (16, 1, 15), (64, 7, 57)])
def test_encoders_get_their_own_gpus_if_there_are_several(gpus: int, encoders: int, replicas: int) -> None:
    pool = plan_encoders(make_config(), device="auto", cpus=gpus * 12, gpus=gpus)
    assert (pool.device, pool.num_encoders, pool.gpus) == ("cuda", encoders, encoders)
    hardware = Hardware(gpus * 12, (8,) * (gpus // 8) or (gpus,))
    pools = plan_pools(make_config(), hardware.subtract(cpus=pool.cpus, gpus=pool.gpus, gpus_per_replica=1))
    assert pools.num_replicas == replicas


def test_replicas_fit_wherever_ray_places_the_encoders() -> None:
    """On nodes of 4, 4 and 3 GPUs, an encoder may occupy a GPU that one of the replicas of 2 GPUs would have used."""
    hardware = Hardware(64, (4, 4, 3))
    assert hardware.subtract(cpus=0, gpus=1, gpus_per_replica=2).count_replicas(2) == 4
    assert hardware.subtract(cpus=2, gpus=2, gpus_per_replica=2).count_replicas(2) == 3
    assert hardware.subtract(cpus=2, gpus=2, gpus_per_replica=2).cpus == 62


def test_a_single_gpu_is_left_to_the_captioner(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        pool = plan_encoders(make_config(), device="auto", cpus=16, gpus=1)
    assert (pool.device, pool.num_encoders, pool.cpus, pool.gpus) == ("cpu", 2, 2, 0)
    assert "siglip-base-patch16-224" in caplog.text


@pytest.mark.parametrize("cpus", [1, 2, 4, 8, 64])
def test_pools_and_encoders_together_fit_on_the_cpus(cpus: int) -> None:
    """Actors that do not fit would wait for ever."""
    pool = plan_encoders(make_config(), device="auto", cpus=cpus, gpus=0)
    pools = plan_pools(make_config(), Hardware(cpus).subtract(cpus=pool.cpus, gpus=0, gpus_per_replica=1))
    wanted = pools.num_replicas * pools.replica_cpus + pools.num_preprocessors * pools.preprocessor_cpus
    assert wanted + pool.cpus <= cpus
    assert pool.num_encoders >= 1


def test_encoders_leave_gpus_to_replicas_that_need_them() -> None:
    """If the model takes both GPUs, frames are encoded on CPUs."""
    for options, on_gpus in (({"tensor_parallel": 2}, 0), ({"tensor_parallel": 1}, 1), ({"num_replicas": 2}, 0)):
        encoders, pools = share_hardware(
            make_config(device="cuda", **{"tensor_parallel": 1, **options}), Hardware(32, (2,)), SIZES["8B"]
        )
        assert encoders.gpus == on_gpus and encoders.num_encoders > 0
        assert pools.num_replicas * pools.replica_gpus == 2 - on_gpus
