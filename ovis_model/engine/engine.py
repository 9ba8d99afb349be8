"""The public engine: `generate` with a replica in this process, or with several ranks in child processes.

Knows token ids, not text, and imports torch only when a model is loaded into this process.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from ovis_model.checkpoint import fetch_checkpoint
from ovis_model.config import OvisConfig, Quantization
from ovis_model.engine.calls import Device, Dtype, EngineOptions, Stats
from ovis_model.engine.rank_pool import RankPool
from ovis_model.types import Completion, Request, SamplingParams
from ovis_model.wording import count_nouns

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ovis_model.engine.decode_step import StepRunner
    from ovis_model.engine.engine_loop import LoopThread
    from ovis_model.engine.scheduler import Budget
    from ovis_model.network.ovis import Ovis


class OvisEngine:
    """One replica of the model; implements `types.Engine`.

    Its device is freed by `close`, with this object, and at the end of this process, however that ends.
    """

    def __init__(self, config: OvisConfig, backend: LoopThread | RankPool) -> None:
        self.config, self.backend = config, backend
        self._close = weakref.finalize(self, backend.close)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str,
        device: Device = "auto",
        dtype: Dtype = "auto",
        tensor_parallel: int = 1,
        post_trunk_norm: bool = False,
        *,
        revision: str | None = None,
        num_threads: int | None = None,
        quantization: Quantization = "none",
    ) -> OvisEngine:
        """Load "demo", a directory, a hub id or a URI.

        `auto` means bfloat16 on CUDA if a device is available, else float32 on a CPU. With `tensor_parallel` above 1,
        that many processes of this machine share the model, and this process holds none of it. Rank i uses the ith CUDA
        device available to this process. `num_threads` limits the CPU threads of all ranks together.
        `quantization="fp8"` needs a GPU with FP8 products, or simulates them on a CPU, and then `auto` means bfloat16
        on both. Raise CheckpointError, ConfigError, WeightsError or another ValueError that says what to do.
        """
        directory = fetch_checkpoint(path_or_id, revision)
        options = EngineOptions(
            directory=directory,
            device=device,
            dtype=dtype,
            post_trunk_norm=post_trunk_norm,
            num_threads=num_threads,
            quantization=quantization,
        )
        config = OvisConfig.from_directory(directory)
        engine = cls(config, _load(options) if tensor_parallel == 1 else RankPool(options, config, tensor_parallel))
        print(f"{path_or_id} on {engine.describe()}", file=sys.stderr)
        return engine

    @classmethod
    def from_model(
        cls,
        model: Ovis,
        *,
        tokenizer: Tokenizer | None = None,
        budget: Budget | None = None,
        make_step_runner: Callable[[], StepRunner] | None = None,
        eos_token_ids: Sequence[int] | None = None,
    ) -> OvisEngine:
        """Make an engine from a loaded model.

        `tokenizer` is needed for stop strings and constraints. By default, `budget` is planned from the device's free
        memory, decode steps run as CUDA graphs on CUDA and eagerly on a CPU, and answers end at the checkpoint's
        end-of-text ids.
        """
        from ovis_model.engine.engine_core import EngineCore
        from ovis_model.engine.engine_loop import LoopThread

        core = EngineCore(
            model,
            tokenizer=tokenizer,
            budget=budget,
            make_step_runner=make_step_runner,
            eos_token_ids=eos_token_ids,
        )
        return cls(model.config, LoopThread(core))

    @property
    def model(self) -> Ovis:
        """The network. Raise AttributeError if rank processes hold it."""
        if isinstance(self.backend, RankPool):
            raise AttributeError("the rank processes hold the model; load it with tensor_parallel=1 to access it")
        return self.backend.core.model

    @property
    def stats(self) -> Stats:
        """A copy of the totals so far; those of rank 0 if there are several ranks."""
        return replace(self.backend.stats)

    def measure(self) -> dict[str, float]:
        """Return `stats` and, for a model on CUDA in this process, the largest memory that torch has used there."""
        found: dict[str, float] = asdict(self.stats)
        if not isinstance(self.backend, RankPool) and self.model.device.type == "cuda":
            import torch

            found["peak_device_bytes"] = torch.cuda.max_memory_allocated(self.model.device)
        return found

    def describe(self) -> str:
        """Describe the device and the engine's limits in one line."""
        return self.backend.describe()

    def generate(
        self, requests: Sequence[Request], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """Return completions in the order of `requests`; `params` are one for all requests, or one for each.

        For requests of one `group`, the vision tower and the shared beginning of the prompts run once. In float32 a
        request gets the same tokens as if it ran alone. Several threads may call at once. Their requests run together,
        so that the last requests of a call do not leave slots empty. Raise RequestError if a request can never be
        generated, EngineDied if the device is lost. A KeyboardInterrupt fails all requests that have not finished.
        """
        each = [params] * len(requests) if isinstance(params, SamplingParams) else params
        if len(each) != len(requests):
            raise ValueError(
                f"got {len(each)} sampling parameters for {count_nouns(len(requests), 'request')}; give one for all, "
                "or one for each"
            )
        return self.backend.calls.generate(requests, each) if requests else []

    def warm_up(self) -> None:
        """Run the largest passes and all batch sizes once, and reset `stats`; see `EngineCore.warm_up`."""
        self.backend.calls.warm_up()

    def rebuild(self) -> bool:
        """Start new ranks if the old ones are gone; return False if the caller's process must be replaced instead.

        Raise EngineDied if the new ranks die as well, or the errors of `from_pretrained`.
        """
        return self.backend.rebuild()

    def close(self) -> None:
        """Free the device. Later calls raise EngineDied."""
        self._close()

    def __enter__(self) -> OvisEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _load(options: EngineOptions) -> LoopThread:
    from ovis_model.engine.engine_core import load_core
    from ovis_model.engine.engine_loop import LoopThread

    loop = LoopThread(load_core(options))
    if loop.core.model.device.type == "cuda":  # a CPU has no graphs to capture, and a warm-up would take minutes
        loop.calls.warm_up()
    return loop
