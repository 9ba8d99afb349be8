"""Parse flags and YAML into a configuration: its fields are the one definition of options, for Python too."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from pipelines.config import RunConfig

Config = TypeVar("Config", bound=RunConfig)


def parse_command_line(kind: type[Config], prog: str, description: str, argv: Sequence[str] | None) -> Config:
    """Return the options: flags over --config's YAML over defaults. On bad usage print what is wrong, exit with 2."""
    parser = _parser(kind, prog, description)
    flags = vars(parser.parse_args(argv))
    paths, config_file = flags.pop("paths", []), flags.pop("config", None)
    try:
        return kind(**_with_paths(_read_yaml(config_file), flags, paths))
    except ValidationError as error:
        parser.error("; ".join(map(_describe, error.errors())))
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(str(error))


def _parser(kind: type[RunConfig], prog: str, description: str) -> argparse.ArgumentParser:
    # Built from the fields by hand: a library that maps flags to them splits list values at commas, and a path or
    # a stop string may hold one.
    parser = argparse.ArgumentParser(
        prog=prog, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    parser.add_argument(
        "paths", nargs="*", metavar="INPUT OUTPUT", help="input and output; or only OUTPUT with --input"
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="these options, same names; flags win")
    for name, field in kind.model_fields.items():
        if name != "output":
            parser.add_argument(f"--{name.replace('_', '-')}", **_argument(name, field))
    return parser


def _argument(name: str, field: FieldInfo) -> dict[str, Any]:
    has_default = not field.is_required() and field.default not in (None, ())
    help_text = (field.description or "") + (f" (default {field.default})" if has_default else "")
    if field.annotation is bool:
        return {"action": argparse.BooleanOptionalAction, "help": help_text}
    is_list = field.annotation == tuple[str, ...] and name != "keep_columns"
    return {"action": "append" if is_list else "store", "help": help_text, "metavar": "X"}


def _with_paths(file: dict[str, Any], flags: dict[str, Any], paths: list[str]) -> dict[str, Any]:
    """All options: flags over the file's; `INPUT OUTPUT`, or `OUTPUT` alone when the inputs are given by name."""
    values = {**file, **flags}
    if isinstance(file.get("input"), str):
        values["input"] = flags.get("input", [file["input"]])
    if len(paths) > 2 or (len(paths) == 1 and not values.get("input")):
        raise ValueError(f"expected INPUT and OUTPUT, got {paths}; give further inputs with --input")
    if len(paths) == 2:
        values["input"] = [paths[0], *flags.get("input", [])]
    return {**values, "output": paths[-1]} if paths else values


def _read_yaml(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    values = yaml.safe_load(Path(path).read_text("utf-8")) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold options as `name: value` lines")
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def _describe(error: Any) -> str:
    if not error["loc"]:
        return str(error["msg"]).removeprefix("Value error, ")
    first, *others = error["loc"]
    name = "--" + ": ".join([str(first).replace("_", "-"), *map(str, others)])
    if name == "--output":
        return "OUTPUT is missing"
    if name == "--input":
        return "INPUT is missing" if error["type"] in ("missing", "too_short") else f"INPUT: {error['msg']}"
    given = "" if error["type"] == "missing" else f" (got {error['input']!r})"
    return f"{name}: {error['msg']}{given}"
