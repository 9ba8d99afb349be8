"""Read YAML from a local file; errors name the file, line and column."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def read_yaml(path: str) -> Any:
    """Return the value in the file. Raise ValueError if it is not YAML in UTF-8, OSError if it cannot be read."""
    return _load(path, yaml.safe_load)


def read_key_lines(path: str) -> dict[str, int]:
    """Return {key: line number, from 1} of the mapping at the top of a YAML file."""
    node = _load(path, yaml.compose)
    pairs = node.value if isinstance(node, yaml.MappingNode) else ()
    return {str(key.value): key.start_mark.line + 1 for key, _ in pairs}


def _load(path: str, load: Any) -> Any:
    try:
        return load(Path(path).read_text("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{path}{place} is not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {str(error).splitlines()[0]}") from error
