"""A job whose engine cannot start ends with one sentence: vLLM missing, untested, broken, or without kernels."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from ovis_model.types import Completion, EngineDied, Request, SamplingParams
from pipelines.errors import ClusterChanged, EngineNotStarted
from pipelines.generate import Replica
from pipelines.pipeline import run_pipeline
from tests.support.fake_engine import FakeEngine, FakeEngineFactory
from tests.support.golden_data import checkpoint_dir
from tests.support.job_configs import make_job_config
from tests.support.pictures import draw, write_demo_pictures
from tests.support.processes import Finished, Job, list_files
from tests.support.roots import ROOT

PROBLEMS = {
    "older": ("0.31.4", ["--model", "demo"], "was tested with vLLM 0.32, and 0.31.4 is installed: pip install"),
    "newer": ("0.33.0", ["--model", "demo"], "was tested with vLLM 0.32, and 0.33.0 is installed: pip install"),
    "heads": (
        "0.32.0",
        ["--model", str(checkpoint_dir("tiny56-tied"))],
        "multiple of 32, and this model has 16; leave",
    ),
    "fp8": ("0.32.0", ["--model", "demo", "--quantization", "fp8"], "no fp8 products on CPUs; leave out --quant"),
}


def write_distribution(site: Path, version: str, code: str = "") -> None:
    """Write what tells Python that a version of vLLM is installed, and a package that runs `code` at its import."""
    (site / f"vllm-{version}.dist-info").mkdir(parents=True)
    metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
    (site / f"vllm-{version}.dist-info" / "METADATA").write_text(metadata)
    if code:
        (site / "vllm").mkdir()
        (site / "vllm" / "__init__.py").write_text(code)


def run_job(directory: Path, options: Sequence[str], ray_address: str | None = None) -> Finished:
    """Run a job with `--engine vllm` on a picture; packages in `directory` come before those that are installed."""
    draw(directory / "picture.png", seed=0, width=64, height=64)
    command = ["jobs.caption", str(directory / "picture.png"), str(directory / "out"), "--engine", "vllm", *options]
    job = Job(command, ray_address, {"PYTHONPATH": f"{directory}:{ROOT}"}).start()
    finished = job.finish(200)
    job.wait_until_all_gone()
    return finished


@pytest.mark.parametrize("problem", PROBLEMS)
def test_what_vllm_cannot_run_is_refused_before_the_run(ray_address: str, tmp_path: Path, problem: str) -> None:
    version, options, told = PROBLEMS[problem]
    write_distribution(tmp_path, version)
    finished = run_job(tmp_path, options, ray_address)
    assert (finished.exit_code, finished.stdout) == (2, "")
    assert finished.stderr.splitlines()[-1].startswith("error: ") and told in finished.stderr
    assert not (tmp_path / "out").exists()


def test_a_broken_vllm_is_named_in_a_sentence(tmp_path: Path) -> None:
    write_distribution(tmp_path, "0.32.0", 'raise RuntimeError("operator torchvision::nms does not exist")')
    finished = run_job(tmp_path, ["--model", "demo"])
    assert finished.exit_code == 2 and "Traceback" not in finished.stderr, finished.stderr
    told = "error: vLLM is installed, but importing it fails (RuntimeError: operator torchvision::nms does not exist)"
    assert finished.stderr.splitlines()[-1].startswith(told)


@dataclass(frozen=True)
class StartsOnce(FakeEngineFactory):
    """Makes an engine that dies when rows are written to `output`, and none after that."""

    output: Path = Path()

    def __call__(self, replica: Replica) -> FakeEngine:
        if list_files(self.output):
            raise EngineNotStarted("too little memory")
        return MortalEngine(self)


class MortalEngine(FakeEngine):
    def __init__(self, factory: StartsOnce) -> None:
        super().__init__(factory)
        self._output, self._turn = factory.output, threading.Lock()

    def generate(
        self, requests: Sequence[Request], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        with self._turn:
            time.sleep(0.5)
            if list_files(self._output):
                raise EngineDied("worn out")
            return super().generate(requests, params)


def test_a_replica_that_does_not_start_again_leaves_a_run_to_resume(ray_cluster: None, tmp_path: Path) -> None:
    write_demo_pictures(tmp_path, 16)
    config = make_job_config([tmp_path / "*.*"], tmp_path / "out", rows_per_file=2, max_error_rate=1.0)
    with pytest.raises(ClusterChanged, match="a replica does not start again: too little memory"):
        run_pipeline(config, make_engine=StartsOnce(output=tmp_path / "out"))
    summary = run_pipeline(config, make_engine=FakeEngineFactory())
    assert (summary.rows, summary.error) == (16, 0) and 0 < summary.skipped_done < 16
