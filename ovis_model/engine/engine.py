"""The public engine: `generate` over a replica in this process, or over several ranks in processes of their own.

Knows token ids only, and no torch until a model is loaded into this process.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ovis_model.checkpoint import fetch_checkpoint
from ovis_model.config import OvisConfig
from ovis_model.engine.calls import Device, Dtype, EngineOptions, Stats
from ovis_model.engine.rank_pool import RankPool
from ovis_model.types import Completion, Request, SamplingParams

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ovis_model.engine.decode_step import StepRunner
    from ovis_model.engine.engine_loop import LoopThread
    from ovis_model.engine.scheduler import Budget
    from ovis_model.network.ovis import Ovis


class OvisEngine:
    """One replica of the model. See `types.Engine`.

    It ends with `close`, with this object and with this process, however the process ends.
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
    ) -> OvisEngine:
        """Load "demo", a directory, a hub id or a URI. `auto` is CUDA in bfloat16 if there is one, else CPU in float32.

        With `tensor_parallel` the model is shared by that many processes of this machine, and none of it is in this
        one; rank i takes the ith of the CUDA devices that this process may use. `num_threads` limits the CPU threads of
        all ranks together. Raise CheckpointError, ConfigError, WeightsError or another ValueError that says what to do.
        """
        directory = fetch_checkpoint(path_or_id, revision)
        options = EngineOptions(
            directory=directory, device=device, dtype=dtype, post_trunk_norm=post_trunk_norm, num_threads=num_threads
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
        """Generate with a model that is loaded already.

        `tokenizer` is for stop strings and constraints. By default `budget` is what the device has memory for, decode
        steps are CUDA graphs on CUDA and eager on a CPU, and answers end at the checkpoint's end-of-text ids.
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
        """The network. Raise AttributeError if the processes of ranks hold it."""
        if isinstance(self.backend, RankPool):
            raise AttributeError("the model is in the processes of its ranks; load it with tensor_parallel=1")
        return self.backend.core.model

    @property
    def stats(self) -> Stats:
        """Totals until now, as a copy; of rank 0 if there are several."""
        return replace(self.backend.stats)

    def describe(self) -> str:
        """Return one line about the device and what the engine may hold at once."""
        return self.backend.describe()

    def generate(
        self, requests: Sequence[Request], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """Return completions in the order of `requests`; `params` are for all of them or one for each.

        For requests of one `group`, vision runs once, and so does what their prompts begin with. In float32 the tokens
        of a request are those that it gets alone. Several threads may call at once: their requests run side by side, so
        that the last ones of a call do not leave slots empty. Raise RequestError if a request can never be generated,
        EngineDied when the device is lost. A KeyboardInterrupt fails all requests that have not finished.
        """
        each = [params] * len(requests) if isinstance(params, SamplingParams) else params
        if len(each) != len(requests):
            raise ValueError(f"{len(each)} sampling parameters for {len(requests)} requests; give one, or one for each")
        return self.backend.calls.generate(requests, each) if requests else []

    def warm_up(self) -> None:
        """Generate the largest batch once, so that memory runs out now if it ever does; then reset `stats`."""
        self.backend.calls.warm_up()

    def rebuild(self) -> bool:
        """Start new ranks if the old ones are gone; return False if a new process of the caller is needed instead.

        Raise EngineDied if the new ranks die as well, else as `from_pretrained`.
        """
        return self.backend.rebuild()

    def close(self) -> None:
        """Free the device. Calls raise EngineDied from then on."""
        self._close()

    def __enter__(self) -> OvisEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _load(options: EngineOptions) -> LoopThread:
    from ovis_model.engine.engine_core import load_core
    from ovis_model.engine.engine_loop import LoopThread

    return LoopThread(load_core(options))
