"""How a cluster is shared: never more than there is, and something for everybody."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovis_model.types import ROWS_SIDE_BY_SIDE
from pipelines.cluster import BATCH_BYTES, Pools, ResourceError, last_line, plan_batches, plan_pools, ray_session
from pipelines.config import CaptionConfig
from pipelines.manifest import ROWS_PER_GROUP


def config(**options: object) -> CaptionConfig:
    return CaptionConfig(input=("in",), output="out", model="demo", **options)  # type: ignore[arg-type]


@given(
    cpus=st.floats(0.5, 2000),
    gpus=st.integers(0, 64),
    num_replicas=st.sampled_from(["auto", 1, 3]),
    num_preprocessors=st.sampled_from(["auto", 1, 2, 50]),
)
def test_pools_never_ask_for_more_cpus_than_there_are(
    cpus: float, gpus: int, num_replicas: int | str, num_preprocessors: int | str
) -> None:
    options = config(num_replicas=num_replicas, num_preprocessors=num_preprocessors)
    if isinstance(num_replicas, int) and 0 < gpus < num_replicas:
        return
    pools = plan_pools(options, cpus=cpus, gpus=gpus)
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
        (32, 8, Pools("cuda", 8, 0, 1, 1, 24, 1)),
        (256, 8, Pools("cuda", 8, 0, 1, 1, 96, 1)),
    ],
)
def test_typical_machines(cpus: float, gpus: float, wanted: Pools) -> None:
    assert plan_pools(config(), cpus=cpus, gpus=gpus) == wanted


def test_an_address_that_does_not_answer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(ResourceError, match="does not answer"), ray_session():
            pass


def test_impossible_requests_say_what_to_do() -> None:
    with pytest.raises(ResourceError, match="--device cpu"):
        plan_pools(config(device="cuda"), cpus=8, gpus=0)
    with pytest.raises(ResourceError, match="lower --num-replicas"):
        plan_pools(config(num_replicas=9), cpus=8, gpus=8)
    with pytest.raises(ResourceError, match="no CPUs"):
        plan_pools(config(), cpus=0, gpus=8)


@given(
    num_rows=st.integers(1, 10**10),
    num_replicas=st.integers(1, 64),
    num_preprocessors=st.integers(1, 500),
    most_tile_bytes=st.integers(1000, 10_000_000),
)
def test_units_and_batches(num_rows: int, num_replicas: int, num_preprocessors: int, most_tile_bytes: int) -> None:
    pools = Pools("cpu", num_replicas, 1, 0, 1, num_preprocessors, 1)
    sizes = plan_batches(num_rows, pools, most_tile_bytes=most_tile_bytes)
    assert ROWS_PER_GROUP % sizes.rows_per_unit == 0
    assert sizes.rows_per_batch * most_tile_bytes <= max(BATCH_BYTES, 4 * most_tile_bytes)
    # While one batch runs out, the others still fill all slots.
    assert sizes.rows_per_batch * (sizes.calls_per_replica - 1) >= ROWS_SIDE_BY_SIDE
    if num_rows <= 20_000 * ROWS_PER_GROUP:
        assert num_rows / sizes.rows_per_unit <= 41_000


def test_the_last_line_is_the_actors_own() -> None:
    trace = (
        'ray::MapWorker.submit()\n  File "x.py", line 1\npipelines.store.StoreError: no such bucket\n\n'
        "The above exception was the direct cause of the following exception:\n\n"
        "ray.exceptions.UserCodeException: UDF failed to process a data block.\nsee the log"
    )
    assert last_line(RuntimeError(trace)) == "pipelines.store.StoreError: no such bucket"
    assert last_line(RuntimeError("nothing named\nlast")) == "last"
