"""Rows survive the way to columns and back, whatever a batch holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import ray.data  # noqa: F401  (registers the types that columns travel in)
from hypothesis import given
from hypothesis import strategies as st
from ray.data.block import BlockAccessor

from ovis_model.types import Request
from pipelines import schema
from pipelines.rows import PreparedRow, ResultRow
from pipelines.tasks.questionnaire import FlatLayout, Questionnaire
from pipelines.tasks.task import Task


@st.composite
def prepared_rows(draw: st.DrawFn) -> PreparedRow:
    number = draw(st.integers(0, 1 << 40))
    texts = {name: draw(st.text(max_size=5)) for name in ("id", "uri", "prompt")}
    if draw(st.booleans()):
        return PreparedRow(number, **texts, stage="decode", error=draw(st.text(min_size=1, max_size=5)))
    tiles = np.full((draw(st.integers(0, 3)), 3, 4, 4), number % 256, np.uint8)
    sizes = np.full((len(tiles), 2), 3, np.int32)
    prompts = [
        np.arange(length, dtype=np.int32) for length in draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    ]
    times_s = np.arange(draw(st.integers(0, 3)), dtype=np.float32)
    requests = tuple(Request(ids, tiles, sizes) for ids in prompts)
    return PreparedRow(number, **texts, requests=requests, num_images=len(times_s), frame_timestamps_s=times_s)


def to_values(row: PreparedRow) -> list[Any]:
    requests = [(r.input_ids.tolist(), r.tiles.tolist(), r.tile_sizes.tolist()) for r in row.requests]
    return [
        row.row,
        row.id,
        row.uri,
        row.prompt,
        row.stage,
        row.error,
        row.num_images,
        list(row.frame_timestamps_s),
        requests,
    ]


@given(st.lists(prepared_rows(), min_size=1, max_size=5))
def test_prepared_rows_come_back_from_their_columns(rows: list[PreparedRow]) -> None:
    assert [to_values(row) for row in PreparedRow.from_columns(PreparedRow.to_columns(rows))] == list(
        map(to_values, rows)
    )


@given(st.lists(prepared_rows(), min_size=1, max_size=5))
def test_prepared_rows_come_back_from_a_ray_block(rows: list[PreparedRow]) -> None:
    block = BlockAccessor.batch_to_block(PreparedRow.to_columns(rows))
    batch = BlockAccessor.for_block(block).to_batch_format("numpy")
    assert [to_values(row) for row in PreparedRow.from_columns(batch)] == list(map(to_values, rows))


@given(prepared_rows())
def test_the_requests_of_a_row_share_their_tiles(row: PreparedRow) -> None:
    [back] = PreparedRow.from_columns(PreparedRow.to_columns([row]))
    assert len({id(request.tiles) for request in back.requests}) <= 1
    assert (back.num_tiles, back.num_prompt_tokens) == (row.num_tiles, row.num_prompt_tokens)


def test_result_rows_have_the_columns_of_the_output() -> None:
    questionnaire = Questionnaire((Task.model_construct(name="", prompt="Why?"),), FlatLayout())
    ids, tiles = np.zeros(7, np.int32), np.zeros((2, 3, 4, 4), np.uint8)
    prepared = PreparedRow(3, "a", "u", "Why?", (Request(ids, tiles, np.zeros((2, 2), np.int32)),), 1)
    answers = {"text": "x", "finish_reason": "stop", "mean_logprob": -1.0, "num_output_tokens": 2}
    rows = [
        ResultRow(prepared, answers),
        ResultRow(
            PreparedRow(4, "b", "u", "Why?", stage="read", error="gone"),
            questionnaire.make_empty_columns(),
            "read",
            "gone",
        ),
    ]
    table = ResultRow.to_table(rows, schema.build_result_schema(questionnaire.schema))
    assert table.schema == schema.build_result_schema(schema.OUTPUT)
    ok, failed = table.to_pylist()
    assert (ok["row"], ok["status"], ok["num_tiles"], ok["num_prompt_tokens"], ok["text"]) == (3, "ok", 2, 7, "x")
    assert (failed["status"], failed["stage"], failed["error"], failed["num_tiles"]) == ("error", "read", "gone", 0)
