"""Run benchmarks through the pipeline, one after the other, and write their scores and predictions."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ovis_model.checkpoint import fetch_checkpoint
from ovis_model.config import SIZES as SHAPES
from ovis_model.config import OvisConfig
from pipelines.checks import resolve_model_paths
from pipelines.evaluation.benchmarks import SIZES, Dataset, Size
from pipelines.evaluation.config import CATEGORIES, IMAGES, EvaluateConfig
from pipelines.evaluation.files import read_items
from pipelines.evaluation.items import select_illustrated, write_items, write_video_items
from pipelines.evaluation.judge import Judge
from pipelines.evaluation.predictions import EMPTY, Prediction, write_predictions
from pipelines.evaluation.prompts import cut_reasoning
from pipelines.evaluation.score import compute_md5, dump_json
from pipelines.evaluation.scoring.scores import Item, get_index
from pipelines.evaluation.summary import Result, render_html, render_markdown, summarize_result
from pipelines.evaluation.videos import Frames, UnreadableVideo, extract_frames, find_clip
from pipelines.generate import EngineFactory, load_engine
from pipelines.output.run_record import acquire_lease
from pipelines.output.sink import read_results
from pipelines.pipeline import run_pipeline
from pipelines.storage import store

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ItemFile:
    """The items of a benchmark, and the folder with the Parquet file that holds them for the pipeline.

    unreadable: index -> why its video cannot be shown; the Parquet file lacks these items.
    """

    dataset: Dataset
    items: Sequence[Item]
    folder: str
    unreadable: Mapping[str, str] = field(default_factory=dict)

    @property
    def uri(self) -> str:
        """The Parquet file."""
        return store.join(self.folder, f"{self.dataset.name}.parquet")

    @property
    def note(self) -> str:
        """The file that says what the Parquet file was made of."""
        return store.join(self.folder, f"{self.dataset.name}.json")


@dataclass(frozen=True)
class EvaluationReport:
    """Counts over all benchmarks, and the score of each, None where a judge is needed."""

    rows: int
    ok: int
    error: int
    seconds: float
    scores: dict[str, float | None]
    output: str


def run_evaluation(config: EvaluateConfig, *, make_engine: EngineFactory = load_engine) -> EvaluationReport:
    """Ask the items that are missing in OUTPUT, score all benchmarks, and write predictions and tables.

    Raise ValueError for mistakes of usage, before any replica starts, and what `run_pipeline` raises.
    """
    config = resolve_model_paths(config)
    size = config.size or find_size(config.model, config.revision)
    with acquire_lease(config.output):
        files = [_prepare(config, dataset, size) for dataset in config.datasets]
    results, seconds = [], 0.0
    for file in files:
        run = _make_run_config(config, file)
        seconds += run_pipeline(run, make_engine=make_engine).seconds
        results.append(_score(config, file, run.output, size))
    _write_summary(config.output, results)
    num_errors = sum(result.num_errors for result in results)
    rows = sum(result.num_rows for result in results)
    scores = {result.dataset.name: result.score for result in results}
    return EvaluationReport(rows, rows - num_errors, num_errors, round(seconds, 3), scores, config.output)


def find_size(model: str, revision: str | None) -> Size:
    """Return the published size that has the shape of this model. Raise ValueError if none has."""
    language = OvisConfig.from_directory(fetch_checkpoint(model, revision, weights=False)).language
    for size in SIZES:
        known = SHAPES[size].language
        if (known.num_hidden_layers, known.hidden_size) == (language.num_hidden_layers, language.hidden_size):
            return size
    raise ValueError(f"{model} has the shape of no published size; give --size {'|'.join(SIZES)} to choose its prompts")


def find_data(inputs: tuple[str, ...], dataset: Dataset, *, is_only: bool) -> str:
    """Return the TSV file of a benchmark: NAME.tsv, in a directory, or the only file. Raise ValueError."""
    for path in map(Path, inputs):
        if path.is_dir() and (path / f"{dataset.name}.tsv").exists():
            return str(path / f"{dataset.name}.tsv")
        if path.stem == dataset.name or (is_only and len(inputs) == 1 and not path.is_dir()):
            return str(path)
    raise ValueError(f"no {dataset.name}.tsv in {', '.join(inputs)}; name the file so, or give its directory")


def _prepare(config: EvaluateConfig, dataset: Dataset, size: Size) -> ItemFile:
    """Write the file of items, or use that of an earlier run. Raise ValueError if that is of other data."""
    data = find_data(config.input, dataset, is_only=len(config.datasets) == 1)
    identity: dict[str, Any] = {
        "md5": compute_md5(dataset, data),
        "size": size,
        "rules": config.rules,
        "limit": config.limit,
    }
    if dataset.frames:
        identity |= {"frames": asdict(config.frame_rule), "subtitles": config.subtitles}
    items = read_items(data) if dataset.frames else select_illustrated(read_items(data), data)
    folder = store.join(store.make_absolute(config.output), "items")
    file = ItemFile(dataset, items[: config.limit], folder)
    if store.find_file(file.note) is None or config.overwrite:
        root = store.make_absolute(config.image_root or str(Path(data).parent))
        file = _write_video_items(config, file, root) if dataset.frames else _write_image_items(file, data, root, size)
        store.write_bytes(file.note, json.dumps({**identity, "unreadable": file.unreadable}).encode())
        return file
    found = json.loads(store.read_bytes(file.note))
    unreadable = found.pop("unreadable", {})
    if found != identity:
        raise ValueError(f"{config.output} holds {dataset.name} with {found}, not {identity}; use --overwrite")
    return replace(file, unreadable=unreadable)


def _identify_items(config: EvaluateConfig, dataset: Dataset, data: str, size: Size) -> dict[str, Any]:
    """Return what decides the file of items."""
    shown = {"frames": asdict(config.frame_rule), "subtitles": config.subtitles} if dataset.frames else {}
    md5 = compute_md5(dataset, data)
    return {"md5": md5, "size": size, "rules": config.rules, "limit": config.limit, **shown}


def _write_image_items(file: ItemFile, data: str, root: str, size: Size) -> ItemFile:
    write_items(file.dataset, file.items, data, root, size, file.uri)
    return file


def _write_video_items(config: EvaluateConfig, file: ItemFile, root: str) -> ItemFile:
    """Extract frames and write the items whose videos are readable. Raise ValueError if none is."""
    clips = {get_index(item): find_clip(item) for item in file.items}
    target = store.join(file.folder, f"{file.dataset.name} frames")
    frames = extract_frames(
        file.dataset, list(clips.values()), root, config.frame_rule, target, reuse=not config.overwrite
    )
    found = {index: frames[clip] for index, clip in clips.items()}
    unreadable = {index: str(error) for index, error in found.items() if isinstance(error, UnreadableVideo)}
    readable = [item for item in file.items if get_index(item) not in unreadable]
    if not readable:
        raise ValueError(f"no video can be read: {next(iter(unreadable.values()))}; --image-root names their directory")
    if unreadable:
        logger.warning("%d items count as wrong: their videos cannot be read", len(unreadable))
    shown = {index: value for index, value in found.items() if isinstance(value, Frames)}
    write_video_items(file.dataset, readable, shown, root if config.subtitles else None, file.uri)
    return replace(file, unreadable=unreadable)


def _make_run_config(config: EvaluateConfig, file: ItemFile) -> EvaluateConfig:
    """Return the options of the run over one benchmark, which is a run like any other, in a folder of OUTPUT."""
    kept = config.keep_columns or tuple(name for name in ("answer", *CATEGORIES) if name in file.items[0])
    return config.model_copy(
        update={
            "benchmark": file.dataset.name,
            "input": (file.uri,),
            "output": store.join(config.output, "runs", file.dataset.name),
            "id_column": "index",
            "image_column": IMAGES,
            "keep_columns": kept,
            "limit": None,
        }
    )


def _score(config: EvaluateConfig, file: ItemFile, output: str, size: Size) -> Result:
    unreadable = {index: Prediction(EMPTY, reason) for index, reason in file.unreadable.items()}
    predictions = {**_read_predictions(output), **unreadable}
    answered = [item for item in file.items if get_index(item) in predictions]
    write_predictions(config.output, file.dataset, answered, predictions)
    return summarize_result(
        file.dataset,
        answered,
        predictions,
        config.scoring,
        size,
        subtitles=config.subtitles,
        judge=_make_judge(config, file.dataset),
    )


def _make_judge(config: EvaluateConfig, dataset: Dataset) -> Judge | None:
    if config.judge_endpoint is None:
        return None
    cache = store.join(store.make_absolute(config.output), "judge", f"{dataset.name}.json")
    return Judge(config.judge_endpoint, cache)


def _read_predictions(output: str) -> Mapping[str, Prediction]:
    """Return {index: prediction} of a run; an error row and an empty answer count as an answer that is wrong."""
    table = read_results(output).select(["id", "prompt", "text", "status", "error"]).to_pylist()
    return {row["id"]: Prediction(cut_reasoning(row["prompt"], row["text"]) or EMPTY, row["error"]) for row in table}


def _write_summary(output: str, results: list[Result]) -> None:
    contents = {
        "scores.json": dump_json({result.dataset.name: result.to_json() for result in results}) + "\n",
        "scores.md": render_markdown(results),
        "scores.html": render_html(results),
    }
    for name, text in contents.items():
        store.write_bytes(store.join(store.make_absolute(output), name), text.encode())
