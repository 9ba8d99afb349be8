"""Messages have the wording in tests/messages.txt; other tests only check an error's type and the values it names.

After changing a message, run `UPDATE_MESSAGES=1 python -m pytest tests/test_messages.py` and review the difference.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ovis_model.config import SIZES
from ovis_model.sizing import check_tensor_parallel
from ovis_model.wording import count_nouns
from pipelines.cluster.resources import Hardware, plan_pools
from pipelines.output.lease import Lease
from pipelines.output.run_record import open_run
from tests.support.jsonl_files import write_lines
from tests.support.roots import ROOT
from tests.support.rows import list_input, make_config

MESSAGES = Path(__file__).with_name("messages.txt")


def write_input(tmp_path: Path, name: str, *ids: str, **fields: object) -> Path:
    rows = ({"id": id_, "image": f"{i}.png", **fields} for i, id_ in enumerate(ids))
    return write_lines(tmp_path / f"{name}.jsonl", *rows)


def open_output(tmp_path: Path, inputs: Path, **options: object) -> None:
    open_run(make_config(inputs, output=str(tmp_path / "out"), **options), {"id": "demo", "revision": None})


def reopen_output(tmp_path: Path, first: dict[str, object], then: dict[str, object]) -> None:
    inputs = write_input(tmp_path, "a", "1", "2", n=1)
    open_output(tmp_path, inputs, **first)
    open_output(tmp_path, inputs, **then)


def extend_by_text(tmp_path: Path) -> None:
    open_output(tmp_path, write_input(tmp_path, "a", "1", n=1), keep_columns=("n",))
    open_output(tmp_path, write_input(tmp_path, "b", "2", n="x"), keep_columns=("n",), extend=True)


def lease_twice(tmp_path: Path) -> None:
    with Lease(str(tmp_path)), Lease(str(tmp_path)):
        pass


def plan(*hardware: Any, tensor_parallel: int = 1, **options: object) -> None:
    plan_pools(make_config("in", **options), Hardware(*hardware), tensor_parallel)


REFUSED: dict[str, Callable[[Path], object]] = {
    "an input that does not exist": lambda tmp: list_input(tmp / "nothing"),
    "ids that repeat": lambda tmp: list_input(write_input(tmp, "a", "1", "2", "1")),
    "a column that does not exist": lambda tmp: list_input(write_input(tmp, "a", "1"), keep_columns="nowhere"),
    "a prompt with an unknown column": lambda tmp: list_input(write_input(tmp, "a", "1"), prompt="Is it {colour}?"),
    "a prompt with a brace": lambda tmp: list_input(write_input(tmp, "a", "1"), prompt="Is it? }"),
    "another prompt": lambda tmp: reopen_output(tmp, {}, {"prompt": "Why?"}),
    "another limit": lambda tmp: reopen_output(tmp, {"limit": 1}, {}),
    "an extension of another type": extend_by_text,
    "extend and overwrite": lambda tmp: make_config("in", extend=True, overwrite=True),
    "autoscale without a number": lambda tmp: make_config("in", autoscale=True),
    "an OUTPUT in use": lease_twice,
    "no GPU": lambda tmp: plan(8.0, device="cuda"),
    "too few GPUs": lambda tmp: plan(8.0, (8,), num_replicas=9),
    "too few GPUs on a node": lambda tmp: plan(64.0, (3, 3), tensor_parallel=4),
    "no CPU": lambda tmp: plan(0.0, (8,)),
    "a number of ranks": lambda tmp: check_tensor_parallel(SIZES["34B"].language, 3),
}


def normalize_message(error: Exception, place: Path) -> str:
    """Return the message without pydantic's own words; paths and processes, which differ per run, are replaced."""
    words = "; ".join(part["msg"] for part in error.errors()) if isinstance(error, ValidationError) else str(error)
    return re.sub(
        r"process .* s ago", "process PID on HOST, last sign of life N s ago", words.replace(str(place), "TMP")
    )


def test_messages_have_the_recorded_wording(tmp_path: Path) -> None:
    found = ""
    for number, (name, refused) in enumerate(REFUSED.items()):
        place = tmp_path / str(number)
        place.mkdir()
        with pytest.raises((ValueError, OSError, RuntimeError)) as raised:
            refused(place)
        found += f"## {name}\n{type(raised.value).__name__}: {normalize_message(raised.value, place)}\n\n"
    if "UPDATE_MESSAGES" in os.environ:
        MESSAGES.write_text(found)
    assert found == MESSAGES.read_text()


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (12_000, "12,000 rows"), (0.5, "0.5 rows")]
)
def test_counted_nouns_agree_with_the_number(count: float, text: str) -> None:
    assert count_nouns(count, "row") == text
    assert count_nouns(1, "row repeats", "rows repeat") == "1 row repeats"


PLURALS = {
    "pipelines/generate.py: {len(rows)} rows",  # a key that nobody reads
    "pipelines/monitoring/error_reasons.py: {self._num_rows} rows",  # at least 500
    "pipelines/preprocess.py: {num_images} images",  # more than the limit
    "pipelines/sources/listing.py: {num_rows} shards",  # another message for one shard
}


def test_counts_in_messages_go_through_the_helper() -> None:
    number = r"(?:%d|\{len\([^{}]*\)\}|\{(?:self\.)?_?num_[a-z_]*\})"
    counted = re.compile(rf"{number} [a-z ]{{0,12}}(?:rows|files|images|items|keys|shards|links)\b")
    files = (path for name in ("jobs", "pipelines", "ovis_model", "demo") for path in (ROOT / name).rglob("*.py"))
    assert {
        f"{path.relative_to(ROOT)}: {text}" for path in files for text in counted.findall(path.read_text())
    } <= PLURALS
