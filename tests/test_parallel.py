"""Several ranks act as one model: same logits and tokens, a shard of the weights each, no leftover processes."""

from __future__ import annotations

import _thread
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ovis_model.config import SIZES, OvisConfig
from ovis_model.engine.calls import EngineOptions
from ovis_model.engine.engine import OvisEngine
from ovis_model.engine.rank_pool import RankPool
from ovis_model.network.ovis import Ovis
from ovis_model.network.tensor_parallel import Shard
from ovis_model.sizing import check_tensor_parallel, list_rank_counts
from ovis_model.types import Constraint, EngineDied, Request, RequestError, SamplingParams
from tests.support.engines import GREEDY, PARAMS, generate_alone, generate_ids, load_greedy_ids, make_golden_requests
from tests.support.golden_data import checkpoint_dir, load_expected_arrays
from tests.support.golden_items import TASKS, assert_same, make_items, make_params
from tests.support.golden_items import generate_alone as generate_item_alone
from tests.support.processes import against_the_clock
from tests.support.roots import ROOT


def start_engine(checkpoint: str, ranks: int, hang_s: float | None = None) -> OvisEngine:
    directory = checkpoint_dir(checkpoint)
    config = OvisConfig.from_directory(directory)
    options = EngineOptions(directory=directory, device="cpu", num_threads=1)
    return OvisEngine(config, RankPool(options, config, ranks, hang_s=hang_s))


def get_pids(engine: OvisEngine) -> list[int]:
    assert isinstance(engine.backend, RankPool)
    return engine.backend.pids


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[OvisEngine]:
    with start_engine("tiny56-tied", 2) as engine:
        yield engine


@pytest.mark.parametrize(("checkpoint", "ranks"), [("tiny56-tied", 2), ("tiny112-untied", 4)])
def test_ranks_share_the_weights_and_compute_the_originals_logits(tmp_path: Path, checkpoint: str, ranks: int) -> None:
    """Four ranks share two key-value heads."""
    outs = [tmp_path / f"{rank}.npz" for rank in range(ranks)]
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.support.rank_logits",
                *map(str, (rank, ranks, tmp_path / "meet", checkpoint, out)),
            ],
            cwd=ROOT,
        )
        for rank, out in enumerate(outs)
    ]
    assert [process.wait(500) for process in processes] == [0] * ranks
    whole = Ovis(OvisConfig.from_directory(checkpoint_dir(checkpoint)))
    num_parameters = sum(p.numel() for p in whole.llm.parameters())
    for out in outs:
        with np.load(out) as found:
            for index in range(len(make_golden_requests(checkpoint))):
                wanted = load_expected_arrays(checkpoint)[f"{checkpoint}_{index}_last_logits"]
                np.testing.assert_allclose(found[f"arr_{index}"], wanted, atol=1e-5, rtol=0)
            assert found["llm_parameters"] < 1.15 * num_parameters / ranks


@pytest.mark.parametrize("size", SIZES)
def test_a_rank_of_a_published_size_holds_its_share_of_the_decoder(size: str) -> None:
    config = SIZES[size]
    with torch.device("meta"):
        for ranks in list_rank_counts(config.language)[1:]:
            models = [Ovis(config, shard=Shard(rank, ranks)) for rank in (0, ranks - 1)]
            whole = sum(p.numel() for p in Ovis(config).llm.parameters())
            for model in models:
                share = sum(p.numel() for p in model.llm.parameters()) / whole
                # A rank holds at least one key-value head.
                assert 1 / ranks <= share < 1 / ranks + 0.01


def test_supported_numbers_of_ranks_are_named() -> None:
    wanted = {"1B": [2], "2B": [2, 4], "4B": [2, 4, 8, 16], "8B": [2, 4], "16B": [2, 4, 8], "34B": [2, 4, 8]}
    assert {size: list_rank_counts(config.language)[1:] for size, config in SIZES.items()} == wanted
    with pytest.raises(
        ValueError, match=r"tensor_parallel=3 does not divide the model's 40 heads, .* use 1, 2, 4 or 8"
    ):
        check_tensor_parallel(SIZES["34B"].language, 3)
    with pytest.raises(ValueError, match="use 1 or 2"):
        check_tensor_parallel(SIZES["1B"].language, 0)
    with pytest.raises(ValueError, match=r"tensor_parallel=3 does not divide the model's 4 heads, .* use 1, 2 or 4"):
        OvisEngine.from_pretrained(str(checkpoint_dir("tiny56-tied")), tensor_parallel=3)


def test_greedy_ids_are_the_originals(two_ranks: OvisEngine) -> None:
    requests, wanted = make_golden_requests("tiny56-tied"), load_greedy_ids("tiny56-tied")
    assert generate_ids(two_ranks, requests) == wanted
    assert [generate_ids(two_ranks, [request])[0] for request in requests] == wanted


def test_samples_and_penalties_are_those_of_one_rank(two_ranks: OvisEngine) -> None:
    requests = make_golden_requests("tiny56-tied")
    kinds = sorted(PARAMS)
    params = [replace(PARAMS[kind], max_new_tokens=12) for kind in kinds]
    found = two_ranks.generate([requests[i % 8] for i in range(len(kinds))], params)
    assert [c.output_ids.tolist() for c in found] == [generate_alone(i % 8, kind) for i, kind in enumerate(kinds)]
    [unseeded] = two_ranks.generate(requests[:1], SamplingParams(temperature=2.0, max_new_tokens=40))
    assert 0 < len(unseeded.output_ids) <= 40


def test_tasks_of_an_item_answer_as_on_one_rank(two_ranks: OvisEngine) -> None:
    """This includes choices that are sampled without a seed: ranks that disagree would diverge."""
    items, tasks = make_items("tiny56-tied"), range(len(TASKS))
    found = two_ranks.generate(
        [request for item in items for request in item], [make_params(task) for _ in items for task in tasks]
    )
    for index, completion in enumerate(found):
        assert_same(completion, generate_item_alone("tiny56-tied", *divmod(index, len(TASKS))))
    unseeded = SamplingParams(choices=((17,), (9, 8, 564), (301,)), temperature=5.0)
    drawn = two_ranks.generate([items[0][0]] * 30, unseeded)
    assert len({tuple(completion.output_ids) for completion in drawn}) > 1


def test_constrained_answers_are_those_of_one_rank(two_ranks: OvisEngine) -> None:
    digits = SamplingParams(max_new_tokens=20, temperature=1.0, seed=3, constraint=Constraint("regex", "[0-9]{9}"))
    params = [digits, GREEDY, replace(digits, seed=4), replace(digits, constraint=Constraint("json_schema", "{}"))]
    requests = make_golden_requests("tiny56-tied")[:4]
    one_rank = OvisEngine.from_pretrained(str(checkpoint_dir("tiny56-tied")), device="cpu", dtype="float32")
    wanted = [completion.output_ids.tolist() for completion in one_rank.generate(requests, params)]
    assert [completion.output_ids.tolist() for completion in two_ranks.generate(requests, params)] == wanted
    never = replace(digits, constraint=Constraint("json_schema", '{"$ref": "#"}'))
    with pytest.raises(RequestError, match="cannot be continued"):
        two_ranks.generate(requests, [never, *params[1:]])
    assert [completion.output_ids.tolist() for completion in two_ranks.generate(requests, params)] == wanted


def test_each_thread_receives_its_own_completions(two_ranks: OvisEngine) -> None:
    requests, wanted = make_golden_requests("tiny56-tied"), load_greedy_ids("tiny56-tied")
    orders = [random.Random(seed).sample(range(len(requests)), k=len(requests)) for seed in range(4)]
    with ThreadPoolExecutor(len(orders)) as pool:
        found = list(pool.map(lambda order: generate_ids(two_ranks, [requests[i] for i in order]), orders))
    assert found == [[wanted[i] for i in order] for order in orders]


def test_ranks_continue_after_a_refused_request(two_ranks: OvisEngine) -> None:
    long = Request(np.ones(30000, np.int32), np.zeros((0, 3, 56, 56), np.uint8), np.zeros((0, 2), np.int32))
    with pytest.raises(RequestError, match="232 over the limit of 32768"):
        two_ranks.generate([long], SamplingParams(max_new_tokens=3000))
    with pytest.raises(ValueError, match="1 sampling parameters for 8 requests"):
        two_ranks.generate(make_golden_requests("tiny56-tied"), [GREEDY])
    assert two_ranks.generate([], GREEDY) == []
    test_greedy_ids_are_the_originals(two_ranks)


def test_ranks_continue_after_an_interrupt(two_ranks: OvisEngine) -> None:
    [request] = make_golden_requests("tiny56-tied")[:1]
    threading.Timer(0.5, _thread.interrupt_main).start()
    with pytest.raises(KeyboardInterrupt):
        while True:
            two_ranks.generate([request] * 64, GREEDY)
    test_greedy_ids_are_the_originals(two_ranks)


def test_two_engines_run_in_parallel() -> None:
    """They use the public entry point and share no fixed name or port."""
    directory = str(checkpoint_dir("tiny112-untied"))

    def start_and_generate(_: int) -> list[list[int]]:
        with OvisEngine.from_pretrained(directory, device="cpu", tensor_parallel=2) as engine:
            assert len(get_pids(engine)) == 2
            return generate_ids(engine, make_golden_requests("tiny112-untied"))

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(start_and_generate, range(2)))
    assert found == [load_greedy_ids("tiny112-untied")] * 2


@against_the_clock
@pytest.mark.parametrize(
    ("by", "reason"), [(signal.SIGKILL, "rank 1 of 2 was killed by SIGKILL"), (signal.SIGSTOP, "no sign of life for")]
)
def test_a_dead_or_hung_rank_is_noticed_and_replaced(by: signal.Signals, reason: str) -> None:
    requests, wanted = make_golden_requests("tiny56-tied"), load_greedy_ids("tiny56-tied")
    # A killed process is noticed by its exit, long before it would count as hung.
    hang_s = 200.0 if by is signal.SIGKILL else 5.0
    with start_engine("tiny56-tied", 2, hang_s=hang_s) as engine:
        first = get_pids(engine)
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(lambda: [generate_ids(engine, requests) for _ in range(1000)])
            time.sleep(0.3)
            os.kill(first[1], by)
            stopped_s = time.monotonic()
            with pytest.raises(EngineDied, match=reason):
                call.result(150)
        assert time.monotonic() - stopped_s < 100
        assert not any(map(is_alive, first))
        with pytest.raises(EngineDied):
            engine.generate(requests, GREEDY)
        assert engine.rebuild()
        assert engine.rebuild()  # does nothing while the ranks live
        assert generate_ids(engine, requests) == wanted
        last = get_pids(engine)
    assert not any(map(is_alive, last))


def test_ranks_end_with_their_owner() -> None:
    program = (
        "import sys\nfrom tests.test_parallel import get_pids, start_engine\n"
        "engine = start_engine('tiny56-tied', 2)\n"
        "print(*get_pids(engine), engine.backend._ranks._meeting.name, flush=True)\nsys.stdin.read()"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        *words, directory = owner.stdout.readline().split()
        pids = [int(pid) for pid in words]
        assert len(pids) == 2 and all(map(is_alive, pids))
        owner.kill()
    deadline_s = time.monotonic() + 60
    while any(map(is_alive, pids)) or Path(directory).exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_the_owner_of_ranks_does_not_import_torch() -> None:
    directory = str(checkpoint_dir("tiny56-tied"))
    program = (
        "import sys\nimport numpy as np\nfrom ovis_model import OvisEngine, Request, SamplingParams\n"
        f"with OvisEngine.from_pretrained({directory!r}, 'cpu', tensor_parallel=2) as engine:\n"
        "    request = Request(np.ones(5, np.int32), np.zeros((0, 3, 56, 56), np.uint8), np.zeros((0, 2), np.int32))\n"
        "    engine.generate([request], SamplingParams(max_new_tokens=4))\n"
        "    print(engine.stats.prompt_tokens, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.stdout == "5 False\n", done.stderr


def test_a_checkpoint_that_does_not_load_is_refused_with_the_reason(tmp_path: Path) -> None:
    for file in checkpoint_dir("tiny56-tied").iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(ValueError, match=r"no \.safetensors file"):
        OvisEngine.from_pretrained(str(tmp_path), tensor_parallel=2, device="cpu")


@pytest.mark.gpu
def test_one_rank_runs_on_nccl(tmp_path: Path) -> None:
    from ovis_model.network.tensor_parallel import join_ranks

    with join_ranks(0, 1, tmp_path / "meet", lambda: None):
        x = torch.ones(4, device="cuda")
        torch.distributed.all_reduce(x)
        assert x.tolist() == [1.0] * 4


def is_alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
