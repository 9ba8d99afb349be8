"""Write Parquet files for tests."""

from __future__ import annotations

import datetime
import decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

HF = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(path: Path, table: dict[str, Any] | pa.Table, **options: Any) -> Path:
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), path, **options)
    return path


def make_kept_columns(count: int) -> dict[str, pa.Array]:
    """Make columns of types that would be lost on a detour through Python or numpy."""
    moment = datetime.datetime(2020, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    return {
        "row": pa.array([*range(count - 1), None], pa.uint8()),
        "when": pa.array([moment] * count, pa.timestamp("ns", "Europe/Berlin")),
        "price": pa.array([decimal.Decimal("1.50")] * count, pa.decimal128(10, 2)),
        "category": pa.array([f"c{i % 3}" for i in range(count)]).dictionary_encode(),
        "box": pa.array([[float(i), 2.0] for i in range(count)], pa.list_(pa.float32(), 2)),
        "nested": pa.array(
            [{"a": [{"b": None}]}] * count, pa.struct([("a", pa.list_(pa.struct([("b", pa.int16())])))])
        ),
        "blob": pa.array([b"\xff"] * count, pa.large_binary()),
        "nothing": pa.nulls(count),
    }
