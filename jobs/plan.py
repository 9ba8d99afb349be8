"""The job `ovis2 plan INPUT OUTPUT --model MODEL`: what a run would do, how long it takes and what it costs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import PositiveFloat, PositiveInt

from jobs.cli import run_job
from jobs.command_line import Command, parse_command_line
from pipelines.config import AnnotateConfig, CaptionConfig, Location, RunConfig, Section, declare_option

_GpuName = Literal["a100-40", "a100-80", "h100-80", "h200-141", "l4-24", "l40s-48"]


class PlanOptions(Section):
    """What to forecast, besides the options of the run."""

    title = "plan"

    gpu: _GpuName | None = declare_option(
        None,
        decides_rows=False,
        description="estimate for GPUs of this kind from published figures, without running rows",
        unset="run rows on the present hardware",
    )
    num_gpus: PositiveInt = declare_option(1, decides_rows=False, description="number of GPUs for --gpu")
    output_tokens: PositiveInt = declare_option(
        100, decides_rows=False, description="expected length of an answer for --gpu, in tokens"
    )
    price_per_gpu_hour: PositiveFloat | None = declare_option(
        None, decides_rows=False, description="price of an hour of one GPU, in any currency", unset="no cost"
    )
    trial_rows: PositiveInt = declare_option(32, decides_rows=False, description="run at least this many rows")
    sample_report: Location | None = declare_option(
        None,
        decides_rows=False,
        description="HTML file to write with the rows that were run",
        unset="NAME-plan.html in this directory",
    )


class PlanCaptionConfig(PlanOptions, CaptionConfig):
    """The options of a caption run and of its plan."""


class PlanAnnotateConfig(PlanOptions, AnnotateConfig):
    """The options of an annotate run and of its plan."""


_TEXT = "Say what a run would do: what INPUT holds, the rate of each stage, time, GPU hours and cost. Changes nothing."
_EXAMPLES = (
    "photos captions --model demo",
    "photos captions --model AIDC-AI/Ovis2-8B --gpu h100-80 --num-gpus 8 --price-per-gpu-hour 2.5",
    "photos answers --model AIDC-AI/Ovis2-1B --tasks tasks.yaml",
)
_NOTES = "All options of caption are accepted; with --tasks FILE, those of annotate."
COMMAND = Command("plan", PlanCaptionConfig, _TEXT, "INPUT OUTPUT --model MODEL", _EXAMPLES, _NOTES)
ANNOTATE = Command("plan", PlanAnnotateConfig, _TEXT, "INPUT OUTPUT --model MODEL --tasks FILE", _EXAMPLES, _NOTES)


def main(argv: Sequence[str] | None = None, prog: str = "python -m jobs.plan") -> int:
    """Run the job -> its exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    command: Command[Any] = ANNOTATE if asks_tasks(given) else COMMAND
    config = parse_command_line(command, given, prog)
    return run_job(lambda: _plan(config), is_resumable=False)


def asks_tasks(arguments: Sequence[str]) -> bool:
    """Return whether a command line is that of `annotate`: it has --tasks."""
    return any(argument.partition("=")[0] == "--tasks" for argument in arguments)


def _plan(config: Any) -> Any:
    from jobs.gpu_estimates import GpuEstimator  # loads torch, which --help does without
    from pipelines.forecast.forecast import ForecastOptions, make_forecast
    from pipelines.forecast.lines import describe_forecast
    from pipelines.report.rows import get_run_name

    options = ForecastOptions(
        gpu=config.gpu,
        trial_rows=config.trial_rows,
        price_per_gpu_hour=config.price_per_gpu_hour,
        to=config.sample_report or f"{get_run_name(config.output)}-plan.html",
    )
    found = make_forecast(
        extract_run_config(config), options, GpuEstimator(config.gpu, config.num_gpus, config.output_tokens)
    )
    for line in describe_forecast(found):
        print(line, file=sys.stderr)
    return found


def extract_run_config(config: RunConfig) -> RunConfig:
    """Return the options of the run alone, so that its fingerprint is that of the run."""
    kind = AnnotateConfig if isinstance(config, AnnotateConfig) else CaptionConfig
    given = {name: getattr(config, name) for name in kind.model_fields if name in config.model_fields_set}
    return kind(**given)


if __name__ == "__main__":
    sys.exit(main())
