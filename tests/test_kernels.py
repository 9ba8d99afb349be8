"""Triton's kernels against the plain torch reference: on a GPU if there is one, else in Triton's interpreter.

The interpreter truncates to bfloat16 instead of rounding, so there the results of several roundings may differ by some
units in the last place.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="the kernels need Triton")

from benchmarks.kernel_launches import count_launches, make_recording_kernels
from ovis_model.config import SIZES
from ovis_model.engine.kv_cache import DecodeStep, KVCache
from ovis_model.engine.memory_plan import bound_prefill_bytes, bound_vision_bytes
from ovis_model.network import kernels, kernels_triton
from ovis_model.network.kernels import TORCH, LayerKernels, TorchKernels, choose_layer_kernels, list_layer_kernels
from ovis_model.network.kernels_triton import TritonKernels
from ovis_model.network.language import compute_rotary
from ovis_model.network.layers import KernelModule
from ovis_model.network.weights import allocate_model, load_model
from tests.support.allocations import META, Allocations, make_shallow
from tests.support.golden_data import checkpoint_dir
from tests.support.prefills import make_prefill
from tests.support.roots import ROOT

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float16: 2.0**-9, torch.bfloat16: 2.0**-7 if torch.cuda.is_available() else 2.0**-4}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE, dtype)


def assert_same(compute: Callable[[LayerKernels], Any], dtype: torch.dtype, atol: float = 1e-3) -> None:
    """Compare the results of both implementations; each computes on inputs of its own."""
    with torch.inference_mode():
        found, wanted = (compute(implementation) for implementation in (TritonKernels(), TORCH))
    torch.testing.assert_close(found, wanted, rtol=TOLERANCE[dtype], atol=atol)


@DTYPES
@pytest.mark.parametrize("size", [64, 100, 896])
def test_norms_agree(dtype: torch.dtype, size: int) -> None:
    weight = draw(size, dtype=dtype)
    assert_same(lambda k: k.apply_rms_norm(draw(2, 3, size, dtype=dtype), weight, 1e-5), dtype)
    x, residual = (draw(5, size, dtype=dtype, seed=seed) for seed in (1, 2))
    assert_same(lambda k: k.add_rms_norm(x.clone(), residual, weight, 1e-6), dtype)


@DTYPES
def test_gates_agree_on_whole_matrices_and_on_columns(dtype: torch.dtype) -> None:
    assert_same(lambda k: k.apply_gate(draw(2, 3, 1500, dtype=dtype), draw(2, 3, 1500, dtype=dtype, seed=1)), dtype)
    assert_same(lambda k: k.apply_gate(*draw(5, 200, dtype=dtype).chunk(2, -1)), dtype)


@DTYPES
@pytest.mark.parametrize(("heads", "head_dim"), [(3, 64), (4, 12)])
@pytest.mark.parametrize("length", [5, 1])
def test_rotations_agree_on_some_heads_of_a_matrix(dtype: torch.dtype, heads: int, head_dim: int, length: int) -> None:
    positions = torch.arange(2 * length, device=DEVICE).view(2, length) * 700
    rotary = compute_rotary(positions, head_dim, 1e6, dtype)
    projected = draw(2 * length, (heads + 2) * head_dim, dtype=dtype).view(2, length, -1, head_dim)
    # An element is a sum of two products that may cancel.
    assert_same(lambda k: k.rotate(projected[:, :, :heads], rotary), dtype, atol=4 * TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("mean", [0, 30])
def test_word_probabilities_agree_and_padding_has_none(
    dtype: torch.dtype, padding: int, mean: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row takes several blocks, the last of them with padding only in part."""
    monkeypatch.setattr(kernels_triton, "HEAD_BLOCK", 256)
    norm = nn.LayerNorm(1019, eps=1e-5).to(DEVICE, dtype).requires_grad_(False)
    norm.weight.copy_(draw(1019, dtype=dtype))
    words = draw(6, 1019 + padding, dtype=dtype) + mean
    assert_same(lambda k: k.compute_word_probabilities(words.clone(), norm), dtype, atol=1e-5)
    padded = TritonKernels().compute_word_probabilities(words.clone(), norm)
    assert not padded[:, 1019:].any()
    torch.testing.assert_close(padded.float().sum(-1), torch.ones(6, device=DEVICE), rtol=0.02, atol=0)


def test_rows_are_quantized_alike() -> None:
    """The interpreter's own rounding to float8 is wrong, so each element is a float8 number times its row's scale."""
    numbers = torch.arange(256, dtype=torch.uint8).view(kernels.FP8).float().nan_to_num(0)
    powers = 2.0 ** torch.arange(-3, 4)[:, None]
    rows = torch.cat([numbers * powers, torch.zeros(1, 256)]).to(DEVICE, torch.bfloat16)
    wide = torch.cat([rows, rows], dim=1)[:, :256]
    (values, scales), (wanted, wanted_scales) = (k.quantize_rows(wide) for k in (TritonKernels(), TORCH))
    assert torch.equal(values.float(), wanted.float()) and torch.equal(scales, wanted_scales)


@pytest.mark.gpu
def test_rows_are_quantized_bitwise_alike_on_cuda() -> None:
    rows = draw(64, 5000, dtype=torch.bfloat16)
    (values, scales), (wanted, wanted_scales) = (k.quantize_rows(rows) for k in (TritonKernels(), TORCH))
    assert torch.equal(values.view(torch.uint8), wanted.view(torch.uint8)) and torch.equal(scales, wanted_scales)


def test_nothing_is_launched_for_no_rows() -> None:
    empty = torch.zeros(0, 64, dtype=torch.bfloat16, device=DEVICE)
    assert TritonKernels().apply_rms_norm(empty, empty.new_ones(64), 1e-5).shape == (0, 64)


@pytest.mark.parametrize("checkpoint", ["tiny56-tied"])
def test_a_model_computes_the_same_with_either(checkpoint: str) -> None:
    """Visual embeddings, a prompt and a decode step, in float16."""
    found, wanted = (_compute_with(checkpoint, implementation) for implementation in (TritonKernels(), TORCH))
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).norm() < 0.01 * theirs.norm()


def _compute_with(checkpoint: str, implementation: LayerKernels) -> list[Tensor]:
    model = load_model(checkpoint_dir(checkpoint), device=DEVICE, dtype=torch.float16)
    model.prepare(implementation)
    side, size = model.config.vision.image_size, model.config.language.hidden_size
    cache = KVCache(model.config.language, slots=2, capacity=8, device=DEVICE, dtype=torch.float16)
    rows = torch.arange(2, device=DEVICE)
    positions, context = make_prefill(cache, 2, 5)
    embeds = draw(1, 10, size, dtype=torch.float16)
    with torch.inference_mode():
        visual = model.encode_tiles(draw(1, 3, side, side, dtype=torch.float16))
        prompt = model.llm.model(embeds, positions, context)
        step = model.llm.model(
            embeds[0, ::5, None].contiguous(), torch.full((2, 1), 5, device=DEVICE), DecodeStep(cache, rows * 0 + 5, 5)
        )
        return [x.float() for x in (visual, prompt, model.llm.compute_logits(step))]


def test_loaded_weights_survive_the_layout() -> None:
    plain, padded = (load_model(checkpoint_dir("tiny56-tied"), device=DEVICE, dtype=torch.float16) for _ in range(2))
    padded.prepare(TritonKernels())
    assert all(torch.equal(tensor, padded.state_dict()[name]) for name, tensor in plain.state_dict().items())
    assert {m.kernels.pads_columns for m in padded.modules() if isinstance(m, KernelModule)} == {True}


def test_a_layer_launches_few_kernels() -> None:
    """Norms of five or more kernels, and a gate of two, had 26, 18 and 23."""
    counts = count_launches(SIZES["1B"], make_recording_kernels)
    assert {kind: launches.total() for kind, launches in counts.items()} == {
        "tower block": 10,
        "prefill layer": 11,
        "decode layer": 11,
    }


@pytest.mark.parametrize("size", SIZES)
def test_passes_stay_within_the_memory_plan(size: str) -> None:
    """As in test_memory, with the results that Triton's kernels allocate."""
    config, tiles, width = make_shallow(SIZES[size]), 4, 1024
    model = allocate_model(config, device=META, dtype=torch.bfloat16)
    model.prepare(_make_silent_kernels())
    side = config.vision.image_size
    with torch.inference_mode(), Allocations() as vision:
        model.encode_tiles(torch.empty(tiles, 3, side, side, dtype=torch.bfloat16, device=META))
    assert 0.2 < vision.peak / bound_vision_bytes(config, torch.bfloat16, tiles) <= 1
    cache = KVCache(config.language, slots=4, capacity=width, device=META, dtype=torch.bfloat16)
    positions, context = make_prefill(cache, 4, width)
    with torch.inference_mode(), Allocations() as prefill:
        embeds = torch.zeros(1, 4 * width, config.language.hidden_size, dtype=torch.bfloat16, device=META)
        model.llm.model(embeds, positions, context)
    assert 0.3 < prefill.peak / bound_prefill_bytes(config, torch.bfloat16, 4 * width, 4) <= 1


def _make_silent_kernels() -> TritonKernels:
    class Silent(TritonKernels):
        def launch(self, kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
            pass

    return Silent()


def test_float32_and_cpus_use_the_reference() -> None:
    for dtype, device in ((torch.bfloat16, "cpu"), (torch.float32, "cuda"), (torch.bfloat16, "meta")):
        assert choose_layer_kernels(dtype, torch.device(device)) is TORCH


def test_triton_is_used_on_cuda_if_it_can_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.delenv("OVIS_KERNELS", raising=False)
    monkeypatch.setattr(kernels, "_can_compile", lambda: True)
    assert isinstance(choose_layer_kernels(torch.bfloat16, cuda), TritonKernels)
    monkeypatch.setenv("OVIS_KERNELS", "torch")
    assert isinstance(choose_layer_kernels(torch.bfloat16, cuda), TorchKernels)
    monkeypatch.setattr(kernels, "_can_compile", lambda: False)
    assert list(list_layer_kernels()) == ["torch"]
    monkeypatch.setenv("OVIS_KERNELS", "triton")
    with pytest.raises(ValueError, match="OVIS_KERNELS=triton is not available here; use one of torch or unset it"):
        choose_layer_kernels(torch.bfloat16, cuda)


def test_triton_needs_a_c_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels._can_compile()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    assert not kernels._can_compile()


@pytest.mark.parametrize("capability", [80, 90])
def test_all_kernels_compile_for_gpus(capability: int) -> None:
    """Triton brings NVIDIA's assembler, so no GPU is needed; the interpreter is off in the child process."""
    command = [sys.executable, "-m", "tests.support.compile_kernels", str(capability)]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == (6 if capability >= 89 else 5)  # FP8 came with 8.9
