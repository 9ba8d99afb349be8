"""Start vLLM with the language model of a checkpoint, or say in one sentence why it does not start."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.llm_engine import LLMEngine

from ovis_model.config import OvisConfig
from ovis_model.engine.vllm_engine.language import register, write_model_directory
from ovis_model.engine.vllm_engine.rules import CHECKPOINT, AnswerRules

MAX_SEQUENCES = 256
_CPU_CACHE_GB = 4
_CPU_CACHE = "VLLM_CPU_KVCACHE_SPACE"
_GPU_SHARE = 0.92  # of a GPU's memory, for everything of this process
_VISION_BYTES = 3 << 30  # of passes over tiles


def start_vllm(directory: Path, config: OvisConfig, arguments: dict[str, Any]) -> LLMEngine:
    """Start vLLM with the checkpoint in `directory`. Raise ValueError that says why it does not start."""
    register()
    with tempfile.TemporaryDirectory(prefix="ovis2-vllm-") as model:
        write_model_directory(Path(model), directory, config)
        settings = {
            "model": model,
            "max_model_len": -1,  # what the cache holds, up to the model's own limit
            "max_num_seqs": MAX_SEQUENCES,
            "enable_prompt_embeds": True,
            "enable_prefix_caching": True,
            "async_scheduling": False,  # the rules need the ids of all earlier tokens
            "skip_tokenizer_init": True,
            "logprobs_mode": "raw_logprobs",
            "logits_processors": [AnswerRules],
            "disable_log_stats": True,
            "seed": 0,
            "additional_config": {CHECKPOINT: str(directory)},
        }
        try:
            engine = LLMEngine.from_engine_args(EngineArgs(**settings, **arguments), enable_multiprocessing=False)
        except Exception as error:
            raise ValueError(_describe_failure(error)) from error
    _remove_rendezvous_file(engine)
    return engine


def _remove_rendezvous_file(engine: LLMEngine) -> None:
    """Remove the file by which the one worker in this process met itself; vLLM leaves it."""
    wrapper = getattr(engine.model_executor, "driver_worker", None)  # with several workers, they meet by a port
    place = getattr(getattr(wrapper, "worker", None), "distributed_init_method", "")
    if place.startswith("file://"):
        Path(place.removeprefix("file://")).unlink(missing_ok=True)


def _describe_failure(error: Exception) -> str:
    """Return one sentence for what vLLM raised, of any type, and what to change."""
    [reason, *_] = re.split(r"\.\s", " ".join(str(error).split()).removesuffix("."))
    told = f"{type(error).__name__}: {reason}"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or re.search(r"memory|cache", reason, re.IGNORECASE):
        return (
            f"vLLM has too little memory to start ({told}); lower {_CPU_CACHE} or --num-replicas on CPUs, on GPUs "
            "raise --tensor-parallel, or leave out --engine vllm"
        )
    return f"vLLM does not start with this model on this machine ({told}); leave out --engine vllm"


def prepare_cpu(num_threads: int | None, tensor_parallel: int) -> None:
    """Set what vLLM and its workers, which share `num_threads`, read from the environment on a CPU."""
    os.environ.setdefault(_CPU_CACHE, str(_CPU_CACHE_GB))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # replicas share the cores
    if num_threads:
        os.environ["OMP_NUM_THREADS"] = str(max(1, num_threads // tensor_parallel))
        torch.set_num_threads(num_threads)


def plan_memory(device: torch.device) -> dict[str, Any]:
    """Return vLLM's share of the GPU: what the embedder and its passes leave free. Raise ValueError if it is none."""
    if device.type != "cuda":
        return {"enforce_eager": True}
    free, total = torch.cuda.mem_get_info(device)
    share = min(_GPU_SHARE, (free - _VISION_BYTES) / total)
    if share <= 0:
        raise ValueError(
            f"vLLM needs more than the {free / 1e9:.1f} GB that are free on the GPU; use a larger one, or raise "
            "--tensor-parallel"
        )
    return {"gpu_memory_utilization": share}
