"""Whole caption jobs on real files: a row in is a row out, whatever the file holds."""

from __future__ import annotations

import io
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image
from safetensors.torch import load_file, save_file

from ovis_model.inputs.processor import Processor
from ovis_model.inputs.resample import load_resampler
from ovis_model.types import SamplingParams
from pipelines import schema
from pipelines.cluster.attempts import GIVEN_UP
from pipelines.config import CaptionConfig, RunConfig
from pipelines.errors import LeaseError, RunError, SourceError
from pipelines.output.lease import Lease
from pipelines.output.sink import read_results
from pipelines.pipeline import run_pipeline
from tests.support.engines import load_engine
from tests.support.fake_engine import FakeEngineFactory
from tests.support.golden_data import CHECKPOINTS, checkpoint_dir
from tests.support.job_configs import make_annotate_config
from tests.support.photographs import find_photographs
from tests.support.pictures import draw
from tests.support.processes import run_caption

MODEL = str(checkpoint_dir("tiny56-tied"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    directory = tmp_path / "pictures"
    directory.mkdir()
    for i in range(24):
        draw(directory / f"{i:02}.{('jpg', 'png', 'webp')[i % 3]}", seed=i, width=60 + 7 * i)
    return directory


def make_config(inputs: Path | str, output: Path, **options: object) -> CaptionConfig:
    values = {"model": MODEL, "max_new_tokens": 8, **options}
    return CaptionConfig(input=(str(inputs),), output=str(output), **values)  # type: ignore[arg-type]


def test_a_folder_of_images_becomes_parquet(pictures: Path, tmp_path: Path) -> None:
    """The job runs as a user runs it, and starts its own Ray."""
    output = tmp_path / "out"
    finished = run_caption(pictures, output, "--model", MODEL, "--max-new-tokens", 8, "--rows-per-file", 10)
    assert finished.exit_code == 0, finished.stderr
    assert len(finished.stdout.splitlines()) == 1
    summary = finished.summary
    assert (summary["rows"], summary["ok"], summary["error"], summary["skipped_done"]) == (24, 24, 0, 0)
    assert summary["output"] == str(output)
    assert summary["seconds"] > 0 and summary["rows_per_s"] > 0 and summary["output_tokens_per_s"] > 0
    assert "24/24 rows" in finished.stderr and "ETA" in finished.stderr
    assert finished.stderr.count("Pillow resizes the images") == (load_resampler() is None)
    ours = ("plan: ", "event=", "Pillow resizes the images", *(f"{i}/24 rows" for i in range(1, 25)))
    assert all(line.startswith(ours) for line in finished.stderr.splitlines()), finished.stderr
    files = sorted((output / "data").iterdir())
    assert len(files) >= 3 and all(pq.read_schema(file).equals(schema.OUTPUT) for file in files)
    for table in (pd.read_parquet(output / "data"), pyarrow.dataset.dataset(output / "data").to_table().to_pandas()):
        assert sorted(table["id"]) == sorted(str(p) for p in pictures.iterdir())
    record = json.loads((output / "run.json").read_text())
    assert record["status"] == "finished" and record["counts"] == {"ok": 24, "error": 0}


def test_rows_equal_what_the_engine_generates_without_ray(ray_cluster: None, pictures: Path, tmp_path: Path) -> None:
    run_pipeline(make_config(pictures, tmp_path / "out"))
    rows = read_results(str(tmp_path / "out")).to_pylist()
    processor = Processor.from_pretrained(MODEL)
    for row in rows:
        with Image.open(row["uri"]) as image:
            request = processor.build_request("Describe the image.", [image.convert("RGB")])
        [completion] = load_engine("tiny56-tied").generate([request], SamplingParams(max_new_tokens=8))
        assert row["text"] == processor.detokenize(completion.output_ids)
        assert row["num_prompt_tokens"] == len(request.input_ids)
        assert row["num_tiles"] == len(request.tiles)
        assert row["num_output_tokens"] == len(completion.output_ids)
        assert row["mean_logprob"] == pytest.approx(completion.mean_logprob, abs=1e-4)
        assert row["finish_reason"] == completion.finish_reason
        assert (row["num_images"], row["status"], row["stage"], row["error"]) == (1, "ok", "", "")


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_photographs_are_ok_rows(ray_cluster: None, tmp_path: Path, checkpoint: str) -> None:
    """The photographs are all that scikit-learn and scikit-image ship: RGB, grey, RGBA, palette, 16 bits."""
    links = tmp_path / "photographs"
    links.mkdir()
    for i, photograph in enumerate(find_photographs()):
        (links / f"{i:03}{photograph.suffix}").symlink_to(photograph)
    model = str(checkpoint_dir(checkpoint))
    summary = run_pipeline(make_config(links, tmp_path / "out", model=model, max_new_tokens=4, max_tiles=4))
    rows = read_results(str(tmp_path / "out")).to_pylist()
    assert [row["error"] for row in rows if row["status"] != "ok"] == []
    assert summary.ok == len(find_photographs()) >= 20


BAD = {
    "empty.jpg": ("decode", "empty"),
    "truncated.jpg": ("decode", ""),
    "text.png": ("decode", "not an image"),
    "missing.png": ("read", "No such file"),
    "huge.png": ("decode", "pixels"),
    "pipe.png": ("list", "not a regular file"),
    os.fsdecode(b"name-\xff.png"): ("list", "not UTF-8"),
}
GOOD = ("one-pixel-high.png", "png-named.jpg", "animated.gif", "ünïcödé 图片 #%?.png", "grey16.png", "[brackets].png")


@pytest.fixture
def mixed(pictures: Path) -> Iterator[Path]:
    """Add every kind of bad file, and unusual good ones, to the pictures."""
    (pictures / "empty.jpg").touch()
    whole = draw(pictures / "whole.jpg", seed=50).read_bytes()
    (pictures / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0x55
    (pictures / "flipped.jpg").write_bytes(flipped)
    (pictures / "text.png").write_text("<html>not found</html>")
    (pictures / "missing.png").symlink_to(pictures / "nowhere.png")
    (pictures / "huge.png").write_bytes(encode_png_header(20_000, 20_000))
    os.mkfifo(pictures / "pipe.png")
    draw(pictures / os.fsdecode(b"name-\xff.png"), seed=51)
    draw(pictures / GOOD[0], seed=52, width=500, height=1)
    draw(pictures / "png-named.png", seed=53).rename(pictures / GOOD[1])
    frames = [Image.new("RGB", (50, 40), colour) for colour in ("red", "green", "blue")]
    frames[0].save(pictures / GOOD[2], save_all=True, append_images=frames[1:])
    draw(pictures / GOOD[3], seed=54)
    Image.fromarray(np.linspace(0, 65535, 60 * 90).reshape(60, 90).astype(np.uint16)).save(pictures / GOOD[4])
    draw(pictures / GOOD[5], seed=55)
    yield pictures


@pytest.mark.parametrize(("make", "prefix"), [(make_config, ""), (make_annotate_config, "caption_")])
def test_bad_files_become_error_rows_and_change_no_other_row(
    ray_cluster: None, mixed: Path, tmp_path: Path, make: Callable[..., RunConfig], prefix: str
) -> None:
    text, confidence = f"{prefix}text", "caption_confidence" if prefix else "mean_logprob"
    summary = run_pipeline(make(mixed, tmp_path / "out"))
    rows = {Path(row["id"]).name: row for row in read_results(str(tmp_path / "out")).to_pylist()}
    assert summary.rows == len(rows) == len(list(mixed.iterdir())) == summary.ok + summary.error
    for name, (stage, reason) in BAD.items():
        row = rows[name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")]
        assert (row["status"], row["stage"]) == ("error", stage), name
        assert reason in row["error"] and row["error"], (name, row["error"])
        assert row[text] == "" and np.isnan(row[confidence]) and row["num_output_tokens"] == 0
    assert all(rows[name]["status"] == "ok" for name in GOOD)
    good_only = tmp_path / "good"
    good_only.mkdir()
    for i in range(24):
        name = f"{i:02}.{('jpg', 'png', 'webp')[i % 3]}"
        (good_only / name).symlink_to(mixed / name)
    run_pipeline(make(good_only, tmp_path / "alone"))
    for row in read_results(str(tmp_path / "alone")).to_pylist():
        assert rows[Path(row["id"]).name][text] == row[text]


def test_extreme_aspect_ratios_are_captioned(ray_cluster: None, tmp_path: Path) -> None:
    directory = tmp_path / "long"
    directory.mkdir()
    for i, (width, height) in enumerate([(10_000, 1), (1, 10_000), (20_000, 2), (3, 2_000), (5_000, 7)]):
        draw(directory / f"{i}.png", i, width, height)
    assert run_pipeline(make_config(directory, tmp_path / "out")).rows == 5
    assert all(row["status"] == "ok" for row in read_results(str(tmp_path / "out")).to_pylist())


def test_a_row_over_the_models_limit_is_an_error_row_with_the_remedy(
    ray_cluster: None, pictures: Path, tmp_path: Path
) -> None:
    run_pipeline(make_config(pictures / "00.jpg", tmp_path / "out", max_new_tokens=32760))
    [row] = read_results(str(tmp_path / "out")).to_pylist()
    assert (row["status"], row["stage"]) == ("error", "tile")
    assert "over the model's limit of 32768" in row["error"] and "--max-new-tokens" in row["error"]


def test_rows_that_the_engine_refuses_fail_alone(ray_cluster: None, pictures: Path, tmp_path: Path) -> None:
    engine = FakeEngineFactory(fails_on_tiles=5)
    run_pipeline(make_config(pictures, tmp_path / "out"), make_engine=engine)
    rows = read_results(str(tmp_path / "out")).to_pylist()
    failed = [row for row in rows if row["status"] == "error"]
    assert 0 < len(failed) < len(rows) == 24
    assert all((row["stage"], row["error"]) == ("generate", "5 tiles are an unlucky number") for row in failed)
    assert {row["num_tiles"] for row in failed} == {5}


def test_special_tokens_in_a_prompt_are_kept_as_text(ray_cluster: None, pictures: Path, tmp_path: Path) -> None:
    prompt = "What do <image> and <|im_end|> mean in <image>?"
    summary = run_pipeline(make_config(pictures / "00.jpg", tmp_path / "out", prompt=prompt))
    assert summary.ok == 1
    assert read_results(str(tmp_path / "out")).column("prompt").to_pylist() == [prompt]


def test_sampling_depends_on_the_seed_and_not_on_the_batch(ray_cluster: None, pictures: Path, tmp_path: Path) -> None:
    options = {"temperature": 1.0, "top_p": 0.9, "seed": 3}
    run_pipeline(make_config(pictures, tmp_path / "all", **options))
    run_pipeline(make_config(pictures / "1*.*", tmp_path / "some", **options))
    texts = {row["id"]: row["text"] for row in read_results(str(tmp_path / "all")).to_pylist()}
    some = read_results(str(tmp_path / "some")).to_pylist()
    assert len(some) == 10 and all(texts[row["id"]] == row["text"] for row in some)
    run_pipeline(make_config(pictures, tmp_path / "other", **{**options, "seed": 4}))
    others = {row["id"]: row["text"] for row in read_results(str(tmp_path / "other")).to_pylist()}
    assert others != texts


def test_an_output_of_other_options_is_refused_unless_overwritten(
    ray_cluster: None, pictures: Path, tmp_path: Path
) -> None:
    engine = FakeEngineFactory()
    run_pipeline(make_config(pictures, tmp_path / "out"), make_engine=engine)
    with pytest.raises(RunError, match=r"prompt 'Describe the image\.' there, 'Why\?' here"):
        run_pipeline(make_config(pictures, tmp_path / "out", prompt="Why?"), make_engine=engine)
    assert set(read_results(str(tmp_path / "out")).column("prompt").to_pylist()) == {"Describe the image."}
    run_pipeline(make_config(pictures, tmp_path / "out", prompt="Why?", overwrite=True), make_engine=engine)
    assert set(read_results(str(tmp_path / "out")).column("prompt").to_pylist()) == {"Why?"}


def test_options_that_do_not_affect_rows_may_change(
    ray_cluster: None, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngineFactory()
    run_pipeline(make_config(pictures, tmp_path / "out"), make_engine=engine)
    again = run_pipeline(make_config(pictures, tmp_path / "out", rows_per_file=3, num_replicas=2), make_engine=engine)
    assert again.skipped_done == again.rows == 24
    assert "nothing to do: 24 rows are in OUTPUT already" in caplog.text


@pytest.mark.parametrize(
    "place", ["data/mine.parquet", "data/rows-000000000000-000000000001.parquet", "manifest/a.csv"]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_files_in_output_are_refused_and_kept(
    pictures: Path, tmp_path: Path, place: str, overwrite: bool
) -> None:
    foreign = tmp_path / "out" / place
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"mine")
    with pytest.raises(RunError, match="holds files that are not from a run"):
        run_pipeline(make_config(pictures, tmp_path / "out", overwrite=overwrite))
    assert foreign.read_bytes() == b"mine"


def test_the_input_is_never_removed(ray_cluster: None, pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run_pipeline(make_config(pictures, output), make_engine=FakeEngineFactory())
    mine = draw(output / "data" / "mine.jpg", seed=1)
    with pytest.raises(RunError, match="the input is in"):
        run_pipeline(make_config(output / "data", output, overwrite=True))
    with pytest.raises(RunError, match=r"not from a run, such as .*mine\.jpg"):
        run_pipeline(make_config(pictures, output, overwrite=True))
    assert mine.exists()


def test_overwriting_with_a_missing_input_removes_nothing(ray_cluster: None, pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run_pipeline(make_config(pictures, output), make_engine=FakeEngineFactory())
    with pytest.raises(SourceError, match="does not exist"):
        run_pipeline(make_config(tmp_path / "picz", output, overwrite=True))
    assert len(read_results(str(output))) == 24


def test_an_output_that_is_a_file_is_refused(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LeaseError, match="cannot use"):
        run_pipeline(make_config(pictures, tmp_path / "file"))


def test_an_output_in_use_is_refused(ray_cluster: None, pictures: Path, tmp_path: Path) -> None:
    """The refusal comes before any byte of it is changed."""
    output = tmp_path / "out"
    run_pipeline(make_config(pictures, output), make_engine=FakeEngineFactory())
    with Lease(str(output)):
        before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
        with pytest.raises(LeaseError, match="another run writes here"):
            run_pipeline(make_config(pictures, output, prompt="Why?", overwrite=True))
        assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_resuming_in_another_dtype_is_refused(ray_cluster: None, pictures: Path, tmp_path: Path) -> None:
    """A run on a GPU in bfloat16 cannot be resumed in float32 on a CPU."""
    output = tmp_path / "out"
    run_pipeline(make_config(pictures, output), make_engine=FakeEngineFactory())
    record = json.loads((output / "run.json").read_text())
    (output / "run.json").write_text(json.dumps({**record, "settled_dtype": "bfloat16"}))
    min((output / "data").iterdir()).unlink()
    with pytest.raises(RunError, match="generated in bfloat16"):
        run_pipeline(make_config(pictures, output), make_engine=FakeEngineFactory())


def test_a_row_that_kills_its_replica_is_an_error_row(ray_cluster: None, pictures: Path, tmp_path: Path) -> None:
    draw(pictures / "poison.png", seed=60, width=600, height=500)
    summary = run_pipeline(make_config(pictures, tmp_path / "out"), make_engine=FakeEngineFactory(dies_on_tiles=10))
    rows = {Path(row["id"]).name: row for row in read_results(str(tmp_path / "out")).to_pylist()}
    assert (summary.rows, summary.error) == (25, 1)
    assert (rows["poison.png"]["num_tiles"], rows["poison.png"]["stage"]) == (10, "generate")
    assert rows["poison.png"]["error"] == GIVEN_UP


def test_rows_are_in_the_order_of_the_input(ray_cluster: None, pictures: Path, tmp_path: Path) -> None:
    engine = FakeEngineFactory(seconds_per_row=0.01)
    run_pipeline(make_config(pictures, tmp_path / "out", rows_per_file=5, num_preprocessors=2), make_engine=engine)
    assert read_results(str(tmp_path / "out")).column("id").to_pylist() == sorted(map(str, pictures.iterdir()))
    assert all(pq.read_metadata(file).num_rows <= 5 for file in (tmp_path / "out" / "data").iterdir())


def test_exit_codes_of_bad_usage_and_of_many_errors(ray_address: str, mixed: Path, tmp_path: Path) -> None:
    assert run_caption(mixed, tmp_path / "a", "--model", "nowhere/at all").exit_code == 2
    assert run_caption(tmp_path / "nothing", tmp_path / "b", "--model", MODEL).exit_code == 2
    for file in mixed.glob("*.webp"):
        file.unlink()
    options = ["--model", MODEL, "--max-new-tokens", 2]
    finished = run_caption(mixed, tmp_path / "c", *options, ray_address=ray_address)
    assert finished.exit_code == 3
    assert finished.summary["error"] / finished.summary["rows"] > 0.1
    assert "The most frequent reasons" in finished.stderr


def test_a_job_joins_a_running_cluster_and_leaves_it_running(ray_address: str, pictures: Path, tmp_path: Path) -> None:
    """`ray job submit` sets RAY_ADDRESS in the same way."""
    options = ["--model", MODEL, "--max-new-tokens", 2]
    finished = run_caption(pictures, tmp_path / "out", *options, ray_address=ray_address)
    assert finished.exit_code == 0, finished.stderr
    assert finished.summary["ok"] == 24
    assert len([node for node in ray.nodes() if node["Alive"]]) == 1


def test_a_model_that_does_not_load_stops_the_job_with_the_reason(
    ray_address: str, pictures: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(MODEL, broken)
    tensors = load_file(broken / "model.safetensors")
    (broken / "model.safetensors").unlink()
    save_file({name: tensor for name, tensor in tensors.items() if name != "vte.weight"}, broken / "model.safetensors")
    finished = run_caption(pictures, tmp_path / "out", "--model", broken, ray_address=ray_address)
    assert finished.exit_code == 1
    assert finished.stderr.splitlines()[-1].endswith("do not fit its config.json; missing: vte.weight")
    assert not finished.stdout


def test_the_engine_stays_busy_while_images_are_prepared(ray_cluster: None, tmp_path: Path) -> None:
    """The engine takes 100 ms per row while two CPU actors decode and tile 640 x 480 JPEGs.

    At this rate the actors keep up even on a loaded machine.
    """
    directory = tmp_path / "pictures"
    directory.mkdir()
    one = draw(directory / "000.jpg", seed=0, width=640, height=480)
    for i in range(1, 64):
        (directory / f"{i:03}.jpg").write_bytes(one.read_bytes())
    log = tmp_path / "busy"
    engine = FakeEngineFactory(seconds_per_row=0.1, busy_log=log)
    run_pipeline(make_config(directory, tmp_path / "out", num_preprocessors=2), make_engine=engine)
    calls = np.loadtxt(io.StringIO(log.read_text()))
    busy_s, window_s = (calls[:, 1] - calls[:, 0]).sum(), calls[:, 1].max() - calls[:, 0].min()
    assert calls[:, 2].sum() == 64
    print(f"busy {busy_s:.2f} s of {window_s:.2f} s")
    assert busy_s / window_s >= 0.9


def encode_png_header(width: int, height: int) -> bytes:
    """Encode a small PNG whose header claims this size."""
    buffer = io.BytesIO()
    Image.new("1", (8, 8)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = width.to_bytes(4) + height.to_bytes(4)
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4)
    return bytes(data)
