"""Runs on clusters of several nodes with fake GPUs survive the death of any process and node."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.cluster.attempts import GIVEN_UP
from pipelines.output.sink import read_results
from tests.support.clusters import Driver, FakeGpuCluster, RayHead, start_gpu_cluster
from tests.support.golden_data import checkpoint_dir
from tests.support.pictures import draw
from tests.support.processes import against_the_clock
from tests.support.roots import ROOT

MODEL = str(checkpoint_dir("tiny56-tied"))
NUM_ROWS = 200


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw images of one tile each, and `poison.png` of ten."""
    directory = tmp_path_factory.mktemp("pictures")
    for i in range(NUM_ROWS):
        draw(directory / f"{i:03}.png", seed=i, width=50, height=40)
    draw(directory / "poison.png", seed=500, width=600, height=500)
    return directory


@pytest.fixture(scope="module")
def four_gpus() -> Iterator[FakeGpuCluster]:
    with start_gpu_cluster(head={"num_cpus": 4, "num_gpus": 4}) as cluster:
        yield cluster


@pytest.mark.slow
def test_every_row_survives_killed_ranks_leaders_and_preprocessors(
    four_gpus: FakeGpuCluster, pictures: Path, tmp_path: Path
) -> None:
    """Two replicas of two ranks: every row is written once, the poison row as an error, and no process is left."""
    driver = Driver(
        four_gpus,
        pictures,
        tmp_path / "out",
        model=MODEL,
        tensor_parallel=2,
        max_new_tokens=4,
        seconds_per_row=0.12,
        poison_tiles=10,
        num_preprocessors=2,
    )
    os.kill(four_gpus.wait_for_process("MapBatches(Preprocess)"), signal.SIGKILL)  # first, as they soon finish
    first = driver.wait_for_leaders(2)
    assert sorted(",".join(event["gpus"] for event in first).split(",")) == ["0", "1", "2", "3"]
    os.kill(
        first[1]["leader"], signal.SIGKILL
    )  # at once: it started last, so it got fewer rows and may be released when it has no more
    kill_a_rank(driver, first[0]["leader"])
    code, out, err = driver.finish()
    assert code == 0, err
    assert "plan: 2 replicas (each: 2 GPUs, 2 ranks)" in err
    rows = read_results(str(tmp_path / "out")).to_pylist()
    assert [Path(row["id"]).name for row in rows] == sorted(path.name for path in pictures.iterdir())
    failed = [row for row in rows if row["status"] == "error"]
    assert [(Path(row["id"]).name, row["stage"]) for row in failed] == [("poison.png", "generate")]
    assert failed[0]["error"] == GIVEN_UP
    rebuilt = [event for event in driver.read_events() if event.get("leader") == first[0]["leader"]]
    assert (
        len(rebuilt) > 1 and rebuilt[0] == first[0] and rebuilt[0]["ranks"] != rebuilt[1]["ranks"]
    )  # the leader rebuilt its engine in place
    assert json.loads(out.splitlines()[-1])["rows"] == NUM_ROWS + 1
    four_gpus.assert_nothing_is_left()


def kill_a_rank(driver: Driver, leader: int) -> None:
    """Kill a living rank of `leader`; the poison row may have killed the one last recorded."""
    for _ in range(100):
        pids = [event["ranks"] for event in driver.read_events() if event.get("leader") == leader][-1]
        try:
            return os.kill(pids[1], signal.SIGKILL)
        except ProcessLookupError:
            time.sleep(0.1)
    raise AssertionError(f"no rank of {leader} lives")


@against_the_clock
@pytest.mark.parametrize("by", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_gpus_are_free_after_an_interrupt_and_after_a_crash(
    four_gpus: FakeGpuCluster, pictures: Path, tmp_path: Path, by: signal.Signals
) -> None:
    """The driver is interrupted or killed while ranks work."""
    # Slow enough that both replicas have work for minutes, whenever each of them is ready.
    options = {"model": MODEL, "tensor_parallel": 2, "max_new_tokens": 4, "seconds_per_row": 2}
    driver = Driver(four_gpus, pictures, tmp_path / "out", num_preprocessors=2, **options)
    driver.wait_for_leaders(2)
    assert len(four_gpus.find_processes("ovis_model.engine.rank_process")) == 4, driver.read_events()
    driver.process.send_signal(by)
    code, _, err = driver.finish()
    assert code == (1 if by is signal.SIGINT else -signal.SIGKILL), err
    four_gpus.assert_nothing_is_left()


def test_more_replicas_than_the_cluster_holds_are_refused_before_the_run(
    four_gpus: FakeGpuCluster, pictures: Path, tmp_path: Path
) -> None:
    driver = Driver(four_gpus, pictures, tmp_path / "out", model=MODEL, tensor_parallel=2, num_replicas=3)
    code, _, err = driver.finish()
    assert code == 2
    assert "3 replicas of 2 GPUs on one node need 6 GPUs; the cluster has 4, room for 2" in err
    assert not driver.read_events(), "a replica was started"


@pytest.mark.slow
def test_a_run_survives_a_lost_node_and_uses_a_new_one(pictures: Path, tmp_path: Path) -> None:
    """A GPU node is killed and another one joins: its replica works, and every row is written once."""
    gpu_node = {"num_cpus": 2, "num_gpus": 1, "labels": {"ray.io/accelerator-type": "L4"}}
    with start_gpu_cluster(gpu_node, gpu_node, head={"num_cpus": 3}) as cluster:
        options = {"model": MODEL, "max_new_tokens": 4, "seconds_per_row": 0.3, "num_preprocessors": 3}
        driver = Driver(cluster, pictures, tmp_path / "out", **options)
        driver.wait_for_rows(12)
        cluster.kill_node(cluster.nodes[1])
        killed_s = time.time()
        joined = cluster.add_node(**gpu_node)
        code, _, err = driver.finish(300)
        assert code == 0, err
        assert "plan: 2 replicas (each: 1 GPU); more as GPUs join; 3 preprocessors" in err
        batches = [event for event in driver.read_events() if "node" in event]
        assert {event["node"] for event in batches} == {joined.node_id, *(node.node_id for node in cluster.nodes)}
        first_s = min(event["at_s"] for event in batches if event["node"] == joined.node_id)
        print(f"the new node's first batch {first_s - killed_s:.1f} s after the other was killed")
        rows = read_results(str(tmp_path / "out")).to_pylist()
        assert [Path(row["id"]).name for row in rows] == sorted(path.name for path in pictures.iterdir())
        assert all(row["status"] == "ok" for row in rows)
        cluster.assert_nothing_is_left()


_PRINT_NODES_OF_ACTORS = """
import sys
import ray
from ray.data import ActorPoolStrategy
from pipelines.cluster.resources import Hardware, prefer_nodes_without
class FindNode:
    def __call__(self, batch):
        return {"node": [ray.get_runtime_context().get_node_id()] * len(batch["id"])}
ray.init(address=sys.argv[1], log_to_driver=False)
for size in (2, 4):
    found = ray.data.range(40, override_num_blocks=20).map_batches(
        FindNode, batch_size=1, num_cpus=1, compute=ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1),
        **prefer_nodes_without(Hardware.detect().gpu_types),
    )
    print(*sorted({row["node"] for row in found.take_all()}))
"""


@pytest.mark.slow
def test_preprocessors_use_gpu_nodes_only_if_the_others_are_full() -> None:
    gpu_node = {"num_cpus": 4, "num_gpus": 1, "labels": {"ray.io/accelerator-type": "L4"}}
    with start_gpu_cluster(gpu_node, {"num_cpus": 3}) as cluster:
        command = [sys.executable, "-c", _PRINT_NODES_OF_ACTORS, cluster.address]
        printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        gpu_node_id, other = (node.node_id for node in cluster.nodes)
        assert [line.split() for line in printed.splitlines()[-2:]] == [[other], sorted([other, gpu_node_id])]


@pytest.mark.slow
def test_an_autoscaler_starts_the_nodes_that_a_run_needs(pictures: Path, tmp_path: Path) -> None:
    """The cluster starts as a head without CPUs and GPUs; the run asks for nodes for both stages."""
    head = RayHead(
        {
            "cpu": {"resources": {"CPU": 2}, "max_workers": 2},
            "gpu": {"resources": {"CPU": 1, "GPU": 2}, "max_workers": 2},
        }
    )
    try:
        options = {"model": MODEL, "tensor_parallel": 2, "num_replicas": 2, "autoscale": True, "num_preprocessors": 2}
        driver = Driver(head, pictures, tmp_path / "out", max_new_tokens=4, seconds_per_row=0.5, **options)
        code, _, err = driver.finish(300)
        assert code == 0, err
        assert "plan: 2 replicas (each: 2 GPUs, 2 ranks); starting as their GPUs join" in err
        assert len({event["leader"] for event in driver.read_events() if "leader" in event}) == 2
        rows = read_results(str(tmp_path / "out"))
        assert sorted(Path(id).name for id in rows.column("id").to_pylist()) == sorted(
            p.name for p in pictures.iterdir()
        )
    finally:
        head.close()
