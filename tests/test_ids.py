"""Ids are unique: duplicates are an error, get a suffix or are skipped, and --extend adds only new ids to a run."""

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


def list_ids(*inputs: object, **options: object) -> list[str]:
    config = make_config(*inputs, **options)
    with list_rows(config, config.questionnaire) as listing:
        ids = [id_ for table in listing.read_tables() for id_ in table.column("id").to_pylist()]
        assert len(ids) == listing.num_rows
    return ids


def write_ids(path: Path, ids: list[str], **fields: object) -> Path:
    return write_lines(path, *({"id": id_, "image": f"{path.stem}-{i}.png", **fields} for i, id_ in enumerate(ids)))


def open_output(output: Path, *inputs: object, **options: object) -> Run:
    return open_run(make_config(*inputs, output=str(output), **options), dict(MODEL))


def read_manifest_ids(run: Run) -> list[str]:
    return [id_ for table in read_columns(run.output, run.num_rows, ["id"]) for id_ in table.column("id").to_pylist()]


def test_duplicate_ids_are_an_error_or_skipped_or_suffixed(tmp_path: Path) -> None:
    path = write_ids(tmp_path / "x.jsonl", ["a", "b", "a", "c", "a"])
    with pytest.raises(SourceError, match=r"2 rows.*--on-duplicate-id.*a \(3 times\)"):
        list_ids(path)
    assert list_ids(path, on_duplicate_id="skip") == ["a", "b", "c"]
    assert list_ids(path, on_duplicate_id="suffix") == ["a", "b", "a~2", "c", "a~3"]


def test_a_suffix_is_never_the_id_of_another_row(tmp_path: Path) -> None:
    path = write_ids(tmp_path / "x.jsonl", ["a", "a", "a~2", "a", "a~2"])
    ids = list_ids(path, on_duplicate_id="suffix")
    assert len(set(ids)) == 5 and ids[0] == "a" and ids[2] == "a~2"


@settings(deadline=None, max_examples=60)
@given(ids=st.lists(st.sampled_from(["a", "b", "a~2", "a~3", "c", "c~2"]), min_size=1, max_size=14))
def test_skip_and_suffix_agree_with_plain_python(tmp_path_factory: pytest.TempPathFactory, ids: list[str]) -> None:
    path = write_ids(tmp_path_factory.mktemp("ids") / "x.jsonl", ids)
    assert list_ids(path, on_duplicate_id="skip") == list(dict.fromkeys(ids))
    suffixed = list_ids(path, on_duplicate_id="suffix")
    assert len(set(suffixed)) == len(ids)
    assert [id_ for i, id_ in enumerate(suffixed) if ids[i] not in ids[:i]] == list(dict.fromkeys(ids))
    assert all(new == old or new.startswith(f"{old}~") for new, old in zip(suffixed, ids, strict=True))


def test_rows_keep_their_columns_when_duplicates_are_skipped(tmp_path: Path) -> None:
    rows = [{"id": id_, "image": f"{i}.png", "n": i} for i, id_ in enumerate("abacb")]
    path = write_lines(tmp_path / "x.jsonl", *rows)
    config = make_config(path, keep_columns=("n",), on_duplicate_id="skip")
    with list_rows(config, config.questionnaire) as listing:
        kept = [row for table in listing.read_tables() for row in table.to_pylist()]
    assert [(row["id"], row["kept"]["n"]) for row in kept] == [("a", 0), ("b", 1), ("c", 3)]


def test_duplicates_are_found_across_chunks_of_the_listing(tmp_path: Path) -> None:
    """The input has more rows than one chunk of the listing."""
    numbers = [*range(5000), *range(4990, 9000)]
    path = write_ids(tmp_path / "x.jsonl", [str(n) for n in numbers])
    assert list_ids(path, on_duplicate_id="skip") == [str(n) for n in range(9000)]
    assert len(set(list_ids(path, on_duplicate_id="suffix"))) == 9010


def test_extend_appends_new_rows_after_the_existing_ones(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in "bd":
        (pictures / f"{name}.png").touch()
    first = open_output(tmp_path / "out", pictures)
    before = read_rows(first.output, RowRange(0, 2)).to_pylist()
    for name in "ac":
        (pictures / f"{name}.png").touch()
    assert open_output(tmp_path / "out", pictures).num_rows == 2  # resuming does not list again
    run = open_output(tmp_path / "out", pictures, extend=True)
    assert [Path(id_).stem for id_ in read_manifest_ids(run)] == ["b", "d", "a", "c"]
    assert read_rows(run.output, RowRange(0, 2)).to_pylist() == before
    assert open_output(tmp_path / "out", pictures, extend=True).num_rows == 4
    assert open_output(tmp_path / "out", pictures).num_rows == 4
    assert [part["first_row"] for part in run.record["extended"]] == [2]


def test_extend_accepts_another_input_and_a_larger_limit(tmp_path: Path) -> None:
    a, b = write_ids(tmp_path / "a.jsonl", ["1", "2", "3"]), write_ids(tmp_path / "b.jsonl", ["4", "5"])
    assert open_output(tmp_path / "out", a, limit=2).num_rows == 2
    with pytest.raises(RunError, match=r"limit 2 there, not set here.*--extend"):
        open_output(tmp_path / "out", a)
    assert open_output(tmp_path / "out", a, extend=True).num_rows == 3
    run = open_output(tmp_path / "out", b, extend=True)
    assert read_manifest_ids(run) == ["1", "2", "3", "4", "5"]
    assert open_output(tmp_path / "out", b).num_rows == 5


def test_extend_starts_a_run_in_an_empty_output(tmp_path: Path) -> None:
    assert open_output(tmp_path / "out", write_ids(tmp_path / "a.jsonl", ["1"]), extend=True).num_rows == 1


def test_extend_refuses_other_options(tmp_path: Path) -> None:
    path = write_ids(tmp_path / "a.jsonl", ["1"])
    open_output(tmp_path / "out", path)
    with pytest.raises(RunError, match=r"prompt .* there, 'Why.' here"):
        open_output(tmp_path / "out", path, extend=True, prompt="Why?")


def test_a_known_id_with_another_image_is_a_duplicate(tmp_path: Path) -> None:
    """Ids that restart in each shard must not pass for rows that the run already has."""
    a, b = write_ids(tmp_path / "a.jsonl", ["1", "2"]), write_ids(tmp_path / "b.jsonl", ["2", "3"])
    open_output(tmp_path / "out", a)
    with pytest.raises(SourceError, match=r"1 row .*2 \(2 times\)"):
        open_output(tmp_path / "out", b, extend=True)
    assert open_output(tmp_path / "out", a).num_rows == 2
    other = tmp_path / "other"
    open_output(other, a, on_duplicate_id="skip")
    assert read_manifest_ids(open_output(other, b, extend=True, on_duplicate_id="skip")) == ["1", "2", "3"]


def test_extend_fills_the_last_file_of_the_manifest_and_adds_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that a killed extension left in the manifest are overwritten."""
    monkeypatch.setattr(manifest, "ROWS_PER_FILE", 8)
    monkeypatch.setattr(manifest, "ROWS_PER_GROUP", 4)
    a, b = write_ids(tmp_path / "a.jsonl", [f"a{i}" for i in range(11)]), write_ids(tmp_path / "b.jsonl", ["b0", "b1"])
    c = write_ids(tmp_path / "c.jsonl", [f"c{i}" for i in range(17)])
    run = open_output(tmp_path / "out", a)
    config = make_config(b)
    with list_rows(config, config.questionnaire, KnownRows()) as listing:
        manifest.write_manifest(
            run.output, listing.read_tables(), run.num_rows
        )  # then killed before run.json was written
    run = open_output(tmp_path / "out", c, extend=True)
    assert read_manifest_ids(run) == [*(f"a{i}" for i in range(11)), *(f"c{i}" for i in range(17))]
    numbers = [read_rows(run.output, RowRange(row, row + 1))["row"].to_pylist() for row in range(28)]
    assert numbers == [[row] for row in range(28)]
    groups = [pq.ParquetFile(path).metadata for path in sorted((tmp_path / "out" / "manifest").iterdir())]
    assert [[g.row_group(i).num_rows for i in range(g.num_row_groups)] for g in groups] == [[4, 4]] * 3 + [[4]]


def test_kept_columns_of_an_extension_must_have_the_types_of_the_run(tmp_path: Path) -> None:
    a, b = write_ids(tmp_path / "a.jsonl", ["1"], n=1), write_ids(tmp_path / "b.jsonl", ["2"], n="x")
    open_output(tmp_path / "out", a, keep_columns=("n",))
    with pytest.raises(RunError, match=r"column n .*int64.*string"):
        open_output(tmp_path / "out", b, keep_columns=("n",), extend=True)
    c = write_ids(tmp_path / "c.jsonl", ["3"], n=None)
    assert open_output(tmp_path / "out", c, keep_columns=("n",), extend=True).num_rows == 2


@pytest.mark.parametrize("options", [{"overwrite": True}, {"on_duplicate_id": "suffix"}], ids=["overwrite", "suffix"])
def test_extend_refuses_overwrite_and_suffix(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"--extend|--overwrite"):
        make_config("x", extend=True, **options)


def test_ids_that_swapped_their_images_are_duplicates(tmp_path: Path) -> None:
    """Each id and each image is known, but not in this combination."""
    rows = [{"id": "1", "image": "A.png"}, {"id": "2", "image": "B.png"}]
    open_output(tmp_path / "out", write_lines(tmp_path / "a.jsonl", *rows))
    swapped = [{"id": "1", "image": "B.png"}, {"id": "2", "image": "A.png"}, {"id": "3", "image": "C.png"}]
    with pytest.raises(SourceError, match=r"2 rows.*--on-duplicate-id"):
        open_output(tmp_path / "out", write_lines(tmp_path / "a.jsonl", *swapped), extend=True)


def test_a_users_files_in_a_directory_named_exchange_are_kept(tmp_path: Path) -> None:
    (tmp_path / "exchange").mkdir()
    (tmp_path / "exchange" / "photo.png").touch()
    with pytest.raises(RunError, match="exchange"):
        open_output(tmp_path, tmp_path / "exchange")
    with pytest.raises(RunError, match=r"photo\.png"):
        open_output(tmp_path, write_ids(tmp_path / "a.jsonl", ["1"]))
    assert (tmp_path / "exchange" / "photo.png").exists()
