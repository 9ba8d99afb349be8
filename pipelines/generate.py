"""Prepared rows -> result rows, in actors that hold a replica of the model each."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from ovis_model.processor import Processor
from ovis_model.ranks import TensorParallelEngine
from ovis_model.text import cut_at_stop
from ovis_model.types import Completion, Engine, EngineDied, Request, RequestError, SamplingParams
from pipelines.attempts import GIVEN_UP, MAX_TRIES, AloneOrTogether, Attempts
from pipelines.config import CaptionConfig
from pipelines.schema import RESULT

Batch = dict[str, np.ndarray]
Row = dict[str, Any]


@dataclass(frozen=True)
class Replica:
    """What one copy of the model runs on."""

    device: Literal["cpu", "cuda"]
    num_threads: int
    tensor_parallel: int = 1


EngineFactory = Callable[[CaptionConfig, str | None, Replica], Engine]


def load_engine(config: CaptionConfig, revision: str | None, replica: Replica) -> Engine:
    """The real engine. Of several ranks, or with torch imported here, so only where a replica lives."""
    # Threads that spin while they wait take the cores that decode images.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if replica.tensor_parallel > 1:
        return TensorParallelEngine(
            config.model,
            tensor_parallel=replica.tensor_parallel,
            device=replica.device,
            dtype=config.dtype,
            revision=revision,
            num_threads=max(1, replica.num_threads // replica.tensor_parallel),
        )
    import torch

    from ovis_model.engine import OvisEngine

    torch.set_num_threads(replica.num_threads)
    return OvisEngine.from_pretrained(
        config.model,
        device=replica.device,
        dtype=config.dtype,
        revision=revision,
    )


class Generate:
    """One replica. `make_engine` is the seam for a fake engine in tests of the plumbing."""

    def __init__(
        self,
        config: CaptionConfig,
        revision: str | None,
        replica: Replica,
        make_engine: EngineFactory,
        attempts: Attempts,
    ) -> None:
        self._config, self._attempts, self._process = config, attempts, AloneOrTogether()
        self._processor = Processor.from_pretrained(config.model, revision)
        self._engine = make_engine(config, revision, replica)

    def __call__(self, batch: Batch) -> pa.Table:
        """Columns of prepared rows -> a table of schema RESULT, a row for each. Several threads may call at once."""
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        while True:
            try:
                return pa.Table.from_pylist(self._results_within_tries(rows), RESULT)
            except EngineDied as error:
                self._replace_engine(error)

    def _results_within_tries(self, rows: list[Row]) -> list[Row]:
        work = f"generate {len(rows)} rows from {rows[0]['row']}"
        with self._process.together():
            tries = self._attempts.begin(work)
            results = self._results(rows) if tries <= MAX_TRIES else []
        if tries > MAX_TRIES:
            results = [result for row in rows for result in self._results_alone(row)]
        self._attempts.end(work)
        return results

    def _replace_engine(self, error: EngineDied) -> None:
        """By new ranks if it has some, else by a new process. The work that it died on is tried again."""
        print(f"the engine died: {error}", file=sys.stderr, flush=True)
        if isinstance(self._engine, TensorParallelEngine):
            with suppress(EngineDied):  # again, while they start: perhaps they do in another place
                self._engine.rebuild()
                return
        # Raising would end the run, a clean exit of the actor as well; Ray replaces a process that is gone.
        os._exit(1)

    def _results_alone(self, row: Row) -> list[Row]:
        """Of a row in a batch that killed its process again and again."""
        work = f"generate row {row['row']}"
        with self._process.alone():
            if self._attempts.begin(work) > MAX_TRIES:
                return [_error_result(row, "generate", GIVEN_UP)]
            results = self._results([row])
            self._attempts.end(work)
        return results

    def _results(self, rows: list[Row]) -> list[Row]:
        prepared = [row for row in rows if not row["stage"]]
        outcomes = self._generate(
            [Request(row["input_ids"], row["tiles"], row["tile_sizes"]) for row in prepared],
            [self._config.sampling_for(row["id"]) for row in prepared],
        )
        results = [self._result(row, outcome) for row, outcome in zip(prepared, outcomes, strict=True)]
        return results + [_error_result(row, row["stage"], row["error"]) for row in rows if row["stage"]]

    def _generate(
        self, requests: Sequence[Request], params: Sequence[SamplingParams]
    ) -> Iterable[Completion | RequestError]:
        """All at once; if one of them cannot be generated, each by itself."""
        try:
            return self._engine.generate(requests, params)
        except RequestError:
            return [self._generate_alone(request, own) for request, own in zip(requests, params, strict=True)]

    def _generate_alone(self, request: Request, params: SamplingParams) -> Completion | RequestError:
        try:
            return self._engine.generate([request], params)[0]
        except RequestError as error:
            return error

    def _result(self, row: Row, outcome: Completion | RequestError) -> Row:
        if isinstance(outcome, RequestError):
            return _error_result(row, "generate", str(outcome))
        text = cut_at_stop(self._processor.detokenize(outcome.output_ids), self._config.stop)
        return {
            **_common(row),
            "text": text,
            "status": "ok",
            "stage": "",
            "error": "",
            "finish_reason": outcome.finish_reason,
            "num_output_tokens": len(outcome.output_ids),
            "mean_logprob": outcome.mean_logprob,
        }


def _error_result(row: Row, stage: str, error: str) -> Row:
    return {
        **_common(row),
        "text": "",
        "status": "error",
        "stage": stage,
        "error": error,
        "finish_reason": "",
        "num_output_tokens": 0,
        "mean_logprob": math.nan,
    }


def _common(row: Row) -> Row:
    return {
        "row": int(row["row"]),
        "id": row["id"],
        "uri": row["uri"],
        "prompt": row["prompt"],
        "num_images": int(row["num_images"]),
        "num_tiles": len(row["tiles"]),
        "num_prompt_tokens": len(row["input_ids"]),
        "frame_timestamps_s": row["frame_timestamps_s"],
    }
