"""Row numbers as ranges, checked against Python's sets, and the file names and footers that hold them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.output.ledger import (
    FileEntry,
    Ledger,
    Ranges,
    RowRange,
    count_rows,
    merge_ranges,
    split_ranges,
    subtract_ranges,
    to_ranges,
)
from pipelines.output.sink import write_file
from tests.support.outputs import make_results

NUMBERS = st.sets(st.integers(0, 60), max_size=40)


def list_numbers(ranges: Ranges) -> set[int]:
    return {number for start, stop in ranges for number in range(start, stop)}


@given(NUMBERS)
def test_equal_sets_of_numbers_give_equal_ranges(numbers: set[int]) -> None:
    ranges = to_ranges(list(numbers) * 2)
    assert list_numbers(ranges) == numbers
    assert count_rows(ranges) == len(numbers)
    assert all(a.stop < b.start for a, b in pairwise(ranges))


@given(NUMBERS, NUMBERS)
def test_union_and_difference_equal_those_of_sets(a: set[int], b: set[int]) -> None:
    assert list_numbers(merge_ranges([*to_ranges(a), *to_ranges(b)])) == a | b
    assert merge_ranges([*to_ranges(a), *to_ranges(b)]) == to_ranges(a | b)
    assert list_numbers(subtract_ranges(RowRange(0, 61), to_ranges(a))) == set(range(61)) - a


@given(NUMBERS, st.integers(1, 20))
def test_split_keeps_all_rows_and_cuts_at_multiples(numbers: set[int], size: int) -> None:
    parts = list(split_ranges(to_ranges(numbers), size))
    assert list_numbers(tuple(parts)) == numbers
    assert all(start // size == (stop - 1) // size for start, stop in parts)


@given(NUMBERS, NUMBERS)
def test_new_rows_are_the_rows_that_are_not_done(done: set[int], rows: set[int]) -> None:
    asked = np.array(sorted(rows), np.int64)
    is_new = Ledger(to_ranges(done)).find_new(asked)
    assert set(asked[is_new].tolist()) == rows - done


@given(NUMBERS.filter(bool), NUMBERS.filter(bool))
def test_files_have_the_same_name_only_if_they_hold_the_same_rows(a: set[int], b: set[int]) -> None:
    one, other = FileEntry(to_ranges(a), 0), FileEntry(to_ranges(b), 1)
    assert (one.file_name == other.file_name) == (a == b)
    assert FileEntry.from_json(other.to_json()) == other


def test_a_ledger_is_read_from_the_footers(tmp_path: Path) -> None:
    write_file(str(tmp_path), make_results([0, 1, 5], errors=[5]))
    write_file(str(tmp_path), make_results([2, 3]))
    ledger = Ledger.read(str(tmp_path))
    assert ledger.done == ((0, 4), (5, 6))
    assert ledger.num_errors == 1
    assert ledger.find_missing(8) == ((4, 5), (6, 8))


def test_files_that_overlap_are_reported(tmp_path: Path) -> None:
    write_file(str(tmp_path), make_results([0, 1]))
    write_file(str(tmp_path), make_results([1, 2]))
    with pytest.raises(ValueError, match="same rows twice"):
        Ledger.read(str(tmp_path))


def test_a_foreign_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "mine.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"mine\.parquet is not an output file"):
        Ledger.read(str(tmp_path))
