"""Single measurements of a GPU for `benchmarks.gpu_acceptance`; each returns its figures by name.

On a CPU, and with tiny sizes, they run for tests only. Nothing here needs Ray, flash-attn or llguidance.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.engine import ROOT, measure_engine, parse_options
from benchmarks.workload import SHAPES, load_or_build_model
from ovis_model.checkpoint import fetch_checkpoint
from ovis_model.config import OvisConfig
from ovis_model.engine.engine import OvisEngine
from ovis_model.engine.memory_plan import measure_free_bytes, plan_for_device
from ovis_model.network.attention import list_kernels
from ovis_model.network.devices import read_driver_version
from ovis_model.network.kernels import TORCH, choose_layer_kernels
from ovis_model.network.tensor_parallel import ALONE
from ovis_model.network.weights import allocate_model
from ovis_model.tokenizer import load_tokenizer
from ovis_model.types import IMAGE_ATOM_ID, Constraint, Request, SamplingParams

Figures = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Where to measure, and whether with sizes that a CPU computes in a second."""

    device: torch.device
    is_tiny: bool = False
    seconds: float = 120.0

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def shrink(self, size: int, tiny: int) -> int:
        """Return `size`, or `tiny` for a test."""
        return tiny if self.is_tiny else size

    def get_config(self, size: str) -> OvisConfig:
        """Return the shape of a published size, or a tiny one."""
        return SHAPES["24x128" if self.is_tiny else size]


def measure_ms(work: Callable[[], object], device: torch.device, times: int = 20) -> float:
    """Return the mean milliseconds of `work` after two runs."""
    for _ in range(2):
        work()
    synchronize(device)
    started_s = time.perf_counter()
    for _ in range(times):
        work()
    synchronize(device)
    return (time.perf_counter() - started_s) / times * 1e3


def measure_once_ms(work: Callable[[], object], device: torch.device) -> float:
    """Return the milliseconds of one run, including what is prepared for a new shape."""
    synchronize(device)
    started_s = time.perf_counter()
    work()
    synchronize(device)
    return (time.perf_counter() - started_s) * 1e3


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def describe_device(setting: Setting) -> Figures:
    """Name the card, the versions, and the attention kernels that work on it."""
    is_cuda = setting.device.type == "cuda"
    return {
        "card": torch.cuda.get_device_name() if is_cuda else "CPU",
        "memory_gb": torch.cuda.get_device_properties(0).total_memory / 1e9 if is_cuda else 0.0,
        "driver": read_driver_version() or "none",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "attention": " ".join(
            name + " (pages)" * kernels.reads_pages for name, kernels in list_kernels(is_cuda, True).items()
        ),
        "layer kernels": type(choose_layer_kernels(setting.dtype, setting.device)).__name__,
        "llguidance": importlib.util.find_spec("llguidance") is not None,
    }


@torch.inference_mode()
def measure_head(setting: Setting) -> Figures:
    """Time the visual head's product for a chunk of tokens at 65,531 and at 65,536 columns."""
    draw = partial(torch.randn, device=setting.device, dtype=setting.dtype)
    tokens, width = setting.shrink(1024, 4), setting.shrink(4096, 8)
    x, figures = draw(tokens, width), {}
    for columns in (65_531, 65_536):
        weight = draw(columns, width)
        figures[f"ms at {columns}"] = measure_ms(partial(F.linear, x, weight), setting.device, setting.shrink(50, 2))
    return {**figures, "ratio": figures["ms at 65531"] / figures["ms at 65536"]}


@torch.inference_mode()
def measure_norms(setting: Setting) -> Figures:
    """Time the norm of a vision pass with torch's operations and with the kernels that the model chooses."""
    tokens, width = setting.shrink(16 * 1024, 4), setting.shrink(1024, 16)
    x, weight = (torch.randn(n, width, device=setting.device, dtype=setting.dtype) for n in (tokens, 1))
    chosen = choose_layer_kernels(setting.dtype, setting.device)
    return {
        f"ms {name}": measure_ms(lambda: kernels.apply_rms_norm(x, weight[0], 1e-5), setting.device)  # noqa: B023
        for name, kernels in (("torch", TORCH), ("chosen", chosen))
    }


@torch.inference_mode()
def measure_new_shapes(setting: Setting) -> Figures:
    """Time causal attention at a length for the first and the second time, with cuDNN and without."""
    backends = {
        "any": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION],
        "without cuDNN": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION],
    }
    figures = {}
    for number, (name, allowed) in enumerate(backends.items()):
        length = setting.shrink(2680, 20) + number
        query = torch.randn(1, 28, length, 128, device=setting.device, dtype=setting.dtype)
        key = query[:, :4].contiguous()
        attend = partial(F.scaled_dot_product_attention, query, key, key, is_causal=True, enable_gqa=True)
        with sdpa_kernel([*allowed, SDPBackend.MATH]):
            figures[f"first ms, {name}"] = measure_once_ms(attend, setting.device)
            figures[f"then ms, {name}"] = measure_ms(attend, setting.device)
    return figures


def measure_uploads(setting: Setting) -> Figures:
    """Time the copy of the tiles of one pass to the device, from pageable and from pinned memory."""
    tiles = [np.zeros((3, 448, 448), np.uint8)] * setting.shrink(16, 1)
    pageable = partial(lambda: torch.from_numpy(np.stack(tiles)).to(setting.device))
    figures = {"ms stacked, pageable": measure_ms(pageable, setting.device)}
    if setting.device.type == "cuda":
        pinned = torch.from_numpy(np.stack(tiles)).pin_memory()
        copy = partial(pinned.to, setting.device, non_blocking=True)
        figures["ms pinned"] = measure_ms(copy, setting.device)
    return figures


def measure_memory(setting: Setting) -> Figures:
    """Allocate 8B; compare the free memory before and after torch's cache is emptied with what the weights leave."""
    is_cuda = setting.device.type == "cuda"
    total = torch.cuda.mem_get_info()[0] if is_cuda else measure_free_bytes(setting.device)
    model = allocate_model(setting.get_config("8B"), device=setting.device, dtype=setting.dtype)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    before = torch.cuda.mem_get_info()[0] if is_cuda else total
    free = measure_free_bytes(setting.device)
    budget = plan_for_device(model.config, model.dtype, model.device, ALONE)
    return {
        "weights_gb": weights / 1e9,
        "free_gb, cache kept": before / 1e9,
        "free_gb": free / 1e9,
        "lost_gb": (total - weights - free) / 1e9 if is_cuda else 0.0,
        "kv_tokens": budget.kv_tokens,
        "pages": bool(budget.page_tokens),
    }


TEST_FILES = (
    "test_devices",
    "test_attention",
    "test_decode_step",
    "test_host_traffic",
    "test_kernels",
    "test_parallel",
    "test_tile_loader",
)


def run_tests(setting: Setting, attention: str) -> Figures:
    """Run the tests marked `gpu` with one attention kernel. Raise RuntimeError that names those that fail."""
    files = [f"tests/{name}.py" for name in TEST_FILES[: setting.shrink(len(TEST_FILES), 1)]]
    # Without the options of pyproject.toml, no plugin has to be installed.
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-rfE", "-m", "gpu", "-o", "addopts=", *files]
    if setting.is_tiny:
        command += ["--collect-only"]
    environment = {**os.environ, "OVIS_ATTENTION": attention}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines = (run.stdout.strip() or run.stderr.strip()).splitlines()
    if run.returncode:
        raise RuntimeError("; ".join([lines[-1], *(line for line in lines if line.startswith(("FAILED", "ERROR")))]))
    return {"tests": lines[-1].strip("= ")}


def run_engine(setting: Setting, size: str, rows: int, options: str) -> Figures:
    """Run `benchmarks.engine` in this process on a published size."""
    words = (
        f"--model {'24x128' if setting.is_tiny else size} --rows {setting.shrink(rows, 4)} --device {setting.device}"
    )
    words += " --dtype bfloat16" if setting.device.type == "cuda" else ""
    words += " --image-size 112x112 --output-median 3 --output-cap 5" if setting.is_tiny else " --image-size 1920x1080"
    result = measure_engine(parse_options([*words.split(), *options.split()]))
    side, seconds = result["sides"]["engine"], result["seconds"]
    others = [side for name, side in result["sides"].items() if name != "engine"]
    return {
        "images_per_s": side["images_per_s"],
        **{name: result[name] for name in ENGINE_FIGURES},
        "decode_s": seconds["decode"],
        "times_transformers": result["wall_ratio"],
        "equal_rows": max((other["equal_rows"] / side["rows"] for other in others), default=None),
        "failures": result["failures"],
    }


ENGINE_FIGURES = (
    "ms_per_tile",
    "prefill_tokens_per_s",
    "ms_per_step",
    "rows_per_step",
    "flops_share_of_vision_and_prefill",
    "bandwidth_share_of_decode",
    "captures_after_warm_up",
    "weights_gb",
    "planned_gb",
    "peak_memory_gb",
)


def run_soak(setting: Setting, size: str) -> Figures:
    """Generate for prompts of 300 to 16,000 tokens, sampled and constrained, until the time is up.

    Raise EngineDied, or RuntimeError if the engine had to shrink its budget.
    """
    # Constraints need a model with at least the words of the demo's tokenizer.
    model = load_or_build_model("demo" if setting.is_tiny else size, setting.device, setting.dtype)
    can_constrain = importlib.util.find_spec("llguidance") is not None
    demo = fetch_checkpoint("demo")
    tokenizer = load_tokenizer(demo) if can_constrain else None
    model.config = replace(model.config, eos_token_ids=OvisConfig.from_directory(demo).eos_token_ids)
    rng, rows, tokens = np.random.default_rng(0), 0, 0
    with OvisEngine.from_model(model, tokenizer=tokenizer) as engine:
        engine.warm_up()
        ends_s = time.monotonic() + setting.seconds
        while not rows or time.monotonic() < ends_s:
            requests = [_draw_request(model.config, rng, setting) for _ in range(setting.shrink(64, 4))]
            params = [_draw_params(rng, number, can_constrain, setting) for number in range(len(requests))]
            completions = engine.generate(requests, params)
            rows += len(completions)
            tokens += sum(len(completion.output_ids) for completion in completions)
        core = engine.backend.core  # type: ignore[union-attr]
        if core.scheduler.budget != core._budget:
            raise RuntimeError(f"the engine ran out of memory and shrank to {core.scheduler.budget}")
    return {"rows": rows, "output_tokens": tokens, "constrained": can_constrain}


def _draw_request(config: OvisConfig, rng: np.random.Generator, setting: Setting) -> Request:
    """Draw a prompt with one tile, of a length whose logarithm is uniform."""
    shortest, longest = setting.shrink(300, 70), setting.shrink(16_000, 200)
    side, atoms = config.vision.image_size, config.vision.tokens_per_tile
    length = int(np.exp(rng.uniform(np.log(shortest), np.log(longest))))
    text = rng.integers(0, config.language.vocab_size // 2, max(1, length - atoms), dtype=np.int32)
    ids = np.concatenate([np.full(atoms, IMAGE_ATOM_ID, np.int32), text])
    tiles = rng.integers(0, 256, (1, 3, side, side), dtype=np.uint8)
    return Request(ids, tiles, np.array([[side, side]], np.int32))


def _draw_params(rng: np.random.Generator, number: int, can_constrain: bool, setting: Setting) -> SamplingParams:
    params = SamplingParams(
        max_new_tokens=int(rng.integers(8, setting.shrink(256, 12))), temperature=1.0, top_p=0.9, seed=number
    )
    if can_constrain and number % 4 == 0:
        return replace(params, constraint=Constraint("regex", "[a-z ]{10,60}"))
    return params


def parse_setting(args: argparse.Namespace, seconds: float) -> Setting:
    """Return the setting of the command line."""
    return Setting(torch.device(args.device), args.tiny, seconds)
