"""FP8: its rounding and products, models that are loaded with it, the plans that count with it, and who refuses it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.quantization import compare
from ovis_model.config import SIZES, Layout, OvisConfig
from ovis_model.engine.engine import OvisEngine
from ovis_model.engine.kv_cache import KVCache
from ovis_model.engine.memory_plan import bound_prefill_bytes, bound_vision_bytes, plan_budget
from ovis_model.inputs.processor import Processor
from ovis_model.network.kernels import FP8, MAX_FP8, TORCH
from ovis_model.network.ovis import Ovis
from ovis_model.network.quantization import Fp8Matrix, check_fp8_device, get_scales
from ovis_model.network.tensor_parallel import Shard
from ovis_model.network.weights import allocate_model, load_model
from ovis_model.sizing import estimate_device_bytes, find_min_ranks
from ovis_model.types import SamplingParams
from pipelines.cluster import resources
from pipelines.cluster.resources import Hardware, check_quantization
from pipelines.config import CaptionConfig
from pipelines.errors import ResourceError, RunError
from pipelines.generate import Replica, load_engine
from pipelines.output.sink import read_results
from pipelines.pipeline import run_pipeline
from tests.support.allocations import META, Allocations, make_shallow
from tests.support.engines import generate_ids, make_golden_requests
from tests.support.golden_data import CHECKPOINTS, LAYOUTS, checkpoint_dir
from tests.support.pictures import write_demo_pictures
from tests.support.prefills import make_prefill
from tests.support.processes import run_caption

CPU = torch.device("cpu")


def make_config(**options: Any) -> CaptionConfig:
    return CaptionConfig(input=("in",), output="out", model="demo", **options)


sizes = pytest.mark.parametrize("size", SIZES)


def test_rows_are_rounded_to_the_nearest_float8_number() -> None:
    """Against a search among all of them; of two equally near ones, the one with an even last bit."""
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    values, scales = TORCH.quantize_rows(x)
    assert values.dtype == FP8 and torch.equal(values.float().abs().amax(1), torch.full((20,), MAX_FP8))
    numbers = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    numbers = numbers[numbers.isfinite()].unique()
    exact = (x.double() / scales.double()).flatten()
    nearest = (exact[:, None] - numbers).abs().amin(1)
    assert torch.allclose((exact - values.double().flatten()).abs(), nearest, atol=1e-5)


def test_a_row_of_zeros_stays_zero() -> None:
    values, scales = TORCH.quantize_rows(torch.zeros(2, 16))
    assert not values.float().any() and scales.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_product_sums_float8_products_in_float32(dtype: torch.dtype, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    tokens, weight = (torch.randn(*shape, generator=generator) for shape in ((7, 48), (80, 48)))
    bias = torch.randn(80, generator=generator).bfloat16() if has_bias else None
    matrix = Fp8Matrix(*TORCH.quantize_rows(weight), TORCH)
    values, scales = TORCH.quantize_rows(tokens.to(dtype))
    wanted = (values.float() @ matrix.values.float().t()) * scales * matrix.scales.t()
    wanted = (wanted if bias is None else wanted + bias.float()).to(dtype)
    torch.testing.assert_close(matrix.multiply(tokens.to(dtype), bias), wanted, rtol=2**-8, atol=1e-4)
    assert (wanted.float() - tokens @ weight.t()).norm() < 0.06 * wanted.float().norm() or has_bias


def load_fp8(checkpoint: str, layout: Layout = "aidc", shard: Shard | None = None) -> Ovis:
    directory = checkpoint_dir(checkpoint, layout)
    shard = shard or Shard()
    return load_model(directory, device=CPU, dtype=torch.bfloat16, quantization="fp8", shard=shard)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_the_matrices_of_tower_and_decoder_are_quantized(checkpoint: str) -> None:
    exact = load_model(checkpoint_dir(checkpoint), device=CPU, dtype=torch.float32).state_dict()
    model = load_fp8(checkpoint)
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        scales = get_scales(modules[name.rpartition(".")[0]]) if parameter.dtype == FP8 else None
        is_matrix = ".layers." in name or ".blocks." in name
        assert (scales is not None) == (is_matrix and name.endswith("weight") and "norm" not in name), name
        if scales is not None:
            restored = parameter.float() * scales
            assert torch.all((restored - exact[name]).abs() <= exact[name].abs() / 16 + scales / 512), name


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_both_layouts_and_a_replica_give_the_same_answers(checkpoint: str) -> None:
    requests = make_golden_requests(checkpoint)
    params = SamplingParams(max_new_tokens=8)
    models = [load_fp8(checkpoint, layout) for layout in LAYOUTS]
    together, native = (generate_ids(OvisEngine.from_model(model), requests, params) for model in models)
    replica = Replica(str(checkpoint_dir(checkpoint)), None, "bfloat16", "cpu", 1, quantization="fp8")
    from_replica = [c.output_ids.tolist() for c in load_engine(replica).generate(requests, params)]
    assert together == native == from_replica


def test_a_rank_quantizes_its_part() -> None:
    """A part of the inputs has scales of its own; a part of the outputs has those of the whole."""
    whole = load_fp8("tiny56-tied").llm.model.layers[0]
    part = load_fp8("tiny56-tied", shard=Shard(1, 2)).llm.model.layers[0]
    for name in ("q_proj", "k_proj", "v_proj"):
        ours, all_rows = (getattr(layer.self_attn, name) for layer in (part, whole))
        rows = slice(ours.out_features, None)
        assert torch.equal(ours.weight.float(), all_rows.weight[rows].float())
        assert torch.equal(get_scales(ours), get_scales(all_rows)[rows])
    scales = [get_scales(layer.self_attn.o_proj) for layer in (part, whole)]
    assert torch.all(scales[0] <= scales[1]) and not torch.equal(*scales)


@sizes
def test_passes_stay_within_the_memory_plan(size: str) -> None:
    config, tiles, width = make_shallow(SIZES[size]), 4, 1024
    model = allocate_model(config, device=META, dtype=torch.bfloat16, quantization="fp8")
    side = config.vision.image_size
    with torch.inference_mode(), Allocations() as vision:
        model.encode_tiles(torch.empty(tiles, 3, side, side, dtype=torch.bfloat16, device=META))
    assert vision.peak <= bound_vision_bytes(config, torch.bfloat16, tiles)
    cache = KVCache(config.language, slots=4, capacity=width, device=META, dtype=torch.bfloat16)
    positions, context = make_prefill(cache, 4, width)
    with torch.inference_mode(), Allocations() as prefill:
        embeds = torch.zeros(1, 4 * width, config.language.hidden_size, dtype=torch.bfloat16, device=META)
        model.llm.model(embeds, positions, context)
    assert prefill.peak <= bound_prefill_bytes(config, torch.bfloat16, 4 * width, 4)


def count_weight_bytes(config: OvisConfig) -> int:
    model = allocate_model(config, device=META, dtype=torch.bfloat16, quantization="fp8")
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@sizes
def test_the_estimate_counts_the_allocated_weights(size: str) -> None:
    config = SIZES[size]
    saved = estimate_device_bytes(config, 1, 2) - estimate_device_bytes(config, 1, 2, "fp8")
    plain = sum(p.nbytes for p in allocate_model(config, device=META, dtype=torch.bfloat16).parameters())
    assert plain - count_weight_bytes(config) == pytest.approx(saved, rel=0.01)


def test_the_largest_model_fits_on_one_gpu_of_80_gb() -> None:
    config = SIZES["34B"]
    assert [find_min_ranks(config, 80 * 10**9, 2, quantization) for quantization in ("none", "fp8")] == [2, 1]
    budget = plan_budget(config, torch.bfloat16, 80 * 10**9 - count_weight_bytes(config))
    assert budget.kv_tokens > 30 * 2700  # thirty rows of ten tiles


def test_float32_and_odd_widths_are_refused() -> None:
    directory = str(checkpoint_dir("tiny56-tied"))
    with pytest.raises(ValueError, match="quantization='fp8' needs dtype='bfloat16'"):
        OvisEngine.from_pretrained(directory, device="cpu", dtype="float32", quantization="fp8")
    narrow = replace(SIZES["1B"], vision=replace(SIZES["1B"].vision, intermediate_size=1000))
    with pytest.raises(ValueError, match="maps 1024 to 1000 channels"):
        allocate_model(narrow, device=META, dtype=torch.bfloat16, quantization="fp8")
    with pytest.raises(ValueError, match="leave out --dtype float32"):
        make_config(quantization="fp8", dtype="float32")


def test_a_gpu_without_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_fp8_device(CPU)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    for capability in ((8, 0), (8, 9), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        if capability == (8, 0):
            with pytest.raises(ValueError, match=r"8\.9 or newer, such as L4, .* but A100 has 8\.0"):
                check_fp8_device(torch.device("cuda"))
        else:
            check_fp8_device(torch.device("cuda"))


def test_a_torch_that_cannot_simulate_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch 2.11 on a CPU takes only one scale per matrix."""

    def refuse(*args: Any, **options: Any) -> None:
        raise RuntimeError("(scale_a.numel() == 1 && scale_b.numel() == 1) INTERNAL ASSERT FAILED")

    check_fp8_device(CPU)
    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    with pytest.raises(ValueError, match=r"cannot be simulated on a CPU with torch .*; use torch 2\.13 or later"):
        check_fp8_device(CPU)


def test_a_cluster_with_a_gpu_without_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = [("NVIDIA L4", (8, 9)), ("NVIDIA A100-SXM4-80GB", (8, 0))]
    monkeypatch.setattr(resources, "query_gpu_capabilities", lambda: mixed)
    with pytest.raises(ResourceError, match=r"NVIDIA A100-SXM4-80GB has 8\.0; use --quantization none"):
        check_quantization(make_config(quantization="fp8"), Hardware(8, (2,)))
    check_quantization(make_config(), Hardware(8, (2,)))
    check_quantization(make_config(quantization="fp8", device="cpu"), Hardware(8, (2,)))


def test_the_driver_is_asked_per_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "NVIDIA H100 80GB HBM3, 9.0"; echo "NVIDIA L4, 8.9"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert resources._query_driver("name,compute_cap") == [["NVIDIA H100 80GB HBM3", "9.0"], ["NVIDIA L4", "8.9"]]


def test_a_caption_job_with_fp8_writes_what_the_engine_generates(ray_address: str, tmp_path: Path) -> None:
    """The demo on a CPU, in a replica of Ray; a run is not resumed without FP8."""
    source, output = tmp_path / "pictures", tmp_path / "out"
    source.mkdir()
    write_demo_pictures(source, 6)
    options = source, output, "--model", "demo", "--device", "cpu", "--max-new-tokens", 12
    finished = run_caption(*options, "--quantization", "fp8", ray_address=ray_address)
    assert finished.exit_code == 0 and finished.summary["ok"] == 6, finished.stderr
    rows, processor = read_results(str(output)).to_pylist(), Processor.from_pretrained("demo")
    images = [Image.open(row["uri"]).convert("RGB") for row in rows]
    requests = [processor.build_request("Describe the image.", [image]) for image in images]
    with OvisEngine.from_pretrained("demo", device="cpu", quantization="fp8") as engine:
        ids = generate_ids(engine, requests, SamplingParams(max_new_tokens=12))
    assert [row["text"] for row in rows] == [processor.detokenize(np.array(each)) for each in ids]
    plain = CaptionConfig(input=(str(source),), output=str(output), model="demo", device="cpu", max_new_tokens=12)
    with pytest.raises(RunError, match="quantization"):
        run_pipeline(plain)


def test_the_accuracy_table_orders_the_kinds_of_weights() -> None:
    exact, half, fp8 = compare("demo", 4)
    assert (exact.visual_error, exact.logit_error, exact.equal_tokens) == (0, 0, 100)
    assert 0 < half.logit_error < fp8.logit_error < 10 and 0 < half.visual_error < fp8.visual_error < 10
    assert set(fp8.right) >= {"bool", "caption", "choice", "count"} and fp8.equal_tokens > 95
