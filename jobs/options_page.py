"""Print docs/options.md, the list of all options: `python -m jobs.options_page > docs/options.md`."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jobs import compact, demo, evaluate, export, plan, report, review, train
from jobs.cli import EXIT_CODES
from jobs.command_line import Command
from jobs.options import Option, join_with_or, list_sections
from pipelines.config import AnnotateConfig, CaptionConfig, RunConfig
from pipelines.evaluation.config import EvaluateConfig

_WIDTH = 110
_HEAD = """\
# Options

<!-- Written by `python -m jobs.options_page > docs/options.md` from pipelines/config.py -->

`ovis2 JOB --help` shows the options of a job; `python -m jobs.JOB` is the same command. Write
`--option VALUE` or `--option=VALUE`, before or after INPUT and OUTPUT. `--no-overwrite` turns off the switch
`--overwrite`.

The options of `caption`, `annotate`, `evaluate` and `train` may also be in a YAML file, given with `--config
run.yaml`. The names are the same, with `-` or `_`; an option that is repeatable is a list. Flags take
precedence over the file:

```yaml
input: [photos, "s3://bucket/shards/*.tar"]
output: captions
model: AIDC-AI/Ovis2-8B
max-tiles: 4
stop: ["\\n\\n"]
```

Options marked *rows* decide what the rows hold. They are part of the fingerprint of a run, so a run cannot
be resumed with another value; only `--extend` accepts another INPUT and `--limit`. All others decide only
how the run is executed: their values may differ each time that the run is resumed.
"""


def main() -> None:
    """Print the page."""
    print(render_page(), end="")


def render_page() -> str:
    """Return the page as Markdown."""
    return "\n".join(_render_parts())


def _render_parts() -> Iterator[str]:
    yield _HEAD
    yield "## caption, annotate and evaluate\n"
    for title, options in list_sections(RunConfig):
        yield f"### {title}\n"
        yield _render_options(options)
    kinds: dict[str, type[RunConfig]] = {
        "caption": CaptionConfig,
        "annotate": AnnotateConfig,
        "evaluate": EvaluateConfig,
    }
    for name, kind in kinds.items():
        yield f"### {kind.title} (only {name})\n"
        yield _render_options(dict(list_sections(kind))[kind.title])
    about = f"{plan.COMMAND.description} It also has all options of caption or annotate."
    yield f"## plan\n\n{textwrap.fill(about, _WIDTH)}\n"
    yield _render_options(dict(list_sections(plan.PlanCaptionConfig))["plan"], tells_effect=False)
    others: list[Command[Any]] = [
        train.COMMAND,
        train.RECIPE,
        evaluate.SCORE,
        report.COMMAND,
        review.COMMAND,
        export.COMMAND,
        compact.COMMAND,
        demo.COMMAND,
    ]
    for command in others:
        yield f"## {command.name}\n\n{command.description}\n"
        yield _render_options(command.options.values(), command.positionals, tells_effect=False)
    yield "`demo-answers` has the same options; its default for `--output` is `demo_answers`.\n"
    yield "## Exit codes\n\n| code | meaning |\n|---|---|"
    yield from (f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items())
    yield ""


def _render_options(
    options: Iterable[Option], places: Sequence[str] = ("input", "output"), *, tells_effect: bool = True
) -> str:
    """Return one list item per option; those in `places` have no flags, `tells_effect` marks those that decide rows."""
    items = [_render_option(option, places, tells_effect and option.decides_rows) for option in options]
    return "\n".join(items) + "\n"


def _render_option(option: Option, places: Sequence[str], decides_rows: bool) -> str:
    facts = [_render_value(option), _render_default(option), *["*rows*"] * decides_rows]
    text = f"{_render_name(option, places)} ({'; '.join(facts)}): {option.description}"
    return textwrap.fill(text, _WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)


def _render_name(option: Option, places: Sequence[str]) -> str:
    if not option.is_required or option.name not in places:
        return f"`{option.flag}`"
    return f"`{option.name.upper()}`" + ", `--input`" * option.is_repeatable


def _render_value(option: Option) -> str:
    if option.is_switch:
        return "switch"
    kinds = [value.allowed for value in option.values if not value.is_word]
    plain = [kind.removeprefix("a ").removesuffix(" in quotes") for kind in kinds]
    return join_with_or([*(f"`{word}`" for word in option.choices), *plain])


def _render_default(option: Option) -> str:
    if option.is_required:
        return "required"
    is_literal = option.field.default not in (None, ()) and not option.is_switch
    return f"default: {f'`{option.default}`' if is_literal else option.default}"


if __name__ == "__main__":
    main()
