"""The engine vllm: the same greedy answers, choices and constrained answers as our own, and its own refusals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ovis_model.checkpoint import fetch_checkpoint
from ovis_model.config import OvisConfig
from ovis_model.engine.engine import OvisEngine
from ovis_model.engine.vllm_engine import versions
from ovis_model.engine.vllm_engine.versions import check_kernels, check_vllm
from ovis_model.inputs.processor import Processor
from ovis_model.network.weights import load_embedder, load_model
from ovis_model.types import Completion, Constraint, Request, SamplingParams
from pipelines.output.sink import read_results
from tests.support.golden_data import checkpoint_dir
from tests.support.pictures import draw
from tests.support.processes import Job, is_alive, list_files, run_caption, wait_for
from tests.support.roots import ROOT

MODEL = "demo"  # its heads have a size that vLLM's attention on CPUs supports
GREEDY = SamplingParams(max_new_tokens=24)
NUMBER = {"type": "integer", "minimum": 0, "maximum": 99}
SCHEMA = {"type": "object", "properties": {"n": NUMBER}, "required": ["n"], "additionalProperties": False}
needs_vllm = pytest.mark.vllm


@pytest.fixture(scope="module")
def ours() -> Iterator[OvisEngine]:
    with OvisEngine.from_pretrained(MODEL, device="cpu", dtype="float32") as engine:
        yield engine


@pytest.fixture(scope="module")
def theirs() -> Iterator[Any]:
    from ovis_model.engine.vllm_engine.engine import VllmEngine

    with VllmEngine.from_pretrained(MODEL, device="cpu", dtype="float32", num_threads=2) as engine:
        yield engine


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """Return 72 requests: one image of any size, several images, none, and eight siblings about one image each."""
    processor, rng = Processor.from_pretrained(MODEL), np.random.default_rng(0)

    def draw_image() -> Image.Image:
        height, width = rng.integers(40, 900, 2)
        return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))

    texts = [f"Question {i}?" * (1 + i % 3) for i in range(8)]
    found = [processor.build_request(f"Describe the image {i}.", [draw_image()]) for i in range(24)]
    found += [processor.build_request("What differs?", [draw_image() for _ in range(2 + i % 3)]) for i in range(12)]
    found += [processor.build_request(f"Tell me {i} things.", []) for i in range(12)]
    for _ in range(3):
        image = draw_image()
        found += processor.build_requests([processor.encode_prompt(text, [image.size]) for text in texts], [image])
    return found


def count_equal(expected: list[Completion], found: list[Completion]) -> int:
    return sum(
        np.array_equal(one.output_ids, other.output_ids) and one.finish_reason == other.finish_reason
        for one, other in zip(expected, found, strict=True)
    )


@needs_vllm
@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SamplingParams(max_new_tokens=3),
        SamplingParams(max_new_tokens=24, stop=(" a", "e")),
        SamplingParams(max_new_tokens=24, repetition_penalty=1.3),
        SamplingParams(max_new_tokens=24, constraint=Constraint("regex", "(yes|no), [a-z]{3,8}")),
        SamplingParams(max_new_tokens=64, constraint=Constraint("json_schema", json.dumps(SCHEMA))),
    ],
    ids=["greedy", "length", "stop", "penalty", "regex", "json"],
)
def test_greedy_answers_are_equal(
    ours: OvisEngine, theirs: Any, requests: list[Request], params: SamplingParams
) -> None:
    expected, found = ours.generate(requests, params), theirs.generate(requests, params)
    assert count_equal(expected, found) == len(requests) == 72
    assert max(abs(a.mean_logprob - b.mean_logprob) for a, b in zip(expected, found, strict=True)) < 1e-3


@needs_vllm
def test_choices_have_equal_probabilities(ours: OvisEngine, theirs: Any, requests: list[Request]) -> None:
    end = ours.config.eos_token_ids[0]
    params = SamplingParams(choices=((5, 6, end), (7, end), (9, 10, 11, end)))
    expected, found = ours.generate(requests, params), theirs.generate(requests, params)
    assert count_equal(expected, found) == len(requests)
    for one, other in zip(expected, found, strict=True):
        assert one.choice_probs is not None and other.choice_probs is not None
        np.testing.assert_allclose(one.choice_probs, other.choice_probs, atol=1e-3)


@needs_vllm
def test_a_sample_depends_on_its_seed_and_not_on_the_batch(theirs: Any, requests: list[Request]) -> None:
    params = [SamplingParams(max_new_tokens=12, temperature=1.0, seed=i) for i in range(8)]
    together = theirs.generate(requests[:8], params)
    alone = [theirs.generate([request], own)[0] for request, own in zip(requests, params, strict=False)]
    assert count_equal(together, alone) == 8
    other = theirs.generate(requests[:8], [SamplingParams(max_new_tokens=12, temperature=1.0, seed=99)] * 8)
    assert count_equal(together, other) < 8


@needs_vllm
def test_threads_may_call_at_once(ours: OvisEngine, theirs: Any, requests: list[Request]) -> None:
    found: dict[int, list[Completion]] = {}
    parts = [requests[i : i + 18] for i in range(0, 72, 18)]
    threads = [
        threading.Thread(target=lambda i=i, part=part: found.update({i: theirs.generate(part, GREEDY)}))
        for i, part in enumerate(parts)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(count_equal(ours.generate(part, GREEDY), found[i]) for i, part in enumerate(parts)) == 72


@needs_vllm
def test_the_tensors_of_both_layouts_have_vllms_names() -> None:
    from safetensors import safe_open

    from ovis_model.engine.vllm_engine.language import to_vllm_name

    def list_names(layout: Any) -> set[str]:
        [file] = checkpoint_dir("tiny112-untied", layout).glob("*.safetensors")
        with safe_open(file, framework="np") as tensors:
            return {to_vllm_name(name) for name in tensors.keys()} - {""}  # noqa: SIM118

    names = list_names("aidc")
    assert names == list_names("native")
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} < names
    assert all(name.startswith("model.layers.") or name.count(".") <= 2 for name in names)


def draw_many(directory: Path, count: int) -> Path:
    directory.mkdir()
    for i in range(count):
        draw(directory / f"{i:02}.png", seed=i, width=300, height=200)
    return directory


def read_answers(output: Path) -> Any:
    return read_results(str(output)).sort_by("id").select(["id", "text", "status"])


OPTIONS = ["--model", MODEL, "--num-replicas", "2", "--max-new-tokens", "16", "--rows-per-file", "2"]


@needs_vllm
@pytest.mark.slow
def test_a_job_with_two_replicas_writes_every_row_once(tmp_path: Path) -> None:
    pictures = draw_many(tmp_path / "pictures", 24)
    expected = run_caption(pictures, tmp_path / "ours", *OPTIONS)
    found = run_caption(pictures, tmp_path / "theirs", *OPTIONS, "--engine", "vllm")
    assert (expected.exit_code, found.exit_code) == (0, 0), found.stderr
    assert read_answers(tmp_path / "ours").equals(read_answers(tmp_path / "theirs"))


def find_workers(job: Job) -> dict[int, list[int]]:
    """Return the processes of vLLM's workers of each replica; vLLM names them."""
    found = {}
    for replica in job.find_actors("Generate"):
        with suppress(OSError):  # it has just ended
            threads = [int(path.name) for path in Path(f"/proc/{replica}/task").iterdir()]
            texts = [Path(f"/proc/{replica}/task/{thread}/children").read_text() for thread in threads]
            children = [int(pid) for text in texts for pid in text.split()]
            found[replica] = [pid for pid in children if b"VLLM" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return found


@needs_vllm
@pytest.mark.slow
def test_killed_workers_and_replicas_cost_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL a worker of one replica's vLLM, and then the other replica, whose workers end with it."""
    pictures = draw_many(tmp_path / "pictures", 40)
    expected = run_caption(pictures, tmp_path / "ours", *OPTIONS)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    command = ["jobs.caption", str(pictures), str(tmp_path / "theirs"), *OPTIONS, "--engine", "vllm"]
    job = Job([*command, "--tensor-parallel", "2"]).start()
    wait_for(lambda: len(list_files(tmp_path / "theirs")) > 0, 280)
    workers = {replica: pids for replica, pids in find_workers(job).items() if len(pids) == 2}
    assert workers, "no replica has started its workers"
    [(first, pids), *others] = workers.items()
    os.kill(pids[1], signal.SIGKILL)
    killed, orphans = others[0] if others else (first, pids)
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: not any(map(is_alive, orphans)), 60)
    assert not any(map(is_alive, orphans))
    found = job.finish()
    job.wait_until_all_gone()
    assert not any(map(is_alive, [*pids, *orphans]))
    assert (expected.exit_code, found.exit_code) == (0, 0), found.stderr
    assert read_answers(tmp_path / "ours").equals(read_answers(tmp_path / "theirs"))


@needs_vllm
def test_too_little_memory_ends_a_job_with_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "100000")
    pictures = draw_many(tmp_path / "pictures", 1)
    found = run_caption(pictures, tmp_path / "out", "--model", MODEL, "--engine", "vllm")
    assert found.exit_code == 2 and "Traceback" not in found.stderr, found.stderr
    assert "error: vLLM has too little memory to start (" in found.stderr.splitlines()[-1]
    assert "lower VLLM_CPU_KVCACHE_SPACE" in found.stderr.splitlines()[-1]


def test_a_missing_or_untested_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, told in (
        (None, "needs the package vllm: pip install"),
        ("0.31.4", "0.31.4 is"),
        ("0.33.0", "0.33.0 is"),
    ):
        monkeypatch.setattr(versions, "_find_version", lambda found=found: found)
        with pytest.raises(ValueError, match=told):
            check_vllm()
    for found in ("0.32.0", "0.32.1+cpu", "0.32"):
        monkeypatch.setattr(versions, "_find_version", lambda found=found: found)
        check_vllm()


def test_a_model_without_kernels_is_refused() -> None:
    tiny = OvisConfig.from_directory(checkpoint_dir("tiny56-tied")).language
    demo = OvisConfig.from_directory(fetch_checkpoint(MODEL)).language
    with pytest.raises(ValueError, match="multiple of 32, and this model has 16"):
        check_kernels(tiny, "cpu", "none")
    with pytest.raises(ValueError, match="no fp8 products on CPUs"):
        check_kernels(demo, "cpu", "fp8")
    check_kernels(tiny, "cuda", "fp8")
    check_kernels(demo, "cpu", "none")


def test_the_tower_beside_vllm_is_quantized_as_ours_is() -> None:
    options: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.bfloat16, "quantization": "fp8"}
    whole, part = (load(checkpoint_dir("tiny56-tied"), **options).state_dict() for load in (load_model, load_embedder))
    assert {name for name in whole if not re.search(r"llm\..*(layers|lm_head)", name)} == {*part} - {
        "llm.lm_head.weight"
    }
    assert any(tensor.dtype == torch.float8_e4m3fn for tensor in part.values())
    assert all(torch.equal(tensor.float(), whole[name].float()) for name, tensor in part.items())


@pytest.mark.skipif(versions._find_version() is not None, reason="vLLM is installed")
def test_a_job_without_vllm_ends_at_once(tmp_path: Path) -> None:
    draw(tmp_path / "picture.png", seed=0, width=64, height=64)
    found = run_caption(tmp_path / "picture.png", tmp_path / "out", "--model", MODEL, "--engine", "vllm")
    assert found.exit_code == 2 and "pip install 'vllm==0.32.*'" in found.stderr
    assert not (tmp_path / "out").exists()


@needs_vllm
def test_an_interrupt_fails_no_later_request(ours: OvisEngine, theirs: Any, requests: list[Request]) -> None:
    theirs._core.abandon()
    assert count_equal(ours.generate(requests[:4], GREEDY), theirs.generate(requests[:4], GREEDY)) == 4


CLOSED = """
from ovis_model.engine.vllm_engine.engine import VllmEngine
from ovis_model.inputs.processor import Processor
from ovis_model.types import EngineDied, SamplingParams

request = Processor.from_pretrained("demo").build_request("Hello")
with VllmEngine.from_pretrained("demo", device="cpu", dtype="float32", num_threads=1) as engine:
    assert len(engine.generate([request], SamplingParams(max_new_tokens=3))[0].output_ids) <= 3
try:
    engine.generate([request], SamplingParams())
except EngineDied as error:
    assert "closed" in str(error)
else:
    raise AssertionError("a closed engine answers")
"""


@needs_vllm
def test_a_closed_engine_says_so_and_leaves_no_file(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", CLOSED], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir() if "vllm" in path.name] == []


FP8 = """
from ovis_model.engine.vllm_engine import engine

engine.check_kernels = lambda *_: None
engine.VllmEngine.from_pretrained("demo", device="cpu", dtype="bfloat16", quantization="fp8", num_threads=1)
"""


@needs_vllm
def test_the_decoders_fp8_is_handed_to_vllm() -> None:
    """Without our refusal, vLLM for CPUs quantizes the weights and finds no product for them."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", FP8], env=environment, capture_output=True, text=True, timeout=200)
    assert re.search("ValueError: vLLM does not start with this model .*fp8", done.stderr), done.stderr
