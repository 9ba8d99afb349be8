"""Each kind of bad data gives its own reason and stage; no bad row reaches a batch, and none is cut."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ovis_model.network.weights import WeightsError
from ovis_model.training.export import load_network
from pipelines.output.ledger import RowRange
from pipelines.training.data.check import CheckedRow, RowChecker
from pipelines.training.data.data_sets import DataSet, list_training_rows
from pipelines.training.data.row_table import write_rows
from pipelines.training.run import make_prepare_options
from tests.support.roots import ROOT
from tests.support.training_files import TINY, make_train_config, write_pictures
from tests.support.web_server import WebServer


def check(tmp_path: Path, *rows: Any, **options: Any) -> list[CheckedRow]:
    """Check rows as a run does, in this process."""
    write_pictures(tmp_path)
    data, output = tmp_path / "data.jsonl", str(tmp_path / "out")
    data.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    num_rows = write_rows(output, list_training_rows([DataSet(name="x", files=(str(data),))]))
    prepare = make_prepare_options(make_train_config(data, Path(output), **options))
    return sorted(RowChecker(output, num_rows, prepare).check(RowRange(0, num_rows)))


def ask(*turns: tuple[str, str], **fields: Any) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **fields}


GOOD = ask(("human", "<image>\nColour?"), ("gpt", "Red."), image="0.png")
BAD = {
    "damaged image": (ask(("human", "?"), ("gpt", "Red."), image="half.png"), "decode", ""),
    "missing image": (ask(("human", "?"), ("gpt", "Red."), image="none.png"), "read", "No such file or directory"),
    "image count": (
        ask(("human", "<image> <image>?"), ("gpt", "Red."), image="0.png"),
        "tile",
        "the turns mark 2 images with <image>, but the row has 1",
    ),
    "empty answer": (ask(("human", "?"), ("gpt", "")), "list", "the answer in turn 2 is empty"),
    "only system turns": (
        ask(("system", "Be brief.")),
        "list",
        "the conversation has only system turns: there is nothing to learn",
    ),
    "over-long": (
        ask(("human", "?"), ("gpt", "Red. " * 300)),
        "tile",
        "the example has 1221 tokens, more than max_length=100; use fewer tiles or frames, or a larger max_length",
    ),
    "wrong JSON": ('{"conversations": [', "list", "not JSON: Expecting value at column 20"),
    "label-free": (ask(("human", "?")), "list", "no turn is an answer: there is nothing to learn"),
    "video without frames": (ask(("human", "<video>?"), ("gpt", "Red."), video="empty.mp4"), "decode", "empty"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_an_error_row_and_its_neighbours_are_good(tmp_path: Path, kind: str) -> None:
    row, stage, reason = BAD[kind]
    (tmp_path / "empty.mp4").touch()
    write_pictures(tmp_path)
    (tmp_path / "half.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    first, bad, last = check(tmp_path, GOOD, row, GOOD, max_length=100)
    assert first.num_tokens == last.num_tokens > 20 and not first.error
    assert (bad.num_tokens, bad.stage) == (0, stage) and reason in bad.error, bad


def test_an_identical_pair_is_an_error_row(tmp_path: Path) -> None:
    pair = {"image": "0.png", "prompt": "Colour?", "chosen": "Red.", "rejected": "Blue."}
    good, same = check(tmp_path, pair, {**pair, "rejected": "Red."}, stage="dpo")
    assert good.num_tokens > 20 and same.stage == "list"
    assert same.error == IDENTICAL


def test_rows_of_the_other_kind_are_error_rows(tmp_path: Path) -> None:
    pair = {"prompt": "Colour?", "chosen": "Red.", "rejected": "Blue."}
    assert "train on it with --stage dpo" in check(tmp_path, pair)[0].error
    assert "needs chosen and rejected answers" in check(tmp_path, GOOD, stage="dpo")[0].error


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_model_with_weights_that_are_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    shutil.copytree(TINY, tmp_path / "model")
    path = next((tmp_path / "model").glob("*.safetensors"))
    weights = load_file(path)
    weights["vte.weight"].flat[7] = value
    save_file(weights, path)
    with pytest.raises(WeightsError, match=r"has NaN or infinite values in vte\.weight"):
        load_network(tmp_path / "model")


def test_images_by_url_are_read_and_hosts_inside_the_network_only_on_request(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    with WebServer().run() as web:
        web.files["/0.png"] = (tmp_path / "0.png").read_bytes()
        row = {**GOOD, "image": f"{web.url}/0.png"}
        [allowed] = check(tmp_path, row, allow_private_addresses=True)
        [refused] = check(tmp_path, row)
    assert allowed.num_tokens > 20 and refused.stage == "read" and "not a public address" in refused.error


IDENTICAL = "the chosen and the rejected answer are identical: the pair carries no preference"
ON_THE_PAGE = {
    "an image that is missing": "missing image",
    "a damaged image": "damaged image",
    "marks and images differ": "image count",
    "an empty answer": "empty answer",
    "system turns only": "only system turns",
    "no answer": "label-free",
    "too long": "over-long",
    "not JSON": "wrong JSON",
    "a video without frames": "video without frames",
}


def test_the_page_lists_each_kind_with_its_stage_and_reason() -> None:
    """The tests above check that rows of these kinds have these stages and reasons."""
    page = (
        (ROOT / "docs" / "training.md").read_text().partition("### What is wrong with a row")[2].partition("\n## ")[0]
    )
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    table = {what: (stage, reason.replace("`", "").removesuffix(" ...")) for what, stage, reason in lines[1:]}
    wanted = {what: BAD[kind][1:] for what, kind in ON_THE_PAGE.items()}
    wanted["equal answers in a pair"] = "list", IDENTICAL
    assert table.keys() == wanted.keys() and len(table) == 10
    for what, (stage, reason) in table.items():
        assert stage == wanted[what][0]
        assert reason == "what the decoder says" or wanted[what][1].startswith(reason)
