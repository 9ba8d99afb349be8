"""The stage Generate: actors, each with one replica, turn prepared rows into result rows."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from ovis_model.config import Quantization
from ovis_model.engine.engine import OvisEngine
from ovis_model.inputs.processor import Processor
from ovis_model.types import Engine, EngineDied, RequestError
from pipelines import schema
from pipelines.answering import Answerer
from pipelines.cluster.actor import register_fast_exit
from pipelines.cluster.attempts import GIVEN_UP, MAX_TRIES, Attempts, SharedExclusiveLock
from pipelines.rows import Batch, PreparedRow, ResultRow
from pipelines.tasks.questionnaire import Questionnaire


@dataclass(frozen=True)
class Replica:
    """One copy of the model and the hardware it runs on; `dtype` and `revision` are already resolved."""

    model: str
    revision: str | None
    dtype: Literal["float32", "bfloat16"]
    device: Literal["cpu", "cuda"]
    num_threads: int
    tensor_parallel: int = 1
    quantization: Quantization = "none"


EngineFactory = Callable[[Replica], Engine]


def load_engine(replica: Replica) -> Engine:
    """Load the real engine in the replica's process."""
    # Waiting OpenMP threads would otherwise spin and occupy the cores that decode images.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return OvisEngine.from_pretrained(
        replica.model,
        device=replica.device,
        dtype=replica.dtype,
        tensor_parallel=replica.tensor_parallel,
        revision=replica.revision,
        num_threads=replica.num_threads,
        quantization=replica.quantization,
    )


class Generate:
    """Generates result rows with one replica. `make_engine` lets tests of the plumbing pass a fake engine."""

    def __init__(
        self, questionnaire: Questionnaire, replica: Replica, make_engine: EngineFactory, attempts: Attempts
    ) -> None:
        register_fast_exit()
        self._questionnaire, self._attempts, self._lock = questionnaire, attempts, SharedExclusiveLock()
        self._schema = schema.build_result_schema(questionnaire.schema)
        processor = Processor.from_pretrained(replica.model, replica.revision)
        self._engine = make_engine(replica)
        self._answerer = Answerer(questionnaire, processor, self._engine)

    def __call__(self, batch: Batch) -> pa.Table:
        """Turn columns of prepared rows into a table of the result schema, one row each. Thread-safe."""
        rows = PreparedRow.from_columns(batch)
        while True:
            try:
                return ResultRow.to_table(self._generate_within_tries(rows), self._schema)
            except EngineDied as error:
                self._replace_engine(error)

    def _generate_within_tries(self, rows: Sequence[PreparedRow]) -> list[ResultRow]:
        work = f"generate {len(rows)} rows from {rows[0].row}"
        with self._lock.hold_shared():
            tries = self._attempts.begin(work)
            results = self._generate(rows) if tries <= MAX_TRIES else []
        if tries > MAX_TRIES:
            results = [result for row in rows for result in self._generate_alone(row)]
        self._attempts.end(work)
        return results

    def _replace_engine(self, error: EngineDied) -> None:
        """Rebuild the engine in this process if possible, else end the process. The work is retried either way."""
        print(f"the engine died: {error}", file=sys.stderr, flush=True)
        with suppress(EngineDied):  # it can die again during the rebuild; a new process may succeed
            if self._engine.rebuild():
                return
        # An exception would end the run, and so would a clean exit of the actor; Ray replaces a killed process.
        os._exit(1)

    def _generate_alone(self, row: PreparedRow) -> list[ResultRow]:
        """Generate one row of a batch that killed its process repeatedly, while no other thread generates."""
        work = f"generate row {row.row}"
        with self._lock.hold_exclusive():
            if self._attempts.begin(work) > MAX_TRIES:
                return [self._make_error_row(row, GIVEN_UP)]
            results = self._generate([row])
            self._attempts.end(work)
        return results

    def _generate(self, rows: Sequence[PreparedRow]) -> list[ResultRow]:
        prepared, failed = [row for row in rows if not row.stage], [row for row in rows if row.stage]
        results = [
            self._make_error_row(row, str(outcome)) if isinstance(outcome, RequestError) else ResultRow(row, outcome)
            for row, outcome in zip(prepared, self._answerer.answer(prepared), strict=True)
        ]
        return results + [
            ResultRow(row, self._questionnaire.make_empty_columns(), row.stage, row.error) for row in failed
        ]

    def _make_error_row(self, row: PreparedRow, reason: str) -> ResultRow:
        return ResultRow(row, self._questionnaire.make_empty_columns(), "generate", reason)
