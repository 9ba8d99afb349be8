"""Parse flags and YAML into a configuration: its fields are the one definition of options, for Python too."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from jobs.config_file import ConfigFile
from jobs.options import Option, list_options, list_sections
from jobs.usage import Advise, HelpFormatter, Parser
from jobs.usage_errors import describe_errors, describe_os_error
from ovis_model.wording import count_nouns
from pipelines.config import ModelOptions, Section

Config = TypeVar("Config", bound=Section)


@dataclass(frozen=True)
class Command(Generic[Config]):
    """A job's command line. `examples` are arguments, `notes` end --help, `places` are fields given by place.

    `optional_place`: a field that may follow them. `advise`: what to do in place of an option that other programs have.
    """

    name: str
    kind: type[Config]
    description: str
    usage: str
    examples: tuple[str, ...] = ()
    notes: str = ""
    places: tuple[str, ...] = ("input", "output")
    optional_place: str = ""
    advise: Advise = lambda _: ""

    @cached_property
    def options(self) -> dict[str, Option]:
        """{field: option}."""
        return {option.name: option for option in list_options(self.kind)}

    @property
    def takes_file(self) -> bool:
        """Whether --config reads options from a file: jobs that load a model have many."""
        return issubclass(self.kind, ModelOptions)

    @property
    def positionals(self) -> list[str]:
        """The fields that are given by place, if the job requires them."""
        required = [name for name in self.places if name in self.options and self.options[name].is_required]
        return [*required, *filter(None, [self.optional_place])]


def parse_command_line(command: Command[Config], argv: Sequence[str] | None, prog: str) -> Config:
    """Return the options: flags over --config's YAML over defaults. On bad usage print what is wrong, exit with 2."""
    parser = build_parser(command, prog)
    known, others = parser.parse_known_intermixed_args(argv)
    flags = vars(known)
    if unknown := [argument for argument in others if argument.startswith("-") and argument != "--"]:
        parser.fail([parser.describe_unknown(argument) for argument in unknown])
    paths = [flags.pop(name.upper()) for name in command.positionals if name.upper() in flags] + others
    try:
        file = ConfigFile(flags.pop("config", ""))
        values = _merge(file, flags, paths, command.positionals)
    except OSError as error:
        parser.fail([describe_os_error(error)])
    except ValueError as error:
        parser.fail([str(error)])
    return _validate(command, values, file, parser)


def build_parser(command: Command[Any], prog: str) -> Parser:
    """Return the parser of a job's flags. Values stay text: the configuration checks them, as it does those of YAML."""
    parser = Parser(
        advise=command.advise,
        prog=prog,
        usage=f"{prog} {command.usage} [OPTIONS]",
        description=command.description,
        epilog=_describe_examples(command, prog),
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )
    arguments = parser.add_argument_group("arguments")
    for name in command.positionals:
        arguments.add_argument(
            name.upper(), nargs="?", help=_escape_help(command.options[name].field.description or "")
        )
    for title, options in list_sections(command.kind):
        group = parser.add_argument_group(title)
        for option in options:
            if option.name in command.positionals:
                _add_further(group, option)
            else:
                _add_option(group, option)
    others = parser.add_argument_group("other")
    if command.takes_file:
        others.add_argument("--config", metavar="FILE", help="YAML file of options, same names; flags take precedence")
    others.add_argument("-h", "--help", action="help", help="show this help and exit")
    return parser


def _add_option(group: Any, option: Option) -> None:
    text = _escape_help(f"{option.description} ({option.default_note})")
    if option.is_switch:
        group.add_argument(option.flag, action=argparse.BooleanOptionalAction, help=text)
    else:
        action = "append" if option.is_repeatable else "store"
        group.add_argument(option.flag, action=action, metavar=option.metavar, help=text)


def _add_further(group: Any, option: Option) -> None:
    """Add the flag for further values of an argument, if it may have several."""
    if option.is_repeatable:
        text = f"another {option.name.upper()}; repeatable"
        group.add_argument(option.flag, action="append", metavar=option.metavar, help=text)


def _escape_help(text: str) -> str:
    return text.replace("%", "%%")


def _describe_examples(command: Command[Any], prog: str) -> str:
    examples = [f"  {prog} {arguments}" for arguments in command.examples]
    return "\n".join([*["examples:"] * bool(examples), *examples, *["", command.notes] * bool(command.notes)])


def _merge(file: ConfigFile, flags: dict[str, Any], paths: list[str], positionals: list[str]) -> dict[str, Any]:
    """Return all options: flags over the file's; paths are INPUT and OUTPUT, or OUTPUT alone if inputs have a name."""
    values = {**file.values, **flags}
    if isinstance(file.values.get("input"), str):
        values["input"] = flags.get("input", [file.values["input"]])
    if len(paths) <= len(positionals) and positionals != ["input", "output"]:
        placed: dict[str, Any] = dict(zip(positionals, paths, strict=False))
        if "input" in placed:
            placed["input"] = [placed["input"], *flags.get("input", [])]
        return {**values, **placed}
    if len(paths) > len(positionals) or (len(paths) == 1 < len(positionals) and not values.get("input")):
        raise ValueError(_describe_paths(paths, positionals))
    if len(paths) == 2:
        values["input"] = [paths[0], *flags.get("input", [])]
    return {**values, "output": paths[-1]} if paths else values


def _describe_paths(paths: list[str], positionals: list[str]) -> str:
    given = ", ".join(map(repr, paths[:3])) + ", ..." * (len(paths) > 3)
    *firsts, last = map(str.upper, positionals or ["no argument without a flag"])
    wanted = " and ".join([*[", ".join(firsts)] * bool(firsts), last])
    more = "; quote a glob, or give further inputs with --input" if len(paths) > 2 and "input" in positionals else ""
    return f"got {count_nouns(len(paths), 'path')}, {given}; give {wanted}{more}"


def _validate(command: Command[Config], values: dict[str, Any], file: ConfigFile, parser: Parser) -> Config:
    known = {name: value for name, value in values.items() if name in command.options}
    lines = file.describe_unknown(command.options, command.advise)

    def label(name: str) -> str:
        if name in file.keys and values[name] == file.values[name]:
            return file.label(name)
        return name.upper() if name in command.positionals else command.options[name].flag

    try:
        config = command.kind(**known)
    except ValidationError as error:
        lines += describe_errors(error, command.options, label, known.get("tasks"))
    except OSError as error:
        lines.append(describe_os_error(error))
    if lines:
        parser.fail(lines)
    return config
