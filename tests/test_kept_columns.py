"""Kept columns: every Arrow type is stored or refused by name while listing."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import CaptionConfig
from pipelines.errors import SourceError
from pipelines.output.manifest import KeptColumns, write_manifest
from pipelines.output.sink import write_file
from pipelines.schema import OUTPUT, build_result_schema
from pipelines.sources import list_rows
from tests.support.rows import make_config

_EMPTY = pa.struct([])
_UNION = pa.UnionArray.from_dense(
    pa.array([0, 1, 0], pa.int8()), pa.array([0, 0, 1], pa.int32()), [pa.array([1, 2]), pa.array(["b"])], ["i", "s"]
)
_UUIDS = pa.array([b"a" * 16, None, b"c" * 16], pa.uuid())
_VIEWS = pa.array(["a", None, "c"], pa.string_view())
_ITEMS = [["a"], None, ["b", None]]
_RUNS = pa.RunEndEncodedArray.from_arrays(pa.array([2, 3], pa.int32()), pa.array(["a", "b"]))
_INTERVALS = pa.array([(1, 2, 3), None, (0, 0, 1)], pa.month_day_nano_interval())
_SAME: dict[str, pa.Array] = {
    "string_view": _VIEWS,
    "binary_view": pa.array([b"a", None, b"c"], pa.binary_view()),
    "list of views": pa.array(_ITEMS, pa.list_(pa.string_view())),
    "list_view": pa.array(_ITEMS, pa.list_view(pa.string())),
    "large_list_view": pa.array(_ITEMS, pa.large_list_view(pa.large_string())),
    "struct of views": pa.StructArray.from_arrays([_VIEWS], ["v"]),
    "null": pa.nulls(3),
    "list of null": pa.array([[], None, [None]], pa.list_(pa.null())),
    "decimal32": pa.array([1, None, 3], pa.decimal32(5, 2)),
    "decimal256": pa.array([1, None, 3], pa.decimal256(50, 2)),
    "map": pa.array([[("a", 1)], None, []], pa.map_(pa.string(), pa.int64())),
    "duration": pa.array([1, None, 3], pa.duration("us")),
    "time32": pa.array([1, None, 3], pa.time32("s")),
    "timestamp": pa.array([1, None, 3], pa.timestamp("s")),
    "date64": pa.array([datetime.date(2020, 1, 2), None, None], pa.date64()),
    "dictionary": pa.array(["a", None, "a"]).dictionary_encode(),
    "dictionary of integers": pa.array([7, None, 7]).dictionary_encode(),
    "dictionary of views": pa.DictionaryArray.from_arrays(
        pa.array([0, None, 1]), pa.array(["a", "b"], pa.string_view())
    ),
    "run ends": _RUNS,
    "json": pa.array(["1", None, "{}"], pa.json_()),
    "fixed_size_list": pa.array([[1, 2], None, [3, None]], pa.list_(pa.int8(), 2)),
}
_CHANGED: dict[str, tuple[pa.Array, list[Any]]] = {
    "uuid": (_UUIDS, [b"a" * 16, None, b"c" * 16]),
    "list of uuid": (pa.ListArray.from_arrays([0, 1, 1, 3], _UUIDS), [[b"a" * 16], [], [None, b"c" * 16]]),
    "union": (_UNION, ["1", '"b"', "2"]),
    "struct of union": (pa.StructArray.from_arrays([_UNION], ["u"]), ['{"u": 1}', '{"u": "b"}', '{"u": 2}']),
    "empty struct": (pa.array([{}, None, {}], _EMPTY), ["{}", None, "{}"]),
    "nested empty struct": (
        pa.array([{"a": [{}]}, None, {"a": None}], pa.struct([("a", pa.list_(_EMPTY))])),
        ['{"a": [{}]}', None, '{"a": null}'],
    ),
    "interval": (_INTERVALS, [json.dumps([1, 2, 3]), None, json.dumps([0, 0, 1])]),
}


_ONLY_IN_PARQUET = {name for name in _SAME if name.startswith("dictionary")}
_ONLY_IN_ARROW = {*_CHANGED, "dictionary of views", "run ends"} - {"uuid", "list of uuid"}


@pytest.mark.parametrize(
    ("name", "suffix"),
    [(name, ".arrow") for name in [*_SAME, *_CHANGED] if name not in _ONLY_IN_PARQUET]
    + [(name, ".parquet") for name in [*_SAME, *_CHANGED] if name not in _ONLY_IN_ARROW],
)
def test_a_kept_column_of_any_type_reaches_the_output(tmp_path: Path, name: str, suffix: str) -> None:
    column, expected = _CHANGED.get(name) or (_SAME[name], _SAME[name].to_pylist())
    table = pa.table({"image": [b"1", b"2", b"3"], "c": column})
    path = tmp_path / f"a{suffix}"
    if suffix == ".arrow":
        _write_arrow(path, table)
    else:
        pq.write_table(table, path)
    assert _keep(path, tmp_path).to_pylist() == expected


def _write_arrow(path: Path, table: pa.Table) -> None:
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)


def _keep(path: Path, tmp_path: Path) -> pa.ChunkedArray:
    """Return the kept column `c` as the sink writes it, taken from the manifest in another order."""
    config = make_config(path, image_column="image", keep_columns=("c",))
    out = str(tmp_path / "out")
    with list_rows(config, config.questionnaire) as listing:
        write_manifest(out, listing.read_tables())
        num_rows = listing.num_rows
    kept = KeptColumns(out)
    assert kept.schema.field("c").type == kept.read(np.arange(num_rows))[0].type
    results = pa.table(
        {f.name: pa.array([_make_value(f.type)] * num_rows, f.type) for f in build_result_schema(OUTPUT)},
        schema=build_result_schema(OUTPUT),
    ).set_column(0, build_result_schema(OUTPUT).field(0), pa.array(range(num_rows), pa.int64()))
    write_file(str(tmp_path / "out/data"), results, kept)
    [written] = (tmp_path / "out/data").glob("*.parquet")
    return pq.read_table(written).column("c")


def _make_value(type_: pa.DataType) -> Any:
    return [] if pa.types.is_list(type_) else "" if pa.types.is_string(type_) else 0


@pytest.mark.parametrize("meta", [[{}], [{"a": {}}], [{"a": [{}]}], [None, {}], [{}, {"a": 1}]])
def test_empty_objects_in_json_lines_are_kept(tmp_path: Path, meta: list[Any]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"image": "x.png", "c": value}) for value in meta))
    found = _keep(path, tmp_path).to_pylist()
    if meta == [{}, {"a": 1}]:
        assert found == [{"a": None}, {"a": 1}]
    else:
        assert found == [value if value is None else json.dumps(value) for value in meta]


def test_a_column_that_cannot_be_kept_is_refused_by_name(tmp_path: Path) -> None:
    repeated = pa.StructArray.from_arrays([_UNION, _UNION], ["a", "a"])
    table = pa.table({"image": [b"1", b"2", b"3"], "c": repeated})
    _write_arrow(tmp_path / "a.arrow", table)
    config: CaptionConfig = make_config(tmp_path / "a.arrow", keep_columns=("c",))
    with pytest.raises(SourceError, match=r"the kept column c .*remove it from --keep-columns"):
        list_rows(config, config.questionnaire)
