"""The stage Generate: actors, each with one replica, turn prepared rows into result rows."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from ovis_model.config import EngineName, Quantization
from ovis_model.engine.engine import OvisEngine
from ovis_model.engine.vllm_engine.versions import import_vllm
from ovis_model.inputs.processor import Processor
from ovis_model.types import Engine, EngineDied, RequestError, SamplingParams
from pipelines import schema
from pipelines.answering import Answerer
from pipelines.cluster.actor import register_fast_exit
from pipelines.cluster.attempts import CONTROL, GIVEN_UP, MAX_TRIES, Attempts
from pipelines.cluster.lock import SharedExclusiveLock
from pipelines.errors import EngineNotStarted
from pipelines.monitoring.usage import Meter, Reading
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
    engine: EngineName = "ovis"


EngineFactory = Callable[[Replica], Engine]


def load_engine(replica: Replica) -> Engine:
    """Load the real engine in the replica's process. Raise EngineNotStarted if vLLM does not start."""
    # Waiting OpenMP threads would otherwise spin and occupy the cores that decode images.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    options: dict[str, Any] = {
        "device": replica.device,
        "dtype": replica.dtype,
        "tensor_parallel": replica.tensor_parallel,
        "quantization": replica.quantization,
        "revision": replica.revision,
        "num_threads": replica.num_threads,
    }
    if replica.engine == "ovis":
        return OvisEngine.from_pretrained(replica.model, **options)
    try:
        import_vllm()
        from ovis_model.engine.vllm_engine.engine import VllmEngine

        return VllmEngine.from_pretrained(replica.model, **options)
    except ValueError as error:
        raise EngineNotStarted(str(error)) from error


class Generate:
    """Generates result rows with one replica. `make_engine` lets tests of the plumbing pass a fake engine."""

    def __init__(
        self,
        questionnaire: Questionnaire,
        replica: Replica,
        make_engine: EngineFactory,
        attempts: Attempts,
        *,
        max_calls: int = 1,
    ) -> None:
        """Load the model. `max_calls`: the number of threads that Ray calls this object from."""
        register_fast_exit()
        attempts.start()
        self._questionnaire, self._attempts, self._lock = questionnaire, attempts, SharedExclusiveLock()
        self._schema = schema.build_result_schema(questionnaire.schema)
        processor = Processor.from_pretrained(replica.model, replica.revision)
        self._engine = make_engine(replica)
        [self._control] = processor.build_requests([processor.encode_prompt("Hello")], [])
        self._answerer = Answerer(questionnaire, processor, self._engine)
        self._meter = Meter(max_calls)
        attempts.follow(self._measure)

    def __call__(self, batch: Batch) -> pa.Table:
        """Turn columns of prepared rows into a table of the result schema, one row each. Thread-safe."""
        rows = PreparedRow.from_columns(batch)
        with self._meter.work():
            while True:
                try:
                    return self._generate_within_tries(rows)
                except EngineDied as error:
                    self._replace_engine(error)

    def _generate_within_tries(self, rows: Sequence[PreparedRow]) -> pa.Table:
        work = f"generate {len(rows)} rows from {rows[0].row}"
        with self._lock.hold_shared():
            if is_shared := self._attempts.begin(work) <= min(MAX_TRIES, len(rows)):
                results = self._generate(rows)
        if not is_shared:
            results = self._generate_each_alone(work, rows)
        self._meter.count(len(rows))
        self._attempts.end(work, reading=self._measure())
        return results

    def _measure(self) -> Reading:
        return self._meter.read(self._engine.measure())

    def _replace_engine(self, error: EngineDied) -> None:
        """Rebuild the engine in this process if possible, else end the process. The work is retried either way."""
        print(f"the engine died: {error}", file=sys.stderr, flush=True)
        self._attempts.note_death(f"the engine died: {error}")
        with suppress(EngineDied):  # it can die again during the rebuild; a new process may succeed
            if self._engine.rebuild():
                return
        # An exception would end the run, and so would a clean exit of the actor; Ray replaces a killed process.
        os._exit(1)

    def _generate_each_alone(self, work: str, rows: Sequence[PreparedRow]) -> pa.Table:
        """Generate the rows one by one that `attempts` does not keep the results of, from an earlier process."""
        by_number = {row.row: row for row in rows}
        alone = self._attempts.resume_alone(work, list(by_number))
        harmless = [
            by_number[number] for number in alone.kept if alone.kept[number].column("status")[0].as_py() == "ok"
        ]
        for number in alone.order:
            with self._lock.hold_exclusive():  # no other thread generates
                if number == CONTROL:
                    self._generate_control(work, harmless[:1])
                else:
                    alone.kept[number] = self._generate_alone(work, by_number[number])
        return pa.concat_tables(alone.kept.values())

    def _generate_alone(self, work: str, row: PreparedRow) -> pa.Table:
        if self._attempts.begin_alone(row.row):
            result = self._generate([row])
            self._attempts.end_alone(work, row.row, result)
        else:
            result = self._to_table([self._make_error_row(row, GIVEN_UP)])
            self._attempts.keep(work, row.row, result)
        return result

    def _generate_control(self, work: str, harmless: Sequence[PreparedRow]) -> None:
        """Generate a row that got through once more or, if none has, a request of one word."""
        self._attempts.begin_alone(CONTROL)
        if harmless:
            self._generate(harmless)
        else:
            self._engine.generate([self._control], SamplingParams(max_new_tokens=1))
        self._attempts.end_alone(work, CONTROL)

    def _generate(self, rows: Sequence[PreparedRow]) -> pa.Table:
        prepared, failed = [row for row in rows if not row.stage], [row for row in rows if row.stage]
        results = [
            self._make_error_row(row, str(outcome)) if isinstance(outcome, RequestError) else ResultRow(row, outcome)
            for row, outcome in zip(prepared, self._answerer.answer(prepared), strict=True)
        ]
        empty = self._questionnaire.make_empty_columns()
        return self._to_table([*results, *(ResultRow(row, empty, row.stage, row.error) for row in failed)])

    def _to_table(self, rows: Sequence[ResultRow]) -> pa.Table:
        return ResultRow.to_table(rows, self._schema)

    def _make_error_row(self, row: PreparedRow, reason: str) -> ResultRow:
        return ResultRow(row, self._questionnaire.make_empty_columns(), "generate", reason)
