"""Run benchmarks through the pipeline, one after the other, and write their scores and predictions."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ovis_model.checkpoint import fetch_checkpoint
from ovis_model.config import SIZES as SHAPES
from ovis_model.config import OvisConfig
from ovis_model.wording import count_nouns
from pipelines.checks import check_model, describe_models, resolve_model_paths
from pipelines.cluster.ray_session import open_ray_session
from pipelines.evaluation.benchmarks import SIZES, Dataset, Size
from pipelines.evaluation.config import CATEGORIES, IMAGES, EvaluateConfig
from pipelines.evaluation.files import clean_answer, read_items
from pipelines.evaluation.items import select_illustrated, write_items, write_video_items
from pipelines.evaluation.judge import Judge, check_endpoint
from pipelines.evaluation.predictions import Prediction, choose_blank, write_predictions
from pipelines.evaluation.prompts import cut_reasoning
from pipelines.evaluation.score import check_items, compute_md5, dump_json, name_missing_column
from pipelines.evaluation.scoring.scores import Item, get_index
from pipelines.evaluation.summary import Result, join_parts, render_html, render_markdown, summarize_result
from pipelines.evaluation.videos import Frames, UnreadableVideo, extract_frames, find_clip
from pipelines.generate import EngineFactory, load_engine
from pipelines.output.run_record import acquire_lease, check_resumable, note_unchanged
from pipelines.output.sink import read_results
from pipelines.pipeline import run_pipeline
from pipelines.plan import plan_run
from pipelines.storage import store
from pipelines.storage.preflight import check_stores

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """The data of a benchmark with its items, what identifies the file made of them, and the folder for it.

    unreadable: index -> why its video cannot be shown, if an earlier run made the file.
    """

    dataset: Dataset
    data: str
    items: Sequence[Item]
    size: Size
    identity: Mapping[str, Any]
    folder: str
    unreadable: Mapping[str, str] | None = None

    @property
    def is_prepared(self) -> bool:
        """Whether an earlier run made the items."""
        return self.unreadable is not None


@dataclass(frozen=True)
class ItemFile:
    """The items of a benchmark, and the folder with the Parquet file that holds them for the pipeline.

    unreadable: index -> why its video cannot be shown; the Parquet file lacks these items. md5: of the TSV file.
    """

    dataset: Dataset
    items: Sequence[Item]
    folder: str
    md5: str
    unreadable: Mapping[str, str] = field(default_factory=dict)

    @property
    def uri(self) -> str:
        """The Parquet file."""
        return store.join(self.folder, f"{self.dataset.name}.parquet")


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
    with ExitStack() as session:
        with note_unchanged():
            check_stores((config.output, config.model))
            config = resolve_model_paths(config)
            size = config.size or find_size(config.model, config.revision)
            check_model(config)
            sources = [_find_source(config, dataset, size) for dataset in config.datasets]
            if not all(source.is_prepared for source in sources):
                _check_resources(config, session)
        with acquire_lease(config.output):
            files = [_prepare(config, source) for source in sources]
        runs = [_make_run_config(config, file) for file in files]
        for run in runs:
            check_resumable(run, describe_models(run))
        results, seconds = [], 0.0
        for file, run in zip(files, runs, strict=True):
            seconds += run_pipeline(run, make_engine=make_engine).seconds
            results.append(_score(config, file, run.output, size))
    num_errors = sum(result.num_errors for result in results)
    rows = sum(result.num_rows for result in results)
    results = join_parts(results)
    _write_summary(config.output, results)
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


def _find_source(config: EvaluateConfig, dataset: Dataset, size: Size) -> Source:
    """Return the data of a benchmark. Raise ValueError if it cannot be used, or OUTPUT holds items of other data."""
    data = find_data(config.input, dataset, is_only=len(config.datasets) == 1)
    identity = _identify_items(config, dataset, data, size)
    items = read_items(data) if dataset.frames else select_illustrated(read_items(data), data)
    _check_items(config, dataset, items)
    folder = store.join(store.make_absolute(config.output), "items")
    note = store.join(folder, f"{dataset.name}.json")
    if store.find_file(note) is None or config.overwrite:
        return Source(dataset, data, items, size, identity, folder)
    found = json.loads(store.read_bytes(note))
    unreadable = found.pop("unreadable", {})
    if differing := [name for name in identity.keys() | found.keys() if found.get(name) != identity.get(name)]:
        there, here = ({name: values.get(name) for name in sorted(differing)} for values in (found, identity))
        raise ValueError(f"{config.output} holds {dataset.name} with {there}, not {here}; use --overwrite")
    return Source(dataset, data, items, size, identity, folder, unreadable)


def _check_items(config: EvaluateConfig, dataset: Dataset, items: Sequence[Item]) -> None:
    """Raise ValueError if the items cannot be asked and scored, which would be found after the model's work only."""
    check_items(dataset, items, config.scoring)
    if dataset.frames:
        with name_missing_column(dataset):
            for item in items:
                find_clip(item)


def _check_resources(config: EvaluateConfig, session: ExitStack) -> None:
    """Start Ray for all benchmarks. Raise ValueError if the cluster or the judge cannot be used."""
    if config.judge_endpoint is not None:
        check_endpoint(config.judge_endpoint)
    session.enter_context(open_ray_session())
    plan_run(config, 1)


def _prepare(config: EvaluateConfig, source: Source) -> ItemFile:
    """Write the file of items, or use that of an earlier run. Raise ValueError if no item can be asked."""
    data, dataset, md5 = source.data, source.dataset, source.identity["md5"]
    file = ItemFile(dataset, source.items[: config.limit], source.folder, md5, source.unreadable or {})
    if source.is_prepared:
        return file
    root = store.make_absolute(config.image_root or str(Path(data).parent))
    if dataset.frames:
        file = _write_video_items(config, file, root)
    else:
        write_items(dataset, file.items, data, root, source.size, file.uri)
    note = {**source.identity, "unreadable": file.unreadable}
    store.write_bytes(store.join(source.folder, f"{dataset.name}.json"), json.dumps(note).encode())
    return file


def _identify_items(config: EvaluateConfig, dataset: Dataset, data: str, size: Size) -> dict[str, Any]:
    """Return what decides the file of items."""
    shown = {"frames": asdict(config.frame_rule), "subtitles": config.subtitles} if dataset.frames else {}
    md5 = compute_md5(dataset, data)
    return {"md5": md5, "size": size, "rules": config.rules, "limit": config.limit, **shown}


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
        counted = count_nouns(len(unreadable), "item counts", "items count")
        logger.warning("%s as wrong, because the video cannot be read", counted)
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
            "save_frames": config.save_frames and store.join(config.save_frames, file.dataset.name),
        }
    )


def _score(config: EvaluateConfig, file: ItemFile, output: str, size: Size) -> Result:
    found = {
        **_read_predictions(output),
        **{index: Prediction("", reason) for index, reason in file.unreadable.items()},
    }
    answered = [item for item in file.items if get_index(item) in found]
    predictions = {get_index(item): _fill_blank(item, found[get_index(item)]) for item in answered}
    write_predictions(config.output, file.dataset, answered, predictions)
    return summarize_result(
        file.dataset,
        answered,
        predictions,
        config.scoring,
        size,
        md5=file.md5,
        subtitles=config.subtitles,
        judge=_make_judge(config, file.dataset),
    )


def _fill_blank(item: Item, prediction: Prediction) -> Prediction:
    """Return the prediction with a wrong answer in place of none, and with the image's path in its error."""
    path = f"{item['image_path']}: " if prediction.error and "image" not in item and "image_path" in item else ""
    text = choose_blank(item) if clean_answer(prediction.text) is None else prediction.text
    return Prediction(text, f"{path}{prediction.error}")


def _make_judge(config: EvaluateConfig, dataset: Dataset) -> Judge | None:
    if config.judge_endpoint is None:
        return None
    cache = store.join(store.make_absolute(config.output), "judge", f"{dataset.name}.json")
    return Judge(config.judge_endpoint, cache)


def _read_predictions(output: str) -> Mapping[str, Prediction]:
    """Return {index: prediction} of a run."""
    table = read_results(output).select(["id", "prompt", "text", "status", "error"]).to_pylist()
    return {row["id"]: Prediction(cut_reasoning(row["prompt"], row["text"]), row["error"]) for row in table}


def _write_summary(output: str, results: Sequence[Result]) -> None:
    contents = {
        "scores.json": dump_json({result.dataset.name: result.to_json() for result in results}) + "\n",
        "scores.md": render_markdown(results),
        "scores.html": render_html(results),
    }
    for name, text in contents.items():
        store.write_bytes(store.join(store.make_absolute(output), name), text.encode())
