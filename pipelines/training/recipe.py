"""Train several stages in order, each from the model of the one before it, as a YAML file lists them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar

from pydantic import ValidationError

from ovis_model.checkpoint import resolve_local_path
from pipelines.config import Location, Section, declare_option
from pipelines.storage import store
from pipelines.storage.yaml_file import read_yaml
from pipelines.training.config import TrainConfig


class RecipeOptions(Section):
    """The options of `train --recipe`."""

    title: ClassVar[str] = "recipe"

    recipe: Annotated[str, "FILE"] = declare_option(
        ..., description="YAML file: `stages`, a list of the options of each stage, and options that all of them have"
    )
    output: Location = declare_option(..., description="directory or URI for the stages and the last model")
    overwrite: bool = declare_option(False, description="delete the earlier runs in OUTPUT and start again")


@dataclass(frozen=True)
class RecipeReport:
    """What each stage did, by its name, and the last model."""

    stages: dict[str, dict[str, Any]]
    model: str


def run_recipe(options: RecipeOptions) -> RecipeReport:
    """Train all stages that are not finished. Raise what `run_training` raises, before the first stage if it can."""
    from pipelines.training.run import run_training

    reports = {}
    configs = read_recipe(options)
    for name, config in configs.items():
        reports[name] = asdict(run_training(config))
    return RecipeReport(reports, reports[name]["model"])


def read_recipe(options: RecipeOptions) -> dict[str, TrainConfig]:
    """Return the configuration of each stage, by its name. Raise ValueError that names stage and option."""
    recipe = read_yaml(options.recipe)
    stages = recipe.get("stages") if isinstance(recipe, dict) else None
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise ValueError(f"{options.recipe} must hold `stages`, a list of the options of each stage")
    common = {key: value for key, value in recipe.items() if key != "stages"}
    configs: dict[str, TrainConfig] = {}
    model: str | None = None
    for number, stage in enumerate(stages, 1):
        values = _rename({**common, **stage})
        name = f"{number}-{values.pop('name', None) or values.get('stage', '4')}"
        output = store.join(options.output, name)
        given = {**values, "output": output, "overwrite": options.overwrite}
        configs[name] = _make_config(options.recipe, name, given if model is None else {**given, "model": model})
        model = resolve_local_path(store.join(store.make_absolute(output), "model"))
    return configs


def _rename(values: Mapping[str, Any]) -> dict[str, Any]:
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def _make_config(path: str, name: str, values: Mapping[str, Any]) -> TrainConfig:
    try:
        return TrainConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])).replace("_", "-")
        raise ValueError(f"{path}: stage {name}, {place}: {first['msg']}") from error
