"""Every id once: duplicates are an error, get a suffix or are left out, and a run is extended by what it lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import RunError, SourceError
from pipelines.output import manifest
from pipelines.output.ledger import RowRange
from pipelines.output.manifest import read_columns, read_rows
from pipelines.output.run_record import Run, open_run
from pipelines.sources import KnownRows, list_rows
from tests.support.jsonl_files import write_lines
from tests.support.rows import make_config

MODEL = {"id": "demo", "revision": None, "weights": "0"}


def ids_of(*inputs: object, **options: object) -> list[str]:
    config = make_config(*inputs, **options)
    with list_rows(config, config.questionnaire) as listing:
        ids = [id_ for table in listing.read_tables() for id_ in table.column("id").to_pylist()]
        assert len(ids) == listing.num_rows
    return ids


def lines(path: Path, ids: list[str], **fields: object) -> Path:
    return write_lines(path, *({"id": id_, "image": f"{path.stem}-{i}.png", **fields} for i, id_ in enumerate(ids)))


def opened(output: Path, *inputs: object, **options: object) -> Run:
    return open_run(make_config(*inputs, output=str(output), **options), dict(MODEL))


def manifest_ids(run: Run) -> list[str]:
    return [id_ for table in read_columns(run.output, run.num_rows, ["id"]) for id_ in table.column("id").to_pylist()]


def test_a_duplicate_is_an_error_unless_told_otherwise(tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", ["a", "b", "a", "c", "a"])
    with pytest.raises(SourceError, match=r"2 rows.*--on-duplicate-id.*a \(3 times\)"):
        ids_of(path)
    assert ids_of(path, on_duplicate_id="skip") == ["a", "b", "c"]
    assert ids_of(path, on_duplicate_id="suffix") == ["a", "b", "a~2", "c", "a~3"]


def test_a_suffix_is_never_the_id_of_another_row(tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", ["a", "a", "a~2", "a", "a~2"])
    ids = ids_of(path, on_duplicate_id="suffix")
    assert len(set(ids)) == 5 and ids[0] == "a" and ids[2] == "a~2"


@settings(deadline=None, max_examples=60)
@given(ids=st.lists(st.sampled_from(["a", "b", "a~2", "a~3", "c", "c~2"]), min_size=1, max_size=14))
def test_policies_against_plain_python(tmp_path_factory: pytest.TempPathFactory, ids: list[str]) -> None:
    path = lines(tmp_path_factory.mktemp("ids") / "x.jsonl", ids)
    assert ids_of(path, on_duplicate_id="skip") == list(dict.fromkeys(ids))
    suffixed = ids_of(path, on_duplicate_id="suffix")
    assert len(set(suffixed)) == len(ids)
    assert [id_ for i, id_ in enumerate(suffixed) if ids[i] not in ids[:i]] == list(dict.fromkeys(ids))
    assert all(new == old or new.startswith(f"{old}~") for new, old in zip(suffixed, ids, strict=True))


def test_rows_keep_their_columns_when_others_are_left_out(tmp_path: Path) -> None:
    rows = [{"id": id_, "image": f"{i}.png", "n": i} for i, id_ in enumerate("abacb")]
    path = write_lines(tmp_path / "x.jsonl", *rows)
    config = make_config(path, keep_columns=("n",), on_duplicate_id="skip")
    with list_rows(config, config.questionnaire) as listing:
        kept = [row for table in listing.read_tables() for row in table.to_pylist()]
    assert [(row["id"], row["kept"]["n"]) for row in kept] == [("a", 0), ("b", 1), ("c", 3)]


def test_duplicates_across_chunks(tmp_path: Path) -> None:
    """More rows than are listed at once."""
    numbers = [*range(5000), *range(4990, 9000)]
    path = lines(tmp_path / "x.jsonl", [str(n) for n in numbers])
    assert ids_of(path, on_duplicate_id="skip") == [str(n) for n in range(9000)]
    assert len(set(ids_of(path, on_duplicate_id="suffix"))) == 9010


def test_extend_adds_what_is_new_behind_what_is_there(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in "bd":
        (pictures / f"{name}.png").touch()
    first = opened(tmp_path / "out", pictures)
    before = read_rows(first.output, RowRange(0, 2)).to_pylist()
    for name in "ac":
        (pictures / f"{name}.png").touch()
    assert opened(tmp_path / "out", pictures).num_rows == 2  # a run that goes on is not listed again
    run = opened(tmp_path / "out", pictures, extend=True)
    assert [Path(id_).stem for id_ in manifest_ids(run)] == ["b", "d", "a", "c"]
    assert read_rows(run.output, RowRange(0, 2)).to_pylist() == before
    assert opened(tmp_path / "out", pictures, extend=True).num_rows == 4
    assert opened(tmp_path / "out", pictures).num_rows == 4
    assert [part["first_row"] for part in run.record["extended"]] == [2]


def test_extend_by_another_input_and_without_limit(tmp_path: Path) -> None:
    a, b = lines(tmp_path / "a.jsonl", ["1", "2", "3"]), lines(tmp_path / "b.jsonl", ["4", "5"])
    assert opened(tmp_path / "out", a, limit=2).num_rows == 2
    with pytest.raises(RunError, match=r"limit 2 there, None here.*--extend"):
        opened(tmp_path / "out", a)
    assert opened(tmp_path / "out", a, extend=True).num_rows == 3
    run = opened(tmp_path / "out", b, extend=True)
    assert manifest_ids(run) == ["1", "2", "3", "4", "5"]
    assert opened(tmp_path / "out", b).num_rows == 5


def test_extend_starts_a_run_where_there_is_none(tmp_path: Path) -> None:
    assert opened(tmp_path / "out", lines(tmp_path / "a.jsonl", ["1"]), extend=True).num_rows == 1


def test_extend_changes_nothing_else(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", ["1"])
    opened(tmp_path / "out", path)
    with pytest.raises(RunError, match=r"prompt .* there, 'Why.' here"):
        opened(tmp_path / "out", path, extend=True, prompt="Why?")


def test_an_id_of_the_run_that_stands_for_something_else_is_a_duplicate(tmp_path: Path) -> None:
    """Numbers that start again in each shard must not be taken for rows that are there."""
    a, b = lines(tmp_path / "a.jsonl", ["1", "2"]), lines(tmp_path / "b.jsonl", ["2", "3"])
    opened(tmp_path / "out", a)
    with pytest.raises(SourceError, match=r"1 rows.*2 \(2 times\)"):
        opened(tmp_path / "out", b, extend=True)
    assert opened(tmp_path / "out", a).num_rows == 2
    other = tmp_path / "other"
    opened(other, a, on_duplicate_id="skip")
    assert manifest_ids(opened(other, b, extend=True, on_duplicate_id="skip")) == ["1", "2", "3"]


def test_extend_across_the_files_of_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last file is filled up and others follow, and rows that a killed extension left are not seen."""
    monkeypatch.setattr(manifest, "ROWS_PER_FILE", 8)
    monkeypatch.setattr(manifest, "ROWS_PER_GROUP", 4)
    a, b = lines(tmp_path / "a.jsonl", [f"a{i}" for i in range(11)]), lines(tmp_path / "b.jsonl", ["b0", "b1"])
    c = lines(tmp_path / "c.jsonl", [f"c{i}" for i in range(17)])
    run = opened(tmp_path / "out", a)
    config = make_config(b)
    with list_rows(config, config.questionnaire, KnownRows()) as listing:
        manifest.write_manifest(run.output, listing.read_tables(), run.num_rows)  # and killed before run.json
    run = opened(tmp_path / "out", c, extend=True)
    assert manifest_ids(run) == [*(f"a{i}" for i in range(11)), *(f"c{i}" for i in range(17))]
    numbers = [read_rows(run.output, RowRange(row, row + 1))["row"].to_pylist() for row in range(28)]
    assert numbers == [[row] for row in range(28)]
    groups = [pq.ParquetFile(path).metadata for path in sorted((tmp_path / "out" / "manifest").iterdir())]
    assert [[g.row_group(i).num_rows for i in range(g.num_row_groups)] for g in groups] == [[4, 4]] * 3 + [[4]]


def test_kept_columns_of_an_extension_have_the_types_of_the_run(tmp_path: Path) -> None:
    a, b = lines(tmp_path / "a.jsonl", ["1"], n=1), lines(tmp_path / "b.jsonl", ["2"], n="x")
    opened(tmp_path / "out", a, keep_columns=("n",))
    with pytest.raises(RunError, match=r"column n .*int64.*string"):
        opened(tmp_path / "out", b, keep_columns=("n",), extend=True)
    c = lines(tmp_path / "c.jsonl", ["3"], n=None)
    assert opened(tmp_path / "out", c, keep_columns=("n",), extend=True).num_rows == 2


@pytest.mark.parametrize("options", [{"overwrite": True}, {"on_duplicate_id": "suffix"}], ids=["overwrite", "suffix"])
def test_what_does_not_go_with_extend(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"--extend|--overwrite"):
        make_config("x", extend=True, **options)


def test_ids_that_changed_places_are_duplicates(tmp_path: Path) -> None:
    """Each id is known and each image, but not this one by that name."""
    rows = [{"id": "1", "image": "A.png"}, {"id": "2", "image": "B.png"}]
    opened(tmp_path / "out", write_lines(tmp_path / "a.jsonl", *rows))
    swapped = [{"id": "1", "image": "B.png"}, {"id": "2", "image": "A.png"}, {"id": "3", "image": "C.png"}]
    with pytest.raises(SourceError, match=r"2 rows.*--on-duplicate-id"):
        opened(tmp_path / "out", write_lines(tmp_path / "a.jsonl", *swapped), extend=True)


def test_what_a_user_keeps_in_a_directory_of_our_name_stays(tmp_path: Path) -> None:
    (tmp_path / "exchange").mkdir()
    (tmp_path / "exchange" / "photo.png").touch()
    with pytest.raises(RunError, match="exchange"):
        opened(tmp_path, tmp_path / "exchange")
    with pytest.raises(RunError, match=r"photo\.png"):
        opened(tmp_path, lines(tmp_path / "a.jsonl", ["1"]))
    assert (tmp_path / "exchange" / "photo.png").exists()
