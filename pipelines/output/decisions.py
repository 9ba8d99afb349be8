"""Keep what people decided about answers: OUTPUT/review/*.parquet, a file per decision, which is never changed."""

from __future__ import annotations

import io
import time
import uuid
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.storage import store

_FIELDS = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("answer", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("is_right", pa.bool_(), nullable=False),
        pa.field("confidence", pa.float64(), nullable=False),
        pa.field("at_us", pa.int64(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Decision:
    """A person's decision about an answer.

    answer: the model's text. text: the right one, the same if the answer is right. confidence: the model's, NaN if
    unknown. at_us: microseconds since 1970.
    """

    row: int
    id: str
    task: str
    answer: str
    text: str
    is_right: bool
    confidence: float
    at_us: int


Decisions = dict[tuple[int, str], Decision]
"""{(row number, task): the newest decision}."""


def write_decision(output: str, decision: Decision) -> None:
    """Add a decision. Raise OSError if it cannot be written."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([asdict(decision)], _FIELDS), buffer)
    name = f"{decision.at_us:017}-{uuid.uuid4().hex[:8]}.parquet"
    store.write_bytes(store.join(output, "review", name), buffer.getvalue())


def read_decisions(output: str) -> Decisions:
    """Return the newest decision about each answer."""
    found: Decisions = {}
    infos = [info for info in store.list_files(store.join(output, "review")) if info.uri.endswith(".parquet")]
    for info in sorted(infos, key=lambda info: info.uri):
        for values in store.read_parquet(info.uri).to_pylist():
            decision = Decision(**values)
            found[decision.row, decision.task] = decision
    return found


def make_time_us() -> int:
    """Return the time of a decision, in microseconds since 1970."""
    return time.time_ns() // 1000
