"""Read the options of a YAML file, and say where in the file each of them is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from jobs.usage import Advise, describe_other
from pipelines.storage.yaml_file import read_key_lines, read_yaml


@dataclass
class ConfigFile:
    """The options of a YAML file, by field; `path` is "" if there is none."""

    path: str
    values: dict[str, Any] = field(init=False, default_factory=dict)
    keys: dict[str, str] = field(init=False, default_factory=dict)
    """Field -> "KEY" as the file has it."""
    lines: dict[str, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        if not self.path:
            return
        values = read_yaml(self.path) or {}
        if not isinstance(values, dict):
            raise ValueError(f"{self.path} must hold options as `name: value` lines")
        lines = read_key_lines(self.path)
        for key, value in values.items():
            name = str(key).replace("-", "_")
            self.values[name], self.keys[name], self.lines[name] = value, str(key), lines.get(str(key), 1)

    def label(self, name: str) -> str:
        """Return where the file has an option: FILE, line N: KEY."""
        return f"{self.path}, line {self.lines[name]}: {self.keys[name]}"

    def describe_unknown(self, known: Iterable[str], advise: Advise) -> list[str]:
        """Return a line for each key that is no option, with the advice about it."""
        names = {name: name.replace("_", "-") for name in known}
        return [
            f"{self.label(name)} is not an option{describe_other(name.replace('_', '-'), names.values(), advise)}"
            for name in self.keys
            if name not in names
        ]
