"""A step makes the host wait for the device once: for the tokens. Counted on the meta device, for the whole engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle, islice
from typing import Any

import pytest
import torch

from ovis_model.config import OvisConfig
from ovis_model.engine.decode_step import run_eagerly
from ovis_model.engine.engine import OvisEngine
from ovis_model.engine.engine_core import EngineCore
from ovis_model.engine.scheduler import Budget
from ovis_model.network.uploads import upload
from ovis_model.network.weights import allocate_model
from ovis_model.tokenizer import load_tokenizer
from ovis_model.types import Constraint, Request, SamplingParams
from tests.support.allocations import META
from tests.support.engines import PARAMS, make_golden_requests
from tests.support.golden_data import checkpoint_dir
from tests.support.host_traffic import HostTraffic

CHECKPOINT = "tiny56-tied"
TOKENS = "copy to the host"


@pytest.fixture(scope="module", params=[0, 16], ids=["slots", "pages"])
def core(request: pytest.FixtureRequest) -> EngineCore:
    directory = checkpoint_dir(CHECKPOINT)
    model = allocate_model(OvisConfig.from_directory(directory), device=META, dtype=torch.bfloat16)
    return EngineCore(
        model,
        tokenizer=load_tokenizer(directory),
        budget=Budget(kv_tokens=20_000, slots=8, slot_tokens=1000, page_tokens=request.param),
        make_step_runner=lambda: run_eagerly,
        eos_token_ids=(),
    )


def list_traffic(core: EngineCore, requests: Sequence[Request], params: Sequence[SamplingParams]) -> Any:
    """Run requests to their end twice; return the waits and copies of each step of the second time."""
    steps = []
    with HostTraffic() as traffic:
        for is_counted in (False, True):
            states = core.enqueue(requests, params)
            while not all(state.has_left for state in states):
                if is_counted:
                    traffic.reset()
                core.step()
                steps += [(traffic.waits, traffic.uploads)] if is_counted else []
            assert not any(state.error for state in states)
    return steps


def list_params(kind: str, count: int) -> Iterator[SamplingParams]:
    held = SamplingParams(constraint=Constraint("regex", "!{40}"), temperature=1.0)  # "!" is the token 0
    given = {**PARAMS, "constrained": held}
    return (replace(given[kind], max_new_tokens=4, seed=seed) for seed in range(count))


@pytest.mark.parametrize("kind", ["greedy", "penalised", "sampled", "hot", "constrained"])
def test_a_step_waits_once_for_its_tokens(core: EngineCore, kind: str) -> None:
    requests = make_golden_requests(CHECKPOINT)
    first, *others = list_traffic(core, requests, [*list_params(kind, len(requests))])
    waits, _ = first
    assert set(waits) == {TOKENS} and 2 <= len(waits) <= 1 + len(requests)  # once a pass over prompts, and the step
    assert [waits for waits, _ in others] == [[TOKENS]] * len(others)
    copies = [uploads for _, uploads in others]
    assert copies == {"greedy": [0] * 2, "penalised": [0] * 2}.get(kind, [1] * 2)


def test_a_row_that_enters_needs_few_copies(core: EngineCore) -> None:
    """Pages, prompt, tiles, and the state of the decode step; the parameters of a sampler if it is not greedy."""
    requests = [*islice(cycle(make_golden_requests(CHECKPOINT)[:1]), 10)]
    lengths = [2, 3, *[6] * 8]
    for kind, most in (("greedy", 4), ("sampled", 8)):
        params = [replace(own, max_new_tokens=n) for n, own in zip(lengths, list_params(kind, 10), strict=True)]
        entered = list_traffic(core, requests, params)[1:3]
        assert [waits for waits, _ in entered] == [[TOKENS] * 2] * 2  # a pass over the prompt, and the step
        assert max(uploads for _, uploads in entered) <= most


def test_choices_are_scored_with_one_copy_back(core: EngineCore) -> None:
    requests = make_golden_requests(CHECKPOINT)[:2]
    params = [SamplingParams(choices=((5, 1), (6, 7, 1)))] * 2
    [(waits, _)] = list_traffic(core, requests, params)
    assert waits == [TOKENS]


def test_arrays_of_any_type_arrive_in_one_copy() -> None:
    generator = torch.Generator().manual_seed(0)
    sent = [
        torch.randint(0, 100, shape, generator=generator).to(dtype).numpy()
        for shape, dtype in (((3, 5), torch.int32), ((7,), torch.uint8), ((0, 2), torch.float64), ((2, 1), torch.int64))
    ]
    sent[0].flags.writeable = False
    for array, tensor in zip(sent, upload(torch.device("cpu"), *sent[:1], sent[1][::2], *sent[2:]), strict=True):
        wanted = array[::2] if array is sent[1] else array
        assert tensor.dtype == torch.from_numpy(wanted.copy()).dtype and tensor.tolist() == wanted.tolist()
    with HostTraffic() as traffic:
        traffic.reset()
        upload(META, *sent)
    assert (traffic.uploads, traffic.waits) == (1, [])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_cuda_reports_one_wait_a_step(kind: str) -> None:
    engine = OvisEngine.from_pretrained(str(checkpoint_dir(CHECKPOINT)), device="cuda")
    core = EngineCore(engine.model, budget=Budget(kv_tokens=8000, slots=8), eos_token_ids=())
    requests = make_golden_requests(CHECKPOINT)
    core.enqueue(requests, [*list_params(kind, len(requests))])
    core.step()
    core.step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchroniz") as found:
            core.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(found) == 1


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: int(x.sum()),
        lambda x: x.tolist(),
        lambda x: x[[0, 1]],
        lambda x: x + torch.tensor([1.0, 2.0], device=META),
        lambda x: x + torch.tensor([1.0, 2.0]).to(META),
        lambda x: x.copy_(torch.zeros(2, 2)),
    ],
)
def test_what_makes_the_host_wait_is_found(work: Any) -> None:
    x = torch.zeros(2, 2, device=META)
    with torch.inference_mode(), HostTraffic() as traffic:
        x.add_(1)
        traffic.reset()
        try:
            work(x)
        except (NotImplementedError, RuntimeError) as error:  # some results have no size on the meta device
            assert "meta" in str(error) or "nonzero" in str(error)
    assert len(traffic.waits) >= 1
