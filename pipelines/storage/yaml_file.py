"""Read YAML from a local file; errors name the file, line and column."""

from __future__ import annotations

from collections.abc import Iterator
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


def find_faults(path: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, what is wrong) for keys that are given twice, and for words that YAML 1.1 takes for booleans.

    PyYAML keeps the last of two equal keys, and reads yes, no, on and off as true and false.
    """
    yield from _find_node_faults(_load(path, yaml.compose))


def read_item_lines(path: str, key: str) -> list[int]:
    """Return the line numbers of the items of a list: that of `key`, or the whole file."""
    node = _load(path, yaml.compose)
    if isinstance(node, yaml.MappingNode):
        node = next((value for name, value in node.value if name.value == key), None)
    return [item.start_mark.line + 1 for item in node.value] if isinstance(node, yaml.SequenceNode) else []


def _find_node_faults(node: Any) -> Iterator[tuple[int, str]]:
    line = node.start_mark.line + 1 if node else 0
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                if key.value in seen:
                    yield key.start_mark.line + 1, f"{key.value!r} is given twice; keep one of them"
                seen.add(key.value)
            yield from _find_node_faults(key)
            yield from _find_node_faults(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _find_node_faults(item)
    elif isinstance(node, yaml.ScalarNode) and node.tag == _BOOL and node.value.lower() not in ("true", "false"):
        is_yes = node.value.lower() in ("yes", "on", "y")
        meant = str(is_yes).lower()
        yield line, f"YAML reads words such as {node.value} as {meant}: quote them, or write {meant}"


_BOOL, _MERGE = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:merge"


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
