"""OUTPUT/run.json of a training run: what decides its weights, so that an OUTPUT resumes only the run that it holds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from pipelines import __version__
from pipelines.errors import RunError
from pipelines.storage import store
from pipelines.training.config import TrainConfig

Json = dict[str, Any]

_RECORD, _KIND = "run.json", "training"
_VERSIONS_OF = ("torch", "numpy", "ray", "tokenizers", "pillow")
_OURS = ("checked.parquet", "errors.jsonl", "metrics.jsonl", "reference.parquet", "training.html", "driver.json")
_OUR_DIRECTORIES = ("rows/", "training_state/", "model/", "adapter/", "tensorboard/")


@dataclass(frozen=True)
class TrainingRun:
    """A run whose rows are frozen. `output` is an absolute path or URI; `record` is the content of run.json."""

    output: str
    record: Json

    @property
    def num_rows(self) -> int:
        """The number of rows, with those that are errors."""
        return int(self.record["num_rows"])

    @property
    def is_finished(self) -> bool:
        """Whether the model is written."""
        return bool(self.record["status"] == "finished")

    @property
    def state_uri(self) -> str:
        """The directory of the checkpoints."""
        return store.join(self.output, "training_state")

    @property
    def model_uri(self) -> str:
        """The directory of the model."""
        return store.join(self.output, "model")

    def update(self, **fields: Any) -> None:
        """Set fields of the record and write it. Raise OSError or StoreFault."""
        self.record.update(fields)
        store.write_bytes(store.join(self.output, _RECORD), json.dumps(self.record, indent=1).encode())


def read_run(config: TrainConfig, model: Json) -> TrainingRun | None:
    """Return the run that OUTPUT holds, None for none. Raise RunError for another one, or for foreign files."""
    output = store.make_absolute(config.output)
    uri = store.join(output, _RECORD)
    if store.find_file(uri) is None:
        _check_ours(output)
        return None
    record = json.loads(store.read_bytes(uri))
    if record.get("kind") != _KIND:
        raise RunError(f"{config.output} holds a run of another job; give another OUTPUT")
    # An option that an earlier version did not have counts as its default.
    here = identify_run(config, model)
    defaults = {name: value for name, value in _get_defaults().items() if name in here}
    _check_same({**defaults, **record["identity"]}, here, config.output)
    return TrainingRun(output, record)


def _get_defaults() -> Json:
    """Return the defaults of all options, as JSON values."""
    fields = TrainConfig.model_fields.items()
    defaults: Json = json.loads(json.dumps({name: x.default for name, x in fields if not x.is_required()}, default=str))
    return defaults


def identify_run(config: TrainConfig, model: Json) -> Json:
    """Return what decides the weights, as JSON values."""
    data = {name: [store.make_absolute(uri) for uri in getattr(config, name)] for name in ("input", "eval_input")}
    identity: Json = json.loads(json.dumps({**config.identify(), **data, "model weights": model["weights"]}))
    return identity


def begin_run(config: TrainConfig, model: Json, **facts: Any) -> TrainingRun:
    """Write the record of a new run whose rows are frozen. `facts`: further fields, `num_rows` among them."""
    versions = {name: metadata.version(name) for name in _VERSIONS_OF} | {"ovis2-ray": __version__}
    record = {"kind": _KIND, "status": "running", "identity": identify_run(config, model), "versions": versions}
    run = TrainingRun(store.make_absolute(config.output), record)
    run.update(**facts)
    return run


def remove_run(output: str) -> None:
    """Remove the files of an earlier run, its record first. Raise RunError if OUTPUT holds other files too."""
    _check_ours(output)
    store.remove(store.join(output, _RECORD))
    for info in store.list_files(output):
        if not info.uri.endswith("/driver.json"):
            store.remove(info.uri)


def _check_ours(output: str) -> None:
    """Raise RunError if OUTPUT holds files that no training run writes."""
    prefix = store.normalize(output).rstrip("/") + "/"
    for info in store.list_files(output):
        name = info.uri.removeprefix(prefix)
        if name not in (*_OURS, _RECORD) and not name.startswith(_OUR_DIRECTORIES):
            raise RunError(f"{output} holds other files, such as {name}; give another OUTPUT")


def _check_same(there: Json, here: Json, output: str) -> None:
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if names:
        shown = "; ".join(f"{n.replace('_', '-')} {there.get(n)} there, {here.get(n)} here" for n in names[:5])
        raise RunError(f"{output} holds a run with other options: {shown}. Use --overwrite, or another OUTPUT")
