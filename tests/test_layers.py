"""bfloat16 weights in float32 passes: the CPUs that use them, their products, and their accuracy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from ovis_model.engine.engine import OvisEngine
from ovis_model.network import layers
from ovis_model.network.layers import apply_linear, choose_pass_dtype
from ovis_model.network.ovis import Ovis
from ovis_model.network.weights import load_model
from ovis_model.types import SamplingParams
from tests.support.engines import compute_logits, make_golden_requests, normalize_tiles
from tests.support.golden_data import CHECKPOINTS, checkpoint_dir

CPU = torch.device("cpu")
MACHINES = {
    "Intel with AMX": ({"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": True}, True),
    "Intel without": ({"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False}, False),
    "AMD Zen 4": ({"architecture": "x86_64", "avx512_bf16": True, "sse4a": True}, True),
    "AMD Zen 3": ({"architecture": "x86_64", "sse4a": True}, False),
    "ARM": ({"architecture": "arm64"}, True),
}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Yield a monkeypatch with which a test can fake another CPU."""
    layers._is_slow_in_bfloat16.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    layers._is_slow_in_bfloat16.cache_clear()


@pytest.mark.parametrize("name", MACHINES)
def test_passes_are_in_float32_where_bfloat16_is_slow(name: str, machine: pytest.MonkeyPatch) -> None:
    capabilities, is_fast = MACHINES[name]
    machine.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_pass_dtype(torch.bfloat16, CPU) == (torch.bfloat16 if is_fast else torch.float32)
    assert choose_pass_dtype(torch.bfloat16, torch.device("meta")) == torch.bfloat16
    assert choose_pass_dtype(torch.float32, CPU) == torch.float32


@pytest.mark.parametrize("values", [1, 3 * 48, 1 << 22])
def test_a_weight_is_widened_in_parts(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "WIDENED_VALUES", values)
    torch.manual_seed(3)
    x, weight, bias = torch.randn(2, 5, 48), torch.randn(70, 48).bfloat16(), torch.randn(70).bfloat16()
    for matrix in (weight, weight.t().contiguous().t()):
        torch.testing.assert_close(apply_linear(x, matrix, bias), F.linear(x, weight.float(), bias.float()))
        torch.testing.assert_close(apply_linear(x, matrix), F.linear(x, weight.float()))


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_float32_passes_are_no_less_accurate(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kinds of pass are compared with a float32 model of the same weights."""
    directory = checkpoint_dir(checkpoint)
    model = load_model(directory, device=CPU, dtype=torch.bfloat16)
    exact = load_model(directory, device=CPU, dtype=torch.float32)
    exact.load_state_dict(model.state_dict())
    plain, widened = (_measure_errors(model, exact, checkpoint, slow, monkeypatch) for slow in (False, True))
    assert all(ours < theirs for ours, theirs in zip(widened, plain, strict=True)), (widened, plain)


def _measure_errors(
    model: Ovis, exact: Ovis, checkpoint: str, is_slow: bool, monkeypatch: pytest.MonkeyPatch
) -> tuple[float, float]:
    """Return root-mean-square errors of visual embeddings and of logits over all golden requests."""
    monkeypatch.setattr(layers, "_is_slow_in_bfloat16", lambda: is_slow)
    requests = [request for request in make_golden_requests(checkpoint) if len(request.tiles)]
    with torch.inference_mode():
        visual = [m.encode_tiles(normalize_tiles(m, r)).float() for m in (model, exact) for r in requests]
    logits = [compute_logits(m, r).float() for m in (model, exact) for r in requests]
    return _compute_rms(visual), _compute_rms(logits)


def _compute_rms(found_then_wanted: list[torch.Tensor]) -> float:
    half = len(found_then_wanted) // 2
    found, wanted = torch.cat(found_then_wanted[:half]), torch.cat(found_then_wanted[half:])
    return float((found - wanted).flatten().square().mean().sqrt())


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_prompt_gives_the_same_result_alone_and_in_a_batch(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dtype depends on the kind of pass, not on its number of tokens."""
    monkeypatch.setattr(layers, "_is_slow_in_bfloat16", lambda: True)
    engine = OvisEngine.from_pretrained(str(checkpoint_dir(checkpoint)), device="cpu", dtype="bfloat16")
    requests, params = make_golden_requests(checkpoint), SamplingParams(max_new_tokens=1)
    together = engine.generate(requests, params)
    alone = [engine.generate([request], params)[0] for request in requests]
    assert [c.output_ids.tolist() for c in together] == [c.output_ids.tolist() for c in alone]
    assert [c.mean_logprob for c in together] == pytest.approx([c.mean_logprob for c in alone], rel=1e-2)
