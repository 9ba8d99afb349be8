"""How work is cut for the pools."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ovis_model.types import ROWS_SIDE_BY_SIDE
from pipelines.caption import plan_batches
from pipelines.cluster import Pools
from pipelines.manifest import ROWS_PER_GROUP
from pipelines.preprocess import BATCH_BYTES


@given(
    num_rows=st.integers(1, 10**10),
    num_replicas=st.integers(1, 64),
    num_preprocessors=st.integers(1, 500),
    most_tile_bytes=st.integers(1000, 10_000_000),
)
def test_units_and_batches(num_rows: int, num_replicas: int, num_preprocessors: int, most_tile_bytes: int) -> None:
    pools = Pools("cpu", num_replicas, 1, 0, num_preprocessors, 1)
    sizes = plan_batches(num_rows, pools, most_tile_bytes=most_tile_bytes)
    assert ROWS_PER_GROUP % sizes.rows_per_unit == 0
    assert sizes.rows_per_batch * most_tile_bytes <= max(BATCH_BYTES, 4 * most_tile_bytes)
    # While one batch runs out, the others still fill all slots.
    assert sizes.rows_per_batch * (sizes.calls_per_replica - 1) >= ROWS_SIDE_BY_SIDE
    if num_rows <= 20_000 * ROWS_PER_GROUP:
        assert num_rows / sizes.rows_per_unit <= 41_000
