"""Memory plans and rates of models for `ovis2 plan`; the only module of the jobs that loads torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ovis_model.checkpoint import fetch_checkpoint
from ovis_model.config import OvisConfig
from ovis_model.engine.forecast import GPUS, choose_ranks, estimate_rate, plan_cpu_memory, plan_gpu_memory
from ovis_model.sizing import MIN_FP8_CAPABILITY, describe_missing_fp8
from pipelines.config import RunConfig

Json = dict[str, Any]


@dataclass(frozen=True)
class GpuEstimator:
    """Estimates for `num_gpus` GPUs named `gpu`; None for this machine's CPUs. Implements `forecast.Estimator`."""

    gpu: str | None
    num_gpus: int
    output_tokens: int

    def plan_memory(self, config: RunConfig) -> Json:
        """Return the memory plan of a replica. Raise ValueError if it does not fit."""
        model = _read_model(config)
        if self.gpu is None:
            return asdict(plan_cpu_memory(model, "float32" if config.dtype == "auto" else config.dtype))
        ranks = self._choose_ranks(config, model)
        return asdict(plan_gpu_memory(model, GPUS[self.gpu], ranks, config.quantization))

    def estimate(self, config: RunConfig, *, tiles: float, prompt: float) -> Json:
        """Return the rate of all replicas. Raise ValueError if they do not fit."""
        assert self.gpu is not None
        model, gpu = _read_model(config), GPUS[self.gpu]
        ranks = self._choose_ranks(config, model)
        replicas = self.num_gpus // ranks
        if not replicas:
            raise ValueError(f"a replica needs {ranks} GPUs of this kind; give --num-gpus {ranks} or more")
        memory = plan_gpu_memory(model, gpu, ranks, config.quantization)
        output = min(self.output_tokens, config.max_new_tokens) * len(config.questionnaire.tasks)
        found = estimate_rate(model, gpu, memory, tiles=tiles, prompt=prompt, output=output)
        return {
            "rows_per_s": replicas * found.rows_per_s,
            "gpus": replicas * ranks,
            "figures": found.figures,
            "pools": f"{replicas} replicas of {ranks} {self.gpu}",
        }

    def _choose_ranks(self, config: RunConfig, model: OvisConfig) -> int:
        gpu = GPUS[self.gpu or ""]
        if config.quantization == "fp8" and gpu.capability < MIN_FP8_CAPABILITY:
            raise ValueError(describe_missing_fp8(self.gpu or "", gpu.capability))
        if config.tensor_parallel != "auto":
            return config.tensor_parallel
        return choose_ranks(model, gpu, config.quantization)


def _read_model(config: RunConfig) -> OvisConfig:
    return OvisConfig.from_directory(fetch_checkpoint(config.model, config.revision, weights=False))
