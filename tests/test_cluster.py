"""Planning of pools, ranks and batches: never more than the cluster has, and a share for every stage."""

from __future__ import annotations

import socket

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ovis_model.config import SIZES
from ovis_model.network.ovis import Ovis
from ovis_model.sizing import count_language_parameters, count_vision_parameters
from ovis_model.types import MAX_CONCURRENT_SEQUENCES
from pipelines.cluster import resources
from pipelines.cluster.ray_session import extract_error_line, find_cause, open_ray_session
from pipelines.cluster.resources import (
    BATCH_BYTES,
    Hardware,
    Pools,
    plan_batches,
    plan_pools,
    plan_tensor_parallel,
)
from pipelines.config import CaptionConfig
from pipelines.errors import ResourceError
from pipelines.schema import ROWS_PER_GROUP


def make_config(**options: object) -> CaptionConfig:
    return CaptionConfig(input=("in",), output="out", model="demo", **options)  # type: ignore[arg-type]


def test_the_cause_of_a_remote_failure_is_the_exception_that_was_raised_there() -> None:
    """Ray's wrapper is of the same class, but its text is the remote trace."""
    from ray.exceptions import RayTaskError

    raised = ResourceError("the model is too large")
    wrapped = RayTaskError("start", "ray::Worker.start()\n  a trace\nResourceError: ...", raised).as_instanceof_cause()
    assert isinstance(wrapped, ValueError) and find_cause(wrapped, ValueError) is raised
    assert find_cause(wrapped, OSError) is None


def make_machine(cpus: float, gpus: int) -> Hardware:
    return Hardware(cpus, (gpus,) if gpus else ())


@given(
    cpus=st.floats(0.5, 2000),
    gpus=st.integers(0, 64),
    num_replicas=st.sampled_from(["auto", 1, 3]),
    num_preprocessors=st.sampled_from(["auto", 1, 2, 50]),
)
def test_pools_never_reserve_more_cpus_than_exist(
    cpus: float, gpus: int, num_replicas: int | str, num_preprocessors: int | str
) -> None:
    options = make_config(num_replicas=num_replicas, num_preprocessors=num_preprocessors)
    if isinstance(num_replicas, int) and 0 < gpus < num_replicas:
        return
    if isinstance(num_preprocessors, int) and num_preprocessors > max(4, int(4 * cpus)):
        with pytest.raises(ResourceError, match="too many"):
            plan_pools(options, make_machine(cpus, gpus))
        return
    pools = plan_pools(options, make_machine(cpus, gpus))
    reserved = pools.num_replicas * pools.replica_cpus + pools.num_preprocessors * pools.preprocessor_cpus
    assert reserved <= cpus + 1e-6
    assert 0 <= pools.replica_cpus <= 1 and 0 < pools.preprocessor_cpus <= 1
    assert pools.num_replicas * pools.replica_gpus <= gpus
    assert num_preprocessors in ("auto", pools.num_preprocessors)


@pytest.mark.parametrize(
    ("cpus", "gpus", "wanted"),
    [
        (1, 0, Pools("cpu", 1, 0.5, 0, 1, 1, 0.5)),
        (2, 0, Pools("cpu", 1, 1, 0, 1, 1, 1)),
        (16, 0, Pools("cpu", 2, 1, 0, 6, 4, 1)),
        (32, 8, Pools("cuda", 8, 0, 1, 1, 24, 1, may_grow=True)),
        (256, 8, Pools("cuda", 8, 0, 1, 1, 96, 1, may_grow=True)),
    ],
)
def test_pools_of_typical_machines(cpus: float, gpus: float, wanted: Pools) -> None:
    assert plan_pools(make_config(), make_machine(cpus, gpus)) == wanted


def test_an_address_that_does_not_answer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # other tests may have started one
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(ResourceError, match="does not respond"), open_ray_session():
            pass


def test_impossible_pools_are_refused_with_a_remedy() -> None:
    with pytest.raises(ResourceError, match="--device cpu"):
        plan_pools(make_config(device="cuda"), make_machine(8, 0))
    with pytest.raises(ResourceError, match=r"9 GPUs.* 8,.*--num-replicas"):
        plan_pools(make_config(num_replicas=9), make_machine(8, 8))
    with pytest.raises(ResourceError, match="no CPUs"):
        plan_pools(make_config(), make_machine(0, 8))


def test_a_replica_never_spans_nodes() -> None:
    """Two nodes of three GPUs fit two replicas of two GPUs, and none of four."""
    two_by_three = Hardware(64, (3, 3), ("L4",))
    pools = plan_pools(make_config(), two_by_three, 2)
    assert (pools.num_replicas, pools.replica_gpus, pools.may_grow, pools.waits_for_gpus) == (2, 2, True, False)
    assert str(pools) == "2 replicas (each: 2 GPUs, 2 ranks); more as GPUs join; 48 preprocessors"
    with pytest.raises(ResourceError, match=r"4 GPUs.* 3;.*--tensor-parallel"):
        plan_pools(make_config(), two_by_three, 4)
    with pytest.raises(ResourceError, match=r"3 replicas of 2 GPUs.* 6 GPUs.* 6,.* 2\b"):
        plan_pools(make_config(num_replicas=3), two_by_three, 2)


def test_each_rank_keeps_a_core_from_the_preprocessors() -> None:
    assert plan_pools(make_config(), make_machine(16, 8), 2).num_preprocessors == 16 - 8
    assert plan_pools(make_config(), make_machine(16, 8), 1).num_preprocessors == 16 - 8
    assert plan_pools(make_config(num_replicas=1), make_machine(16, 8), 4).num_preprocessors == 16 - 4


def test_autoscaled_pools_ignore_what_exists_now() -> None:
    """The cluster may start with its head node alone and add GPUs and cores later."""
    pools = plan_pools(make_config(num_replicas=8, autoscale=True), Hardware(0), 2)
    assert (pools.device, pools.num_replicas, pools.replica_gpus) == ("cuda", 8, 2)
    assert (pools.num_preprocessors, pools.preprocessor_cpus) == (192, 1)
    assert pools.waits_for_gpus and not pools.may_grow
    with pytest.raises(ValueError, match=r"--autoscale.*--num-replicas"):
        make_config(autoscale=True)


@pytest.mark.parametrize(
    ("size", "memory_gb", "ranks"),
    [("1B", 16, 1), ("8B", 24, 2), ("16B", 80, 1), ("16B", 24, 4), ("34B", 80, 2), ("34B", 141, 1), ("34B", 24, 8)],
)
def test_tensor_parallel_is_chosen_by_gpu_memory(
    monkeypatch: pytest.MonkeyPatch, size: str, memory_gb: int, ranks: int
) -> None:
    monkeypatch.setattr(resources, "query_gpu_memory_bytes", lambda: memory_gb * 10**9)
    assert plan_tensor_parallel(make_config(), make_machine(8, 8), SIZES[size]) == ranks
    assert plan_tensor_parallel(make_config(device="cpu"), make_machine(8, 8), SIZES[size]) == 1
    assert plan_tensor_parallel(make_config(tensor_parallel=2), make_machine(8, 8), SIZES[size]) == 2


def test_a_model_that_never_fits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "query_gpu_memory_bytes", lambda: 16 * 10**9)
    with pytest.raises(ValueError, match=r"16 GB.*20 GB.* 8"):
        plan_tensor_parallel(make_config(), make_machine(8, 8), SIZES["34B"])


def test_parameter_counts_equal_those_published_and_torchs() -> None:
    """The published sizes count vision and language; torch's count covers the language model of the 2B."""
    wanted = {"1B": 1_131_283_318, "4B": 4_304_941_558, "8B": 8_935_282_678, "34B": 34_872_912_886}
    for size, number in wanted.items():
        assert count_vision_parameters(SIZES[size]) + count_language_parameters(SIZES[size].language) == number
    with torch.device("meta"):
        model = Ovis(SIZES["2B"])
    assert count_language_parameters(SIZES["2B"].language) == sum(p.numel() for p in model.llm.parameters())


@given(
    num_rows=st.integers(1, 10**10),
    num_replicas=st.integers(1, 64),
    num_preprocessors=st.integers(1, 500),
    max_tile_bytes=st.integers(1000, 10_000_000),
)
def test_batches_fill_every_replica_within_its_memory(
    num_rows: int, num_replicas: int, num_preprocessors: int, max_tile_bytes: int
) -> None:
    pools = Pools("cpu", num_replicas, 1, 0, 1, num_preprocessors, 1)
    sizes = plan_batches(num_rows, pools, max_tile_bytes=max_tile_bytes)
    assert ROWS_PER_GROUP % sizes.rows_per_unit == 0
    assert sizes.rows_per_batch * max_tile_bytes <= max(BATCH_BYTES, 4 * max_tile_bytes)
    # While one batch drains, the others still fill all slots; but no replica takes the share of another.
    share = num_rows / num_replicas
    wanted = MAX_CONCURRENT_SEQUENCES if num_replicas == 1 else min(MAX_CONCURRENT_SEQUENCES, share // 2)
    assert sizes.rows_per_batch * (sizes.calls_per_replica - 1) >= wanted
    if num_replicas > 1 and share >= 32:  # large enough that a batch is at most an eighth of it
        assert sizes.rows_per_batch * (sizes.calls_per_replica + 1) <= share
    if num_rows <= 20_000 * ROWS_PER_GROUP:
        assert num_rows / sizes.rows_per_unit <= 41_000


def test_last_line_is_the_actors_own_error() -> None:
    trace = (
        'ray::MapWorker.submit()\n  File "x.py", line 1\npipelines.storage.store.StoreError: no such bucket\n\n'
        "The above exception was the direct cause of the following exception:\n\n"
        "ray.exceptions.UserCodeException: UDF failed to process a data block.\nsee the log"
    )
    assert extract_error_line(RuntimeError(trace)) == "pipelines.storage.store.StoreError: no such bucket"
    assert extract_error_line(RuntimeError("nothing named\nlast")) == "last"
