"""A checkpoint exists when its marker does; a killed writer leaves the one before it, in any store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.storage import store
from pipelines.training.checkpoints import Checkpoints
from pipelines.training.metrics import MetricLog
from pipelines.training.page import render_training_page

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(5, dtype=np.uint8), "c": np.float32(3.5)}


def write(checkpoints: Checkpoints, step: int) -> None:
    tensors = ((name, np.asarray(value + step)) for name, value in TENSORS.items())
    checkpoints.write(step, tensors, {"step": step}, max_part_bytes=20)


def read(checkpoints: Checkpoints, step: int) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in checkpoints.read_tensors(step)}


def expect(step: int) -> dict[str, Any]:
    return {name: (value + step).tolist() for name, value in TENSORS.items()}


@pytest.fixture(params=["local", "s3"])
def checkpoints(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Checkpoints]:
    if request.param == "s3":
        request.getfixturevalue("bucket")
    yield Checkpoints("s3://bucket/run/training_state" if request.param == "s3" else str(tmp_path / "state"))


def test_what_is_written_is_read_and_two_are_kept(checkpoints: Checkpoints) -> None:
    for step in (5, 10, 15):
        write(checkpoints, step)
    assert checkpoints.list_steps() == [10, 15] and checkpoints.find_last() == 15
    assert read(checkpoints, 15) == expect(15) and checkpoints.read_state(10) == {"step": 10}


def test_without_its_marker_a_checkpoint_does_not_exist(checkpoints: Checkpoints) -> None:
    write(checkpoints, 5)
    write(checkpoints, 10)
    store.remove(f"{checkpoints.uri}/step-00000010/complete.json")
    assert checkpoints.find_last() == 5
    write(checkpoints, 10)
    assert read(checkpoints, 10) == expect(10)


@pytest.mark.parametrize("damage", [b"", b"\0" * 100], ids=["empty", "zeros"])
def test_a_damaged_checkpoint_is_logged_and_the_one_before_is_used(
    checkpoints: Checkpoints, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    write(checkpoints, 5)
    write(checkpoints, 10)
    store.write_bytes(f"{checkpoints.uri}/step-00000010/part-00001.safetensors", damage)
    assert checkpoints.find_last() == 5 and "step 10 is damaged" in caplog.text
    checkpoints.remove_after(5)
    assert checkpoints.list_steps() == [5]


class Killed(BaseException):
    """The process died."""


@pytest.mark.parametrize("survived", range(6))
def test_a_writer_that_is_killed_at_any_write_leaves_a_checkpoint(
    tmp_path: Path, survived: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(str(tmp_path))
    write(checkpoints, 5)
    with monkeypatch.context() as patched:
        kill_after(patched, survived)
        with suppress(Killed):
            write(checkpoints, 10)
    last = checkpoints.find_last()
    assert last in (5, 10) and read(checkpoints, last) == expect(last)


def kill_after(patched: pytest.MonkeyPatch, count: int) -> None:
    """Let the store write `count` files, then raise."""
    write_bytes, left = store.write_bytes, [count]

    def write_or_die(uri: str, data: bytes) -> None:
        if not left[0]:
            raise Killed
        left[0] -= 1
        write_bytes(uri, data)

    patched.setattr(store, "write_bytes", write_or_die)


def test_metrics_after_the_checkpoint_are_measured_again(tmp_path: Path) -> None:
    log = MetricLog(str(tmp_path), until_step=0)
    log.add({"step": step, "kind": "train", "loss": 1 / step} for step in (1, 2, 3))
    log.add([{"step": 3, "kind": "eval", "eval_loss": float("nan")}])
    log.write()
    again = MetricLog(str(tmp_path), until_step=2)
    assert again.list_points("loss") == [(1, 1.0), (2, 0.5)] and again.list_points("eval_loss") == []


def test_the_page_draws_curves_and_escapes_answers(tmp_path: Path) -> None:
    log = MetricLog(str(tmp_path), until_step=0)
    log.add({"step": step, "kind": "train", "loss": 1 / step, "learning_rate": 1e-4} for step in range(1, 2000))
    log.add([{"step": 1999, "kind": "sample", "question": "<b>?", "wanted": "a", "answer": "<script>"}])
    page = render_training_page("Stage 1", {"model": "<i>"}, log)
    assert page.count("<polyline") == 2 and "&lt;script&gt;" in page and "<script>" not in page and "<i>" not in page
    assert len(page) < 60_000 and "http" not in page.replace("http-equiv", "")
