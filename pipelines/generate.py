"""Prepared rows -> result rows, in actors that hold a replica of the model each."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from ovis_model.engine.rank_pool import TensorParallelEngine
from ovis_model.inputs.processor import Processor
from ovis_model.types import Engine, EngineDied, RequestError
from pipelines import schema
from pipelines.answering import Answering
from pipelines.cluster.actor import end_with_python
from pipelines.cluster.attempts import GIVEN_UP, MAX_TRIES, AloneOrTogether, Attempts
from pipelines.config import RunConfig

Batch = dict[str, np.ndarray]
Row = dict[str, Any]


@dataclass(frozen=True)
class Replica:
    """What one copy of the model runs on."""

    device: Literal["cpu", "cuda"]
    num_threads: int
    tensor_parallel: int = 1


EngineFactory = Callable[[RunConfig, str | None, Replica], Engine]


def load_engine(config: RunConfig, revision: str | None, replica: Replica) -> Engine:
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

    from ovis_model.engine.engine import OvisEngine

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
        config: RunConfig,
        revision: str | None,
        replica: Replica,
        make_engine: EngineFactory,
        attempts: Attempts,
    ) -> None:
        end_with_python()
        self._config, self._attempts, self._process = config, attempts, AloneOrTogether()
        self._schema = schema.result(config.columns)
        processor = Processor.from_pretrained(config.model, revision)
        self._engine = make_engine(config, revision, replica)
        self._answering = Answering(config, processor, self._engine)

    def __call__(self, batch: Batch) -> pa.Table:
        """Columns of prepared rows -> a table of `schema.result`, a row for each. Several threads may call at once."""
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        while True:
            try:
                return pa.Table.from_pylist(self._results_within_tries(rows), self._schema)
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
                return [self._error(row, "generate", GIVEN_UP)]
            results = self._results([row])
            self._attempts.end(work)
        return results

    def _results(self, rows: list[Row]) -> list[Row]:
        prepared = [row for row in rows if not row["stage"]]
        results = list(map(self._result, prepared, self._answering.values(prepared)))
        return results + [self._error(row, row["stage"], row["error"]) for row in rows if row["stage"]]

    def _result(self, row: Row, values: Row | RequestError) -> Row:
        if isinstance(values, RequestError):
            return self._error(row, "generate", str(values))
        return {**_common(row), "status": "ok", "stage": "", "error": "", **values}

    def _error(self, row: Row, stage: str, error: str) -> Row:
        about = {"status": "error", "stage": stage, "error": error, "num_output_tokens": 0}
        return {**_common(row), **about, **self._config.no_values()}


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
