"""Name the settings in which the run of an OUTPUT differs from another one."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

Json = dict[str, Any]

_TASK = "task {} "


def list_differences(record: Json, identity: Json, defaults: Json) -> dict[str, str]:
    """Return {setting: its two values} of the settings in which the runs differ.

    A setting that one of them lacks was unknown to the version that wrote it: it counts as its default.
    """
    recorded, current = _flatten(record, defaults), _flatten(identity, defaults)
    _drop_other_tasks(recorded, current)
    return {
        name: f"{_format_value(recorded.get(name))} there, {_format_value(current.get(name))} here"
        for name in sorted(recorded.keys() | current.keys())
        if recorded.get(name) != current.get(name)
    }


def list_type_differences(existing: pa.Schema, current: pa.Schema) -> list[str]:
    """Return one phrase per column whose type in the files of a run is not the one that would be written now."""
    types = {field.name: field.type for field in existing}
    return [
        f"{field.name} is {types[field.name]} there, {field.type} here"
        for field in current
        if not types.get(field.name, field.type).equals(field.type)
    ]


def _flatten(record: Json, defaults: Json) -> Json:
    """Flatten a run record to {setting: value} for comparison, without the settings that a task leaves open."""
    models = {f"model {name}": value for name, value in record["model"].items()}
    settings = {**defaults, **record["config"], **models}
    of_task = settings.pop("task", {})
    if tasks := [{**of_task, **task} for task in settings.get("tasks", [])]:
        settings["tasks"] = [task["name"] for task in tasks]
        for task in tasks:
            prefix = _TASK.format(task["name"])
            settings |= {prefix + k: v for k, v in task.items() if v is not None and k != "name"}
    return settings


def _drop_other_tasks(*runs: Json) -> None:
    """Remove the settings of tasks that not all runs have: their names, which differ, say enough."""
    named = [set(run.get("tasks", ())) for run in runs]
    for other in set.union(*named) - set.intersection(*named):
        for run in runs:
            for name in [name for name in run if name.startswith(_TASK.format(other))]:
                del run[name]


def _format_value(value: Any) -> str:
    if value is None:
        return "not set"
    return ("off", "on")[value] if isinstance(value, bool) else repr(value)
